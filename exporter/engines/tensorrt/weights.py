"""A variant's graph as TensorRT is given it: shapes fixed, weights mapped from the bundle's files and never copied by us."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from exporter.bundle import Bundle
from exporter.engines.tensorrt.parts import Part
from exporter.errors import BundleError


@dataclass
class Source:
    """A graph without its large weights, and where those are: initialiser → (address, bytes). It keeps their memory."""

    model: onnx.ModelProto
    path: Path
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    maps: dict[str, mmap.mmap] = field(default_factory=dict)  # by file name
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # uint8 [n] of each weight, mapped or memory of our own
    saved: int = 0  # bytes that quantised weights take less

    def release(self) -> None:
        """Hand read pages back: they count as this process's memory, and come again from the page cache when needed."""
        for mapped in self.maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def numbers(self) -> dict[str, float]:
        """The constants that are one number, by name."""
        single = [t for t in self.model.graph.initializer if math.prod(t.dims) == 1 and t.name not in self.places]
        return {tensor.name: float(numpy_helper.to_array(tensor).reshape(-1)[0].astype(np.float64)) for tensor in single}

    def place(self, name: str, data: np.ndarray) -> None:
        """Give the weight `name` the contiguous memory of `data`."""
        self.arrays[name] = data
        self.places[name] = (int(data.ctypes.data), data.nbytes)


def open_source(bundle: Bundle, part: Part, batch: int, capacity: int) -> Source:
    """The part's graph with B and S fixed; TensorRT's cache layer wants S as a number. Raises BundleError."""
    path = bundle.path / part.graph
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises classes of its own
        raise BundleError(
            f"{path} is not an ONNX graph: {' '.join(str(error).split())[:200]}; export the bundle again"
        ) from None
    if not model.graph.node:
        raise BundleError(f"{path} has no nodes; it is damaged, export the bundle again")
    fix_shapes(model, part.sizes(batch, capacity))
    source = Source(model, path)
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        try:
            place = ExternalDataInfo(tensor)  # raises ValueError for what is no place
            name, offset, length = place.location, int(place.offset or 0), int(place.length or 0)
        except ValueError:
            name, length = "", 0
        if not name or not length:
            raise BundleError(f"{path} does not say where weight {tensor.name} lies; it is damaged, export the bundle again")
        if name not in part.variant.weights:
            raise BundleError(
                f"{path}: weight {tensor.name} lies in {name}, which is not a file of variant {part.variant.name}"
            )
        if name not in source.maps:
            with open(bundle.path / name, "rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise BundleError(f"{bundle.path / name} is empty; it is damaged, export the bundle again")
                source.maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if offset + length > len(source.maps[name]):
            raise BundleError(f"{bundle.path / name} ends inside weight {tensor.name}; it is damaged, export the bundle again")
        source.place(tensor.name, np.frombuffer(source.maps[name], np.uint8, length, offset))
    return source


def fix_shapes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
    """Give the named dimensions of inputs and outputs their numbers."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
    del model.graph.value_info[:]  # inner shapes are inferred again
