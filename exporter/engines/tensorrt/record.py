"""engine.json: what lies in a folder of engines, how it came about, and which of them fits a session.

BUNDLE/engines/<backend>-<targets>/engine.json
                                   model[.gN…].engine    a plan; of an encoder-decoder encoder[.gN…] and decoder[.gN…]
                                   model[.gN…].log       what the builder said
A batch, a capacity and weights that are not the usual ones are in the name, too: model.g3.b4.s1024.int4.engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.bundle import Bundle, Variant
from exporter.decode import decode, parse
from exporter.engines.tensorrt.api import HERE
from exporter.engines.tensorrt.parts import Name, unfit
from exporter.errors import BundleError, EngineError, UserError
from exporter.files import replacing
from exporter.units import size

SCHEMA = 1
MANIFEST = "engine.json"
FOLDER = "engines"
CHUNK = 1 << 22
AMPERE = 80  # compute capability 8.0


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: new tokens T a call, fewest, tuned for and most; of an encoder-decoder its input's tokens E."""

    name: str  # prefill, decode; input
    least: int
    best: int
    most: int


@dataclass(frozen=True)
class EngineBinding:
    """An input or output of an engine. −1 in `shape` is T or E; `alias` names the input whose memory an output is."""

    name: str
    mode: str  # input, output
    dtype: str
    shape: tuple[int, ...]
    alias: str | None = None


@dataclass(frozen=True)
class Recipe:
    """All that an engine depends on. An engine whose recipe is the same need not be built again."""

    graph_sha256: str
    weights_sha256: dict[str, str]  # by file
    backend: str
    module: str
    version: str
    targets: tuple[str, ...]
    batch: int
    capacity: int
    prefill: int
    optimisation: int | None
    workspace_bytes: int | None
    strip: bool
    compatible: tuple[str, ...]
    quantize: str | None
    code_sha256: str = ""  # of headpool's own modules that make an engine of a graph

    def loads_in(self, version: str) -> bool:
        """Whether TensorRT `version` reads the plan: the one that built it, or with --compatible version any later one."""
        return self.version == version or ("version" in self.compatible and _numbers(version) >= _numbers(self.version))

    def runs_on(self, chip: str) -> bool:
        """Whether a GPU ("sm89") runs the plan: one it was built for, or with --compatible hardware Ampere and all later."""
        return chip in self.targets or ("hardware" in self.compatible and int(chip[2:]) >= AMPERE)


@dataclass(frozen=True)
class Verified:
    """What verification found in the network. `heads` are query and KV heads, "9:3", of each layer where layers differ;
    `causal` the kinds that attention has."""

    layers: int
    fused_attention: int
    decomposable_attention: int
    cache_updates: int
    dequantised_weights: int
    heads: str | tuple[str, ...]
    causal: tuple[str, ...]


@dataclass(frozen=True)
class EngineRecord:
    """One engine. `seconds` is parsing, verifying and building; `weight_bytes` are those that a decode step reads."""

    variant: str
    file: str
    log: str
    bytes: int
    sha256: str
    seconds: float
    recipe: Recipe
    profiles: tuple[Profile, ...]
    bindings: tuple[EngineBinding, ...]
    network: Verified
    part: Name = "decoder"
    weight_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.profiles:
            raise UserError(f"{self.file!r:.60} has no profiles")

    def flaw(self, folder: Path) -> str | None:
        """What a look at the plan's size tells; None where it has the bytes that were built."""
        path = folder / self.file
        if not path.is_file():
            return f"{path} is missing, {MANIFEST} names it"
        if (found := path.stat().st_size) != self.bytes:
            return f"{path} has {found} bytes, {self.bytes} were built; it is damaged"
        return None

    def intact(self, folder: Path) -> bool:
        """Whether the plan on disk is the one that was built."""
        return self.flaw(folder) is None and sha256(folder / self.file) == self.sha256


def folder_name(backend: str, targets: tuple[str, ...]) -> str:
    return "-".join((backend, *targets))


