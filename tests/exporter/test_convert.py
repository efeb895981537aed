"""Head conversion against numpy written another way, and against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporter.config import ModelConfig
from exporter.convert import conversion_record, convert_weights
from exporter.errors import CheckpointError, UserError
from exporter.weights import ComputedTensor, LazyTensor, Weights

H, D, WIDTH, LAYERS = 12, 8, 40, 2


def make_config(kv_heads: int, **changes: object) -> ModelConfig:
    values = {
        "vocab_size": 64,
        "hidden_size": WIDTH,
        "num_layers": LAYERS,
        "num_heads": H,
        "kv_heads": (kv_heads,) * LAYERS,
        "head_dim": D,
        "intermediate_size": 32,
        "max_positions": 64,
    }
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def lazy(name: str, value: torch.Tensor) -> LazyTensor:
    return ComputedTensor(name, value.dtype, tuple(value.shape), lambda: value.clone())


def make_weights(kv_heads: int, bias: bool = True) -> Weights:
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.self_attn."
        shapes[prefix + "q_proj.weight"] = (H * D, WIDTH)
        shapes[prefix + "k_norm.weight"] = (D,)
        for name in ("k_proj", "v_proj"):
            shapes[f"{prefix}{name}.weight"] = (kv_heads * D, WIDTH)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (kv_heads * D,)
    return {name: lazy(name, torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def per_query_head(value: np.ndarray) -> list[np.ndarray]:
    """What each of the H query heads reads, one by one."""
    count = value.shape[0] // D
    return [value[(h * count // H) * D : (h * count // H + 1) * D] for h in range(H)]


@pytest.mark.parametrize(("before", "after"), [(12, 4), (12, 1), (6, 3), (6, 4), (4, 6), (3, 2)])
def test_mean_is_the_average_over_the_query_heads_of_a_group(before: int, after: int) -> None:
    weights = make_weights(before)
    config, converted = convert_weights(make_config(before), weights, after, "mean")
    assert config.kv_heads == (after,) * LAYERS
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.bias"):
        heads = per_query_head(weights[name].read().numpy().astype(np.float64))
        size = H // after
        expected = np.concatenate([sum(heads[g * size : (g + 1) * size]) / size for g in range(after)])
        np.testing.assert_allclose(converted[name].read().numpy(), expected, rtol=0, atol=1e-6)
        assert converted[name].shape == expected.shape


@pytest.mark.parametrize(("before", "after"), [(12, 4), (12, 1), (6, 2)])
def test_first_keeps_the_first_head_of_each_group(before: int, after: int) -> None:
    weights = make_weights(before)
    _, converted = convert_weights(make_config(before), weights, after, "first")
    name = "model.layers.1.self_attn.v_proj.weight"
    value = weights[name].read().numpy()
    step = before // after
    expected = np.concatenate([value[g * step * D : (g * step + 1) * D] for g in range(after)])
    np.testing.assert_array_equal(converted[name].read().numpy(), expected)


def test_random_keeps_one_head_of_each_group_the_same_for_k_v_and_bias() -> None:
    weights, config = make_weights(12), make_config(12)

    def picked(converted: Weights, layer: int, name: str) -> list[int]:
        full = f"model.layers.{layer}.self_attn.{name}"
        old = weights[full].read().numpy().reshape(12, D, -1)
        new = converted[full].read().numpy().reshape(4, D, -1)
        return [int(np.flatnonzero([np.array_equal(head, row) for head in old])[0]) for row in new]

    by_seed = []
    for seed in range(6):
        _, converted = convert_weights(config, weights, 4, "random", seed)
        _, again = convert_weights(config, weights, 4, "random", seed)
        for layer in range(LAYERS):
            heads = picked(converted, layer, "k_proj.weight")
            assert [head // 3 for head in heads] == [0, 1, 2, 3]
            assert heads == picked(converted, layer, "v_proj.weight") == picked(converted, layer, "k_proj.bias")
            assert heads == picked(again, layer, "k_proj.weight")
            by_seed.append(tuple(heads))
    assert len(set(by_seed)) > 6  # seeds and layers differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("before", "after"), [(1, 12), (3, 12), (2, 6)])
def test_degrouping_is_exact_and_pooling_it_back_returns_the_bits(dtype: torch.dtype, before: int, after: int) -> None:
    weights = {name: lazy(name, tensor.read().to(dtype)) for name, tensor in make_weights(before).items()}
    more, grown = convert_weights(make_config(before), weights, after)
    _, back = convert_weights(more, grown, before)
    for name in weights:
        assert grown[name].dtype == dtype
        assert torch.equal(back[name].read(), weights[name].read())
        if "k_proj" in name or "v_proj" in name:
            for one, other in zip(
                per_query_head(weights[name].read().float().numpy()),
                per_query_head(grown[name].read().float().numpy()),
                strict=True,
            ):
                np.testing.assert_array_equal(one, other)


def test_untouched_tensors_are_the_same_objects() -> None:
    weights = make_weights(12)
    config, converted = convert_weights(make_config(12), weights, (12, 4))
    assert config.kv_heads == (12, 4)
    changed = {name for name in weights if converted[name] is not weights[name]}
    assert changed == {f"model.layers.1.self_attn.{p}.{k}" for p in ("k_proj", "v_proj") for k in ("weight", "bias")}
    same, kept = convert_weights(make_config(12), weights, 12)
    assert same == make_config(12)
    assert all(kept[name] is weights[name] for name in weights)


def test_the_record_names_what_was_done() -> None:
    config = make_config(12)
    assert conversion_record(config, config, "mean") is None
    assert conversion_record(config.with_kv_heads(4), config, "optimal", 7) == {
        "method": "repetition",
        "seed": None,
        "kv_heads_before": [4, 4],
        "kv_heads_after": [12, 12],
    }
    assert conversion_record(config, config.with_kv_heads(4), "random", 7) == {
        "method": "random",
        "seed": 7,
        "kv_heads_before": [12, 12],
        "kv_heads_after": [4, 4],
    }


def test_user_mistakes() -> None:
    config, weights = make_config(12), make_weights(12)
    with pytest.raises(UserError, match="layer 0: 5 KV heads do not divide 12 query heads; choose from 12, 6, 4, 3, 2, 1"):
        convert_weights(config, weights, 5)
    with pytest.raises(UserError, match="method 'median' is not one of mean, first, random"):
        convert_weights(config, weights, 4, "median")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="seed -1 is negative"):
        convert_weights(config, weights, 4, "random", -1)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.self_attn\.k_proj\.weight"):
        convert_weights(config, {}, 4)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight has 48 rows, its config says 96: 12 KV heads of 8"):
        convert_weights(config, make_weights(6), 4)


def transformers_model(kv_heads: int, state: dict[str, torch.Tensor] | None = None) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM  # QK-norm and biases at once

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=H,
        num_key_value_heads=kv_heads,
        head_dim=D,
        attention_bias=True,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).eval()
    if state is not None:
        model.load_state_dict(state)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20).remainder(17)[None]).logits


@pytest.mark.parametrize("after", [6, 12])
def test_transformers_gives_the_same_logits_with_more_heads(after: int) -> None:
    model = transformers_model(3)
    weights = {name: lazy(name, value) for name, value in model.state_dict().items()}
    _, converted = convert_weights(make_config(3), weights, after)
    more = transformers_model(after, {name: tensor.read() for name, tensor in converted.items()})
    torch.testing.assert_close(logits(more), logits(model), rtol=0, atol=1e-5)


def test_transformers_with_heads_pooled_by_hand_agrees() -> None:
    model = transformers_model(12)
    weights = {name: lazy(name, value) for name, value in model.state_dict().items()}
    _, converted = convert_weights(make_config(12), weights, 4)
    pooled = transformers_model(4, {name: tensor.read() for name, tensor in converted.items()})
    by_hand = transformers_model(12, model.state_dict())
    with torch.no_grad():  # every head of a group replaced by the group's mean, with all 12 heads kept
        for block in by_hand.model.layers:  # type: ignore[union-attr, operator]
            for linear in (block.self_attn.k_proj, block.self_attn.v_proj):
                for parameter in (linear.weight, linear.bias):
                    groups = parameter.view(4, 3, D, -1)
                    groups.copy_(groups.mean(1, keepdim=True).expand_as(groups).clone())
    torch.testing.assert_close(logits(pooled), logits(by_hand), rtol=0, atol=2e-5)
    assert (logits(pooled) - logits(model)).abs().max() > 0.1  # pooling is not a no-op here
