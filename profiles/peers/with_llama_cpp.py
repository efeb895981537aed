"""llama.cpp through llama-cpp-python's plain bindings of its C interface, compiled for this machine."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path

import numpy as np

from profiles.peers.runner import Runner

ROWS = 256  # of a cache, which llama.cpp allocates in multiples of


def export(checkpoint: Path, out: Path, weights: str) -> None:
    """`checkpoint` is a GGUF file; int4 is Q4_0 as `llama-quantize` makes it: its output head is Q6_K."""
    import llama_cpp as c

    out.mkdir()
    if weights == "fp32":
        (out / "model.gguf").hardlink_to(checkpoint)
        return
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = c.LLAMA_FTYPE_MOSTLY_Q4_0, True
    status = c.llama_model_quantize(str(checkpoint).encode(), str(out / "model.gguf").encode(), ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


class Peer(Runner):
    """The cache in fp32, as the other runtimes' is, unless `cache` is "f16", its default; `flash` is its fused attention.

    Each sequence has a cache of its own, its default too: in a unified one every sequence would read the rows of all.
    """

    def __init__(self, model: Path, batch: int, capacity: int, threads: int, flash: bool = False, cache: str = "f32") -> None:
        import llama_cpp as c

        self.c = c
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(str(model / "model.gguf").encode(), c.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        parameters = c.llama_context_default_params()
        parameters.n_seq_max, parameters.kv_unified = batch, False
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.n_ctx = batch * -(-capacity // ROWS) * ROWS  # of all sequences; each gets its part in whole ROWS
        parameters.n_batch = parameters.n_ctx  # a prompt in one call, which it cuts into n_ubatch
        parameters.type_k = parameters.type_v = {"f32": c.GGML_TYPE_F32, "f16": c.GGML_TYPE_F16}[cache]
        parameters.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = c.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {capacity} tokens")
        self.memory = c.llama_get_memory(self.context)
        self.fed, self.length = c.llama_batch_init(parameters.n_batch, 0, 1), 0
        self.words = c.llama_model_get_vocab(self.model)
        self.vocabulary = c.llama_vocab_n_tokens(self.words)
        system = c.llama_print_system_info().decode().strip()
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        self.options = {"threads": threads, "flash attention": flash, "KV": cache, "build": system}

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        fed, (batch, count) = self.fed, tokens.shape
        fed.n_tokens = tokens.size
        for at, token in enumerate(tokens.ravel().tolist()):  # one sequence after the other
            row, place = divmod(at, count)
            fed.token[at], fed.pos[at], fed.logits[at] = token, self.length + place, place == count - 1
            fed.n_seq_id[at], fed.seq_id[at][0] = 1, row
        if status := self.c.llama_decode(self.context, fed):
            raise RuntimeError(f"llama_decode returned {status}")
        self.length += count
        return np.ctypeslib.as_array(self.c.llama_get_logits(self.context), (batch, self.vocabulary))

    def rewind(self, length: int) -> None:
        for row in range(self.c.llama_n_seq_max(self.context)):
            self.c.llama_memory_seq_rm(self.memory, row, length, -1)
        self.length = length