def read(folder: Path) -> tuple[EngineRecord, ...]:
    """The engines of one folder; none where it has no engine.json. Raises BundleError."""
    path = folder / MANIFEST
    if not path.is_file():
        return ()
    try:
        data = parse(path.read_text("utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            there = data.get("schema") if isinstance(data, dict) else None
            raise UserError(f"its schema is {there!r:.40}, this headpool reads {SCHEMA}")
        records = decode(tuple[EngineRecord, ...], data.get("engines"), "engines")
        for record in records:
            for name in (record.file, record.log):
                if Path(name).name != name or name in ("", ".", ".."):
                    raise UserError(f"it names {name!r}, which is not a file name in its own folder")
        return records
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {' '.join(str(error).split())}; remove the folder and build again") from None


def write(folder: Path, records: tuple[EngineRecord, ...]) -> None:
    """Put engine.json in place of the one there, in one step."""
    data = {"schema": SCHEMA, "engines": [dataclasses.asdict(record) for record in records]}
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def engines_of(bundle: Path) -> Iterator[tuple[Path, EngineRecord]]:
    """Every engine of a bundle with its folder, in order of names."""
    root = bundle / FOLDER
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        for record in read(folder):
            yield folder, record


@dataclass(frozen=True)
class Wanted:
    """What a session asks of an engine. `quantize` None takes any, plain weights first."""

    backend: str
    version: str
    batch: int
    capacity: int
    quantize: str | None = None


def choose(bundle: Bundle, variant: Variant, wanted: Wanted, device: str | None = None) -> tuple[Path, EngineRecord]:
    """The engine that decodes `variant` and that a session can use on `device` ("sm89"; None where that is not known yet).

    Of several, one with plain weights, and then the smallest capacity. Raises EngineError that says what is there instead.
    """
    name, w = variant.name, wanted
    weights = "" if w.quantize is None else f" --quantize {w.quantize}"
    sizes = "" if w.batch == 1 else f" --batch {w.batch}"
    command = f"headpool build {bundle.path} --backend {w.backend} --variant {name}"
    there = [(f, r) for f, r in engines_of(bundle.path) if r.recipe.backend == w.backend and r.variant == name]
    fitting = [(f, r) for f, r in there if r.part == "decoder"]
    if not fitting and (reason := unfit(variant)) is not None:
        raise EngineError(f"{bundle.path}: variant {reason}")
    if not fitting:
        raise EngineError(f"{bundle.path} has no {w.backend} engine of variant {name}; make one: {command}")

    def narrow(fits: Callable[[Recipe], bool], what: Callable[[Recipe], object], refusal: str) -> None:
        nonlocal fitting
        there = ", ".join(sorted({str(what(r.recipe)) for _, r in fitting}))
        fitting = [(f, r) for f, r in fitting if fits(r.recipe)]
        if not fitting:
            raise EngineError(f"variant {name} has {w.backend} engines {refusal.replace('…', there)}")

    narrow(lambda r: r.loads_in(w.version), lambda r: r.version, f"built by …, here is {w.version}; {command}")
    if device is not None:
        narrow(
            lambda r: r.runs_on(device),
            lambda r: "+".join(r.targets),
            f"for …, this GPU is {device}; {command} --target {HERE}",
        )
    if w.quantize is not None:
        refusal = f"with weights …, not {w.quantize}; {command}{weights}{sizes}"
        narrow(lambda r: r.quantize == w.quantize, lambda r: r.quantize or "as exported", refusal)
    refusal = f"for batch …, this run has {w.batch}; {command}{weights} --batch {w.batch}"
    narrow(lambda r: r.batch == w.batch, lambda r: r.batch, refusal)
    more = f"{command}{weights}{sizes} --capacity {w.capacity}"
    refusal = f"for … tokens a sequence, this run wants {w.capacity}; take less --capacity, or {more}"
    narrow(lambda r: r.capacity >= w.capacity, lambda r: r.capacity, refusal)
    return min(fitting, key=lambda item: (item[1].recipe.quantize is not None, item[1].recipe.capacity))


def _numbers(version: str) -> tuple[int, ...]:
    """11.3.1.5 → (11, 3, 1, 5); what is no number counts as 0."""
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))


def encoder_of(bundle: Bundle, folder: Path, decoder: EngineRecord) -> EngineRecord:
    """The encoder's engine that was built with `decoder`. Raises EngineError where there is none of the same recipe."""
    for record in read(folder):
        same = dataclasses.replace(record.recipe, graph_sha256=decoder.recipe.graph_sha256) == decoder.recipe
        if same and record.variant == decoder.variant and record.part == "encoder":
            return record
    raise EngineError(
        f"{folder} has no encoder's engine that was built as {decoder.file} was; make it again: headpool build {bundle.path} "
        f"--backend {decoder.recipe.backend} --variant {decoder.variant}"
    )


def describe(bundle: Path) -> list[dict[str, Any]]:
    """What `headpool inspect` says of a bundle's engines. Raises BundleError."""
    return [
        {"folder": folder.name, "flaw": record.flaw(folder), **dataclasses.asdict(record)}
        for folder, record in engines_of(bundle)
    ]


def render(engines: list[dict[str, Any]]) -> list[str]:
    """Lines of `describe` for a person."""
    lines = []
    for engine in engines:
        recipe, network = engine["recipe"], engine["network"]
        weights = f", weights {recipe['quantize']}" if recipe["quantize"] else ""
        module = f"{recipe['module']} {recipe['version']}"
        longest = "inputs" if engine["profiles"][0]["name"] == "input" else "prefill"
        rows = "" if engine["part"] == "encoder" else f" {recipe['capacity']} tokens,"
        caches = "" if engine["part"] == "encoder" else f" {network['cache_updates']} caches in place,"
        lines.append(f"  engines/{engine['folder']}/{engine['file']}: {size(engine['bytes'])}, {module}")
        lines.append(f"    batch {recipe['batch']},{rows} {longest} to {recipe['prefill']}{weights}")
        heads = network["heads"] if isinstance(network["heads"], str) else ", ".join(_runs(network["heads"]))
        lines.append(f"    verified as it was built: {_attention(network)},{caches} heads {heads}")
        if engine["flaw"]:
            lines.append(f"    {engine['flaw']}; build it again")
    return lines


def _runs(words: Sequence[str]) -> list[str]:
    """Equal neighbours counted: 8:8, 8:2 × 29."""
    counted = [(word, len(list(same))) for word, same in itertools.groupby(words)]
    return [word if count == 1 else f"{word} × {count}" for word, count in counted]


def _attention(network: dict[str, Any]) -> str:
    if count := network["decomposable_attention"]:
        return f"{count} attention layers that TensorRT may take apart (no fused kernel in fp32)"
    return f"{network['fused_attention']} fused attention layers" if network["fused_attention"] else "grouped products"
