"""The trained decoder against transformers: logits, and the gradient of every weight, but for the order of float32 sums."""

from __future__ import annotations

import copy

import hf
import pytest
import torch

from exporter.checkpoint import open_checkpoint
from exporter.checkpoint.families import layout
from exporter.models.decoder import canonical_to_module
from exporter.uptrain.loss import loss
from exporter.uptrain.processes import Processes
from exporter.uptrain.trainer import build

ALONE = Processes(0, 1, torch.device("cpu"), None)
NAMES = ("llama", "llama-tied-biased", "llama-mha-gelu", "llama-mqa-relu-yarn", "qwen3", "gemma", "phi3-partial", "starcoder2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients(name: str, checkpointing: bool, tmp_path) -> None:
    theirs = copy.deepcopy(hf.model(name)).requires_grad_(True)
    checkpoint = open_checkpoint(hf.save(name, tmp_path))
    ours = build(checkpoint.config, checkpoint.weights, ALONE, checkpointing)
    ids = torch.randint(0, hf.SIZES["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(1))

    expected = theirs(ids, use_cache=False).logits
    logits, hidden = ours(ids)
    torch.testing.assert_close(logits.reshape(expected.shape), expected, atol=2e-4, rtol=2e-4)
    assert len(hidden) == checkpoint.config.num_layers

    theirs(ids, labels=ids, use_cache=False).loss.backward()
    value = loss(ours(ids[:, :-1]), ids[:, 1:], None, 1.0, 1.0)
    value.total.backward()
    mine = dict(ours.named_parameters())
    wanted = dict(theirs.named_parameters())
    for file_name, parts in layout(checkpoint.config).items():
        found = torch.cat([mine[canonical_to_module(part)].grad for part in parts])  # type: ignore[misc]
        gradient = wanted[file_name].grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found, gradient, atol=2e-4 * float(gradient.abs().max()), rtol=2e-3, msg=file_name)


def test_attention_only_leaves_the_rest_frozen(checkpoint) -> None:
    model = build(checkpoint.config, checkpoint.weights, ALONE, attention_only=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in dict(model.named_parameters()) if ".self_attn." in name}
    assert len(trained) == 4 * checkpoint.config.num_layers


def test_distances_from_the_teacher() -> None:
    """Against torch.distributions, and a sum written out."""
    generator = torch.Generator().manual_seed(0)

    def output() -> tuple[torch.Tensor, list[torch.Tensor]]:
        return torch.randn(12, 31, generator=generator) * 3, [torch.randn(12, 8, generator=generator) for _ in range(2)]

    student, teacher = output(), output()
    targets = torch.randint(0, 31, (3, 4), generator=generator)
    value = loss(student, targets, teacher, 0.7, 0.3)
    categorical = torch.distributions.Categorical
    ours, theirs = categorical(logits=student[0]), categorical(logits=teacher[0])
    kl = torch.distributions.kl_divergence(theirs, ours).mean()
    shares = [
        ((s - t).norm() / t.norm()) ** 2
        for one, other in zip(student[1], teacher[1], strict=True)
        for s, t in zip(one, other, strict=True)
    ]
    hidden = torch.stack(shares).mean()
    entropy = -ours.log_prob(targets.flatten()).mean()
    torch.testing.assert_close((value.cross_entropy, value.kl, value.hidden), (entropy, kl, hidden))
    torch.testing.assert_close(value.total, entropy + 0.7 * kl + 0.3 * hidden)
    same = loss(student, targets, student, 0.7, 0.3)
    torch.testing.assert_close(same.total, same.cross_entropy)
