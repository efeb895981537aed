"""How far headpool's logits are from transformers', along every path that tokens take into a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from exporter.engines.base import Session

PATHS = ("prefill", "chunked prefill", "decode")
STEPS = 8  # tokens that are decoded one by one after each prompt
Reference = Callable[[np.ndarray], np.ndarray]


def transformers_logits(folder: Path) -> Reference:
    """Tokens [T] → float32 logits [T, V] of the Hugging Face checkpoint in `folder`, in one forward pass without a cache."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()

    return logits


def differences(
    session: Session, tokens: list[np.ndarray], expected: list[np.ndarray], in_step: bool = False
) -> dict[str, float]:
    """The largest |Δ logits| of each of PATHS, for a session of as many sequences as `tokens`.

    tokens    int64 [T_b] a sequence; the last STEPS of each are decoded one by one, the others prefilled: at once, and in two
              parts of unequal lengths.
    expected  float32 [T_b, V]: the reference's logits after each of those tokens.
    in_step   whether all prompts are cut at one place: some sessions have sequences of one length alone.
    """
    prompts = [sequence[:-STEPS] for sequence in tokens]
    last = [len(prompt) - 1 for prompt in prompts]
    found = {}
    session.reset()
    found["prefill"] = _largest(session.prefill(prompts), expected, last)
    session.reset()
    cuts = [len(prompt) // 3 + (0 if in_step else row) for row, prompt in enumerate(prompts)]
    session.prefill([prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)])
    rest = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
    found["chunked prefill"] = _largest(session.prefill(rest), expected, last)
    steps = []
    for step in range(STEPS):
        fed = [at + 1 + step for at in last]
        logits = session.decode(np.array([sequence[at] for sequence, at in zip(tokens, fed, strict=True)]))
        steps.append(_largest(logits, expected, fed))
    found["decode"] = max(steps)
    return found


def _largest(logits: np.ndarray, expected: list[np.ndarray], at: list[int]) -> float:
    """Of logits [B, V] against each reference's row `at`. NaN is not hidden: it is larger than any promise."""
    truth = np.stack([rows[index] for rows, index in zip(expected, at, strict=True)])
    return float(np.nan_to_num(np.abs(logits - truth), nan=np.inf).max())
