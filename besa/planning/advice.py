"""What to change in the settings of `besa prune` where a run does not fit, by what gains most.

>>> from besa.planning.shapes import open_headers, shape_of
>>> config = PruneConfig(out="pruned", samples=128, seqlen=32)
>>> cpu = torch.device("cpu")
>>> shape = shape_of(open_headers("path/to/model"), config)
>>> setting = setting_of(config, shape, cpu, seqlen=32)
>>> most = need_of(shape, setting, process=0).host.total
>>> room = Room(host=most - 1000, process=0, device=None, disk=10**9)
>>> advice = list(advice_for(shape, setting, cpu, 32, room))
>>> advice[0].fits
True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from besa.errors import BesaError
from besa.planning.need import Need, lacking, need_of, setting_of
from besa.planning.prune_memory import Setting
from besa.planning.room import Room
from besa.planning.shapes import ModelShape
from besa.pruning.config import PruneConfig

# Changes that are made at once, at most, where one is not enough.
_TOGETHER = 4

# An advice that gains less than this part of what is needed is none.
_LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Advice:
    """A change of the settings.

    Attributes:
        flag: as it is typed.
        gain: bytes less, of what does not fit.
        fits: whether everything fits with it.
    """

    flag: str
    gain: int
    fits: bool


def advice_for(
    shape: ModelShape, setting: Setting, device: torch.device, seqlen: int, room: Room
) -> Iterator[Advice]:
    """Changes that help, what gains most first; of no use for a disk too small for the output."""
    before = need_of(shape, setting, room.process)
    if before.output > room.disk:
        room = replace(room, disk=before.output + before.activations)
    missing = lacking(before, room)
    if not missing:
        return
    tried = _tried(_Changed({}, setting.config, device, seqlen), shape, room, missing)
    for changed, after in tried:
        yield Advice(changed.typed, _less(before, after, missing), not lacking(after, room))
    if not tried or not lacking(tried[0][1], room):
        return
    for _ in range(_TOGETHER - 1):  # where no change is enough, some together may be
        best, after = tried[0]
        if not (tried := _tried(best, shape, room, lacking(after, room))):
            return
        changed, after = tried[0]
        if not lacking(after, room):
            yield Advice(changed.typed, _less(before, after, missing), fits=True)
            return


@dataclass(frozen=True)
class _Changed:
    """Settings with some changes, and these as they are typed, by their flags."""

    flags: Mapping[str, str]
    config: PruneConfig
    device: torch.device
    seqlen: int

    @property
    def typed(self) -> str:
        return " ".join(f"{flag} {value}" for flag, value in self.flags.items())


def _tried(
    start: _Changed, shape: ModelShape, room: Room, missing: Mapping[str, int]
) -> list[tuple[_Changed, Need]]:
    """Further changes that help with what is missing, and what each leaves; the best one first."""
    found = []
    for changed in _changes(start):
        setting = setting_of(changed.config, shape, changed.device, changed.seqlen)
        after = need_of(shape, setting, room.process)
        left = lacking(after, room)
        gain = sum(missing[name] - left.get(name, 0) for name in missing)
        if gain > _LEAST_GAIN * sum(missing.values()) and not left.keys() - missing.keys():
            found.append((gain, changed, after))
    found.sort(key=lambda each: -each[0])
    return [(changed, after) for _, changed, after in found]


def _less(before: Need, after: Need, missing: Mapping[str, int]) -> int:
    """How many bytes less a change takes of what does not fit."""
    less = {
        "memory": before.host.total - after.host.total,
        "device": before.device.total - (after.device.total if after.device else 0)
        if before.device
        else 0,
        "disk": before.output + before.activations - after.output - after.activations,
    }
    return sum(less[name] for name in missing)


def _changes(start: _Changed) -> Iterator[_Changed]:
    """Settings that take less."""
    config, seqlen = start.config, start.seqlen
    changes: list[dict[str, Any]] = [
        {"activations": "disk"},
        {"activations": "host"},
        {"teacher": "pruned"},
        {"update": "admm"},
        {"update": "none"},
        {"method": "wanda", "update": "none"},
        {"dtype": "bfloat16"},
        {"samples": max(1, config.sample_count // 2)},
    ]
    for change in changes:
        if all(getattr(config, name) == value for name, value in change.items()):
            continue
        flags = {**start.flags, **{f"--{name}": str(value) for name, value in change.items()}}
        with suppress(BesaError):  # the settings do not go together
            yield replace(start, flags=flags, config=replace(config, **change))
    if seqlen > 1:
        flags = {**start.flags, "--seqlen": str(seqlen // 2)}
        yield replace(start, flags=flags, seqlen=seqlen // 2)
    if start.device.type != "cpu":
        flags = {**start.flags, "--device": "cpu"}
        cpu = torch.device("cpu")
        yield replace(start, flags=flags, config=replace(config, device="cpu"), device=cpu)
