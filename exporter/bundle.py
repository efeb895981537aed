"""The bundle: one flat folder that export writes and every later stage reads.

`Bundle.open` checks everything a reader relies on, so a `Bundle` in hand is whole. Paths inside the manifest are plain file
names: a bundle cannot point outside its own folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter import contract, contract_seq2seq
from exporter.config import DTYPES, CacheForm, ModelConfig
from exporter.decode import decode, parse
from exporter.errors import BundleError, UserError, one_of
from exporter.seq2seq_config import Seq2SeqConfig
from graphs.caches import CACHES

SCHEMA = 1
MANIFEST = "headpool.json"


@dataclass(frozen=True)
class Variant:
    """One graph of a bundle with all that is needed to run it."""

    name: str  # "g4", or "g4.grouped" where the bundle holds several patterns
    graph: str  # file name of the ONNX graph
    config: ModelConfig
    pattern: str  # repeat, grouped, attention, gqa
    cache: CacheForm
    dtype: str
    logits: contract.Logits
    weights: tuple[str, ...]  # safetensors files its graph reads
    weight_bytes: int  # bytes of weights one decode step reads (a tied embedding once, untied embedding rows not at all)
    conversion: dict[str, Any] | None = None  # method, seed and KV heads before, where KV heads were changed
    quantize: str | None = None  # how its matrices are stored: a form of graphs/quantise.py
    cache_dtype: str | None = None  # fp16, int8: how its caches are stored, see graphs/caches.py; None: in `dtype`
    rounding: dict[str, Any] | None = None  # how they were rounded: method, and what it was calibrated on

    @property
    def graphs(self) -> tuple[str, ...]:
        """File names of all its graphs."""
        return (self.graph,)

    @property
    def groups(self) -> int | tuple[int, ...]:
        """KV heads: one number where all layers agree."""
        kv_heads = self.config.kv_heads
        return kv_heads[0] if len(set(kv_heads)) == 1 else kv_heads

    @property
    def precision(self) -> str:
        """What figures of it are to say: its dtype, and how its matrices and caches are stored where that is not in it."""
        calibrated = self.rounding is not None and self.rounding.get("method") == "gptq"
        weights = [f"{self.quantize} weights" + " by GPTQ" * calibrated] if self.quantize is not None else []
        cache = [f"{self.cache_dtype} cache"] if self.cache_dtype is not None else []
        return ", ".join([self.dtype, *weights, *cache])

    @property
    def kv_bytes_per_token(self) -> int:
        return self.config.kv_bytes_per_token(self.cache_dtype or self.dtype)

    def inputs(self) -> list[contract.Binding]:
        return contract.inputs(self.config, self.cache, self.dtype, self.cache_dtype)

    def outputs(self) -> list[contract.Binding]:
        return contract.outputs(self.config, self.cache, self.dtype, self.logits, self.cache_dtype)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "graph": self.graph,
            "pattern": self.pattern,
            "cache": self.cache,
            "dtype": self.dtype,
            "logits": self.logits,
            "weights": list(self.weights),
            "weight_bytes": self.weight_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "conversion": self.conversion,
            "quantize": self.quantize,
            "cache_dtype": self.cache_dtype,
            "rounding": self.rounding,
            "config": self.config.to_json(),
            "inputs": [binding.to_json() for binding in self.inputs()],
            "outputs": [binding.to_json() for binding in self.outputs()],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Variant:
        """What `to_json` wrote. Raises UserError where a key is missing or mistyped, or what follows from others does not."""
        kind = Seq2SeqVariant if data.get("encoder") is not None else cls
        derived = {key: data.get(key) for key in ("kv_bytes_per_token", "inputs", "outputs")}
        if kind is Seq2SeqVariant:
            derived |= {key: data.get(key) for key in ("encoder_inputs", "encoder_outputs")}
        variant = decode(kind, {key: value for key, value in data.items() if key not in derived}, "variant")
        if not variant.name or variant.weight_bytes < 0:
            raise UserError(f"variant {variant.name!r} has no name or a negative number of bytes")
        if variant.dtype not in DTYPES:
            raise UserError(one_of("dtype", variant.dtype, DTYPES))
        if variant.cache_dtype is not None and (
            variant.cache_dtype not in CACHES or (variant.pattern, variant.cache) != ("fused", "static")
        ):
            what = f"pattern {variant.pattern}, {variant.cache} cache"
            raise UserError(f"variant {variant.name!r} ({what}) stores its cache as {variant.cache_dtype!r}, which it cannot")
        written = variant.to_json()
        for key, value in derived.items():
            if value != written[key]:
                raise UserError(f"variant {variant.name!r}: its {key} are not what the contract says for this config")
        return variant


@dataclass(frozen=True, kw_only=True)
class Seq2SeqVariant(Variant):
    """An encoder-decoder: `encoder` runs once an input, `graph` is a step of the decoder over what it gave.

    `first` is the decoder's first step as optimum takes it; nothing of ours runs it.
    """

    config: Seq2SeqConfig
    encoder: str
    first: str | None = None

    @property
    def graphs(self) -> tuple[str, ...]:
        return (self.encoder, *([self.first] if self.first else []), self.graph)

    def inputs(self) -> list[contract.Binding]:
        return contract_seq2seq.decoder_inputs(self.config, self.cache, self.dtype)

    def outputs(self) -> list[contract.Binding]:
        return contract_seq2seq.decoder_outputs(self.config, self.cache, self.dtype, self.logits)

    def encoder_inputs(self) -> list[contract.Binding]:
        return contract_seq2seq.encoder_inputs()

    def encoder_outputs(self) -> list[contract.Binding]:
        return contract_seq2seq.encoder_outputs(self.config, self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {
            **super().to_json(),
            "encoder": self.encoder,
            "first": self.first,
            "encoder_inputs": [binding.to_json() for binding in self.encoder_inputs()],
            "encoder_outputs": [binding.to_json() for binding in self.encoder_outputs()],
        }


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    variants: tuple[Variant, ...]
    source: dict[str, Any] = field(default_factory=dict)  # name and sha256 of the checkpoint
    tools: dict[str, str] = field(default_factory=dict)  # versions of what made it

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check `path`/headpool.json. Raises BundleError."""
        path = Path(path)
        manifest = path / MANIFEST
        try:
            data = parse(manifest.read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            lack = f"has no {MANIFEST}" if path.is_dir() else "is a file" if os.path.exists(path) else "does not exist"
            remedy = "make one with 'headpool export'"
            if inside := bundles_in(path):
                lack, remedy = (
                    f"{lack}, but holds {', '.join(map(str, inside))}",
                    f"give {'one of them' if inside[1:] else 'that'}",
                )
            raise BundleError(f"{path} is not a bundle: it {lack}; {remedy}") from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{manifest} cannot be read: {' '.join(str(error).split())}; export it again") from None
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else None
            raise BundleError(f"{manifest} has schema {found!r:.40}, this headpool reads schema {SCHEMA}; export it again")
        try:
            variants = tuple(Variant.from_json(item) for item in data["variants"])
            source = decode(dict[str, Any], data.get("source", {}), "source")
            bundle = cls(path, variants, source, decode(dict[str, str], data.get("tools", {}), "tools"))
            bundle._check_files()
        except UserError as error:
            raise BundleError(f"{manifest} is damaged: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{manifest} is damaged: {type(error).__name__}: {error}") from None
        return bundle

    def _check_files(self) -> None:
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) != len(names):
            raise UserError(f"its variants are {', '.join(names) or 'none'}; there must be some, each with a name of its own")
        for name in sorted({name for variant in self.variants for name in (*variant.graphs, *variant.weights)}):
            if Path(name).name != name or name in ("", ".", ".."):
                raise UserError(f"it names {name!r}, which is not a file name in its own folder")
            if not os.path.isfile(self.path / name):
                raise UserError(f"it names {name}, which {self.path} lacks")

    def to_json(self) -> dict[str, Any]:
        variants = [variant.to_json() for variant in self.variants]
        return {"schema": SCHEMA, "source": self.source, "tools": self.tools, "variants": variants}

    def variant(self, name: str | None = None) -> Variant:
        """The variant called `name`; without a name, the only or first one."""
        if name is None:
            return self.variants[0]
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise BundleError(one_of(f"{self.path}: variant", name, [variant.name for variant in self.variants]))

    def graph_path(self, variant: Variant) -> Path:
        return self.path / variant.graph


def holds_bundle(path: Path) -> bool:
    """Whether `path` is for Bundle.open: a bundle, or a sweep's folder, of which that names the bundles inside."""
    return (path / MANIFEST).is_file() or bool(bundles_in(path))


def bundles_in(folder: Path) -> list[Path]:
    """Folders in `folder` that are bundles: a sweep's has some."""
    return [manifest.parent for manifest in sorted(folder.glob(f"*/{MANIFEST}"))]
