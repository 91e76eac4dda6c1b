"""What a run of `besa prune` takes of memory and disk, at the moment at which that is most.

>>> room = Room(host=100, process=10, device=None, disk=50)
>>> need = Need(Moment("learn", {"weights": 120}), None, 90, output=20, activations=0)
>>> lacking(need, room)
{'memory': 20}
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from besa.model.loading import computing_dtype
from besa.planning.parts import Moment, peak_of
from besa.planning.prune_memory import (
    Setting,
    around_blocks,
    block_moments,
    left_by_text,
    stream_bytes,
    text_bytes,
)
from besa.planning.room import Room
from besa.planning.shapes import ModelShape
from besa.pruning.batches import batches_of
from besa.pruning.config import PruneConfig
from besa.pruning.guard import held_out_of

# Batches that are on a GPU at a time: read ahead, under way, and being copied back.
_BATCHES_THERE = 8


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


def lacking(need: Need, room: Room) -> dict[str, int]:
    """Bytes that are missing, of what there is too little: "memory", "device", "disk"."""
    needed = {"memory": need.host.total, "device": need.device.total if need.device else 0}
    return room.lacking({**needed, "disk": need.output + need.activations})
