"""What `besa prune` would take: memory, disk, work, time, and what to change if it does not fit.

>>> config = PruneConfig(out="pruned", samples=8, seqlen=32)
>>> plan = plan_prune("path/to/model", config, timed=False)
>>> plan.host.total > plan.room.process, plan.device is None, plan.fits
(True, True, True)
>>> plan.advice
()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from besa.data.samples import sample_length
from besa.model.loading import computing_dtype, pick_device
from besa.planning.advice import Advice, advice_for
from besa.planning.need import Need, lacking, need_of, setting_of
from besa.planning.parts import Moment
from besa.planning.prune_memory import Setting, text_tokens
from besa.planning.prune_work import around_work, block_work, passes
from besa.planning.room import Room, room_for
from besa.planning.shapes import ModelShape, open_headers, shape_of
from besa.planning.speed import measure
from besa.planning.work import Speed, Work
from besa.pruning.config import PruneConfig
from besa.pruning.guard import FIRST

# Tokens that a tokenizer cuts in a second, by a single thread.
_CUT = 150_000


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
    def missing(self) -> dict[str, int]:
        """Bytes that are missing, of what there is too little."""
        return lacking(self.need, self.room)

    @property
    def fits(self) -> bool:
        return not self.missing

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
        advice=tuple(advice_for(shape, setting, device, seqlen, room)),
        notes=tuple(_notes(config)),
    )


def work_of(shape: ModelShape, setting: Setting) -> dict[str, Work]:
    """By phase, over all blocks and around them."""
    counts = Counter((block, min(index, FIRST)) for index, block in enumerate(shape.blocks))
    work = {"copy": around_work(shape.others, setting)}
    for (block, index), count in counts.items():
        for name, each in block_work(block, shape.attention, setting, index).items():
            work[name] = work.get(name, Work()) + each * count
    return work


def _notes(config: PruneConfig) -> Iterator[str]:
    """What the figures leave out."""
    if config.rotate != "off":
        yield "not counted: rotations, which hold the whole model, and their copy of it on the disk"
    if config.trains:
        yield "not counted: the training after pruning, which holds the whole model twice"
    if config.drop_experts:
        yield "not counted: choosing experts to drop, and the copy of the model without them"
    if config.expert_tokens:
        yield "not counted: up to three times as many samples for experts that see few tokens"
