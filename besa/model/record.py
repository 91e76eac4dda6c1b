"""besa.json: what every run leaves beside the weights, read and written in one place.

>>> record = read_record(Path("path/to/pruned"))
>>> if isinstance(record, PruneRecord):
...     print(record.sparsity.achieved, len(record.blocks))
0.5 3

Each kind of run has its type: see besa.model.prune_record and besa.model.export_record. This module
loads in an instant, because it does without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from besa.errors import BesaError
from besa.model.digests import companion_digests
from besa.model.export_record import ExportRecord, OnnxRecord, PackedRecord, UnpackedRecord
from besa.model.json_files import read_object
from besa.model.prune_record import PruneRecord, Record
from besa.typed_json import ShapeError, from_json, to_json
from besa.writing import write_text

NAME = "besa.json"

Written = TypeVar("Written", bound=Record)

_EXPORTS: dict[str, type[ExportRecord]] = {
    "vllm": PackedRecord,
    "dense": UnpackedRecord,
    "onnx": OnnxRecord,
}


def read_record(directory: Path) -> Record | None:
    """The record of a directory; None if it has none, or one that besa did not write."""
    found = read_raw_record(directory)
    return None if found is None else parse_record(found)


def read_raw_record(directory: Path) -> dict[str, Any] | None:
    """The JSON of a directory's besa.json as it is; None if it cannot be read."""
    try:
        return read_object(directory / NAME)
    except BesaError:
        return None


def parse_record(found: Mapping[str, Any]) -> Record | None:
    """The record that a JSON object holds; None if it is no record of besa's."""
    kind: type[Record] | None = PruneRecord
    if found.get("command") == "export":
        kind = _EXPORTS.get(str(found.get("format")))
    try:
        return None if kind is None else from_json(kind, found, lenient=True)
    except ShapeError:
        return None


def write_record(record: Written, directory: Path) -> Written:
    """Writes besa.json, whole or not at all; gives the record with digests of what lies beside.

    Raises:
        BesaError: it could not be written.
    """
    record = replace(record, companion_digests=companion_digests(directory, record.digests))
    write_text(json.dumps(to_json(record), indent=1), directory / NAME)
    return record


def pruning_of(record: ExportRecord) -> PruneRecord | None:
    """The record of `besa prune` that an export goes back to, if besa pruned the model.

    A model may have been packed and unpacked in between.
    """
    source = record.source
    while isinstance(source, dict):
        found = parse_record(source)
        if isinstance(found, PruneRecord):
            return found
        source = source.get("source")
    return None
