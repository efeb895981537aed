"""A plan on disk: KV heads for each layer of one model, how they are to be made, and what was known when they were chosen."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.config import ModelConfig, check_groups
from exporter.convert.methods import GROUPINGS, METHODS, Grouping, Method
from exporter.decode import decode, parse
from exporter.errors import UserError, one_of
from exporter.files import write_text

SCHEMA = 1
TARGETS = {"kv_budget": "of the KV cache", "target_ms": "ms a token", "max_loss": "nats a token"}


@dataclass(frozen=True)
class KVPlan:
    """`kv_heads` in place of `kv_heads_before`, made by `method`, `grouping`, `calibration` and `seed` as `convert` has them.

    `target` is what was asked for: one of TARGETS and its number. `found` is what the plan was chosen by: its share of the KV
    cache, divergences in nats a token, milliseconds a token, whichever were measured.
    """

    model: str
    heads: int
    kv_heads_before: tuple[int, ...]
    kv_heads: tuple[int, ...]
    method: Method
    grouping: Grouping
    calibration: str | None
    seed: int
    target: dict[str, float]
    found: dict[str, float]
    kv_digest: str = ""  # of the checkpoint (see Checkpoint.kv_digest); empty where that was not noted
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise UserError(f"plan has schema {self.schema}, this headpool reads schema {SCHEMA}; select it again")
        for what, value, choices in (("method", self.method, METHODS), ("grouping", self.grouping, GROUPINGS)):
            if value not in choices:
                raise UserError(one_of(f"plan's {what}", value, choices))
        if len(self.kv_heads) != len(self.kv_heads_before):
            raise UserError(
                f"plan has KV heads for {len(self.kv_heads)} of {len(self.kv_heads_before)} layers; select it again"
            )
        for layer, counts in enumerate(zip(self.kv_heads, self.kv_heads_before, strict=True)):
            for count in counts:
                check_groups(self.heads, count, f"plan, layer {layer}: ")

    def check(self, config: ModelConfig, name: str, where: object) -> None:
        """Refuse a plan that was made for a model of another shape. `where` is the plan's own name."""
        if (self.heads, self.kv_heads_before) != (config.num_heads, config.kv_heads):
            raise UserError(
                f"{where} is a plan for {self.model}, {shape(self.heads, self.kv_heads_before)}; {name} has "
                f"{shape(config.num_heads, config.kv_heads)}; make one with 'headpool select'"
            )

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> KVPlan:
        """Raises UserError for a file that is not a whole plan."""
        data = read_object(path, "plan")
        if not {"kv_heads", "kv_heads_before"} & data.keys():
            raise UserError(f"{path} is not a plan; make one with 'headpool select'")
        try:
            return decode(cls, data, str(path))
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def shape(heads: int, kv_heads: tuple[int, ...]) -> str:
    """ "30 layers of 9 query and 3 KV heads"; where layers differ, all their KV heads."""
    counts = str(kv_heads[0]) if len(set(kv_heads)) == 1 else ", ".join(map(str, kv_heads))
    return f"{len(kv_heads)} layers of {heads} query and {counts} KV heads"


def read_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError."""
    try:
        data = parse(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not JSON: it is not UTF-8 text") from None
    except ValueError as error:
        raise UserError(f"{what} {path} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{what} {path} is not a JSON object; make one with 'headpool select'")
    return data
