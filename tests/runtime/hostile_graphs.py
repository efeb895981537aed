"""A bundle's graph with anything in it changed, by a seed, for runtime/tests/hostile.cpp.

python tests/runtime/hostile_graphs.py BUNDLE VARIANT COUNT FOLDER writes COUNT mutations, named by what was done, into FOLDER.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto

from exporter.bundle import Bundle

Random = random.Random
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 5, 7, 8, 16, 64, 255, 65536, 2**31, 2**40, 2**61 + 6, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e38)


def nodes(model: onnx.ModelProto, random: Random) -> list[onnx.NodeProto]:
    """Mostly headpool's own alone: what all others must be is ONNX Runtime's to know."""
    own = [node for node in model.graph.node if node.domain == "headpool"]
    return own if own and random.random() < 0.8 else list(model.graph.node)


def names(model: onnx.ModelProto) -> list[str]:
    return ["", *(name for node in model.graph.node for name in (*node.input, *node.output))]


def attribute(model: onnx.ModelProto, random: Random) -> str:
    node = random.choice([node for node in nodes(model, random) if node.attribute] or list(model.graph.node))
    if not node.attribute:
        return edge(model, random)
    sizes = [1 + len(each.ints) + len(each.floats) for each in node.attribute]
    (index,) = random.choices(range(len(sizes)), sizes)
    chosen = node.attribute[index]
    name = f"{node.op_type}-{chosen.name}"
    values: Any = chosen.ints or chosen.floats
    if random.random() < 0.05:
        del node.attribute[index]
        return f"no-{name}"
    if random.random() < 0.05:
        other = onnx.helper.make_attribute(chosen.name, random.choice([1.5, "text", 7, [1, 2], [0.5]]))
        chosen.CopyFrom(other)
        return f"type-of-{name}"
    if values:
        at = random.randrange(len(values))
        kind = random.choice(("set", "set", "set", "near", "near", "drop", "double", "cut"))
        if kind == "set":
            values[at] = random.choice((*INTEGERS, *range(-2, 24)) if chosen.ints else FLOATS)
        elif kind == "near":
            values[at] = values[at] + random.choice((-1, 1)) if chosen.ints else -values[at]
        elif kind == "drop":
            del values[at]
        elif kind == "double":
            values.append(values[at])
        else:
            del values[at:]
        return f"{kind}-{name}"
    if chosen.type == AttributeProto.INT:
        chosen.i = random.choice((*INTEGERS, min(chosen.i + 1, 2**63 - 1), -chosen.i if chosen.i > -(2**63) else 0))
    elif chosen.type == AttributeProto.FLOAT:
        chosen.f = random.choice(FLOATS)
    elif chosen.type == AttributeProto.TENSOR:
        tensor(chosen.t, random)
    return name


def tensor(chosen: TensorProto, random: Random) -> str:
    kind = random.choice(("dims", "dim", "type", "bytes", "place", "place"))
    if kind == "dims":
        chosen.dims[:] = random.choice(([], [0], [1], [-1], [2**40, 2**40], [*chosen.dims, 1], [*chosen.dims][::-1]))
    elif kind == "dim" and chosen.dims:
        at = random.randrange(len(chosen.dims))
        chosen.dims[at] = random.choice((*INTEGERS, chosen.dims[at] + 1, max(chosen.dims[at] - 1, 0)))
    elif kind == "type":
        chosen.data_type = random.choice((*range(30), -1, 2**31 - 1))
    elif kind == "bytes" and chosen.raw_data:
        data = bytearray(chosen.raw_data)
        data[random.randrange(len(data))] = random.choice((0, 1, 127, 128, 255))
        chosen.raw_data = bytes(data[: random.choice((len(data), len(data), len(data) - 1))])
    elif kind == "place" and chosen.external_data:
        entry = random.choice(chosen.external_data)
        kind = entry.key
        if entry.key == "location":
            entry.value = random.choice(
                ("", ".", "..", "../model.safetensors", "/etc/passwd", "headpool.json", "a\0b", "nothing")
            )
        else:
            near = [int(entry.value) + step for step in (-64, -1, 1, 2, 3, 4, 64)]
            entry.value = str(random.choice((*near, *INTEGERS, 2**64 - 4, 2**64, "", "x", "1e3")))
    else:
        chosen.data_location = 1 - chosen.data_location
        kind = "location"
    return f"{kind}-of-tensor"


def initialiser(model: onnx.ModelProto, random: Random) -> str:
    chosen = random.choice(model.graph.initializer)
    if random.random() < 0.1:
        other = random.choice(model.graph.initializer)
        chosen.name, other.name = other.name, chosen.name
        return "names-of-tensors"
    return tensor(chosen, random)


def edge(model: onnx.ModelProto, random: Random) -> str:
    """What a node reads or writes."""
    node = random.choice(nodes(model, random))
    side, word = random.choice(((node.input, "input"), (node.input, "input"), (node.output, "output")))
    if not side:
        side, word = node.output, "output"
    at, kind = random.randrange(len(side)), random.choice(("drop", "none", "swap", "other", "more"))
    if kind == "drop":
        del side[at]
    elif kind == "none":
        side[at] = ""
    elif kind == "swap":
        other = random.randrange(len(side))
        side[at], side[other] = side[other], side[at]
    elif kind == "other":
        side[at] = random.choice(names(model))
    else:
        side.append(random.choice(names(model)))
    return f"{kind}-{word}-of-{node.op_type}"


def node(model: onnx.ModelProto, random: Random) -> str:
    at = random.randrange(len(model.graph.node))
    chosen, kind = model.graph.node[at], random.choice(("drop", "double", "operator", "domain"))
    name = f"{kind}-{chosen.op_type}"
    if kind == "drop":
        del model.graph.node[at]
    elif kind == "double":
        model.graph.node.append(chosen)
    elif kind == "operator":
        chosen.op_type = random.choice([other.op_type for other in model.graph.node])
    else:
        chosen.domain = random.choice(("", "headpool", "com.microsoft", "nowhere"))
    return name


def value(model: onnx.ModelProto, random: Random) -> str:
    """An input, an output or a known shape of the graph; the versions of its operators."""
    chosen = random.choice([*model.graph.input, *model.graph.output, *model.graph.value_info, None])
    if chosen is None:
        random.choice(model.opset_import).version = random.choice(INTEGERS)
        return "opset"
    kind = chosen.type.tensor_type
    if random.random() < 0.3 or not kind.shape.dim:
        kind.elem_type = random.randrange(25)
    else:
        dim = random.choice(kind.shape.dim)
        dim.dim_value = random.choice(INTEGERS)
    return "value"


def any_bytes(data: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(changed))
        kind = random.randrange(4)
        if kind < 2:
            changed[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
        elif kind == 2:
            del changed[at : at + random.randrange(1, 40)]
        else:
            changed[at:at] = changed[(start := random.randrange(len(changed))) : start + random.randrange(1, 40)]
    return bytes(changed)


STRUCTURED: tuple[Callable[[onnx.ModelProto, Random], str], ...] = (
    *[attribute] * 5,
    *[initialiser] * 3,
    *[edge] * 3,
    node,
    value,
)


def mutations(graph: bytes, count: int, seed: int) -> list[tuple[str, bytes]]:
    """What was done to the serialised `graph`, and what became of it."""
    random, results = Random(seed), []
    for index in range(count):
        if index % 10 == 9:
            results.append(("bytes", any_bytes(graph, random)))
            continue
        model = onnx.ModelProto.FromString(graph)
        done = [random.choice(STRUCTURED)(model, random) for _ in range(random.choice((1, 1, 1, 1, 2)))]
        results.append(("+".join(done), model.SerializeToString()))
    return results


def write(graph: Path, count: int, folder: Path, seed: int = 1) -> list[Path]:
    folder.mkdir()
    files = []
    for index, (name, data) in enumerate(mutations(graph.read_bytes(), count, seed)):
        files.append(folder / f"{index:04}-{name}.onnx")
        files[-1].write_bytes(data)
    return files


if __name__ == "__main__":
    bundle = Bundle.open(Path(sys.argv[1]))
    write(bundle.graph_path(bundle.variant(sys.argv[2])), int(sys.argv[3]), Path(sys.argv[4]))
