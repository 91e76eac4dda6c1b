"""What onnx.checker says of a graph and its external data.

>>> check_graph(Path("path/to/onnx/model.onnx"))

It knows the standard operators. ONNX Runtime's own are in a domain of theirs, which it passes over;
but one of them, SimplifiedLayerNormalization, ONNX Runtime keeps among the standard ones. For the
check alone it goes to where the others are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.checker

from besa.errors import BesaError, reason_of
from besa.model.links import check_link

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
        BesaError: it is damaged, or they are missing or cut off, or elsewhere than beside it.
    """
    check_link(path.parent, path)
    if path.exists() and not path.is_file():
        raise BesaError(f"{path} is no file: export the model again")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # noqa: BLE001 - of protobuf's many kinds
        raise BesaError(f"{path} is missing or damaged: {reason_of(error)}") from None
    for tensor in _tensors(model):
        _check_external(tensor, path)
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants of a graph: those of the graphs and functions within it, too."""
    nodes = [node for function in model.functions for node in function.node]
    graphs = [model.graph]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        while nodes:
            for attribute in nodes.pop().attribute:
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                yield from (attribute.t, *attribute.tensors)


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Whether a constant's data are within their file, and that beside the graph."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    where = {entry.key: entry.value for entry in tensor.external_data}
    name = where.get("location", "")
    plain = isinstance(name, str) and Path(name).name == name and "\0" not in name
    if not plain or name in ("", ".."):
        raise BesaError(
            f"{path} has data in {name[:80]!r}, which is no file beside it: export the model again"
        )
    data = path.with_name(name)
    check_link(path.parent, data)
    try:
        start, length = int(where.get("offset", 0)), int(where.get("length", 0))
    except ValueError:
        start, length = -1, 0
    if min(start, length) < 0:
        raise BesaError(f"{path} is damaged ({tensor.name} lies nowhere): export the model again")
    end = start + length
    size = data.stat().st_size if data.is_file() else None
    if size is None:
        raise BesaError(f"{data} is missing: copy it from where {path.name} comes from")
    if size < end:
        raise BesaError(f"{data} is cut off: it has {size:,} bytes of at least {end:,}")
