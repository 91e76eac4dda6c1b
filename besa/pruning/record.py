"""What a run leaves in besa.json: settings, versions, what was achieved and at what cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.data.held_out import HELD_OUT
from besa.data.samples import samples_digest
from besa.machine import peak_memory
from besa.model.blocks import Linear
from besa.model.checkpoint import Checkpoint
from besa.model.conditions import conditions
from besa.model.prune_record import (
    BlockRecord,
    BlockUpdate,
    LinearRecord,
    PruneRecord,
    Rounding,
    RowRates,
    Sparsity,
)
from besa.pruning.block_run import BlockRun, Tensors
from besa.pruning.config import PruneConfig
from besa.pruning.model_copy import ModelCopy
from besa.pruning.scores import InputNorms
from besa.typed_json import from_json
from besa.version import __version__, versions

# A group's largest weight is clipped if it is less than that of the dense one. To be stored in
# bfloat16 takes up to 0.4% from it.
_CLIPPED = 0.98


def settings_of(
    model: str | Path,
    config: PruneConfig,
    checkpoint: Checkpoint,
    windows: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All that the result depends on; what an unfinished run must share to be gone on with."""
    settings = dataclasses.asdict(config)
    for name in ("out", "overwrite", "activations"):
        del settings[name]
    return {
        **settings,
        "pattern": str(config.pattern),
        "quantize": config.quantize and str(config.quantize),
        "sparsity": config.rate,
        "seqlen": windows.shape[1],
        "calibration_sha256": samples_digest(windows),
        **conditions(model, checkpoint, device, dtype),
    }


def linear_record(linear: Linear, stored: Tensor, norms: InputNorms) -> LinearRecord:
    """The zeros of one linear and how its rows share them.

    Args:
        stored: the pruned parameter.
        norms: of its inputs.
    """
    of_experts = stored.ndim == 3
    zeros = (linear.matrix(stored) == 0).reshape(-1, linear.cols).sum(1)
    rates = zeros.double() / linear.cols
    return LinearRecord(
        name=linear.name,
        shape=tuple(linear.shape),
        zeros=int(zeros.sum()),
        sparsity=float(rates.mean()),
        rows=RowRates(
            min=float(rates.min()),
            mean=float(rates.mean()),
            max=float(rates.max()),
            histogram=tuple(torch.histc(rates, bins=50, min=0, max=1).int().tolist()),
        ),
        unrouted_experts=tuple(norms.unseen(linear)) if of_experts else (),
        expert_tokens=tuple(norms.tokens[linear.name].tolist()) if of_experts else (),
    )


def rounding_record(run: BlockRun, masks: Tensors) -> Rounding | None:
    """What rounding did to a block; None where it was not asked for.

    Args:
        run: the block with its pruned weights in place.
        masks: bool [groups, rows, cols] by the linears' names, True where a weight is kept.
    """
    grid = run.config.quantize
    if grid is None:
        return None
    groups = empty = clipped = added = 0
    for linear in run.linears:
        mask = masks[linear.name]
        stored = linear.matrix(run.stored.get_parameter(linear.parameter).data).to(mask.device)
        width = grid.group_size or linear.cols
        after, before = (
            torch.stack([part.amax(-1) for part in matrix.abs().float().split(width, -1)])
            for matrix in (stored, torch.where(mask, run.weights[linear.name], 0.0))
        )
        groups += after.numel()
        empty += int((after == 0).sum())
        clipped += int(((after > 0) & (after < _CLIPPED * before)).sum())
        added += int((mask & (stored == 0)).sum())
    return Rounding(groups=groups, zero_groups=empty, clipped=clipped, added_zeros=added)


def block_record(
    index: int,
    name: str,
    run: BlockRun,
    *,
    masks: Tensors,
    losses: Sequence[float],
    error: float,
    error_wanda: float | None,
    seconds: float,
    update: BlockUpdate | None = None,
) -> BlockRecord:
    """The record of one pruned block.

    Args:
        run: the block with its pruned weights in place.
        masks: bool [groups, rows, cols] by the linears' names, True where a weight is kept.
        losses: the mean loss of each epoch.
        error, error_wanda: of its output, see `BlockRecord`.
        update: what was chosen to follow the mask.
    """
    linears = [
        linear_record(x, run.stored.get_parameter(x.parameter).data, run.norms) for x in run.linears
    ]
    weights = sum(math.prod(linear.shape) for linear in linears)
    zeros = sum(linear.zeros for linear in linears)
    return BlockRecord(
        index=index,
        name=name,
        weights=weights,
        zeros=zeros,
        sparsity=zeros / max(1, weights),
        linears=tuple(linears),
        error=error,
        error_wanda=error_wanda,
        loss=tuple(losses),
        seconds=round(seconds, 3),
        update=update,
        rounding=rounding_record(run, masks),
    )


