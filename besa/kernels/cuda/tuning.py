"""Which way a product by records takes: measured once for each shape of weight, kept on disk.

>>> print(table(call).describe())        # of a `Call` with a weight of that shape on a GPU
tokens 1: multiply 1/16/3/2, 9.9 us; 2 to 8: ...

A way that is best for one shape is up to twice as slow for another: what counts is how evenly the
thread blocks fill the GPU. So each of a few candidates is timed for some numbers of tokens, with
the weight read from memory and not from the L2 cache, as in a model; that takes some 10 ms a shape,
plus the time to compile what no process before has used. A product that comes first while a CUDA
graph is captured, when nothing can be measured, takes the way that should be the fastest.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.kernels.cuda import cache as disk
from besa.kernels.cuda import driver
from besa.kernels.cuda.product import TYPES, Call, Expand, Multiply, Shape, Way, expansion
from besa.writing import write_text

# A way is timed for the most tokens that it is chosen for: a bucket begins where one ends.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)

_REPEATS = 5
_FLUSHED = 128 << 20  # bytes that are written to empty the L2 cache

# How many sizes of the kernel of few tokens are timed, by its row blocks: those that should fill the
# GPU best. With more row blocks a warp has more to do at a time, and x is read less often.
_FEW = {1: 3, 2: 2}  # up to 8 tokens
_MORE = {1: 1, 2: 2, 4: 2}
_STAGES = (2, 3)

_EXPAND = Expand()


def candidates(shape: Shape, tokens: int, multiprocessors: int) -> list[Way]:
    """The ways that may be the fastest."""
    ways: list[Way] = []
    for blocks, count in (_FEW if tokens <= 8 else _MORE if tokens <= 64 else {}).items():
        best: dict[int, tuple[float, int, int]] = {}  # for each number of thread blocks
        for warps, resident in _sizes(blocks, tokens):
            occupancy = _occupancy(blocks, warps, resident, shape, multiprocessors)
            best[resident] = max(best.get(resident, (0.0, 0, 0)), (occupancy, -warps, resident))
        for _, minus_warps, resident in sorted(best.values(), reverse=True)[:count]:
            several = [Multiply(blocks, -minus_warps, stages, resident) for stages in _STAGES]
            ways += [way for way in several if way.instance(shape, tokens) is not None]
    if tokens > 16 or not ways:
        ways.append(_EXPAND)
    return ways


def _sizes(blocks: int, tokens: int) -> list[tuple[int, int]]:
    """(warps, thread blocks of a multiprocessor) for which the registers suffice."""
    eights = -(-tokens // 8)
    registers = 40 + 8 * eights + (8 + 4 * eights) * blocks
    warps = min(32, 2048 // registers)  # of a multiprocessor
    return [
        (each, resident)
        for resident in range(1, 9)
        for each in range(4, min(16, warps // resident) + 1)
        if each * (resident + 1) > warps  # with room for one more, more would be better
    ]


def _occupancy(blocks: int, warps: int, resident: int, shape: Shape, multiprocessors: int) -> float:
    """How much of the time how many of 32 warps are at work, from 0 to 1.

    Thread blocks are as long as each other: the GPU is done when its fullest multiprocessor is, and a
    thread block when the warp with most tiles is.
    """
    grid, tiles = -(-shape.rows // (16 * blocks)), shape.cols // 64
    beside = min(resident, -(-grid // multiprocessors))
    rounds = -(-grid // (multiprocessors * beside))
    evenness = grid / (multiprocessors * beside * rounds) * tiles / (warps * -(-tiles // warps))
    return evenness * min(1.0, warps * beside / 32)


@dataclass(frozen=True)
class Choice:
    """A way, and what it was measured to take, in microseconds; None if nothing was measured."""

    way: Way
    us: float | None = None


@dataclass(frozen=True)
class Table:
    """The choice for each of `BUCKETS`, and one for more tokens."""

    choices: tuple[Choice, ...]

    def way(self, tokens: int) -> Way:
        """The way for a number of tokens."""
        for bucket, choice in zip(BUCKETS, self.choices, strict=False):
            if tokens <= bucket:
                return choice.way
        return self.choices[-1].way

    def describe(self) -> str:
        """One line for each run of buckets that go one way."""
        lines, low = [], 1
        for i, choice in enumerate(self.choices):
            high = BUCKETS[i] if i < len(BUCKETS) else None
            last = high is None or self.choices[i + 1].way != choice.way
            if last:
                span = f"from {low}" if high is None else f"{low} to {high}" if high > low else low
                took = "" if choice.us is None else f", {choice.us:.1f} µs"
                lines.append(f"{span} tokens: {choice.way}{took}")
                low = (high or 0) + 1
        return "\n".join(lines)


_tables: dict[tuple[int, Shape], Table] = {}


def table(call: Call) -> Table:
    """The table of the call's shape, which is measured with the call's weight if it must be."""
    key = (call.records.device.index, call.shape)
    if (found := _tables.get(key)) is not None:
        return found
    if torch.cuda.is_current_stream_capturing():
        return _untimed(call.shape, _multiprocessors(call.records.device))
    path, kept = _kept(call.records.device)
    name = _name(call.shape)
    if name in kept:
        found = _read(kept[name])
    else:
        found = _measure(call)
        _keep(path, name, found)
    _tables[key] = found
    return found


def _untimed(shape: Shape, multiprocessors: int) -> Table:
    """The first candidates."""
    ways = [candidates(shape, tokens, multiprocessors)[0] for tokens in BUCKETS]
    return Table(tuple(Choice(way) for way in [*ways, _EXPAND]))


@torch.no_grad()
def _measure(call: Call) -> Table:
    """Times all candidates on the call's weight."""
    device, shape = call.records.device, call.shape
    tried = {tokens: candidates(shape, tokens, _multiprocessors(device)) for tokens in BUCKETS}
    jobs = {
        (way.source, name)
        for tokens, ways in tried.items()
        for way in ways
        if (name := way.instance(shape, tokens)) is not None
    }
    driver.prepare(sorted(jobs), device)
    with torch.cuda.device(device):
        flush = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)
        choices = []
        for tokens, ways in tried.items():
            if len(ways) == 1:
                choices.append(Choice(ways[0]))
                continue
            x = torch.randn(tokens, shape.cols, dtype=shape.x, device=device)
            y = torch.empty(tokens, shape.rows, dtype=shape.x, device=device)
            one = Call(shape, call.records, call.offsets, call.scale, None, x, y)
            timed = [(_time(way, one, flush), i) for i, way in enumerate(ways)]
            us, best = min(timed)
            choices.append(Choice(ways[best], round(us, 2)))
    found = Table((*choices, Choice(_EXPAND)))
    driver.prepare(sorted(_instances(shape, found)), device)
    return found


