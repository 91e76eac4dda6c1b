"""What a person sees of a long run: a live line on a terminal, plain lines elsewhere.

with progress_for(sys.stderr) as tell:
    prune(model, config, tell)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

Tell = Callable[[Mapping[str, Any]], None]


@contextmanager
def progress_for(file: IO[str]) -> Iterator[Tell]:
    """A receiver of `besa.prune`'s events that shows them on `file`."""
    console = Console(file=file)
    if not console.is_terminal:
        yield _Plain(file)
        return
    columns = (
        TextColumn("block {task.fields[block]}/{task.fields[blocks]}"),
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
    """A receiver of events {phase, what, done, total}: one bar on a terminal, else lines."""
    console = Console(file=file)
    if not console.is_terminal:
        said: set[tuple[str, str]] = set()

        def line(event: Mapping[str, Any]) -> None:
            step = (event["phase"], event["what"])
            if step not in said:
                said.add(step)
                write_line(" ".join(step), file)

        yield line
        return
    columns = (TextColumn("{task.fields[phase]} {task.fields[what]}"), BarColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", phase="", what="")
        yield lambda event: progress.update(
            task,
            completed=event["done"],
            total=event["total"],
            phase=event["phase"],
            what=event["what"],
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

    def left(self, event: Mapping[str, Any]) -> float | None:
        """Seconds until all blocks are done; None before the first one is."""
        if event["phase"] == "replay":
            self.start, self.first = time.monotonic(), None
            return None
        if self.first is None:
            self.first = event["block"]
        done = event["block"] - self.first + (event["phase"] == "written")
        if not done:
            return None
        rest = event["blocks"] - event["block"] - (event["phase"] == "written")
        return (time.monotonic() - self.start) / done * rest


def duration(seconds: float) -> str:
    """2 h 05 min, 3 min 20 s, 12 s."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _summary(event: Mapping[str, Any]) -> str:
    """A finished block in one line."""
    record = event["record"]
    line = f"block {event['block'] + 1}/{event['blocks']}  {record['name']}: "
    line += f"{record['sparsity']:.2%} zeros, error {record['error']:.3%}"
    if record["error_wanda"] is not None:
        line += f" (Wanda {record['error_wanda']:.3%})"
    return line


class _Plain:
    def __init__(self, file: IO[str]) -> None:
        self.file, self.clock = file, _Clock()

    def __call__(self, event: Mapping[str, Any]) -> None:
        left = self.clock.left(event)
        if event["phase"] == "written":
            line = _summary(event)
            if left:
                line += f", {duration(left)} left"
            write_line(line, self.file)
        elif event["phase"] == "replay" and event["done"] == event["total"]:
            line = f"block {event['block'] + 1}/{event['blocks']}  finished before, replayed"
            write_line(line, self.file)


class _Live:
    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.console, self.clock = progress, console, _Clock()
        self.task = progress.add_task(
            "", block=0, blocks=0, phase="", figures="", left="", visible=False
        )

    def __call__(self, event: Mapping[str, Any]) -> None:
        left = self.clock.left(event)
        if event["phase"] == "written":
            self.console.print(_summary(event), highlight=False)
        figures = ""
        if "loss" in event:
            figures = f"loss {event['loss']:.3%}  rate {event['rate']:.2%}"
        self.progress.update(
            self.task,
            completed=event.get("done", 1),
            total=event.get("total", 1),
            block=event["block"] + 1,
            blocks=event["blocks"],
            phase=event["phase"],
            figures=figures,
            left="" if left is None else f"{duration(left)} left",
            visible=True,
        )