def run_record(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    seconds: float,
    device: torch.device,
    dropped: ModelCopy | None = None,
    rotated: ModelCopy | None = None,
    processes: int = 1,
) -> PruneRecord:
    """The record of a whole run.

    Args:
        shards: what was written, each with its digest and, of a block, its record.
        dropped, rotated: what was pruned in the model's place.
        processes: how many shared the samples.
    """
    blocks = [from_json(BlockRecord, shard["record"]) for shard in shards if "record" in shard]
    zeros = sum(block.zeros for block in blocks)
    weights = sum(block.weights for block in blocks)
    on_gpu = device.type == "cuda"
    return PruneRecord(
        besa_version=__version__,
        model=settings["model"],
        architecture=type(checkpoint.model).__name__,
        loader=checkpoint.loader,
        settings=dict(settings),
        versions=versions(),
        seconds=round(seconds, 3),
        peak_memory_bytes=peak_memory(),
        digests={shard["file"]: shard["sha256"] for shard in shards},
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        dtype=settings["dtype"],
        threads=settings["threads"],
        processes=processes,
        sparsity=Sparsity(
            target=settings["sparsity"], achieved=zeros / weights, zeros=zeros, weights=weights
        ),
        blocks=tuple(blocks),
        peak_device_memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        notes=(
            *([f"before pruning, {dropped.words}"] if dropped else ()),
            *_rotation_notes(rotated),
            *_rounding_notes(settings, blocks),
            *_update_notes(settings),
            *_unrouted_notes(blocks),
            *_starved_notes(settings, blocks),
        ),
        dropped_experts=dropped.dropped if dropped else {},
        rotation=rotated.words if rotated else None,
    )


def _rotation_notes(rotated: ModelCopy | None) -> list[str]:
    if rotated is None:
        return []
    return [f"before pruning {rotated.words}, which leaves the model's function as it is"]


def _rounding_notes(settings: Mapping[str, Any], blocks: Sequence[BlockRecord]) -> list[str]:
    roundings = [block.rounding for block in blocks if block.rounding is not None]
    if not roundings:
        return []
    added, clipped, groups = (
        sum(getattr(each, name) for each in roundings)
        for name in ("added_zeros", "clipped", "groups")
    )
    return [
        f"what is kept was rounded to {settings['quantize']}: {added:,} of these weights became "
        f"zero, too, and {clipped:,} of {groups:,} scales were clipped"
    ]


def _update_notes(settings: Mapping[str, Any]) -> list[str]:
    if settings["update"] != "auto" or settings["samples"] >= HELD_OUT:
        return []
    return [
        f"the masks stand alone: of {settings['samples']} samples none can be held out to choose "
        f"updates by; give --samples {HELD_OUT} or more"
    ]


def _starved_notes(settings: Mapping[str, Any], blocks: Sequence[BlockRecord]) -> list[str]:
    wanted = settings["expert_tokens"] or 0
    notes = []
    for block in blocks:
        for linear in block.linears:
            few = {e: n for e, n in enumerate(linear.expert_tokens) if 0 < n < wanted}
            if few:
                told = ", ".join(f"{expert} ({tokens})" for expert, tokens in few.items())
                notes.append(
                    f"{block.name}.{linear.name}: fewer than {wanted} calibration tokens reached "
                    f"experts {told}"
                )
    return notes


def _unrouted_notes(blocks: Sequence[BlockRecord]) -> list[str]:
    return [
        f"{block.name}.{linear.name}: no calibration token reached experts "
        f"{', '.join(map(str, linear.unrouted_experts))}; they were pruned by magnitude"
        for block in blocks
        for linear in block.linears
        if linear.unrouted_experts
    ]
