"""Which way a product by records takes: measured once for each shape of weight, kept on disk.

>>> shape = Shape(4096, 4096, torch.bfloat16, torch.bfloat16, True, 1152, 0, False)
>>> print(untimed(shape, Gpu(multiprocessors=132, capability=(9, 0))).describe())  # of 2:4
1 to 8 tokens: records, 1 x 16 rows, 16 warps, 2 stages
9 to 16 tokens: records, 1 x 16 rows, 13 warps, 2 stages
17 to 32 tokens: records, 1 x 16 rows, 10 warps, 2 stages
33 to 64 tokens: records, 2 x 16 rows, 8 warps, 2 stages
from 65 tokens: expand, cuBLAS

A way that is best for one shape is up to twice as slow for another: what counts is how evenly the
thread blocks fill the GPU. So each of a few candidates is timed for some numbers of tokens, with
the weight read from memory and not from the L2 cache, as in a model; that takes some 10 ms a shape,
plus the time to compile what no process before has used. A product that comes first while a CUDA
graph is captured, when nothing can be measured, takes the way that should be the fastest.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.errors import BesaError, BesaWarning
from besa.kernels.cuda import cache as disk
from besa.kernels.cuda import driver
from besa.kernels.cuda.call import Call, Needed, Shape, Way
from besa.kernels.cuda.candidates import Gpu, candidates
from besa.kernels.cuda.expansion import Expand
from besa.kernels.cuda.matmul import Config, Matmul, Plan
from besa.kernels.cuda.multiply import Multiply
from besa.writing import write_text

# A way is timed for the most tokens that it is chosen for: a bucket begins where one ends.
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

_REPEATS, _WORKS = 5, 4
# Bytes of the largest record that make no difference to a table.
_CAPACITIES = 256
_FLUSHED = 128 << 20  # bytes that are written to empty the L2 cache


@dataclass(frozen=True)
class Choice:
    """A way, and why.

    Attributes:
        us: what it was measured to take, in microseconds; None if nothing was measured.
        candidates: how many ways there were to choose from.
    """

    way: Way
    us: float | None = None
    candidates: int = 1


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
                span = f"from {low}" if high is None else f"{low} to {high}"
                span = str(low) if high == low else span
                took = "" if choice.us is None else f", {choice.us:.1f} µs"
                lines.append(f"{span} tokens: {choice.way}{took}")
                low = (high or 0) + 1
        return "\n".join(lines)


_tables: dict[tuple[int, Shape], Table] = {}


def table(call: Call) -> Table:
    """The table of the call's shape, which is measured with the call's weight if it must be."""
    device = call.records.device
    exact = (device.index, call.shape)
    if (found := _tables.get(exact)) is not None:
        return found
    shape = _rounded(call.shape)
    if (found := _tables.get((device.index, shape))) is not None:
        _tables[exact] = found
        return found
    if torch.cuda.is_current_stream_capturing():
        return untimed(shape, Gpu.of(device))
    path, kept = _kept(device)
    name, tried = _name(shape), candidates_of(shape, Gpu.of(device))
    known = kept.get(name)
    if known is not None and _fits(known, tried):
        found = known
    else:
        try:
            found = _measure(call, tried)
            _keep(path, name, found)
        except RuntimeError as error:  # no memory to time in, a capture by somebody else
            _say_untimed(str(error).splitlines()[0])
            found = untimed(shape, Gpu.of(device))
    _tables[exact] = _tables[device.index, shape] = found
    return found


@cache
def _say_untimed(reason: str) -> None:
    warnings.warn(
        "the ways of GPU products could not be timed, so that some may take a slower one: "
        f"{reason}",
        BesaWarning,
        stacklevel=2,
    )


def _rounded(shape: Shape) -> Shape:
    """The shape of a table: layers whose largest records differ a little have one in common."""
    return replace(shape, capacity=-(-shape.capacity // _CAPACITIES) * _CAPACITIES)


def candidates_of(shape: Shape, gpu: Gpu) -> list[tuple[int, list[Way]]]:
    """The candidates of each bucket."""
    return [(tokens, candidates(shape, tokens, gpu)) for tokens in BUCKETS]


def untimed(shape: Shape, gpu: Gpu) -> Table:
    """The first candidates."""
    first = [Choice(ways[0], None, len(ways)) for _, ways in candidates_of(shape, gpu)]
    return Table((*first, Choice(first[-1].way)))


@torch.no_grad()
def _measure(call: Call, tried: list[tuple[int, list[Way]]]) -> Table:
    """Times all candidates on the call's weight."""
    device, shape = call.records.device, call.shape
    _prepare([(way, tokens) for tokens, ways in tried for way in ways], shape, device)
    choices = []
    with torch.cuda.device(device):
        flush = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)
        for tokens, ways in tried:
            if len(ways) == 1:
                choices.append(Choice(ways[0]))
                continue
            x = torch.randn(tokens, shape.cols, dtype=shape.x, device=device)
            y = torch.empty(tokens, shape.rows, dtype=shape.x, device=device)
            one = replace(call, bias=None, x=x, y=y)
            us, best = min((_time(way, one, flush), i) for i, way in enumerate(ways))
            choices.append(Choice(ways[best], round(us, 2), len(ways)))
    found = Table((*choices, Choice(choices[-1].way)))
    _prepare([(found.way(tokens), tokens) for tokens in range(1, 66)], shape, device)
    return found


