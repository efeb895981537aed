"""The canonical graphs of an encoder-decoder: parts traced once each, layers stamped, as exporter/trace.py does a decoder's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporter import contract_seq2seq as contract
from exporter.checkpoint.t5_names import EMBEDDING, HEAD
from exporter.config import CacheForm
from exporter.contract import Binding, Logits
from exporter.models import seq2seq
from exporter.models.relative import bucket_table
from exporter.seq2seq_config import Seq2SeqConfig
from exporter.trace import IR_DTYPES, OPSET, B, P, T, epilogue, finish, graph_value, trace_part
from exporter.weights import TORCH_DTYPES
from graphs import canonical
from graphs.stamp import Stamper

E = 7  # stands for the encoder's tokens: distinct from B, T, P and their sums


def canonical_graphs(config: Seq2SeqConfig, cache: CacheForm, dtype: str, logits: Logits = "last") -> dict[str, ir.Model]:
    """File name, without its suffix → graph over the canonical node. The encoder comes first, the decoder last.

    In the concat form also optimum's first step, and optimum's names for all of them.
    """
    if cache == "static":
        return {"encoder": encoder_graph(config, dtype), "decoder": decoder_graph(config, cache, dtype, logits)}
    return {
        "encoder_model": encoder_graph(config, dtype),
        "decoder_model": first_graph(config, dtype, logits),
        "decoder_with_past_model": decoder_graph(config, cache, dtype, logits),
    }


def encoder_graph(config: Seq2SeqConfig, dtype: str) -> ir.Model:
    """The encoder, and what every cross-attention reads of it."""
    graph = _Graph(config, dtype, contract.encoder_inputs())
    ids, mask = graph.inputs.values()
    x, bias = graph.stamp(_encoder_prologue, "encoder", [ids, graph.weight(EMBEDDING)])
    for index in range(config.encoder_layers):
        (x,) = graph.stamp(_encoder_layer, f"encoder.layers.{index}", [x, mask, bias])
    (hidden,) = graph.stamp(_encoder_epilogue, "encoder", [x, mask])
    caches = [value for pair in graph.cross_caches(hidden) for value in pair]
    return graph.finish([hidden, *caches], contract.encoder_outputs(config, dtype), bidirectional=True)


def decoder_graph(config: Seq2SeqConfig, cache: CacheForm, dtype: str, logits: Logits) -> ir.Model:
    """A step of the decoder over its caches."""
    graph = _Graph(config, dtype, contract.decoder_inputs(config, cache, dtype))
    layers = range(config.num_layers)
    past, cross = (
        [[graph.inputs[name] for name in contract.names("past_key_values", layer, stack)] for layer in layers]
        for stack in ("decoder", "encoder")
    )
    scores, present = graph.decode(past, cross, logits)
    return graph.finish([scores, *present], contract.decoder_outputs(config, cache, dtype, logits))


def first_graph(config: Seq2SeqConfig, dtype: str, logits: Logits) -> ir.Model:
    """The first step as optimum takes it: from the encoder's hidden states, without caches."""
    graph = _Graph(config, dtype, contract.first_inputs(config, dtype))
    empty = [graph.stamp(_empty_cache, "decoder", [graph.inputs["input_ids"]], kv_heads) for kv_heads in config.kv_heads]
    cross = graph.cross_caches(graph.inputs["encoder_hidden_states"])
    scores, present = graph.decode(empty, cross, logits)
    caches = [value for layer, read in enumerate(cross) for value in (*present[2 * layer : 2 * layer + 2], *read)]
    return graph.finish([scores, *caches], contract.first_outputs(config, dtype, logits))


