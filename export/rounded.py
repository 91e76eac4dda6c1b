"""What `besa prune --quantize` rounded is packed as it is, unless the user says otherwise.

>>> as_pruned("path/to/pruned", ExportConfig(out="sparse", quantize="none")).quantize is None
True
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from besa.errors import BesaError
from besa.export.config import ExportConfig
from besa.kernels.abi import WHOLE
from besa.kernels.nibbles import MOST, MOST_STEP
from besa.model.files import resolve
from besa.model.prune_record import PruneRecord
from besa.model.record import read_record
from besa.pruning.grid import Grid


def as_pruned(source: str | Path, config: ExportConfig) -> ExportConfig:
    """The settings of an export, with how the model's weights were rounded where none say it.

    Raises:
        BesaError: only weights are to be rounded, and they are not.
    """
    found = _with_rounding(source, config)
    if found.weight_only and found.quantize not in WHOLE:
        raise BesaError("--weight-only is for --quantize int8 or int4: give both, or neither")
    return found


def _with_rounding(source: str | Path, config: ExportConfig) -> ExportConfig:
    if config.quantize == "none":
        return replace(config, quantize=None)
    grid = rounding_of(source)
    if grid is None:
        return config
    values = f"int{grid.bits}"
    if config.format == "onnx":
        if config.sparse and config.precision is None and config.device == "cpu":
            return replace(config, precision=values, group_size=grid.group_size)
    elif config.quantize is None:
        return replace(config, quantize=values, group_size=grid.group_size)
    return config


def rounding_of(source: str | Path) -> Grid | None:
    """What a pruned model's weights were rounded to; None if they were not, or trained since."""
    record = read_record(resolve(source))
    if not isinstance(record, PruneRecord) or record.recovery is not None:
        return None
    text = record.settings.get("quantize")
    return Grid.parse(text) if isinstance(text, str) else None


def peak_of(source: Path, group_size: int | None) -> int:
    """What the largest weight of a group becomes in eight bits.

    Rows of four bits are kept exactly if their largest weight becomes what number times step is.
    """
    grid = rounding_of(source)
    four = grid is not None and grid.bits == 4 and group_size is None
    return MOST * MOST_STEP if four else 127
