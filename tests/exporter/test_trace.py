"""What tracing leaves out, it leaves out without a trace in the graph."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import hf
import onnx_ir as ir
import pytest
import torch

from exporter import trace
from exporter.checkpoint import open_source
from exporter.trace import canonical_graph


def content(model: ir.Model) -> list[Any]:
    """The graph without its names: each node by its operator, attributes and where its inputs come from."""
    places: dict[ir.Value, Any] = {value: ("input", value.name) for value in model.graph.inputs}
    for name, value in model.graph.initializers.items():
        constant = value.const_value
        places[value] = name if constant is None else ("constant", str(constant.dtype), constant.numpy().tolist())
    rows = []
    for number, node in enumerate(model.graph):
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        places |= {value: (number, index) for index, value in enumerate(node.outputs)}
        rows.append((node.domain, node.op_type, sorted(attributes.items()), [value and places[value] for value in node.inputs]))
    return [*rows, [places[value] for value in model.graph.outputs]]


@pytest.fixture
def anew():
    """Parts are traced, not remembered."""
    memories = (trace._prologue, trace._layer, trace.epilogue)

    def forget() -> None:
        for memory in memories:
            memory.cache_clear()

    forget()
    yield forget
    forget()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", hf.MODELS)
def test_a_program_that_is_not_decomposed(name: str, dtype: str, anew: Any, monkeypatch: Any, tmp_path: Path) -> None:
    """The graph is the same. (A T5's reads sizes off other tensors; its logits are held to transformers' elsewhere.)"""
    config = open_source(hf.save(name, tmp_path)).config
    made = []
    for _ in range(2):
        anew()
        made.append([content(canonical_graph(config, form, dtype)) for form in ("static", "concat")])
        monkeypatch.setattr(trace, "_decomposed_where_needed", contextlib.nullcontext)
    assert made[0] == made[1]


def test_what_is_traced_once(anew: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A decoder's programs; no other test would notice if a new torch had them decomposed again."""
    config = open_source(hf.save("llama", tmp_path)).config

    def never(*_: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", never)
    canonical_graph(config, "static", "fp32")
