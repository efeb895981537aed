"""llama.cpp through llama-cpp-python's plain bindings of its C interface, compiled for this machine."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path

import numpy as np

from profiles.peers.runner import Runner


def export(checkpoint: Path, out: Path, weights: str) -> None:
    """`checkpoint` is a GGUF file in fp32; int4 is Q4_0 as `llama-quantize` makes it: its output head is Q6_K."""
    import llama_cpp as c

    out.mkdir()
    if weights == "fp32":
        (out / "model.gguf").hardlink_to(checkpoint)
        return
    parameters = c.llama_model_quantize_default_params()
    parameters.ftype = c.LLAMA_FTYPE_MOSTLY_Q4_0
    status = c.llama_model_quantize(str(checkpoint).encode(), str(out / "model.gguf").encode(), ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


class Peer(Runner):
    """The cache in fp32, as the other runtimes' is; `flash` is its fused attention."""

    def __init__(self, model: Path, capacity: int, threads: int, flash: bool = False) -> None:
        import llama_cpp as c

        self.c = c
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(str(model / "model.gguf").encode(), c.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {model}")
        parameters = c.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = capacity, threads, threads
        parameters.n_batch = capacity  # a prompt in one call, which it cuts into n_ubatch
        parameters.type_k = parameters.type_v = c.GGML_TYPE_F32
        parameters.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = c.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {capacity} tokens")
        self.memory = c.llama_get_memory(self.context)
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        system = c.llama_print_system_info().decode().strip()
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        self.options = {"threads": threads, "flash attention": flash, "KV": "f32", "build": system}

    def feed(self, tokens: np.ndarray) -> np.ndarray:
        c, count = self.c, len(tokens)
        ids = (c.llama_token * count)(*tokens.tolist())
        if status := c.llama_decode(self.context, c.llama_batch_get_one(ids, count)):
            raise RuntimeError(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(c.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def rewind(self, length: int) -> None:
        self.c.llama_memory_seq_rm(self.memory, 0, length, -1)
