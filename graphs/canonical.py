"""`headpool::GroupedAttention`: the one custom node of the canonical graph, and its ONNX schema.

Inputs   query [B,T,H·D], key [B,T,G·D], value [B,T,G·Dv] (after RoPE), past_key [B,G,S,D], past_value [B,G,S,Dv], then
         exactly one of
           position_ids   int64 [B,T]: the *static* cache form. Row b writes its T new keys and values to cache rows
                          position_ids[b,0] … position_ids[b,0]+T−1; query t of row b sees cache rows ≤ position_ids[b,t].
           attention_mask int64 [B,P+T]: the *concat* form, past is [B,G,P,D]. New rows are appended; query t of row b sees
                          row j when j ≤ P + t and attention_mask[b,j] is 1.
         and optionally bias [B or 1,H,T,S or P+T], added to the scores.
         Without key and value nothing is written: past [B,G,S,·] is only read, attention_mask [B,S] says which rows, for all
         queries alike, and past is what present is: cross-attention, and an encoder's attention to its own keys.
Outputs  output [B,T,H·Dv]; present_key, present_value: [B,G,S,·] (static), [B,G,P+T,·] (concat).
Attributes  num_heads H, kv_num_heads G (divides H), scale: output = softmax(scale · QKᵀ + bias + mask) V, query head h reading
         KV head h // (H/G).

Query rows that see nothing (left padding) give finite, unspecified values.
"""

from __future__ import annotations

from typing import cast

import onnx.defs
import onnx_ir as ir

from graphs.errors import GraphError

DOMAIN = "headpool"
VERSION = 1
OP_TYPE = "GroupedAttention"
INPUTS = ("query", "key", "value", "past_key", "past_value", "position_ids", "attention_mask", "bias")
NEW = ("key", "value")
OUTPUTS = ("output", "present_key", "present_value")


def _schema() -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    parameter = schema.FormalParameter
    optional = schema.FormalParameterOption.Optional
    inputs = [parameter(name, "T", param_option=optional) if name in NEW else parameter(name, "T") for name in INPUTS[:5]]
    inputs += [parameter(name, "tensor(int64)", param_option=optional) for name in INPUTS[5:7]]
    inputs.append(parameter(INPUTS[7], "T", param_option=optional))
    kind = schema.AttrType
    attributes = [("num_heads", kind.INT), ("kv_num_heads", kind.INT), ("scale", kind.FLOAT)]
    return schema(
        OP_TYPE,
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=inputs,
        outputs=[parameter(name, "T") for name in OUTPUTS],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "activations and cache")],
        attributes=[schema.Attribute(name, type_, "", required=True) for name, type_ in attributes],
    )


def register() -> onnx.defs.OpSchema:
    """The node's schema, known to onnx (checker, onnxscript) from the first call on."""
    if onnx.defs.has(OP_TYPE, DOMAIN):
        return onnx.defs.get_schema(OP_TYPE, VERSION, DOMAIN)
    onnx.defs.register_schema(_schema())
    return onnx.defs.get_schema(OP_TYPE, VERSION, DOMAIN)


class GroupedAttention:
    """A canonical node taken apart and checked. Raises GraphError with the reason when the node is not well formed."""

    def __init__(self, node: ir.Node) -> None:
        name = node.name or "(unnamed)"
        if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            raise GraphError(f"node {name} is {node.domain}::{node.op_type}, not {DOMAIN}::{OP_TYPE}")
        if len(node.outputs) != len(OUTPUTS):
            raise GraphError(f"node {name} has {len(node.outputs)} outputs, {OP_TYPE} has {', '.join(OUTPUTS)}")
        given = [*node.inputs, *([None] * (len(INPUTS) - len(node.inputs)))]
        self.reads_only = given[1] is None and given[2] is None
        needed = [label for label in INPUTS[:5] if not (self.reads_only and label in NEW)]
        if missing := [label for label, value in zip(INPUTS[:5], given, strict=False) if value is None and label in needed]:
            raise GraphError(f"node {name} lacks its input {', '.join(missing)}")
        self.node = node
        self.name = name
        self.query, self._key, self._value, self.past_key, self.past_value = (cast(ir.Value, value) for value in given[:5])
        self.position_ids, self.attention_mask, self.bias = given[5:8]
        if (self.position_ids is None) == (self.attention_mask is None):
            raise GraphError(f"node {name} must have either position_ids (static cache) or attention_mask (concat cache)")
        if self.reads_only and self.attention_mask is None:
            raise GraphError(f"node {name} has no new keys and values to write at its position_ids; it needs attention_mask")
        self.num_heads = _attribute(node, "num_heads")
        self.kv_num_heads = _attribute(node, "kv_num_heads")
        scale = node.attributes.get("scale")
        if scale is None or not scale.as_float() > 0:
            raise GraphError(f"node {name} needs a scale above 0")
        self.scale = scale.as_float()
        if self.num_heads % self.kv_num_heads:
            raise GraphError(f"node {name}: {self.kv_num_heads} KV heads do not divide {self.num_heads} query heads")
        self.dtype = _cache_dtype(self.past_key, name)
        self.head_dim = _head_size(self.past_key, name)
        self.value_dim = _head_size(self.past_value, name)

    @property
    def key(self) -> ir.Value:
        assert not self.reads_only, self.name
        return self._key

    @property
    def value(self) -> ir.Value:
        assert not self.reads_only, self.name
        return self._value

    @property
    def static(self) -> bool:
        return self.position_ids is not None

    @property
    def group(self) -> int:
        """R: query heads that share one KV head."""
        return self.num_heads // self.kv_num_heads


