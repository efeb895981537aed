"""Every family against transformers: what it saves we read byte for byte, and what we write it loads with equal logits."""

from __future__ import annotations

import copy
import dataclasses

import hf
import pytest
import torch

from exporter.checkpoint import expected_shapes, open_checkpoint, write_checkpoint
from exporter.checkpoint.families import FAMILIES, layout
from exporter.convert import convert_weights
from exporter.errors import CheckpointError
from exporter.weights import FileTensor


def canonical(model) -> dict[str, torch.Tensor]:
    """A transformers model's state under canonical names, taken apart by hand."""
    state, config = dict(model.state_dict()), model.config
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    result = {}
    for name, value in state.items():
        if "qkv_proj" in name:
            size = value.shape[0] // (config.num_attention_heads + 2 * config.num_key_value_heads)
            counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
            for letter, part in zip("qkv", value.split([count * size for count in counts]), strict=True):
                result[name.replace("qkv_proj", f"{letter}_proj")] = part
        elif "gate_up_proj" in name:
            for half, part in zip(("gate", "up"), value.chunk(2), strict=True):
                result[name.replace("gate_up_proj", f"{half}_proj")] = part
        else:
            result[name.replace("c_fc", "up_proj").replace("c_proj", "down_proj")] = value
    return result


@pytest.mark.parametrize("name", hf.MODELS)
def test_reads_the_bytes_transformers_wrote(name, models, saved):
    checkpoint = open_checkpoint(saved(name))
    wanted = canonical(models(name))
    assert set(checkpoint.weights) == set(wanted) == set(expected_shapes(checkpoint.config))
    for key, tensor in checkpoint.weights.items():
        assert isinstance(tensor, FileTensor)
        assert tensor.name == key
        assert torch.equal(tensor.read(), wanted[key]), key
        assert torch.equal(torch.cat(list(tensor.blocks())).reshape(tensor.shape), wanted[key])
    assert checkpoint.config.family == models(name).config.model_type
    assert checkpoint.hf_config["architectures"] == [FAMILIES[checkpoint.config.family].architecture]


@pytest.mark.parametrize("name", hf.MODELS)
def test_config_means_what_transformers_computes(name, models, saved, their_logits, our_logits):
    ours, theirs = our_logits(saved(name)), their_logits(models(name))
    assert theirs.std() > 0.1  # flat logits would hide a mistake
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", hf.MODELS)
@pytest.mark.parametrize("max_shard_bytes", [10_000, 10_000_000])
def test_transformers_loads_what_we_write(name, max_shard_bytes, models, saved, tmp_path, their_logits):
    from transformers import AutoModelForCausalLM

    write_checkpoint(open_checkpoint(saved(name)), tmp_path / "out", max_shard_bytes)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 3) == (max_shard_bytes == 10_000)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(their_logits(loaded.eval()), their_logits(models(name)))
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(saved(name)).config


@pytest.mark.parametrize("name", ["llama-tied-biased", "qwen2", "qwen3", "gemma", "phi3", "starcoder2"])
def test_fewer_and_more_kv_heads(name, saved, tmp_path, their_logits, our_logits):
    """Two KV heads to one (pooled) and to six (exact), loaded by transformers with the new number."""
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(saved(name))
    for groups in (1, 6):
        config, weights = convert_weights(source.config, source.weights, groups)
        out = tmp_path / f"g{groups}"
        write_checkpoint(dataclasses.replace(source, config=config, weights=weights), out)
        loaded = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
        assert loaded.config.num_key_value_heads == groups
        theirs = their_logits(loaded)
        torch.testing.assert_close(our_logits(out), theirs, rtol=2e-4, atol=2e-4 * float(theirs.abs().max()))
    six = their_logits(loaded)
    torch.testing.assert_close(six, our_logits(saved(name)), rtol=2e-4, atol=2e-4 * float(six.abs().max()))


def test_sharded_folder(models, saved):
    folder = saved("phi3", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    checkpoint = open_checkpoint(folder)
    assert len(checkpoint.files) > 2
    for key, value in canonical(models("phi3")).items():
        assert torch.equal(checkpoint.weights[key].read(), value)


def test_shards_may_be_links(models, saved, tmp_path):
    """A Hugging Face cache is a folder of links."""
    folder, cache = saved("llama"), tmp_path / "cache"
    cache.mkdir()
    for path in folder.iterdir():
        (cache / path.name).symlink_to(path)
    checkpoint = open_checkpoint(cache)
    assert checkpoint.name == "cache"
    assert torch.equal(checkpoint.weights["lm_head.weight"].read(), models("llama").lm_head.weight)


def test_keys_of_transformers_4(saved, edit):
    """rope_theta and rope_scaling instead of rope_parameters, torch_dtype instead of dtype."""
    for name in ("llama-glu-llama3", "llama-yarn-mscale", "phi3-partial"):
        folder = saved(name)
        new = open_checkpoint(folder)
        parameters = dict(new.hf_config["rope_parameters"])
        old = {"rope_theta": parameters.pop("rope_theta"), "torch_dtype": "float32"}
        if (partial := parameters.pop("partial_rotary_factor", None)) is not None:
            old["partial_rotary_factor"] = partial
        kind = parameters.pop("rope_type")
        scaling = {**parameters, "type": kind} if kind != "default" else None
        edit(folder, drop=("rope_parameters", "dtype"), rope_scaling=scaling, **old)
        assert open_checkpoint(folder).config == new.config


def test_token_ids_come_from_the_generation_config_first(saved, edit):
    folder = saved("llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert open_checkpoint(folder).config.eos_token_ids == (2, 5)
    assert open_checkpoint(folder).config.bos_token_id == 1
    (folder / "generation_config.json").unlink()
    assert open_checkpoint(folder).config.eos_token_ids == (2,)
    assert open_checkpoint(edit(folder, eos_token_id=[3, 4])).config.eos_token_ids == (3, 4)


def test_side_files_travel(saved, tmp_path):
    folder = saved("llama")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("é", "utf-8")
    (folder / "README.md").write_text("no")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.side_files["chat_template.jinja"] == "é".encode()
    write_checkpoint(checkpoint, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja")
    }


def test_half_precision_stays_as_it_is(models, tmp_path):
    from transformers import AutoModelForCausalLM

    model = copy.deepcopy(models("qwen2")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    checkpoint = open_checkpoint(tmp_path / "bf16")
    assert {tensor.dtype for tensor in checkpoint.weights.values()} == {torch.bfloat16}
    write_checkpoint(checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_old_buffers_and_a_stored_tied_head_are_tolerated(models, tmp_path):
    from safetensors.torch import save_file

    model = models("llama-tied-biased")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4, dtype=torch.float64)
    folder = tmp_path / "tied"
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(folder).weights
    state["lm_head.weight"][3, 4] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    assert str(error.value) == (
        f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true; "
        "set it to false in config.json"
    )


def test_name_maps_are_one_to_one(saved):
    for name in ("llama", "phi3", "starcoder2"):
        config = open_checkpoint(saved(name)).config
        parts = [part for group in layout(config).values() for part in group]
        assert sorted(parts) == sorted(expected_shapes(config))
