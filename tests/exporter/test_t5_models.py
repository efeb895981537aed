"""The eager T5 and its checkpoints against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import t5
import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.models.t5.modeling_t5 import T5Attention

from exporter.checkpoint import open_checkpoint, write_checkpoint
from exporter.models.relative import bucket_table
from exporter.models.seq2seq import Seq2Seq
from exporter.seq2seq_config import Seq2SeqConfig

TOLERANCE = 2e-4  # absolute, on logits of about ±10
SOURCE, TARGET = np.arange(41) * 7 % 67, np.arange(30) * 11 % 67


def ours(folder: Path) -> Seq2Seq:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint.config, Seq2SeqConfig)
    return Seq2Seq.from_weights(checkpoint.config, checkpoint.weights)


@pytest.mark.parametrize("name", t5.MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    """Static and concat caches, token by token after a chunk; the encoder's padding is not seen."""
    model = ours(t5.save(name, tmp_path))
    wanted = t5.logits(name, SOURCE, TARGET)
    assert np.abs(wanted).max() > 5
    padded = torch.from_numpy(np.concatenate([SOURCE, [9, 9, 9]]))[None]
    mask = (torch.arange(len(SOURCE) + 3) < len(SOURCE)).long()[None]
    cross = model.cross_caches(model.encode(padded, mask))
    ids, places = torch.from_numpy(TARGET)[None], torch.arange(len(TARGET))[None]
    for static in (True, False):
        past = model.empty_cache(1, 40 if static else 0)
        found = []
        for start, end in ((0, 13), *((place, place + 1) for place in range(13, len(TARGET)))):
            position_ids = places[:, start:end] if static else None
            scores, past = model(ids[:, start:end], position_ids, past, cross, mask)
            found.append(scores[0].numpy())
        np.testing.assert_allclose(np.concatenate(found), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (4, 3), (33, 100)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets(buckets: int, distance: int, bidirectional: bool) -> None:
    relative = torch.arange(-3 * distance, 3 * distance)
    wanted = T5Attention._relative_position_bucket(relative, bidirectional, buckets, distance)
    table = bucket_table(buckets, distance, bidirectional)
    assert table[relative.clamp(-distance, distance) + distance].tolist() == wanted.tolist()


@pytest.mark.parametrize("name", t5.MODELS)
def test_written_folders_are_transformers_own(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(t5.save(name, tmp_path))
    write_checkpoint(checkpoint, tmp_path / "again")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        ids, output = torch.from_numpy(SOURCE)[None], torch.from_numpy(TARGET)[None]
        found = theirs(input_ids=ids, decoder_input_ids=output).logits[0].numpy()
    np.testing.assert_allclose(found, t5.logits(name, SOURCE, TARGET), rtol=0, atol=TOLERANCE)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "num_key_value_heads" not in written
    assert written["tie_word_embeddings"] == checkpoint.config.tied == (name == "t5")
