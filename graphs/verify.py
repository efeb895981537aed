"""Is a written graph valid ONNX? The checker's full check with strict shape inference, on the file as others will read it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from graphs import canonical
from graphs.errors import GraphError


def check_model(path: Path) -> None:
    """onnx.checker on the graph file `path` without its weights' bytes. Raises GraphError with the checker's first line.

    The external data's places and sizes are checked here, because the checker would load all of it: each tensor must lie
    inside its file and have the bytes that its shape and dtype say.
    """
    canonical.register()
    model = onnx.load(path, load_external_data=False)
    try:
        onnx.checker.check_model(model, full_check=False)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"{path.name} is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise GraphError(f"{path.name}: weight {name} has no value")
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(path, name, tensor)


def _check_external(path: Path, name: str, tensor: ir.ExternalTensor) -> None:
    file = path.parent / tensor.location
    offset, length = tensor.offset or 0, tensor.length or 0
    if Path(tensor.location).name != str(tensor.location):
        raise GraphError(f"{path.name}: weight {name} lies at {tensor.location}, outside the bundle's folder")
    if not file.is_file() or offset + length > file.stat().st_size or length != tensor.nbytes:
        raise GraphError(f"{path.name}: weight {name} needs {tensor.nbytes} bytes at {offset} of {tensor.location}")