def _instances(shape: Shape, found: Table) -> set[tuple[str, str]]:
    """All that the products of a table may launch, for any number of tokens."""
    ways = [(found.way(tokens), tokens) for tokens in range(1, 66)]
    names = {(way.source, way.instance(shape, tokens)) for way, tokens in ways}
    if shape.int8:
        names |= {("sparse_linear.cu", f"quantize<{TYPES[shape.x]}>")}
        names |= {
            ("expand.cu", f"rescale<{TYPES[shape.x]}>"),
            ("expand.cu", expansion(shape, torch.int8)),
        }
    return {(source, name) for source, name in names if name is not None}


def _time(way: Way, call: Call, flush: Tensor) -> float:
    """Median microseconds of a product that finds nothing in the L2 cache."""
    way.run(call)
    spans = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # takes longer than to queue what follows
        begin.record()
        way.run(call)
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in spans) * 1e3


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# ---------------------------------------------------------------- on disk


@cache
def _kept(device: torch.device) -> tuple[Path | None, dict[str, Any]]:
    """The file of the tables of this kind of GPU, and what is in it."""
    home = disk.folder()
    if home is None:
        return None, {}
    sources = "".join(
        (driver.FOLDER / name).read_text(encoding="utf-8")
        for name in ("sparse_linear.cu", "expand.cu", *driver.headers())
    )
    what = (torch.cuda.get_device_name(device), torch.__version__, BUCKETS, sources)
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    path = home.parent / "tuning" / f"{digest}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        for entry in kept.values():
            _read(entry)
        return path, kept
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return path, {}  # none yet, or damaged: measured anew


def _keep(path: Path | None, name: str, measured: Table) -> None:
    """Adds a table to the file; other processes may do so, too, and one of them wins."""
    if path is None:
        return
    kept = _kept_entries(path)
    kept[name] = [[_write(choice.way), choice.us] for choice in measured.choices]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(kept, indent=1) + "\n", path)
    except (OSError, BesaError):
        return  # a folder that can't be written: measured again by the next process


def _kept_entries(path: Path) -> dict[str, Any]:
    try:
        entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries


def _name(shape: Shape) -> str:
    return " ".join(f"{key}={value}" for key, value in asdict(shape).items())


def _write(way: Way) -> dict[str, int] | None:
    return None if isinstance(way, Expand) else asdict(way)


def _read(entry: list[Any]) -> Table:
    return Table(
        tuple(Choice(_EXPAND if way is None else Multiply(**way), us) for way, us in entry)
    )
