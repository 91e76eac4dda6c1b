"""What is exported: a plain checkpoint, with its zeros stored like any other weight.

>>> open_plain("path/to/pruned").blocks_name
'model.layers'
>>> open_plain("path/to/sparse")
Traceback (most recent call last):
besa.errors.BesaError: path/to/sparse is packed already: ...
"""

from __future__ import annotations

from pathlib import Path

from besa.errors import BesaError
from besa.formats import QUANT_METHOD
from besa.model.checkpoint import Checkpoint
from besa.model.files import resolve
from besa.model.json_files import read_object


def open_plain(model: str | Path, trust_remote_code: bool = False) -> Checkpoint:
    """Opens a directory or hub id for export; reads headers only.

    Args:
        trust_remote_code: whether code that lies beside the checkpoint may run.

    Raises:
        BesaError: it is packed or quantized already, or no whole checkpoint.
    """
    directory = resolve(model)
    check_plain(directory)
    return Checkpoint.open(directory, trust_remote_code)


def check_plain(directory: Path) -> None:
    """Raises a BesaError for what is packed already; what else is wrong, `Checkpoint.open` says."""
    try:
        method = read_object(directory / "config.json")["quantization_config"]["quant_method"]
    except (BesaError, KeyError, TypeError):
        return
    if method == QUANT_METHOD:
        raise BesaError(
            f"{directory} is packed already: serve it as it is, or unpack it with --format dense"
        )