class _Graph:
    """A graph in the making, with what its parts are traced for."""

    def __init__(self, config: Seq2SeqConfig, dtype: str, inputs: Sequence[Binding]) -> None:
        self.config, self.dtype = config, dtype
        self.inputs = {binding.name: graph_value(binding) for binding in inputs}
        self.stamper = Stamper(self.inputs.values(), opset=OPSET, domains={canonical.DOMAIN: canonical.VERSION})

    def weight(self, name: str) -> ir.Value:
        return self.stamper.initializer(name, IR_DTYPES[self.dtype], (self.config.vocab_size, self.config.hidden_size))

    def stamp(self, part, prefix: str, inputs: Sequence[ir.Value], kv_heads: int = 0, *how) -> list[ir.Value]:  # type: ignore[no-untyped-def]
        one = dataclasses.replace(self.config, encoder_layers=1, num_layers=1, kv_heads=(kv_heads or self.config.num_heads,))
        return self.stamper.stamp(part(one, self.dtype, *how), prefix, inputs)

    def cross_caches(self, hidden: ir.Value) -> list[list[ir.Value]]:
        return [
            self.stamp(_cross_cache, f"decoder.layers.{index}.cross_attn", [hidden], kv_heads)
            for index, kv_heads in enumerate(self.config.kv_heads)
        ]

    def decode(
        self, past: Sequence[Sequence[ir.Value]], cross: Sequence[Sequence[ir.Value]], logits: Logits
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Logits, and K and V of every layer after."""
        config, cache = self.config, "static" if "position_ids" in self.inputs else "concat"
        ids = self.inputs["input_ids"]
        positions = [self.inputs["position_ids"]] if cache == "static" else []
        start = [ids, *positions, past[0][0], self.weight(EMBEDDING)]
        x, bias, *mask = self.stamp(_decoder_prologue, "decoder", start, 0, cache)  # of the cache it reads the length only
        shared = [ids, *positions, *mask, bias, self.inputs["encoder_attention_mask"]]
        present: list[ir.Value] = []
        for index, (kv_heads, kept, read) in enumerate(zip(config.kv_heads, past, cross, strict=True)):
            given = [x, *shared, *kept, *read]
            x, *caches = self.stamp(_decoder_layer, f"decoder.layers.{index}", given, kv_heads, cache)
            present += caches
        head = self.weight(EMBEDDING if config.tied else HEAD)
        (scores,) = self.stamp(epilogue, "decoder", [x, ids, head], 0, logits, config.head_scale)
        return scores, present

    def finish(self, outputs: Sequence[ir.Value], bindings: Sequence[Binding], bidirectional: bool = False) -> ir.Model:
        name = f"{'encoder' if bidirectional else 'decoder'}.bias.buckets"
        table = bucket_table(self.config.relative_buckets, self.config.relative_max_distance, bidirectional)
        self.stamper.initializers[name].const_value = ir.tensor(table.numpy())
        return finish(self.stamper, outputs, bindings, self.config.family)


class _EmptyCache(nn.Module):
    """input_ids [B,T] → K [B,G,0,D] and V [B,G,0,Dv]."""

    def __init__(self, config: Seq2SeqConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads, self.sizes, self.dtype = config.kv_heads[0], (config.head_dim, config.value_dim), dtype

    def forward(self, input_ids: Tensor) -> list[Tensor]:
        shape = (input_ids.shape[0], self.heads, 0)
        return [torch.zeros((*shape, size), dtype=self.dtype) for size in self.sizes]


IDS = ((B, T), torch.long, (0, 1))
SOURCE = ((B, E), torch.long, (0, 1))


@functools.lru_cache(maxsize=64)
def _encoder_prologue(config: Seq2SeqConfig, dtype: str) -> ir.Model:
    weight = ((config.vocab_size, config.hidden_size), TORCH_DTYPES[dtype], ())
    return trace_part(lambda: seq2seq.EncoderPrologue(config), dtype, [SOURCE, weight])


@functools.lru_cache(maxsize=64)
def _encoder_layer(config: Seq2SeqConfig, dtype: str) -> ir.Model:
    kind = TORCH_DTYPES[dtype]
    inputs = [((B * E, config.hidden_size), kind, (0,)), SOURCE, ((1, config.num_heads, E, E), kind, (2, 3))]
    return trace_part(lambda: seq2seq.EncoderLayer(config), dtype, inputs)


@functools.lru_cache(maxsize=64)
def _encoder_epilogue(config: Seq2SeqConfig, dtype: str) -> ir.Model:
    x = ((B * E, config.hidden_size), TORCH_DTYPES[dtype], (0,))
    return trace_part(lambda: seq2seq.EncoderEpilogue(config), dtype, [x, SOURCE])


@functools.lru_cache(maxsize=64)
def _cross_cache(config: Seq2SeqConfig, dtype: str) -> ir.Model:
    hidden = ((B, E, config.hidden_size), TORCH_DTYPES[dtype], (0, 1))
    return trace_part(lambda: seq2seq.CrossCache(config, config.kv_heads[0]), dtype, [hidden])


@functools.lru_cache(maxsize=64)
def _empty_cache(config: Seq2SeqConfig, dtype: str) -> ir.Model:
    return trace_part(lambda: _EmptyCache(config, TORCH_DTYPES[dtype]), dtype, [IDS])


@functools.lru_cache(maxsize=64)
def _decoder_prologue(config: Seq2SeqConfig, dtype: str, cache: CacheForm) -> ir.Model:
    kind = TORCH_DTYPES[dtype]
    past = ((B, config.kv_heads[0], P, config.head_dim), kind, (0, 2))
    weight = ((config.vocab_size, config.hidden_size), kind, ())
    inputs = [IDS, IDS if cache == "static" else None, past, weight]
    return trace_part(lambda: seq2seq.DecoderPrologue(config), dtype, inputs)


@functools.lru_cache(maxsize=64)
def _decoder_layer(config: Seq2SeqConfig, dtype: str, cache: CacheForm) -> ir.Model:
    kind, G, static = TORCH_DTYPES[dtype], config.kv_heads[0], cache == "static"
    x = ((B * T, config.hidden_size), kind, (0,))
    mask = None if static else ((B, P + T), torch.long, (0, 1))
    bias = ((B if static else 1, config.num_heads, T, P if static else P + T), kind, (0, 2, 3) if static else (2, 3))
    kept, read = ([((B, G, length, size), kind, (0, 2)) for size in (config.head_dim, config.value_dim)] for length in (P, E))
    inputs = [x, IDS, IDS if static else None, mask, bias, SOURCE, *kept, *read]
    return trace_part(lambda: seq2seq.DecoderLayer(config, G), dtype, inputs)
