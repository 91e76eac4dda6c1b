"""Trains a pruned model as a whole, towards the dense one: `besa recover`.

>>> config = RecoverConfig(out="recovered", teacher="path/to/model", samples=16, seqlen=32)
>>> recovery = recover("path/to/pruned", config)
>>> recovery.after < recovery.before
True

Pruning goes block by block and gives each block its dense outputs back as well as it can. What is
lost in spite of that adds up, and only the model's own output shows how. So the weights of all
blocks are trained at once towards the dense model's next-token distributions, zeros excepted
(`besa.KeepZeros`). Embedding, last norm and head stay as they are.

What is written is the best of the states that training went through (`besa.recovery.training`), and
nothing is where none is better than the pruned model.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from besa.data.samples import draw_samples, samples_digest
from besa.errors import BesaError
from besa.model.checkpoint import Checkpoint
from besa.model.conditions import check_alike, conditions, resumable
from besa.model.files import resolve
from besa.model.loading import fitting_in_memory, pick_device
from besa.model.prune_record import PruneRecord, Recovery
from besa.model.record import read_record
from besa.model.workspace import Workspace, check_free
from besa.processes.ranks import Ranks, joined
from besa.progress import Tell
from besa.recovery.config import RecoverConfig, check_accelerate
from besa.recovery.training import train
from besa.report.names import short_name
from besa.report.pages import write_pages

# Of the Trainer's at once: the best, the last and the one that is written. In each a weight has 12
# bytes, two of Adam's moments among them.
_CHECKPOINTS = 3


class NothingBetterError(BesaError):
    """Training made nothing better on held-out samples."""


def recover(pruned: str | Path, config: RecoverConfig, tell: Tell = lambda event: None) -> Recovery:
    """Trains what `besa prune` wrote and writes it to `config.out`, in the same files.

    Args:
        pruned: directory or hub id of a model that `besa prune` wrote.
        config: the settings.
        tell: is given every step's event for display.

    Raises:
        BesaError: something that the user can mend; the last finished part of the training stays in
            `OUT.partial`, and the same call goes on from there.
        PeerLostError: of processes that share the run, another one ended.
    """
    with joined() as ranks:
        return _recover(pruned, config, tell, ranks)


def _recover(pruned: str | Path, config: RecoverConfig, tell: Tell, ranks: Ranks) -> Recovery:
    started = time.monotonic()
    out = Path(config.out)
    check_free(out, config.overwrite)
    check_accelerate()
    if config.batch_size % ranks.size:
        raise BesaError(
            f"{ranks.size} processes cannot share steps of {config.batch_size} "
            f"sample{'s' * (config.batch_size > 1)}: give --batch-size "
            f"{ranks.evened(config.batch_size)}"
        )
    device = _device(config.device, ranks)
    checkpoint = Checkpoint.open(pruned, config.trust_remote_code)
    record = _record_of(checkpoint.directory)
    teacher_directory = resolve(config.teacher)
    windows = draw_samples(checkpoint, config.text, config)
    dtype = _dtype(config.dtype, device)
    settings = _settings(pruned, config, checkpoint, windows, device, dtype)
    check_alike(settings, ranks)
    needed = checkpoint.nbytes + _CHECKPOINTS * 12 * _parameters(checkpoint)
    to_resume = resumable(settings)
    with Workspace.open(out, to_resume, config.overwrite, needed, ranks) as workspace:
        too_large = "the model, its dense teacher and what training keeps of both"
        remedy = "lower --seqlen or --batch-size, or give --gradient-checkpointing or --device cpu"
        with workspace.interruptible(), fitting_in_memory(too_large, remedy):
            trained = train(
                checkpoint,
                teacher_directory,
                config,
                windows,
                _training(workspace.path),
                device,
                dtype,
                tell,
                ranks,
            )
        if not trained.after < trained.before:
            ranks.from_leader(workspace.abandon)
            raise NothingBetterError(
                f"training made nothing better: the divergence from {config.teacher} on held-out "
                f"samples was {trained.before:.4f} and at best {trained.after:.4f} then; give "
                "more text, or a smaller --step"
            )
        shards = _write(checkpoint, trained.student, workspace)
        recovery = Recovery(
            teacher=str(config.teacher),
            settings=settings,
            tokens=config.epochs * (len(windows) - config.held_out) * windows.shape[1],
            step=trained.step,
            before=trained.before,
            after=trained.after,
            seconds=round(time.monotonic() - started, 3),
        )
        digests = {shard["file"]: shard["sha256"] for shard in shards}
        notes = (*record.notes, _in_words(recovery))
        record = dataclasses.replace(record, recovery=recovery, digests=digests, notes=notes)

        def publish() -> None:
            workspace.write_index(shards)
            checkpoint.copy_companions(workspace.path)
            write_pages(record, workspace.path)
            shutil.rmtree(_training(workspace.path), ignore_errors=True)
            workspace.publish()

        ranks.from_leader(publish)
    return recovery


def _in_words(recovery: Recovery) -> str:
    return (
        f"after pruning it was trained as a whole towards {short_name(recovery.teacher)}, on "
        f"{recovery.tokens:,} tokens: the divergence from it on held-out samples went from "
        f"{recovery.before:.3f} to {recovery.after:.3f} nats a token; the figures of blocks are "
        "from before"
    )


def _device(name: str | None, ranks: Ranks) -> torch.device:
    device = pick_device(ranks.device(name))
    if device.index and ranks.size == 1:
        raise BesaError(
            f"device {name}: training takes the first GPU that it sees; give --device cuda, with "
            f"CUDA_VISIBLE_DEVICES={device.index} before the command"
        )
    return device


def _record_of(directory: Path) -> PruneRecord:
    record = read_record(directory)
    if not isinstance(record, PruneRecord):
        raise BesaError(f"{directory} has no besa.json of a pruned model: give what prune wrote")
    rounded = record.settings.get("quantize")
    if rounded:
        raise BesaError(
            f"{directory} is rounded to {rounded}, and training would undo that: recover a model "
            "that was pruned without --quantize, and give it to export"
        )
    return record


def _settings(
    pruned: str | Path,
    config: RecoverConfig,
    checkpoint: Checkpoint,
    windows: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All that the result depends on."""
    settings = dataclasses.asdict(config)
    for name in ("out", "overwrite"):
        del settings[name]
    return {
        **settings,
        "teacher": str(config.teacher),
        "seqlen": windows.shape[1],
        "text_sha256": samples_digest(windows),
        **conditions(pruned, checkpoint, device, dtype),
    }


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(parameter.numel() for parameter in checkpoint.model.parameters())


def _training(path: Path) -> Path:
    """Where the Trainer keeps its checkpoints."""
    return path / "training"


def _write(
    checkpoint: Checkpoint, student: nn.Module, workspace: Workspace
) -> list[dict[str, Any]]:
    """Writes all tensors in the layout of the pruned model's; gives the shards' records."""
    count = len(checkpoint.blocks) + 1
    trained = dict(student.named_parameters(remove_duplicate=False))
    with checkpoint.other_tensors() as tensors:
        shards = [workspace.finish("others", workspace.shard(1, count), tensors, {})]
    for index in range(len(checkpoint.blocks)):
        block = checkpoint.load_block(index)
        for name, parameter in block.named_parameters():
            value = trained[f"{checkpoint.blocks_name}.{index}.{name}"].detach()
            parameter.data = value.to("cpu", parameter.dtype)
        shard = workspace.shard(index + 2, count)
        tensors = checkpoint.stored_tensors(index)
        shards.append(workspace.finish(f"block-{index:05d}", shard, tensors, {}))
        checkpoint.unload_block(index)
    return shards
