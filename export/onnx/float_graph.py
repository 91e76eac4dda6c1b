"""The float graph of a checkpoint: built, and compared tightly before anything is made of it.

>>> from besa.model.loading import load_model
>>> source, out = Path("path/to/pruned"), Path("float")
>>> out.mkdir()
>>> expected = reference_of(load_model(source, "float32", "cpu"))
>>> build_float_graph(source, out, "genai", expected).error < 1e-4
True

What a graph does wrong, rounding hides: a scale of positions that it drops costs an int4 graph no
more than its four bits. So the graph is float32 first, and its text is longer than any window of
the model and than any boundary of its positions, as far as `MOST_TOKENS` go.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from besa.errors import BesaError, BesaWarning
from besa.export.config import ExportConfig
from besa.export.onnx.builder import MODEL, GraphError, build
from besa.export.onnx.decoder import Decoder, Reference
from besa.export.onnx.runtime import open_session, reason
from besa.export.onnx.standard import build_standard
from besa.model.export_record import LogitsCheck
from besa.model.files import GENAI_CONFIG

MOST_TOKENS = 2048

# Tokens that are compared beyond a boundary, and where there is none.
_BEYOND = 64

# The relative error of float32 logits beyond which a graph is another model's. Sums in another
# order stay below 1e-5, the fused attention's approximation of tanh below 2e-3; where the reference
# is computed in the checkpoint's own 16 bits, no less than that dtype's rounding can be seen.
_MOST_ERROR = {"float32": 5e-3}
_MOST_ERROR_16 = 0.05

# Settings of a config that name a number of tokens from which on a model does something else.
_BOUNDARIES = ("window", "chunk", "original_max_position")


class CannotRunError(GraphError):
    """ONNX Runtime's CPU provider cannot run a graph; another provider may."""


def float_graph(
    source: Path,
    out: Path,
    config: ExportConfig,
    precision: str,
    device: str,
    expected: Reference,
) -> str:
    """Writes the float graph that all is made of, of the kind that is the model's; tells which.

    Args:
        config: whether it is to be a standard one, and whether it is to be sparse.
        precision, device: what is to be made of it: the builder alone rounds dense weights, and
            makes graphs for GPUs.

    Raises:
        BesaError: there is no such graph, or none that can be made into what was asked for.
    """
    trust = config.trust_remote_code
    if config.onnx_graph == "standard":
        _standard(source, out, expected, trust)
        return "standard"
    try:
        build_float_graph(source, out, "genai", expected, trust)
        return "genai"
    except CannotRunError as error:
        if device == "cuda":  # its provider knows more operators
            return "genai"
        failed: GraphError = error
    except GraphError as error:
        failed = error
    if device == "cuda":
        raise BesaError(f"{failed}; for the CPU it becomes a standard one") from None
    if precision != "fp32" and not config.sparse:
        raise BesaError(f"{failed}; without --precision it becomes a standard one") from None
    try:
        _standard(source, out, expected, trust)
    except BesaError as error:
        raise BesaError(f"{failed}; and {error}") from None
    warnings.warn(f"{failed}; it becomes a standard one", BesaWarning, stacklevel=2)
    return "standard"


def _standard(source: Path, out: Path, expected: Reference, trust_remote_code: bool) -> None:
    try:
        build_float_graph(source, out, "standard", expected, trust_remote_code)
    except GraphError as error:
        raise BesaError(
            f"{error}, so there is no ONNX graph of it: serve the checkpoint itself"
        ) from None


def build_float_graph(
    source: Path, out: Path, kind: str, expected: Reference, trust_remote_code: bool = False
) -> LogitsCheck:
    """Writes a float32 graph to `out`, and tells how far its logits are off.

    Args:
        kind: "genai" or "standard".
        expected: transformers' logits.
        trust_remote_code: whether code that lies beside the checkpoint may run.

    Raises:
        GraphError: there is none of that kind, or it is another model's. Nothing is left in `out`.
        CannotRunError: it is there, but cannot be run here.
    """
    try:
        if kind == "genai":
            build(source, out, "fp32", trust_remote_code=trust_remote_code)
        else:
            build_standard(source, out, trust_remote_code)
        check = check_logits(out, source, expected)
        if not check.error <= _MOST_ERROR.get(check.dtype, _MOST_ERROR_16):
            raise GraphError(
                f"{source}: the {kind} graph's logits are off by {check.error:.2g} of transformers'"
            )
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
    return check


def check_logits(
    path: Path, source: Path, expected: Reference, library: str | None = None
) -> LogitsCheck:
    """How far the logits of the graph in `path` are from transformers'.

    Args:
        source: the checkpoint, for messages.
        library: of operators; for sparse graphs.

    Raises:
        CannotRunError: ONNX Runtime cannot run it on this CPU.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", "0").split(",")[0] or 0)
    described = json.loads((path / GENAI_CONFIG).read_text(encoding="utf-8"))
    try:
        session = open_session(path / MODEL, library, threads)
        return expected.check(Decoder(session, described["model"]["decoder"]["head_size"]))
    except BesaError as error:
        raise CannotRunError(str(error)) from None
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises many kinds
        raise CannotRunError(
            f"ONNX Runtime cannot run the graph of {source} ({reason(error)})"
        ) from None


def reference_of(model: Any) -> Reference:
    """What a loaded model makes of a text that is long enough."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
    longest = max(_boundaries(config.to_dict()), default=0)
    return Reference.of(model, min(MOST_TOKENS, most, longest + _BEYOND))


def _boundaries(settings: Any) -> Iterator[int]:
    """The numbers of tokens that a config's settings name as boundaries, in whatever part of it."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _boundaries(value)
        elif isinstance(value, int) and any(word in str(name) for word in _BOUNDARIES):
            yield value
