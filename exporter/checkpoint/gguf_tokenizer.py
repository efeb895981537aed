"""The tokenizer inside a GGUF file → tokenizer.json and the small files beside it.

Byte-level BPE only (tokenizer.ggml.model "gpt2"). How text is cut before the merges is named by tokenizer.ggml.pre; the cuts
below are those of llama.cpp's src/llama-vocab.cpp in the words of the tokenizers library.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from exporter.checkpoint.gguf_file import GgufFile
from exporter.errors import CheckpointError

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt2": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "llama-bpe": _llama3,
}
LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe")  # they start with BOS, and take a whole word that is a token as it is


def side_files_from(file: GgufFile, generation: dict[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json.

    Where the tokenizer is of another kind there is generation_config.json alone. Raises CheckpointError for a damaged one.
    """
    files = {"generation_config.json": _json({key: value for key, value in generation.items() if value is not None})}
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()}
    if ggml.get("model") != "gpt2" or ggml.get("pre") not in PRE_TOKENIZERS:
        return files
    try:
        tokenizer = _tokenizer(ggml)
        special = _special_tokens(ggml)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{file.path}: its tokenizer is damaged: {error}") from None
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.metadata.get("llama.context_length"),
    }
    if isinstance(template := file.metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    files["tokenizer.json"] = tokenizer.to_str(pretty=False).encode("utf-8")
    files["tokenizer_config.json"] = _json(config)
    files["special_tokens_map.json"] = _json(special)
    return files


def _tokenizer(ggml: dict[str, Any]) -> Tokenizer:
    tokens, merges = ggml["tokens"], ggml["merges"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{len(tokens) - len(vocab)} tokens stand twice")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if bad := [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise ValueError(f"merge {bad[0]!r} is not two tokens")
    llama3 = ggml["pre"] in LLAMA3_NAMES
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=llama3))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[ggml["pre"]]()
    tokenizer.decoder = decoders.ByteLevel()
    types = ggml.get("token_type", [])
    if len(types) not in (0, len(tokens)):
        raise ValueError(f"{len(types)} token types for {len(tokens)} tokens")
    added = [(token, kind) for token, kind in zip(tokens, types, strict=False) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind != USER_DEFINED) for token, kind in added])
    if ggml.get("add_bos_token", llama3):
        bos = tokens[ggml["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def _special_tokens(ggml: dict[str, Any]) -> dict[str, str]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token": ggml.get(f"{key}_token_id") for name, key in keys.items()}
    return {name: ggml["tokens"][number] for name, number in ids.items() if number is not None}


def _json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
