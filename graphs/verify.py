"""Is a written graph valid ONNX? The checker's full check with strict shape inference, on the file as others will read it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from graphs import canonical
from graphs.errors import GraphError


def check_model(path: Path) -> None:
    """onnx.checker on the graph file `path` without reading its weights. Raises GraphError with the checker's first line.

    External weights are shown to the checker as inputs of their dtype and shape: it refuses files with several hard links.
    Where they lie is checked here instead: inside a file of the bundle, with the bytes that shape and dtype say.
    """
    canonical.register()
    try:
        onnx.checker.check_model(_weights_as_inputs(onnx.load(path, load_external_data=False)), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(f"{path.name} is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    for name, value in ir.load(path).graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise GraphError(f"{path.name}: weight {name} has no value")
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(path, name, tensor)


def _weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    kept = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _check_external(path: Path, name: str, tensor: ir.ExternalTensor) -> None:
    file = path.parent / tensor.location
    offset, length = tensor.offset or 0, tensor.length or 0
    if Path(tensor.location).name != str(tensor.location):
        raise GraphError(f"{path.name}: weight {name} lies at {tensor.location}, outside the bundle's folder")
    if not file.is_file() or offset + length > file.stat().st_size or length != tensor.nbytes:
        raise GraphError(f"{path.name}: weight {name} needs {tensor.nbytes} bytes at {offset} of {tensor.location}")