def _prepare(ways: list[tuple[Way, int]], shape: Shape, device: torch.device) -> None:
    """Compiles what ways launch for numbers of tokens."""
    needed: set[Needed] = set()
    for way, tokens in ways:
        needed.update(way.kernels(shape, tokens) or [])
    for specific in (False, True):
        jobs = sorted((x.source, x.name) for x in needed if x.specific == specific)
        driver.prepare(jobs, device, specific=specific)


def _time(way: Way, call: Call, flush: Tensor) -> float:
    """Median microseconds of a product that finds nothing in the L2 cache.

    Infinite for one that the GPU does not take: a cluster that has no room, for example.
    """
    try:
        way.run(call)
    except BesaError:
        return math.inf

    def from_memory() -> None:
        flush.zero_()
        way.run(call)

    both, alone = _captured(from_memory), _captured(flush.zero_)
    return statistics.median(_replay(both) - _replay(alone) for _ in range(_REPEATS)) * 1e3


def _captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work some times over, as a graph: to launch it from Python may take longer."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_WORKS):
            work()
    graph.replay()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one of the works."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / _WORKS


# ---------------------------------------------------------------- on disk


@cache
def _kept(device: torch.device) -> tuple[Path | None, dict[str, Table]]:
    """The file of the tables of this kind of GPU, and what is in it."""
    home = disk.folder()
    if home is None:
        return None, {}
    sources = "".join(
        path.read_text(encoding="utf-8") for path in sorted(driver.FOLDER.glob("*.cu*"))
    )
    what = (torch.cuda.get_device_name(device), torch.__version__, BUCKETS, sources)
    digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    path = home.parent / "tuning" / f"{digest}.json"
    return path, _tables_in(path)


def _fits(found: Table, tried: list[tuple[int, list[Way]]]) -> bool:
    """Whether a table holds candidates of now: another version of besa may have kept it."""
    chosen = [choice.way for choice in found.choices]
    return len(chosen) == len(tried) + 1 and all(
        way in ways for way, (_, ways) in zip(chosen, tried, strict=False)
    )


def _keep(path: Path | None, name: str, measured: Table) -> None:
    """Adds a table to the file; other processes may do so, too, and one of them wins."""
    if path is None:
        return
    kept = {
        each: [[_write(x.way), x.us, x.candidates] for x in found.choices]
        for each, found in {**_tables_in(path), name: measured}.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(kept, indent=1) + "\n", path)
    except (OSError, BesaError):
        return  # a folder that can't be written: measured again by the next process


def _tables_in(path: Path) -> dict[str, Table]:
    """What `_keep` wrote; of a damaged file nothing, so that it is written anew."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: _read(entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _name(shape: Shape) -> str:
    return " ".join(f"{key}={value}" for key, value in asdict(shape).items())


def _write(way: Way) -> dict[str, Any]:
    fields: dict[str, Any] = asdict(way)  # type: ignore[call-overload]  # all of them are dataclasses
    return {"way": type(way).__name__, **fields}


def _read(entry: list[Any]) -> Table:
    """What `_keep` wrote.

    Raises:
        ValueError, KeyError, TypeError: the file is damaged.
    """
    return Table(tuple(Choice(_way(dict(fields)), us, count) for fields, us, count in entry))


def _way(fields: dict[str, Any]) -> Way:
    name = fields.pop("way")
    if name == "Expand":
        return Expand(**fields)
    if name == "Multiply":
        return Multiply(**fields)
    plan = fields["plan"]
    return Matmul(Plan(**{**plan, "config": Config(**plan["config"])}))
