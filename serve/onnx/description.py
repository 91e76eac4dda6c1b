"""genai_config.json, which says how ONNX Runtime GenAI loads a model: read, and not trusted.

>>> described_by(Path("path/to/onnx"))["model"]["vocab_size"]
257

GenAI loads the library that it names, for operators of its own, and to load a library is to run
what is in it. besa's own is let through, and another one where the user says so.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from besa.errors import BesaError
from besa.export.onnx.runtime import ort_library
from besa.model.files import GENAI_CONFIG
from besa.model.json_files import read_object

# What besa itself reads of the model, beside its decoder.
_NEEDED = ("context_length", "vocab_size", "eos_token_id")

_LIBRARY = re.compile(r"\.(so|dll|dylib)(\.|$)", re.IGNORECASE)


def described_by(directory: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """What genai_config.json says of a model.

    Args:
        trust_remote_code: whether a library that lies beside the model may be loaded, whoever
            built it.

    Raises:
        BesaError: it is damaged, or names a library that is not this installation's own.
    """
    path = directory / GENAI_CONFIG
    described = read_object(path, "export the model again")
    if not isinstance(decoder := _part(described, "model", "decoder"), dict):
        raise BesaError(f"{path} is damaged (it has no decoder): export the model again")
    needed = ("filename" in decoder, *(name in described["model"] for name in _NEEDED))
    if not all(needed):
        raise BesaError(f"{path} is damaged (a part is missing): export the model again")
    for library in () if trust_remote_code else _libraries(described):
        _check_library(directory, library)
    return described


def _part(described: Any, *names: str) -> Any:
    for name in names:
        described = described.get(name) if isinstance(described, dict) else None
    return described


def _libraries(described: Any) -> Iterator[Any]:
    """The libraries that a part of genai_config.json has GenAI load."""
    parts = described.items() if isinstance(described, dict) else enumerate(described)
    for name, part in parts:
        if isinstance(part, dict | list):
            yield from _libraries(part)
        elif name == "custom_ops_library" or _LIBRARY.search(str(part)):
            yield part


def _check_library(directory: Path, library: Any) -> None:
    """Raises a BesaError for a library that is not, bit by bit, besa's own operators.

    To load one is to run what is in it.
    """
    path = directory / str(library)
    own = ort_library()
    if not path.is_file():
        raise BesaError(f"{path} is missing: put {own} there")
    if not filecmp.cmp(path, own, shallow=False):
        raise BesaError(
            f"{path} is a library that this besa did not build: put {own} in its place, or give "
            "--trust-remote-code to run it"
        )
