"""Lower the canonical graph: every `headpool::GroupedAttention` becomes one pattern of graphs/patterns.

Preconditions: every canonical node is well formed and the pattern's check passes for all, before anything is changed.
Postconditions: no canonical node is left; inputs, outputs and weights have the names, types and shapes they had, but for caches
stored in another form (graphs/caches.py).
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from graphs.caches import CACHES
from graphs.canonical import GroupedAttention, is_canonical
from graphs.emit import Emitter
from graphs.errors import GraphError, one_of
from graphs.patterns import PATTERNS
from graphs.quantise import Form, quantise
from graphs.stamp import tidy


def lower(
    canonical: ir.Model, pattern: str, form: Form | None = None, weights: Collection[str] = (), cache: str | None = None
) -> ir.Model:
    """A lowered copy; `canonical` stays as it is. Raises GraphError naming the node and the reason.

    With a `form`, the `weights` called so are read in it, and with a `cache` of graphs/caches.py the caches are stored in that
    one.
    """
    if pattern not in PATTERNS:
        raise GraphError(one_of("pattern", pattern, PATTERNS))
    check_cache(pattern, cache)
    rules = PATTERNS[pattern]
    model = canonical.clone()
    nodes = [GroupedAttention(node) for node in model.graph if is_canonical(node)]
    if not nodes:
        raise GraphError("the graph has no headpool::GroupedAttention node; lower takes the canonical graph")
    for node in nodes:
        if (reason := rules.check(node)) is not None:
            raise GraphError(f"pattern {pattern} does not fit node {node.name}: {reason}")

    emit = Emitter(model.graph)
    for node in nodes:
        emit.at(node.node)
        _replace(model.graph, node.node, rules.rewrite(node, emit))
    tidy(model)
    if form is not None:
        quantise(model, form, weights)
    if finish := getattr(rules, "finish", None):
        finish(model)
    if cache is not None:
        rules.store(model, cache)
    assert not any(is_canonical(node) for node in model.graph)
    return model


def check_cache(pattern: str, cache: str | None) -> None:
    """Refuse a cache stored as `cache` where the pattern's operators cannot read that. Raises GraphError."""
    if cache is not None and cache not in CACHES:
        raise GraphError(one_of("cache dtype", cache, CACHES))
    able = [name for name, rules in PATTERNS.items() if hasattr(rules, "store")]
    if cache is not None and pattern not in able:
        raise GraphError(
            f"pattern {pattern} keeps its cache in the dtype of the activations; one of {cache} is for the pattern "
            f"{' or '.join(able)}, whose operator converts as it reads"
        )


def _replace(graph: ir.Graph, node: ir.Node, values: tuple[ir.Value, ...]) -> None:
    """Give `node`'s outputs to `values`, under their names, types and shapes where the graph shows them."""
    outputs = list(graph.outputs)
    for old, new in zip(node.outputs, values, strict=True):
        if not old.uses() and old not in outputs:
            continue  # nobody asks for it: what a node that only reads gives back is the graph's own input
        new.type, new.shape = old.type, old.shape
        if old in outputs:
            new.name, old.name = old.name, None
            graph.outputs[outputs.index(old)] = new
        old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
