"""A tiny decoder as torch model and as lowered graph with its weights inside, for parity tests."""

from __future__ import annotations

import os
import random

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from evaluator import BF16, evaluator
from tiny import canonical

from exporter import contract
from exporter.config import ModelConfig, RopeConfig
from exporter.engines.operators import operator_library
from exporter.errors import EngineError
from exporter.models.decoder import Decoder, canonical_to_module
from exporter.weights import TORCH_DTYPES
from graphs.lower import lower

NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": BF16}


def tiny_config(kv_heads=(2, 2), num_heads=8, **changes) -> ModelConfig:
    values = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_layers": len(kv_heads),
        "num_heads": num_heads,
        "kv_heads": tuple(kv_heads),
        "head_dim": 16,
        "intermediate_size": 96,
        "max_positions": 128,
        "rope": RopeConfig(theta=100.0),
    }
    return ModelConfig(**{**values, **changes})


def random_decoder(config: ModelConfig, dtype: str = "fp32", std: float = 0.3, seed: int = 0) -> Decoder:
    """Large random weights: small ones hide a missing RoPE or mask."""
    torch.manual_seed(seed)
    model = Decoder(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(torch.rand_like(parameter) + (0 if config.norm_offset else 0.5))
            else:
                parameter.normal_(0, std)
    return cast(model, dtype)


def cast(model: Decoder, dtype: str) -> Decoder:
    """Another decoder with the weights in `dtype`, in eval mode."""
    other = Decoder(model.config, TORCH_DTYPES[dtype])
    other.load_state_dict({name: value.to(TORCH_DTYPES[dtype]) for name, value in model.state_dict().items()})
    return other.eval().requires_grad_(False)


def with_weights(model: ir.Model, decoder: Decoder) -> onnx.ModelProto:
    state = decoder.state_dict()
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            tensor = state[canonical_to_module(name)]
            array = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
            value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
    return ir.to_proto(model)


def session(decoder: Decoder, pattern: str, cache: str, dtype: str = "fp32", logits: str = "all"):
    """The lowered graph in ONNX Runtime; in bf16, which its CPU has no kernels for, in onnx's reference implementation."""
    graph = with_weights(lower(canonical(decoder.config, cache, dtype, logits), pattern), decoder)
    if dtype == "bf16":
        return evaluator(graph)
    return ort_session(graph, own_operators=pattern == "fused")


def ort_session(graph: onnx.ModelProto, own_operators: bool = False, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come as exceptions
    if own_operators:
        options.register_custom_ops_library(operators())
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def refusals(
    proto: onnx.ModelProto, node: onnx.NodeProto, names: tuple[str, ...], feeds: dict[str, np.ndarray], tries: int
) -> int:
    """How many of so many random changes of the node's lists of numbers headpool's library refuses; it runs the others.

    `names` are drawn from: one that stands there more often is changed more often.
    """
    attributes = {attribute.name: attribute for attribute in node.attribute}
    whole = {name: list(attributes[name].ints) for name in names}
    rng, refused = random.Random(0), 0
    for _ in range(tries):
        changed = {name: list(values) for name, values in whole.items()}
        part = changed[rng.choice(names)]
        if rng.random() < 0.2:
            del part[rng.randrange(len(part)) :]
        else:
            part[rng.randrange(len(part))] = rng.choice([-(2**62), -3, -2, -1, 0, 1, 2, 3, 5, 8, 12, 17, 2**31, 2**62])
        for name, values in changed.items():
            attributes[name].CopyFrom(onnx.helper.make_attribute(name, values, attr_type=onnx.AttributeProto.INTS))
        try:
            ort_session(proto, own_operators=True).run(None, feeds)
        except Exception as error:  # ONNX Runtime has many
            if f"{node.domain}::{node.op_type}" not in str(error):
                raise
            refused += 1
    return refused


def operators() -> str:
    """The library of headpool's operators. Where it was not built, the test that asks is skipped, but fails where CI is set."""
    try:
        return str(operator_library())
    except EngineError as error:
        # Only the operators' library needs a compiler to build (scripts/ops); without one the other patterns are still tested.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


def run(sess, config: ModelConfig, ids, positions, caches, mask=None):
    """Logits and the flat list of caches after; caches are copied in, so nothing is in place here."""
    feeds = {"input_ids": ids, "position_ids": positions}
    if mask is not None:
        feeds["attention_mask"] = mask
    names = [name for layer in range(config.num_layers) for name in contract.past_names(layer)]
    feeds |= dict(zip(names, caches, strict=True))
    logits, *present = sess.run(None, feeds)
    return logits.astype(np.float32), present


def empty(config: ModelConfig, batch: int, length: int, dtype: str = "fp32"):
    sizes = (config.head_dim, config.value_dim)
    return [np.zeros((batch, g, length, size), NUMPY[dtype]) for g in config.kv_heads for size in sizes]
