"""config.json of model_type `headpool`: a ModelConfig in its own words, for models that no other tool has a class for.

GLU attention, learned positions, FFNs of any kind in any combination. Its keys are the fields of `ModelConfig`, most of which
have defaults; `dtype` (or torch_dtype), `architectures` and transformers_version stand beside them as Hugging Face writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from exporter.checkpoint.families import HEADPOOL
from exporter.config import ModelConfig

BESIDE = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "family")


def parse_own(hf: Mapping[str, Any]) -> ModelConfig:
    """The model a config.json of model_type `headpool` describes. Raises UserError for a key that is unknown or missing."""
    return ModelConfig.from_json({**{key: hf[key] for key in hf if key not in BESIDE}, "family": HEADPOOL.model_type})


def own_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `parse_own` reads `config` from, which is of the family `headpool`."""
    name = str(dtype).removeprefix("torch.")
    fields = {key: value for key, value in config.to_json().items() if key != "family"}
    return {"model_type": HEADPOOL.model_type, "architectures": [HEADPOOL.architecture], "dtype": name, **fields}
