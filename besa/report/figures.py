"""The figures that a page and a card quote, worked out from a run's record; and how they read.

>>> percent(0.4999), signed(0.186), duration(123.4), size(3 * 2**30), short_name("/a/b/Llama-7b/")
('50.0%', '+18.6%', '2 min 03 s', '3.0 GiB', 'Llama-7b')
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]

NAMES = {"besa": "BESA", "wanda": "Wanda", "sparsegpt": "SparseGPT", "magnitude": "Magnitude"}
NONE = "\N{EN DASH}"  # what stands where there is no figure
FLAGS = (  # of `besa prune`: what of the settings a user can type
    "method",
    "sparsity",
    "pattern",
    "granularity",
    "calibration",
    "samples",
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
    """`error` and `error_wanda` are means over the blocks that have them; `change` is their
    ratio minus one, over the blocks that have both; `better` counts those where `error` is lower.
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
    """All linears of one name in one block (one linear, or a block's experts)."""

    sparsity: float
    weights: int
    low: float  # the rows' lowest and highest rates
    high: float
    histogram: tuple[int, ...]  # rows per bin, equal bins over [0, 1]; empty if not recorded

    @property
    def rows(self) -> int:
        return sum(self.histogram)


def summarise(record: Record) -> Summary:
    errors = [finite(block.get("error")) for block in record["blocks"]]
    wandas = [finite(block.get("error_wanda")) for block in record["blocks"]]
    pairs = [(e, w) for e, w in zip(errors, wandas, strict=True) if e is not None and w is not None]
    own, other = mean([e for e, _ in pairs]), mean([w for _, w in pairs])
    sparsity = record["sparsity"]
    return Summary(
        method=method_name(record["settings"].get("method")),
        target=float(sparsity["target"]),
        achieved=float(sparsity["achieved"]),
        zeros=int(sparsity["zeros"]),
        weights=int(sparsity["weights"]),
        error=own if pairs else mean([e for e in errors if e is not None]),
        error_wanda=other,
        change=own / other - 1 if own is not None and other else None,
        better=sum(e < w for e, w in pairs),
        compared=len(pairs),
    )


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def grid(blocks: list[Record]) -> dict[str, list[Cell | None]]:
    """name → one cell per block, None where a block has no such linear. Model order is kept."""
    names = {linear["name"]: linear["name"] for block in blocks for linear in block["linears"]}
    if len(names) > MANY_LINEARS:
        names = {name: re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names}
    table: dict[str, list[Cell | None]] = {group: [] for group in names.values()}
    for block in blocks:
        members: dict[str, list[Record]] = {}
        for linear in block["linears"]:
            members.setdefault(names[linear["name"]], []).append(linear)
        for group, cells in table.items():
            cells.append(cell(members[group]) if group in members else None)
    return table


def cell(linears: list[Record]) -> Cell:
    sizes = [math.prod(linear["shape"]) for linear in linears]
    total = sum(sizes)
    rate = sum(n * linear["sparsity"] for n, linear in zip(sizes, linears, strict=True)) / total
    rows = [linear["rows"] for linear in linears if linear.get("rows")]
    return Cell(
        sparsity=rate,
        weights=total,
        low=min((r["min"] for r in rows), default=rate),
        high=max((r["max"] for r in rows), default=rate),
        histogram=tuple(map(sum, zip(*(r["histogram"] for r in rows), strict=True))),
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
        histogram=tuple(map(sum, zip(*(c.histogram for c in present if c.rows), strict=True))),
    )


def quantile(cell: Cell, share: float) -> float:
    """The rate below which `share` of the rows lie, linear inside a bin, kept in [low, high]."""
    wanted, seen, bins = share * cell.rows, 0, len(cell.histogram)
    for index, count in enumerate(cell.histogram):
        if count and seen + count >= wanted:
            value = (index + (wanted - seen) / count) / bins
            return min(max(value, cell.low), cell.high)
        seen += count
    return cell.high


def unrouted(blocks: list[Record]) -> list[str]:
    """One line per linear that has experts which saw no calibration token."""
    return [
        f"Block {block['index']}, {linear['name']}: "
        + f"expert{'s' if len(linear['unrouted_experts']) > 1 else ''} "
        + ", ".join(map(str, linear["unrouted_experts"]))
        for block in blocks
        for linear in block["linears"]
        if linear.get("unrouted_experts")
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """`self_attn.q_proj` → `q_proj`, if that leaves every name its own."""
    last = [name.rsplit(".", 1)[-1] for name in names]
    return last if len(set(last)) == len(names) and "*" not in last else list(names)


def method_name(method: Any) -> str:
    return NAMES.get(str(method), str(method))


def hub_id(model: str) -> str | None:
    """The Hugging Face id that a model argument or a cache folder stands for, if it is one."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return model if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model) else None


def short_name(model: str) -> str:
    """A model's name without the folders before it."""
    return hub_id(model) or re.split(r"[/\\]", model.rstrip("/\\"))[-1] or model


def public(record: Record) -> Record:
    """The record with nothing of this machine's folders in its settings: names instead of paths."""
    settings = {
        key: Path(value).name if isinstance(value, str) and re.match(r"[/~.]", value) else value
        for key, value in record["settings"].items()
    }
    model = short_name(str(record["model"]))
    if "model" in settings:
        settings["model"] = model
    return {**record, "model": model, "settings": settings}


def command(record: Record, out: str = "PRUNED") -> str:
    """The `besa prune` line that this run's settings stand for, quoted for a shell."""
    words = ["besa", "prune", str(record["model"])]
    for key in FLAGS:
        value = record["settings"].get(key)
        if value is not None:
            words += [f"--{key}", str(value)]
    return shlex.join([*words, "--out", out])


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def rate(share: float) -> str:
    """A target as a user would write it: 50%, 62.5%."""
    return f"{100 * share:.6g}%"


def signed(share: float, digits: int = 1) -> str:
    words = f"{100 * share:+.{digits}f}%".replace("-", "\N{MINUS SIGN}")
    return words[1:] if float(f"{100 * share:.{digits}f}") == 0 else words


def small(value: float | None) -> str:
    """Three significant figures, never an exponent unless it has to be."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    power = math.floor(math.log10(abs(value)))
    return f"{value:.{max(2 - power, 0)}f}" if -4 <= power < 6 else f"{value:.2e}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size(count: float | None) -> str:
    if count is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
