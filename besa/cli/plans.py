"""What `--plan` prints: bytes by part, work and time, and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from besa.cli.tables import show
from besa.methods import METHODS
from besa.report.formatting import duration, rate, size

if TYPE_CHECKING:
    from besa.planning.export import ExportPlan
    from besa.planning.parts import Moment
    from besa.planning.prune import PrunePlan
    from besa.planning.serve import ServePlan

# The exit code of a plan that does not fit; 2 is a user's error.
DOES_NOT_FIT = 3


# The phases of `besa.planning.prune_work`, as people call them.
_PHASES = {
    "copy": "copy what is in no block",
    "load": "load blocks",
    "statistics": "gather statistics",
    "masks": "choose masks",
    "teacher": "run the dense model",
    "update": "update weights",
    "compare": "compare errors",
    "hand on": "run the pruned model",
    "write": "write blocks",
}


def print_prune_plan(plan: PrunePlan) -> int:
    """Prints it; gives the exit code."""
    shape, setting, config = plan.shape, plan.setting, plan.setting.config
    goal = str(config.pattern) if config.pattern.m else rate(config.rate)
    dtype = str(plan.dtype).removeprefix("torch.")
    print(
        f"{shape.name}: {_count(shape.parameters)} parameters in {len(shape.blocks)} blocks; "
        f"{METHODS[config.method]} {goal}, update {config.update}, teacher {config.teacher}; "
        f"{setting.samples} × {setting.seqlen} tokens; {dtype} on {plan.device_name}\n"
    )
    _memory("memory", plan.host, plan.room.host)
    if plan.device is not None:
        _memory("device memory", plan.device, plan.room.device)
    where = "device" if plan.device is not None else "memory"
    print(f"a block alone: {size(plan.need.block)} of {where} at its peak")
    _disk(plan.need.output, plan.need.activations, plan.room.disk)
    print(
        f"work: all tokens {plan.forward:.1f} times forward and {plan.backward:.1f} times backward "
        f"through each block, {_flops(plan.flops)}"
    )
    if plan.seconds is not None and plan.speed is not None:
        speed = plan.speed
        slowest = max(plan.work, key=lambda name: plan.work[name].seconds(speed))
        print(
            f"time: about {_days(plan.seconds)}, most of it to {_PHASES[slowest]} "
            f"({speed.products / 1e9:.0f} GFLOP/s measured)"
        )
    for note in plan.notes:
        print(note)
    code = _verdict(plan.missing)
    if plan.need.output > plan.room.disk:
        print(f"  --out on a disk with {size(plan.need.output)} free")
    for advice in plan.advice:
        end = ", and then it fits" if advice.fits else ""
        print(f"  {advice.flag}: {size(advice.gain)} less{end}")
    return code


def print_export_plan(plan: ExportPlan) -> int:
    """Prints it; gives the exit code."""
    print(
        f"{plan.name}: {_count(plan.parameters)} parameters in {plan.blocks} blocks; {plan.what}\n"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("disk")
    table.add_column("", justify="right")
    for name, count in plan.files.items():
        table.add_row(name, size(count))
    show(table)
    _memory("memory", plan.memory, plan.room.host)
    _disk(plan.output, 0, plan.room.disk)
    if plan.seconds is not None and plan.read_speed is not None:
        speed = f"{plan.read_speed / 1e6:.0f} MB/s read and digested"
        print(f"time: about {_days(plan.seconds)} ({speed})")
    for note in plan.notes:
        print(note)
    return _verdict(plan.missing)


def print_serve_plan(plan: ServePlan) -> int:
    """Prints it; gives the exit code."""
    print(f"{plan.name}: {plan.what}, engine {plan.engine}, {plan.place}\n")
    _memory("memory", plan.memory, plan.room)
    print(
        f"cache: {size(plan.per_token)} a token; {size(plan.sequence)} for a sequence of "
        f"{plan.context:,} tokens; room for {plan.cached_tokens:,} tokens"
    )
    for note in plan.notes:
        print(note)
    code = _verdict(plan.missing)
    for advice in plan.advice if code else ():
        print(f"  {advice}")
    return code


def _verdict(missing: Mapping[str, int]) -> int:
    print(_lacks(missing) if missing else "It fits.")
    return DOES_NOT_FIT if missing else 0


def _lacks(missing: Mapping[str, int]) -> str:
    words = {"memory": "of memory", "device": "of the device's memory", "disk": "on the disk"}
    lacks = " and ".join(f"{size(count)} {words[name]}" for name, count in missing.items())
    return f"It does not fit: {lacks} are missing."


def _memory(name: str, moment: Moment, room: int | None) -> None:
    """What is in memory when it is most."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    free = "" if room is None else f" of {size(room)}"
    table.add_column(f"{name}, most to {moment.name}", "together")
    table.add_column("", f"{size(moment.total)}{free}", justify="right")
    for part, count in sorted(moment.parts.items(), key=lambda each: -each[1]):
        if count >= moment.total / 200:
            table.add_row(part, size(count))
    show(table)


def _disk(output: int, activations: int, room: int) -> None:
    more = f" and {size(activations)} of activations meanwhile" if activations else ""
    print(f"disk: {size(output)} for the output{more}, of {size(room)} that are free")


def _days(seconds: float) -> str:
    """A duration; from two days on in days."""
    return duration(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:.0f} days"


def _count(numbers: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if numbers >= unit:
            return f"{numbers / unit:.3g} {name}"
    return f"{numbers:,.0f}"


def _flops(count: float) -> str:
    units = ((1e18, "E"), (1e15, "P"), (1e12, "T"))
    unit, name = next(((u, n) for u, n in units if count >= u), (1e9, "G"))
    return f"{count / unit:.3g} {name}FLOP"
