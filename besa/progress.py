"""What a person sees of a long run: a live line on a terminal, plain lines elsewhere.

>>> import sys
>>> with steps_for(sys.stdout) as tell:
...     tell(Event("packing", 1, 12, what="model.layers.0"))
packing model.layers.0
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from besa.processes.launch import launch_of
from besa.typed_json import to_json

# Phases of a pruning run that mean something to the display.
REPLAY = "replay"  # the calibration stream goes through a block that an earlier run finished
WRITTEN = "written"  # a block is finished


class FinishedBlock(Protocol):
    """What the display reads of a finished block's record (besa.model.prune_record.BlockRecord)."""

    @property
    def name(self) -> str: ...
    @property
    def sparsity(self) -> float: ...
    @property
    def error(self) -> float | None: ...
    @property
    def error_wanda(self) -> float | None: ...


@dataclass(frozen=True)
class Event:
    """A step of a long run. A field is None where it says nothing.

    Attributes:
        phase: what is being done: "statistics", "learn", "packing".
        done, total: how far the phase is. Both None: it has no parts.
        what: what it is done to, for people.
        block, blocks: the block's index, and how many blocks there are.
        loss: of a step of learning.
        rate: the fraction of the block's weights that this step pruned.
        record: what besa.json says of a finished block.
    """

    phase: str
    done: float | None = None
    total: float | None = None
    what: str | None = None
    block: int | None = None
    blocks: int | None = None
    loss: float | None = None
    rate: float | None = None
    record: FinishedBlock | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that say something, as a run's log has them: first where, then what."""
        values = to_json(self)
        names = dict.fromkeys(("block", "blocks", *values))
        return {name: values[name] for name in names if values[name] is not None}


Tell = Callable[[Event], None]


@contextmanager
def progress_for(file: IO[str]) -> Iterator[Tell]:
    """A receiver of `besa.prune`'s events that shows them on `file`.

    Of processes that share the run, the first one shows them.
    """
    if not launch_of().leads:
        yield lambda event: None
        return
    console = Console(file=file)
    if not console.is_terminal:
        yield _Plain(file)
        return
    columns = (
        TextColumn("{task.fields[place]}"),
        TextColumn("{task.fields[phase]:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Live(progress, console)


@contextmanager
def steps_for(file: IO[str]) -> Iterator[Tell]:
    """A receiver of events with `what` they are about: one bar on a terminal, else lines.

    Of processes that share the run, the first one shows them.
    """
    if not launch_of().leads:
        yield lambda event: None
        return
    console = Console(file=file)
    if not console.is_terminal:
        said: set[str] = set()

        def line(event: Event) -> None:
            step = f"{event.phase} {event.what}"
            if step not in said:
                said.add(step)
                write_line(step, file)

        yield line
        return
    columns = (TextColumn("{task.fields[phase]} {task.fields[what]}"), BarColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", phase="", what="")
        yield lambda event: progress.update(
            task,
            completed=event.done,
            total=event.total,
            phase=event.phase,
            what=event.what,
        )


def write_line(line: str, file: IO[str]) -> None:
    """Writes the line and its end at once: Ctrl-C can fall between the two writes of a print."""
    file.write(line + "\n")
    file.flush()


class _Clock:
    """Time left, from the blocks that this run did."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first: int | None = None

    def left(self, event: Event) -> float | None:
        """Seconds until all blocks are done; None before the first one is."""
        if event.phase == REPLAY:
            self.start, self.first = time.monotonic(), None
            return None
        block, blocks = _place(event)
        if self.first is None:
            self.first = block
        finished = block + (event.phase == WRITTEN)
        if finished == self.first:
            return None
        return (time.monotonic() - self.start) / (finished - self.first) * (blocks - finished)


def _place(event: Event) -> tuple[int, int]:
    """The block that an event is about, counted from 0, and the number of blocks."""
    assert event.block is not None
    assert event.blocks is not None
    return event.block, event.blocks


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 12 s."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _summary(event: Event) -> str:
    """A finished block in one line."""
    block, blocks = _place(event)
    record = event.record
    assert record is not None
    line = f"block {block + 1}/{blocks}  {record.name}: "
    line += f"{record.sparsity:.2%} zeros, error {record.error:.3%}"
    if record.error_wanda is not None:
        line += f" (Wanda {record.error_wanda:.3%})"
    return line


class _Plain:
    """A line for each block that is finished, or was before."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.clock, self.last = file, _Clock(), ""

    def __call__(self, event: Event) -> None:
        if event.block is None:  # of the model as a whole
            line = f"{event.phase} {event.what}"
            if line != self.last:
                write_line(line, self.file)
            self.last = line
            return
        left = self.clock.left(event)
        if event.phase == WRITTEN:
            line = _summary(event)
            if left:
                line += f", {duration(left)} left"
            write_line(line, self.file)
        elif event.phase == REPLAY and event.done == event.total:
            block, blocks = _place(event)
            write_line(f"block {block + 1}/{blocks}  finished before, replayed", self.file)


class _Live:
    """One bar that says what is being done, above it a line for each finished block."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.console, self.clock = progress, console, _Clock()
        self.task = progress.add_task("", place="", phase="", figures="", left="", visible=False)

    def __call__(self, event: Event) -> None:
        if event.block is None:
            place, left, figures = "model", None, event.what or ""
        else:
            place, left, figures = self._in_block(event)
        self.progress.update(
            self.task,
            completed=1 if event.done is None else event.done,
            total=1 if event.total is None else event.total,
            place=place,
            phase=event.phase,
            figures=figures,
            left="" if left is None else f"{duration(left)} left",
            visible=True,
        )

    def _in_block(self, event: Event) -> tuple[str, float | None, str]:
        """Which block it is, the seconds left, and how learning goes."""
        left = self.clock.left(event)
        if event.phase == WRITTEN:
            self.console.print(_summary(event), highlight=False)
        figures = ""
        if event.loss is not None and event.rate is not None:
            figures = f"loss {event.loss:.3%}  rate {event.rate:.2%}"
        block, blocks = _place(event)
        return f"block {block + 1}/{blocks}", left, figures