def _attribute(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    if attribute is None or attribute.as_int() <= 0:
        raise GraphError(f"node {node.name} needs {name} above 0")
    return attribute.as_int()


def _cache_dtype(cache: ir.Value, name: str) -> ir.DataType:
    if cache.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise GraphError(f"node {name} has a cache of {cache.dtype}, not FLOAT, FLOAT16 or BFLOAT16")
    return cache.dtype


def _head_size(cache: ir.Value, name: str) -> int:
    if cache.shape is None or len(cache.shape) != 4 or not isinstance(cache.shape[3], int):
        raise GraphError(f"node {name}: its cache {cache.name} needs the shape [B, G, S, D] with D a number, has {cache.shape}")
    return cache.shape[3]


def is_canonical(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, OP_TYPE)


def standalone(
    num_heads: int,
    kv_heads: int,
    head_dim: int,
    static: bool = True,
    dtype: ir.DataType = ir.DataType.FLOAT,
    layers: int = 1,
    value_dim: int | None = None,
    biased: bool = False,
) -> ir.Model:
    """A model of canonical nodes and nothing else: to time a pattern, or to ask a runtime whether it has its kernels.

    Inputs and outputs are named as the node's own; with several `layers` each has its own, `query.0`, …, but for the positions
    or mask, which all share. `value_dim` is Dv, D where it is None. `biased`: with a bias.
    """
    tokens = ("position_ids", ["B", "T"]) if static else ("attention_mask", ["B", "total"])
    shared = ir.Value(name=tokens[0], shape=ir.Shape(tokens[1]), type=ir.TensorType(ir.DataType.INT64))
    bias = ir.Value(name="bias", shape=ir.Shape([1, num_heads, "T", "total"]), type=ir.TensorType(dtype)) if biased else None
    inputs, nodes, sizes = [*([bias] if bias is not None else []), shared], [], (head_dim, value_dim or head_dim)
    for layer in range(layers):
        node = _standalone_node(num_heads, kv_heads, sizes, ir.TensorType(dtype), shared, static, bias)
        for value in (*node.inputs[:5], *node.outputs) if layers > 1 else ():
            assert value is not None
            value.name = f"{value.name}.{layer}"
        node.name = f"/layers.{layer}/attention/{OP_TYPE}"
        inputs[-1:-1] = [value for value in node.inputs[:5] if value is not None]
        nodes.append(node)
    outputs = [value for node in nodes for value in node.outputs]
    graph = ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 24, DOMAIN: VERSION}, name="attention")
    return ir.Model(graph, ir_version=11, producer_name="headpool")


def _standalone_node(
    H: int, G: int, sizes: tuple[int, int], data: ir.TensorType, shared: ir.Value, static: bool, bias: ir.Value | None
) -> ir.Node:
    D, Dv = sizes
    shapes: list[list[int | str]] = [["B", "T", H * D], ["B", "T", G * D], ["B", "T", G * Dv]]
    shapes += [["B", G, "S", D], ["B", G, "S", Dv]]
    given = [ir.Value(name=name, shape=ir.Shape(shape), type=data) for name, shape in zip(INPUTS, shapes, strict=False)]
    attributes = {"num_heads": H, "kv_num_heads": G, "scale": D**-0.5}
    where = [shared, None] if static else [None, shared]
    node = ir.node(OP_TYPE, [*given, *where, bias], attributes, domain=DOMAIN, num_outputs=3)
    rows = "S" if static else "total"
    given_back: list[list[int | str]] = [["B", "T", H * Dv], ["B", G, rows, D], ["B", G, rows, Dv]]
    for value, name, shape in zip(node.outputs, OUTPUTS, given_back, strict=True):
        value.name, value.type, value.shape = name, data, ir.Shape(shape)
    return node
