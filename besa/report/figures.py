"""The figures that a page and a card quote of a pruning run, worked out from its record.

>>> from besa.model.record import read_record
>>> record = read_record(Path("path/to/pruned"))
>>> summary = summarise(record)
>>> summary.method, summary.achieved
('Wanda', 0.5)
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from besa.model.prune_record import BlockRecord, LinearRecord, PruneRecord
from besa.report.names import recipe_name, short_name

FLAGS = (  # of `besa prune`: what of the settings a user can type
    "method",
    "effort",
    "rotate",
    "update",
    "teacher",
    "sparsity",
    "pattern",
    "quantize",
    "granularity",
    "calibration",
    "column",
    "separator",
    "bos",
    "samples",
    "expert_tokens",
    "drop_experts",
    "seqlen",
    "epochs",
    "seed",
    "device",
    "dtype",
    "include",
    "exclude",
    "activations",
)
MANY_LINEARS = 24  # more names than this, and an expert's index no longer gets a line of its own


@dataclass(frozen=True)
class Summary:
    """The run in a few figures.

    Attributes:
        method: its name for people.
        target, achieved: fractions of `weights` that were to be, and are, zero.
        error, error_wanda: means over the blocks that have them.
        change: the ratio of the two minus one, over the blocks that have both.
        better: of the `compared` blocks that have both, those where `error` is lower.
    """

    method: str
    target: float
    achieved: float
    zeros: int
    weights: int
    error: float | None
    error_wanda: float | None
    change: float | None
    better: int
    compared: int


@dataclass(frozen=True)
class Cell:
    """All linears of one name in one block (one linear, or a block's experts).

    Attributes:
        low, high: the rows' lowest and highest fraction of zeros.
        histogram: rows in each of equal bins over [0, 1]; empty if it was not recorded.
    """

    sparsity: float
    weights: int
    low: float
    high: float
    histogram: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.histogram)


def summarise(record: PruneRecord) -> Summary:
    errors = [finite(block.error) for block in record.blocks]
    wandas = [finite(block.error_wanda) for block in record.blocks]
    pairs = [(e, w) for e, w in zip(errors, wandas, strict=True) if e is not None and w is not None]
    own, other = mean([e for e, _ in pairs]), mean([w for _, w in pairs])
    sparsity = record.sparsity
    return Summary(
        method=recipe_name(record.settings),
        target=sparsity.achieved if sparsity.target is None else sparsity.target,
        achieved=sparsity.achieved,
        zeros=sparsity.zeros,
        weights=sparsity.weights,
        error=own if pairs else mean([e for e in errors if e is not None]),
        error_wanda=other,
        change=own / other - 1 if own is not None and other else None,
        better=sum(e < w for e, w in pairs),
        compared=len(pairs),
    )


def sparsity_in_words(record: PruneRecord) -> str:
    """`unstructured, with a learned rate for each row`, `2:4 pattern`."""
    settings = record.settings
    pattern = str(settings.get("pattern", "unstructured"))
    if ":" in pattern:
        return f"{pattern} pattern"
    granularity = settings.get("granularity")
    if settings.get("method") != "besa" or not granularity:
        return pattern
    each = "linear" if granularity == "layer" else granularity
    return f"{pattern}, with a learned rate for each {each}"


def finite(value: float | None) -> float | None:
    """None for what is no number to draw or to print."""
    return value if value is not None and math.isfinite(value) else None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def grid(blocks: Sequence[BlockRecord]) -> dict[str, list[Cell | None]]:
    """name → one cell per block, None where a block has no such linear. Model order is kept."""
    names = {linear.name: linear.name for block in blocks for linear in block.linears}
    if len(names) > MANY_LINEARS:
        names = {name: re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    table: dict[str, list[Cell | None]] = {group: [] for group in names.values()}
    for block in blocks:
        members: dict[str, list[LinearRecord]] = {}
        for linear in block.linears:
            members.setdefault(names[linear.name], []).append(linear)
        for group, cells in table.items():
            cells.append(cell(members[group]) if group in members else None)
    return table


def cell(linears: Sequence[LinearRecord]) -> Cell:
    """Linears of one block put together, each weighted by its size."""
    sizes = [math.prod(linear.shape) for linear in linears]
    total = sum(sizes)
    rate = sum(n * linear.sparsity for n, linear in zip(sizes, linears, strict=True)) / total
    rows = [linear.rows for linear in linears if linear.rows is not None]
    return Cell(
        sparsity=rate,
        weights=total,
        low=min((r.min for r in rows), default=rate),
        high=max((r.max for r in rows), default=rate),
        histogram=_add([r.histogram for r in rows]),
    )


def merge(cells: Sequence[Cell | None]) -> Cell:
    """Cells put together: all blocks of one name, or all names of one block."""
    present = [c for c in cells if c]
    weights = sum(c.weights for c in present)
    rate = sum(c.sparsity * c.weights for c in present) / weights
    return Cell(
        sparsity=rate,
        weights=weights,
        low=min(c.low for c in present),
        high=max(c.high for c in present),
        histogram=_add([c.histogram for c in present if c.rows]),
    )


def _add(histograms: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*histograms, strict=True)))


def quantile(cell: Cell, share: float) -> float:
    """The rate below which `share` of the rows lie, linear inside a bin, kept in [low, high]."""
    wanted, seen, bins = share * cell.rows, 0, len(cell.histogram)
    for index, count in enumerate(cell.histogram):
        if count and seen + count >= wanted:
            value = (index + (wanted - seen) / count) / bins
            return min(max(value, cell.low), cell.high)
        seen += count
    return cell.high


def unrouted(blocks: Sequence[BlockRecord]) -> list[tuple[str, str]]:
    """Each linear with experts that saw no calibration token, and which experts those are."""
    return [
        (
            f"Block {block.index}, {linear.name}",
            f"expert{'s' if len(linear.unrouted_experts) > 1 else ''} "
            + ", ".join(map(str, linear.unrouted_experts)),
        )
        for block in blocks
        for linear in block.linears
        if linear.unrouted_experts
    ]


def public(record: PruneRecord) -> PruneRecord:
    """The record with nothing of this machine's folders in its settings: names instead of paths."""
    settings = {
        key: Path(value).name if isinstance(value, str) and re.match(r"[/~.]", value) else value
        for key, value in record.settings.items()
    }
    model = short_name(record.model)
    if "model" in settings:
        settings["model"] = model
    return replace(record, model=model, settings=settings)


def command(record: PruneRecord, out: str = "PRUNED") -> str:
    """The `besa prune` line that this run's settings stand for, quoted for a shell."""
    arguments = ["besa", "prune", record.model]
    for key in FLAGS:
        value = record.settings.get(key)
        if value is not None:
            arguments += [f"--{key}", str(value)]
    return shlex.join([*arguments, "--out", out])
