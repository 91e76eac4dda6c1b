"""What a config.json says of how its weights are stored: as floats, or in some other way.

Tools that prune leave notes there beside float weights, too. llm-compressor and SparseML write a
`sparsity_config`, alone or within what usually says that a model is quantized. Such notes are of
the weights as they were, and are dropped from what is read and from what is written.

>>> note = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}}
>>> stored_as({"quantization_config": note}).floats
True
>>> stored_as({"quantization_config": {"quant_method": "gptq", "bits": 4}})
StoredAs(method='gptq', floats=False, packed_zeros=False)
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa.errors import BesaError

# Where such notes stand in a config.json, today's place first.
NOTES = ("quantization_config", "compression_config", "sparsity_config")

# The method whose configs also describe floats, and what it calls weights that are stored whole.
_COMPRESSED = "compressed-tensors"
_WHOLE = (None, "dense")
_BITMASKS = ("sparse-bitmask", "sparse-24-bitmask")


@dataclass(frozen=True)
class StoredAs:
    """How weights are stored.

    Attributes:
        method: what the notes call it; None where there are none.
        floats: whether each weight is one floating tensor under its own name.
        packed_zeros: whether it would be, but for zeros that are left out by a bitmask.
    """

    method: str | None
    floats: bool
    packed_zeros: bool = False


def stored_as(config: Mapping[str, Any]) -> StoredAs:
    """Reads the notes of a config.json.

    Raises:
        BesaError: one of them is no JSON object.
    """
    quantization = _note(config, NOTES[0]) or _note(config, NOTES[1])
    sparsity = _note(quantization, NOTES[2]) or _note(config, NOTES[2])
    if not quantization and not sparsity:
        return StoredAs(None, True)
    method = quantization.get("quant_method", _COMPRESSED)
    form = sparsity.get("format")
    if method == _COMPRESSED and not quantization.get("config_groups"):
        name = method if form in _WHOLE else f"{method}, {form}"
        return StoredAs(name, form in _WHOLE, form in _BITMASKS)
    return StoredAs(str(method), False)


def _note(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a config says under a name; empty where it says nothing."""
    found = config.get(name) or {}
    if not isinstance(found, Mapping):
        raise BesaError(f"the {name} of config.json is no JSON object: download the model again")
    return dict(found)


def without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says of how weights are stored."""
    return {name: value for name, value in config.items() if name not in NOTES}


def dequantizing(method: str | None) -> type | None:
    """transformers' config for a method, if it can load such weights as floats on any machine."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kind: type | None = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        return None
    return kind


def check_floats(directory: Path, config: Any) -> None:
    """Raises a BesaError, with what to do, if a transformers config is of no float weights."""
    found = stored_as(vars(config))
    if not found.floats:
        raise not_floats(directory, found)


def not_floats(directory: Path, found: StoredAs) -> BesaError:
    """What is wrong with weights that are no floats, and what to do."""
    remedy = "take the float model that it was made from"
    if found.method == "besa" or found.packed_zeros or dequantizing(found.method):
        source = shlex.quote(str(directory))
        remedy = f"unpack it first, with `besa export --format dense {source} --out DENSE`"
    return BesaError(f"{directory} is quantized ({found.method}): {remedy}")


def drop_notes(config: Any) -> None:
    """Takes what a transformers config says of how weights are stored from it."""
    for name in NOTES:
        vars(config).pop(name, None)
