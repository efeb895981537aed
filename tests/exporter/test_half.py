"""fp16 and bf16 against transformers in the same dtype: the bundle's graphs and the torch model lose no more than it does.

Every step rounds to 11 (fp16) or 8 (bf16) bits, whoever computes it, and where sums run in other orders other values come out.
So all are off the exact logits (float32, the same weights) by errors of one size, which is measured on transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import hf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from evaluator import evaluator

from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.export import ExportOptions, export
from exporter.models.decoder import Decoder, Prologue
from exporter.models.norm import Norm
from exporter.trace import quiet
from exporter.weights import TORCH_DTYPES

NAMES = ("llama-tied-biased", "qwen3", "gemma", "phi3-partial", "starcoder2")
TOKENS = np.random.default_rng(1).integers(0, 67, 40)
CHUNKS = (23, 1, 15, 1)
TIMES_THEIR_LOSS = 2  # root mean square over all of TOKENS; measured are 0.6 to 0.95 to the exact logits, 0.5 to 1.25 to theirs


class Truth:
    """One of hf.MODELS with weights rounded to `dtype`: transformers' logits [n, V] for TOKENS, and the exact ones."""

    def __init__(self, name: str, dtype: str, folder: Path) -> None:
        theirs = _load(hf.save(name, folder), TORCH_DTYPES[dtype])
        theirs.save_pretrained(folder / "half")
        self.model = theirs
        self.checkpoint: Checkpoint = open_checkpoint(folder / "half")
        self.theirs = hf.logits(theirs, TOKENS)
        self.exact = hf.logits(_load(folder / "half", torch.float32), TOKENS)
        self.loss = rms(self.theirs - self.exact)
        assert 1e-4 < self.loss < 0.1 * rms(self.exact)  # a model that half precision ruins would let everything pass

    def close(self, ours: np.ndarray) -> None:
        """`ours` [n, V] to the exact logits and to transformers'."""
        for expected in (self.exact, self.theirs):
            assert rms(ours - expected) <= TIMES_THEIR_LOSS * self.loss


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval().requires_grad_(False)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_torch_model(name: str, dtype: str, tmp_path: Path) -> None:
    truth = Truth(name, dtype, tmp_path)
    model = Decoder.from_weights(truth.checkpoint.config, truth.checkpoint.weights, TORCH_DTYPES[dtype])
    n = len(TOKENS)
    logits, _ = model(torch.from_numpy(TOKENS)[None], torch.arange(n)[None], model.empty_cache(1, n))
    assert logits.dtype == TORCH_DTYPES[dtype]
    truth.close(logits[0].float().numpy())


EVERY = [*((name, "bf16", "static") for name in NAMES), *((name, "bf16", "concat") for name in ("gemma", "starcoder2"))]


@pytest.mark.parametrize(("name", "dtype", "cache"), [*EVERY, ("gemma", "fp16", "static"), ("gemma", "fp16", "concat")])
def test_the_bundles_graphs(name: str, dtype: str, cache: Any, tmp_path: Path) -> None:
    """Prefill, decode, chunk, decode: fp16 in ONNX Runtime, bf16 (patterns of standard operators) in onnx's reference."""
    truth = Truth(name, dtype, tmp_path)
    config = truth.checkpoint.config
    patterns = ("repeat", "grouped", "attention", *(("gqa",) if dtype == "fp16" else ()))
    bundle = export(
        truth.checkpoint, tmp_path / "out", ExportOptions(None, patterns=patterns, cache=cache, dtype=dtype, logits="all")
    )
    for variant in bundle.variants:
        path = bundle.graph_path(variant)
        graph = evaluator(onnx.load(path)) if dtype == "bf16" else onnxruntime.InferenceSession(path)
        past, stop, blocks = harness.empty(config, 1, 48 if cache == "static" else 0, dtype), 0, []
        for width in CHUNKS:
            start, stop = stop, stop + width
            mask = np.ones((1, stop), np.int64) if cache == "concat" else None
            ids, positions = TOKENS[None, start:stop], np.arange(start, stop)[None]
            logits, past = harness.run(graph, config, ids, positions, past, mask)
            blocks.append(logits[0])
        truth.close(np.concatenate(blocks))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_gemmas_norm_and_embedding_round_where_transformers_rounds(dtype: str, tmp_path: Path) -> None:
    """1 + w in float32 and sqrt(d) in the weights' dtype: in torch to the bit, in the graph but for sums in another order."""
    theirs = _load(hf.save("gemma", tmp_path), TORCH_DTYPES[dtype])
    checkpoint = open_checkpoint(tmp_path / "gemma")
    model = Decoder.from_weights(checkpoint.config, checkpoint.weights, TORCH_DTYPES[dtype])
    x = torch.randn(500, 48, generator=torch.Generator().manual_seed(0)).mul(3).to(TORCH_DTYPES[dtype])
    ids = torch.arange(67)[None]
    norm, prologue = model.epilogue.norm, model.prologue
    for ours, given, expected in (
        (norm, (x,), theirs.model.norm(x)),
        (prologue, (ids, ids), theirs.model.embed_tokens(ids)[0]),
    ):
        assert isinstance(ours, Norm | Prologue)
        first = ours(*given)
        assert torch.equal(first if isinstance(first, torch.Tensor) else first[0], expected)
        with quiet():
            program = torch.onnx.export(ours, given, dynamo=True, opset_version=24, optimize=False, verbose=False)
        assert program is not None
        graph = evaluator(program.model_proto)
        feeds = {name: _numpy(value) for name, value in zip(graph.input_names, given, strict=False)}
        in_graph = graph.run(None, feeds)[0]
        assert in_graph.dtype == _numpy(expected).dtype
        assert np.mean(in_graph != _numpy(expected)) < (0.2 if dtype == "fp32" else 1e-3)


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint16).numpy().view(harness.BF16) if x.dtype == torch.bfloat16 else x.numpy()
