"""Is the mask of an attention what was planned? It is all that keeps a query from later rows: its form is checked, not only
where it comes from.

Added to the scores, 0 where a row is seen and a number far below them where it is not, with a bias beside where one is planned.
A decoder sees the rows up to its own position; what an encoder has read is seen where its mask says so.
"""

from __future__ import annotations

from collections.abc import Iterator

from exporter.engines.tensorrt.lineage import SHAPED, maker, uncast
from exporter.engines.tensorrt.network import Layer, Network, Tensor
from exporter.engines.tensorrt.parts import Attention

UNSEEN = -1e4  # at most; fp16's is -16384


def mask_flaws(network: Network, mask: Tensor, plan: Attention) -> Iterator[str]:
    behind = network.behind(mask.name, shapes=False)
    if missing := [source for source in plan.mask if source not in behind]:
        yield from (f"its mask does not come from {source}" for source in missing)
        return
    chosen = _chosen(network, mask, plan.mask[1] if len(plan.mask) > 1 else None)
    if chosen is None:
        yield "its mask is no choice between rows that are seen and rows that are not"
        return
    condition, seen, unseen = chosen.inputs[:3]
    values = [network.scalar(given.name) if given is not None else None for given in (seen, unseen)]
    if values[0] != 0 or values[1] is None or not values[1] <= UNSEEN:
        yield f"its mask adds {values[0]} to rows that are seen and {values[1]} to others, planned 0 and at most {UNSEEN:g}"
    source = plan.mask[0]
    fits = _up_to_position(network, condition) if source == "position_ids" else _as_told(network, condition, source)
    if not fits:
        planned = "the rows up to position_ids" if source == "position_ids" else f"those that {source} tells"
        yield f"its mask does not let {planned} be seen, and no others"


def _chosen(network: Network, mask: Tensor, bias: str | None) -> Layer | None:
    """The SELECT, below what repeats it for each query head of a group and what adds a bias of that weight."""
    layer = maker(network, mask)
    if layer is None or layer.kind == "SELECT":
        return layer
    if layer.kind == "SLICE" and (whole := layer.inputs[0]) is not None:
        sizes = zip(whole.shape, layer.outputs[0].shape, strict=False)
        spread = len(whole.shape) == len(layer.outputs[0].shape) and all(before in (after, 1) for before, after in sizes)
        return _chosen(network, whole, bias) if spread or layer.details["mode"] == "WRAP" else None
    if layer.kind == "ELEMENTWISE" and layer.details["op"] == "SUM" and bias is not None:
        left, right = layer.inputs[:2]
        for chosen, added in ((left, right), (right, left)):
            if chosen is None or added is None or bias not in network.behind(added.name, shapes=False):
                continue
            if (found := _chosen(network, chosen, None)) is not None:
                return found
    return None


def _up_to_position(network: Network, condition: Tensor | None) -> bool:
    """row < position or row = position, over rows 0, 1, 2, …"""
    either = maker(network, condition)
    if either is None or either.kind != "ELEMENTWISE" or either.details["op"] != "OR":
        return False
    parts = [maker(network, given) for given in either.inputs[:2]]
    if sorted(part.details.get("op", "") if part is not None else "" for part in parts) != ["EQUAL", "LESS"]:
        return False
    for part in parts:
        assert part is not None
        rows, position = maker(network, part.inputs[0]), _input(network, part.inputs[1])
        if rows is None or rows.kind != "FILL" or position != "position_ids":
            return False
        if [network.scalar(given.name) if given is not None else None for given in rows.inputs[1:3]] != [0, 1]:
            return False
    return True


def _as_told(network: Network, condition: Tensor | None, source: str) -> bool:
    """Where the input `source` is not 0."""
    cast = maker(network, condition)
    return (
        cast is not None and cast.kind == "CAST" and cast.details["to"] == "bool" and _input(network, cast.inputs[0]) == source
    )


def _input(network: Network, given: Tensor | None) -> str | None:
    """The input of the network that `given` is, but for its shape."""
    while given is not None and (layer := network.producer.get(given.name)) is not None:
        if layer.kind not in SHAPED:
            return None
        given = layer.inputs[0]
    return given.name if given is not None else None


def written_rows(network: Network, rows: Tensor | None) -> bool:
    """Whether `rows` are the first position of each sequence's new tokens."""
    layer = uncast(network, rows)
    if layer is None or layer.kind != "GATHER" or layer.inputs[1] is None:
        return False
    first = layer.details["axis"] == 1 and network.scalar(layer.inputs[1].name) == 0
    return first and _input(network, layer.inputs[0]) == "position_ids"
