"""Weights for a plan that was built without them (--strip), from the bundle it lies in."""

from __future__ import annotations

from typing import Any

from exporter.bundle import Bundle
from exporter.engines.tensorrt.api import Api, Messages
from exporter.engines.tensorrt.build import source_of
from exporter.engines.tensorrt.parts import Part
from exporter.engines.tensorrt.record import Recipe, sha256
from exporter.errors import EngineError


def refit(api: Api, engine: Any, log: Any, messages: Messages, bundle: Bundle, part: Part, recipe: Recipe) -> None:
    """Give `engine` the weights it was built from. Raises EngineError where the bundle's are others or do not fit."""
    for name, built in recipe.weights_sha256.items():
        if (found := sha256(bundle.path / name)) != built:
            raise EngineError(f"{bundle.path / name} has the SHA-256 {found[:12]}…, the engine was built from {built[:12]}…")
    source, _ = source_of(bundle, part, recipe)
    refitter = api.trt.Refitter(engine, log)
    parser = api.trt.OnnxParserRefitter(refitter, log)
    done = parser.load_model_proto(source.model.SerializeToString(), str(source.path))
    done = done and all(parser.load_initializer(name, *place) for name, place in source.places.items())
    if not (done and parser.refit_model_proto() and refitter.refit_cuda_engine()):
        raise EngineError(f"the weights of variant {part.label} do not go into its engine: {messages.reason()}")
