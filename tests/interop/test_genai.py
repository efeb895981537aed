"""onnxruntime-genai's Model generates transformers' tokens from concat bundles, and from a static one with shared buffers."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime_genai as og
import pytest


@pytest.mark.parametrize("form", ["grouped.concat", "gqa.concat", "repeat.concat", "attention.concat", "gqa.static"])
def test_greedy(form, folder, groups, expected):
    bundle = folder / f"g{groups}.{form}"
    shares = json.loads((bundle / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    assert shares == form.endswith("static")
    model = og.Model(str(bundle))
    for prompt, wanted in zip(expected.prompts, expected.continuations, strict=True):
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + len(wanted), do_sample=False)
        generator = og.Generator(model, settings)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        found = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        assert found == wanted


def test_the_tokenizer_is_read(folder, groups, expected):
    tokenizer = og.Tokenizer(og.Model(str(folder / f"g{groups}.gqa.static")))
    text = tokenizer.decode(np.array(expected.continuations[0], dtype=np.int32))
    assert "Paris" in text
    assert tokenizer.encode("The capital of France is").tolist() == expected.prompts[0]
