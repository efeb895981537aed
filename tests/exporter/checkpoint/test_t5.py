"""T5 folders: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import t5
import torch
from safetensors.torch import load_file, save_file

from exporter.checkpoint import open_checkpoint, open_source, write_checkpoint
from exporter.checkpoint.hf_config import parse_config
from exporter.convert import convert_weights
from exporter.errors import CheckpointError
from exporter.seq2seq_config import Seq2SeqConfig

T5_SMALL = {"model_type": "t5", "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "vocab_size": 32128}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-quick_gelu"}, "feed_forward_proj 'gated-quick_gelu' .*gated-gelu"),
        ({"feed_forward_proj": None}, "feed_forward_proj None"),
        ({"dense_act_fn": "mish"}, 'dense_act_fn "mish" is not what feed_forward_proj \'relu\' means, "relu"'),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"}, 'dense_act_fn "relu" .* means, "gelu_new"'),
        ({"feed_forward_proj": "gated-gelu", "is_gated_act": False}, "is_gated_act false is not .* means, true"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type 'alibi' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling .* is not supported"),
        ({"encoder_attention_type": "local"}, "encoder_attention_type 'local' is not supported"),
        ({"relative_attention_num_buckets": 2}, "relative_buckets 2 is not a whole number from 4"),
        ({"relative_attention_max_distance": 16}, "relative_max_distance 16 is not more than half of its 32"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is false: that is half of a T5"),
        ({"architectures": ["T5EncoderModel"]}, "architectures 'T5EncoderModel' has no encoder and decoder"),
        ({"num_key_value_heads": 3}, "3 KV heads do not divide 8 query heads"),
        ({"decoder_start_token_id": 40000}, "decoder_start_id 40000 is outside the vocabulary"),
        ({"num_layers": 10**6}, "num_layers 1000000 is not a whole number from 1 to 4096"),
        ({"model_type": "umt5"}, "model_type 'umt5' .*t5, mt5"),
    ],
)
def test_configs_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_config({**T5_SMALL, **changes})


def test_what_the_config_says() -> None:
    plain = parse_config(T5_SMALL)
    assert isinstance(plain, Seq2SeqConfig)
    assert (plain.ffn, plain.tied, plain.head_scale, plain.encoder_layers) == ("relu", True, 512**-0.5, 6)
    newer = parse_config({**T5_SMALL, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2})
    assert isinstance(newer, Seq2SeqConfig)
    assert (newer.ffn, newer.gelu_tanh, newer.tied, newer.head_scale, newer.num_layers) == ("geglu", True, False, 1.0, 2)
    assert parse_config({**T5_SMALL, "num_key_value_heads": 2}).kv_heads == (2,) * 6
    assert Seq2SeqConfig.from_json(newer.to_json()) == newer


def edited(folder: Path, change: Any) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_copies_of_the_embedding_have_to_be_it(tmp_path: Path) -> None:
    """Old files hold the shared embedding under each stack's name, and a bias that nothing uses."""
    folder = t5.save("t5-1.1", tmp_path)
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

    def as_old(weights: dict[str, torch.Tensor]) -> None:
        for stack in ("encoder", "decoder"):
            weights[f"{stack}.embed_tokens.weight"] = weights["shared.weight"].clone()
        weights[unused] = torch.zeros(8, 6)

    names = list(open_checkpoint(folder).weights)
    assert list(open_checkpoint(edited(folder, as_old)).weights) == names
    with pytest.raises(CheckpointError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight, but the"):
        open_checkpoint(edited(folder, lambda weights: weights["encoder.embed_tokens.weight"].add_(1)))


def test_a_pair_is_needed_and_tied_heads_are_told(tmp_path: Path) -> None:
    folder = t5.save("t5", tmp_path)

    def encoder_alone(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith("decoder.")]:
            del weights[name]

    other = t5.save("t5-1.1", tmp_path)
    config = json.loads((other / "config.json").read_text())
    assert config.pop("scale_decoder_outputs") is False  # transformers 5's; without it, the head has to be what the config says
    (other / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from shared\.weight, but tie_word_embeddings is true"):
        open_checkpoint(other)
    with pytest.raises(CheckpointError, match=r"tensors do not fit its config: \d+ missing \(decoder\."):
        open_checkpoint(edited(folder, encoder_alone))


def test_fewer_kv_heads_are_written_and_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(t5.save("mt5", tmp_path))
    for kv_heads in (2, (3, 1)):
        config, weights = convert_weights(checkpoint.config, checkpoint.weights, kv_heads)
        out = tmp_path / str(kv_heads)
        write_checkpoint(type(checkpoint)(**{**vars(checkpoint), "config": config, "weights": weights}), out)
        again = open_checkpoint(out)
        assert again.config == config
        for name, tensor in again.weights.items():
            torch.testing.assert_close(tensor.read(), weights[name].read(), rtol=0, atol=0)


def test_random_weights_of_a_config(tmp_path: Path) -> None:
    small = {**T5_SMALL, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_heads": 4, "num_layers": 1, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps(small))
    source = open_source(tmp_path / "config.json")
    _, weights = convert_weights(source.config, source.weights, 2)
    name = "decoder.layers.0.cross_attn.k_proj.weight"
    wanted = source.weights[name].read().unflatten(0, (2, 2, 8)).mean(1).flatten(0, 1)
    torch.testing.assert_close(weights[name].read(), wanted)
