"""GGUF against transformers and the gguf package: tiny files made with gguf's writer, and the real SmolLM2."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import llama, write

from exporter.checkpoint import expected_shapes, open_checkpoint, write_checkpoint
from exporter.checkpoint.gguf_file import read_gguf
from exporter.checkpoint.gguf_llama import NAMES, GgufTensor
from exporter.errors import CheckpointError
from exporter.weights import FileTensor


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_tensors_come_back_as_they_were(tied, biased, tmp_path):
    model = llama(tied, biased)
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", model))
    assert checkpoint.name == "tiny"
    assert checkpoint.config.tied == tied
    assert checkpoint.config.eos_token_ids == (2,)
    assert checkpoint.config.norm_eps == 1e-5
    assert list(checkpoint.weights) == list(expected_shapes(checkpoint.config))
    for name, tensor in checkpoint.weights.items():
        assert torch.equal(tensor.read(), model.state_dict()[name]), name
        assert isinstance(tensor, GgufTensor if ".q_proj." in name or ".k_proj." in name else FileTensor)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1], ids=lambda kind: kind.name)
def test_kinds(kind, tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", kind=kind))
    native = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind)
    for name, tensor in checkpoint.weights.items():
        value, wanted = tensor.read(), llama().state_dict()[name]
        assert tensor.dtype == value.dtype == (native if native and value.dim() == 2 else torch.float32)
        exact = gguf.quants.dequantize(gguf.quants.quantize(wanted.numpy(), kind), kind) if value.dim() == 2 else wanted.numpy()
        assert np.array_equal(value.float().numpy(), exact), name


def test_blocks_keep_whole_heads(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", kind=Kind.Q8_0))
    whole = {name: tensor.read() for name, tensor in checkpoint.weights.items()}
    monkeypatch.setattr("exporter.checkpoint.gguf_llama.BLOCK_BYTES", 9000)
    for name, tensor in checkpoint.weights.items():
        blocks = list(tensor.blocks())
        assert len(blocks) > 1 or tensor.nbytes <= 9000
        assert torch.equal(torch.cat(blocks).reshape(tensor.shape), whole[name]), name


def test_written_as_a_folder_transformers_computes_the_same(tmp_path, their_logits, our_logits):
    from transformers import AutoModelForCausalLM

    path = write(tmp_path / "tiny.gguf")
    write_checkpoint(open_checkpoint(path), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    wanted = their_logits(llama())
    assert torch.equal(their_logits(loaded), wanted)
    torch.testing.assert_close(our_logits(path), wanted, rtol=2e-4, atol=2e-4 * float(wanted.abs().max()))


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    path = write(tmp_path / "tiny.gguf", kind=Kind.Q8_0)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")} == ours.metadata
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.kind, entry.shape) == (tensor.tensor_type, tuple(map(int, reversed(tensor.shape))))
        assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_linear_and_llama3_scaling(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    linear = open_checkpoint(write(tmp_path / "a.gguf", rope__scaling__type="linear", rope__scaling__factor=2.5)).config.rope
    assert (linear.kind, linear.factor, linear.theta) == ("linear", 2.5, 5000.0)
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=131072
    )
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config)[0]
    factors = (1 / 5e5 ** (torch.arange(0, 16, 2) / 16) / scaled).numpy()
    rope = open_checkpoint(write(tmp_path / "b.gguf", factors=factors, rope__freq_base=5e5)).config.rope
    assert (rope.kind, rope.factor, rope.original_max_positions) == ("llama3", 32.0, 8192)
    for bad in (factors * 1.01, factors[:-1], np.full(8, np.nan)):
        path = tmp_path / "c.gguf"
        path.unlink(missing_ok=True)
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(write(path, factors=bad, rope__freq_base=5e5))
        assert str(error.value) == f"{path}: rope_freqs.weight holds frequency factors other than Llama 3's"


def test_smollm_equals_transformers_own_gguf_loader(smollm2):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32)
    checkpoint = open_checkpoint(smollm2)
    state = model.state_dict()
    assert set(state) - set(checkpoint.weights) == {"lm_head.weight"}
    for name in expected_shapes(checkpoint.config):
        if "layers" not in name or ".layers.0." in name or ".layers.29." in name:
            assert torch.equal(checkpoint.weights[name].read(), state[name]), name
    theirs, ours = model.config, checkpoint.hf_config
    for key in (
        "hidden_size",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "vocab_size",
        "tie_word_embeddings",
    ):
        assert getattr(theirs, key) == ours[key], key
    assert theirs.rope_parameters["rope_theta"] == ours["rope_theta"]
    assert theirs.rms_norm_eps == pytest.approx(ours["rms_norm_eps"])


def test_names_are_one_to_one():
    assert len(set(NAMES.values())) == len(NAMES)
