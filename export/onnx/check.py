"""What onnx.checker says of a graph and its external data.

>>> check_graph(Path("path/to/onnx/model.onnx"))

It knows the standard operators. ONNX Runtime's own are in a domain of theirs, which it passes over;
but one of them, SimplifiedLayerNormalization, ONNX Runtime keeps among the standard ones. For the
check alone it goes to where the others are.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.checker

from besa.errors import BesaError

_OWN = ("SimplifiedLayerNormalization",)


def check_graph(path: Path) -> None:
    """Checks a graph, and that its external data are there to their last byte.

    Raises:
        BesaError: what is wrong, in one line.
    """
    model = load_whole(path)
    for node in model.graph.node:
        if node.domain == "" and node.op_type in _OWN:
            node.domain = "com.microsoft"
    copy = path.with_name(path.name + ".checked")
    try:
        copy.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(copy))
    except onnx.checker.ValidationError as error:
        raise BesaError(f"{path} is no valid graph: {str(error).splitlines()[0]}") from None
    finally:
        copy.unlink(missing_ok=True)


def load_whole(path: Path) -> onnx.ModelProto:
    """A graph without its external data, which are there to their last byte.

    Raises:
        BesaError: it is damaged, or they are missing or cut off.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # noqa: BLE001 - of protobuf's many kinds
        raise BesaError(f"{path} is missing or damaged: {error}") from None
    for tensor in model.graph.initializer:
        _check_external(tensor, path)
    return model


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Whether an initializer's data are within their file."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    where = {entry.key: entry.value for entry in tensor.external_data}
    data = path.with_name(where["location"])
    end = int(where.get("offset", 0)) + int(where.get("length", 0))
    size = data.stat().st_size if data.is_file() else None
    if size is None:
        raise BesaError(f"{data} is missing: copy it from where {path.name} comes from")
    if size < end:
        raise BesaError(f"{data} is cut off: it has {size:,} bytes of at least {end:,}")
