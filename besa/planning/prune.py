"""What `besa prune` would take: memory, disk, work, time, and what to change if it does not fit.

>>> plan = plan_prune("path/to/model", PruneConfig(out="pruned", samples=8, seqlen=32))
>>> plan.host.total > plan.room.process, plan.device is None, plan.fits
(True, True, True)
>>> plan.advice
()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from besa.data.samples import sample_length
from besa.errors import BesaError
from besa.model.loading import computing_dtype, pick_device
from besa.planning.parts import Moment, peak_of
from besa.planning.prune_memory import (
    Setting,
    around_blocks,
    block_moments,
    left_by_text,
    stream_bytes,
    text_bytes,
    text_tokens,
)
from besa.planning.prune_work import around_work, block_work, passes
from besa.planning.room import Room, room_for
from besa.planning.shapes import ModelShape, open_headers, shape_of
from besa.planning.speed import measure
from besa.planning.work import Speed, Work
from besa.pruning.batches import batches_of
from besa.pruning.config import PruneConfig
from besa.pruning.guard import FIRST, held_out_of

# Batches that are on a GPU at a time: read ahead, under way, and being copied back.
_BATCHES_THERE = 8

# Tokens that a tokenizer cuts in a second, by a single thread.
_CUT = 150_000

# Changes that are made at once, at most, where one is not enough.
_TOGETHER = 4

# An advice that gains less than this part of what is needed is none.
_LEAST_GAIN = 0.02


@dataclass(frozen=True)
class Need:
    """What a run takes of memory and disk.

    Attributes:
        host: the moment at which it takes most of the host's memory.
        device: the same of the device's; None where that is the host.
        block: bytes of the largest block alone, on the host or the device that computes.
        output: bytes of the output.
        activations: bytes of activations on disk.
    """

    host: Moment
    device: Moment | None
    block: int
    output: int
    activations: int


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


@dataclass(frozen=True)
class PrunePlan:
    """What a run would take.

    Attributes:
        shape: of the model.
        setting: of the run.
        device_name, dtype: of the computation.
        need: memory and disk.
        room: what there is of them.
        work: by phase, over all blocks.
        forward, backward: how often all tokens go through all blocks.
        speed: measured here; None where the plan was asked for without.
        seconds: estimated; None without a speed.
        advice: what to change if it does not fit, what gains most first.
        notes: what the figures leave out.
    """

    shape: ModelShape
    setting: Setting
    device_name: str
    dtype: torch.dtype
    need: Need
    room: Room
    work: Mapping[str, Work]
    forward: float
    backward: float
    speed: Speed | None
    seconds: float | None
    advice: tuple[Advice, ...]
    notes: tuple[str, ...]

    @property
    def host(self) -> Moment:
        return self.need.host

    @property
    def device(self) -> Moment | None:
        return self.need.device

    @property
    def fits(self) -> bool:
        return not lacking(self.need, self.room)

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.work.values())


def plan_prune(model: str | Path, config: PruneConfig, *, timed: bool = True) -> PrunePlan:
    """Plans a run by the model's config and headers; writes nothing.

    Args:
        model: as for `besa.prune`, or a directory with a config.json alone.
        timed: whether to measure this machine, which takes two seconds.

    Raises:
        BesaError: no such model, or settings that do not suit it.
    """
    device = pick_device(config.device)
    room = room_for(device, Path(config.out))
    checkpoint = open_headers(model, config.trust_remote_code)
    seqlen = sample_length(checkpoint, config.seqlen)
    shape = shape_of(checkpoint, config)
    setting = setting_of(config, shape, device, seqlen)
    work = work_of(shape, setting)
    forward, backward = passes(setting, len(shape.blocks))
    dtype = computing_dtype(config.dtype, device, shape.dtype)
    speed = seconds = None
    if timed:
        speed = measure(device, dtype, setting.batch, shape.width, shape.weights)
        seconds = sum(x.seconds(speed) for x in work.values()) + text_tokens(setting) / _CUT
    on_gpu = device.type == "cuda"
    return PrunePlan(
        shape=shape,
        setting=setting,
        device_name=torch.cuda.get_device_name(device) if on_gpu else str(device),
        dtype=dtype,
        need=need_of(shape, setting, room.process),
        room=room,
        work=work,
        forward=forward,
        backward=backward,
        speed=speed,
        seconds=seconds,
        advice=tuple(_advice(shape, setting, device, seqlen, room)),
        notes=tuple(_notes(config)),
    )


def setting_of(
    config: PruneConfig, shape: ModelShape, device: torch.device, seqlen: int
) -> Setting:
    """What of a run memory and work depend on."""
    dtype = computing_dtype(config.dtype, device, shape.dtype)
    windows = torch.zeros(1).expand(config.sample_count, seqlen)
    batches, _ = batches_of(windows, held_out_of(config))
    return Setting(
        config=config,
        seqlen=seqlen,
        samples=config.sample_count,
        batch=batches[0].numel(),
        stored=shape.itemsize,
        computed=dtype.itemsize,
        on_gpu=device.type != "cpu",
    )


def need_of(shape: ModelShape, setting: Setting, process: int) -> Need:
    """What a run takes of memory and disk.

    Args:
        process: bytes that Python and its packages have already.
    """
    base = {"Python, torch, transformers": process}
    streams = stream_bytes(shape.width, setting)
    on_disk = setting.config.activations == "disk"
    left = left_by_text(shape, setting)
    always = base | left if on_disk else base | left | streams
    moments = [Moment("read the text", {**base, "text and tokenizer": text_bytes(shape, setting)})]
    moments += [moment.beside(base | left) for moment in around_blocks(shape, setting)]
    device: list[Moment] = []
    block = 0
    for each in set(shape.blocks):
        found = block_moments(each, shape.attention, setting)
        block = max(block, peak_of(found.device or found.host).total)
        moments += [moment.beside(always) for moment in found.host]
        device += found.device
    there = {"batches under way": _BATCHES_THERE * setting.batch * shape.width * setting.computed}
    peak = peak_of([moment.beside(there) for moment in device]) if device else None
    activations = sum(streams.values()) if on_disk else 0
    return Need(peak_of(moments), peak, block, shape.stored_bytes, activations)


def work_of(shape: ModelShape, setting: Setting) -> dict[str, Work]:
    """By phase, over all blocks and around them."""
    counts = Counter((block, min(index, FIRST)) for index, block in enumerate(shape.blocks))
    work = {"copy": around_work(shape.others, setting)}
    for (block, index), count in counts.items():
        for name, each in block_work(block, shape.attention, setting, index).items():
            work[name] = work.get(name, Work()) + each * count
    return work


def lacking(need: Need, room: Room) -> dict[str, int]:
    """Bytes that are missing, of what there is too little: "memory", "device", "disk"."""
    missing = {
        "memory": need.host.total - room.host,
        "device": need.device.total - room.device if need.device and room.device else 0,
        "disk": need.output + need.activations - room.disk,
    }
    return {name: bytes_ for name, bytes_ in missing.items() if bytes_ > 0}


def _advice(
    shape: ModelShape, setting: Setting, device: torch.device, seqlen: int, room: Room
) -> Iterator[Advice]:
    """Changes that help, what gains most first."""
    before = need_of(shape, setting, room.process)
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


def _notes(config: PruneConfig) -> Iterator[str]:
    """What the figures leave out."""
    if config.rotate != "off":
        yield "not counted: rotations, which hold the whole model, and their copy of it on the disk"
    if config.effort == "high" and config.quantize is None:
        yield "not counted: the training after pruning, which holds the whole model twice"
    if config.drop_experts:
        yield "not counted: choosing experts to drop, and the copy of the model without them"
    if config.expert_tokens:
        yield "not counted: up to three times as many samples for experts that see few tokens"
