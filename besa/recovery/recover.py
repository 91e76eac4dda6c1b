"""Trains a pruned model as a whole, towards the dense one: `besa recover`.

>>> config = RecoverConfig(out="recovered", teacher="path/to/model", samples=16, seqlen=32)
>>> recovery = recover("path/to/pruned", config)
>>> recovery.after < recovery.before
True

Pruning goes block by block and gives each block its dense outputs back as well as it can. What is
lost in spite of that adds up, and only the model's own output shows how. So the weights of all
blocks are trained at once towards the dense model's next-token distributions, zeros excepted
(`besa.KeepZeros`). Embedding, last norm and head stay as they are.

An eighth of the samples is held out and looked at eight times on the way. Where the first look
shows harm, training begins anew with a smaller step. What is written is the best of these states,
and nothing is where none is better than the pruned model.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import is_accelerate_available

from besa.data.samples import draw_samples
from besa.errors import BesaError
from besa.model.checkpoint import Checkpoint
from besa.model.files import resolve
from besa.model.loading import (
    fitting_in_memory,
    load_model,
    pick_device,
    quiet,
)
from besa.model.prune_record import PruneRecord, Recovery
from besa.model.record import read_record
from besa.model.workspace import Workspace, check_free
from besa.progress import Event, Tell
from besa.recovery.config import RecoverConfig
from besa.recovery.distill import (
    Distiller,
    Watch,
    is_harmful,
    optimizer_of,
    whole_checkpoints,
)
from besa.recovery.keep_zeros import KeepZeros
from besa.report.names import short_name
from besa.report.pages import write_pages
from besa.version import __version__
from besa.writing import writing

# Of the Trainer's at once: the best, the last and the one that is written. In each a weight has 12
# bytes, two of Adam's moments among them.
_CHECKPOINTS = 3

# Of Adam's first step, as shares of a matrix's root mean square: a smaller one is tried where a
# larger one does harm.
STEPS = (0.003, 0.001, 0.0003)

# A disk with fewer bytes than that is full.
_FULL = 1 << 20

# How often what is held out is looked at, and training can go on from.
_LOOKS = 8


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
    """
    started = time.monotonic()
    out = Path(config.out)
    check_free(out, config.overwrite)
    check_accelerate()
    device = _device(config.device)
    checkpoint = Checkpoint.open(pruned)
    record = _record_of(checkpoint.directory)
    teacher_directory = resolve(config.teacher)
    windows = draw_samples(checkpoint.directory, config.text, config)
    settings = _settings(pruned, config, checkpoint, windows, device)
    needed = checkpoint.nbytes + _CHECKPOINTS * 12 * _parameters(checkpoint)
    with Workspace.open(out, settings, config.overwrite, needed) as workspace:
        too_large = "the model, its dense teacher and what training keeps of both"
        remedy = "lower --seqlen or --batch-size, or give --gradient-checkpointing or --device cpu"
        with workspace.interruptible(), fitting_in_memory(too_large, remedy):
            trained = _trained(
                checkpoint, teacher_directory, config, windows, workspace.path, device, tell
            )
        if not trained.after < trained.before:
            workspace.abandon()
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
        workspace.write_index(shards)
        checkpoint.copy_companions(workspace.path)
        write_pages(record, workspace.path)
        shutil.rmtree(_training(workspace.path), ignore_errors=True)
        workspace.publish()
    return recovery


def check_accelerate() -> None:
    """Raises a BesaError if what the Trainer needs is not there."""
    if not is_accelerate_available():
        raise BesaError(
            "training needs accelerate, as transformers' Trainer does: pip install 'besa[recover]'"
        )


def _in_words(recovery: Recovery) -> str:
    return (
        f"after pruning it was trained as a whole towards {short_name(recovery.teacher)}, on "
        f"{recovery.tokens:,} tokens: the divergence from it on held-out samples went from "
        f"{recovery.before:.3f} to {recovery.after:.3f} nats a token; the figures of blocks are "
        "from before"
    )


def _device(name: str | None) -> torch.device:
    device = pick_device(name)
    if device.index:
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
) -> dict[str, Any]:
    """All that the result depends on."""
    settings = dataclasses.asdict(config)
    for name in ("out", "overwrite"):
        del settings[name]
    return {
        **settings,
        "teacher": str(config.teacher),
        "seqlen": windows.shape[1],
        "text_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "device": device.type,
        "dtype": str(_dtype(config.dtype, device)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "model": str(pruned),
        "model_fingerprint": checkpoint.fingerprint(),
        "besa": __version__,
        "torch": torch.__version__,
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


@dataclass(frozen=True)
class _Trained:
    """The trained model, the step that it took, and its divergence on held-out samples."""

    student: nn.Module
    step: float
    before: float
    after: float


def _trained(
    checkpoint: Checkpoint,
    teacher: Path,
    config: RecoverConfig,
    windows: Tensor,
    path: Path,
    device: torch.device,
    tell: Tell,
) -> _Trained:
    """Trains by the largest step that does no harm.

    Raises:
        BesaError: the teacher has other words.
    """
    dtype = _dtype(config.dtype, device)
    dense = load_model(teacher, str(dtype).removeprefix("torch."), device)
    seen = len(windows) - config.held_out

    def on_step(done: int, total: int, held_out: float | None) -> None:
        what = "" if held_out is None else f"held-out divergence {held_out:.4f}"
        tell(Event("distilling", done, total, what=what))

    steps = STEPS if config.step is None else (config.step,)
    for step in steps:
        folder = _training(path) / f"{step:g}"
        if is_harmful(folder):  # an earlier run found out
            continue
        student = load_model(checkpoint.directory, "float32", device)
        _check_words(student, dense, teacher)
        blocks = student.get_submodule(checkpoint.blocks_name)
        student.requires_grad_(False)
        blocks.requires_grad_(True)
        watch = Watch(on_step, may_end=step != steps[-1])
        trainer = Distiller(
            student,
            dense,
            _arguments(config, folder, seen, device, dtype),
            windows[:seen],
            windows[seen:],
            optimizer_of(list(blocks.parameters()), step),
            [KeepZeros(), watch],
        )
        trainer.remove_callback(PrinterCallback)
        finished = whole_checkpoints(folder)
        with quiet(), _room_on_disk(folder):
            trainer.evaluate()
            trainer.train(resume_from_checkpoint=str(finished[-1]) if finished else None)
        if not is_harmful(folder):
            break
        for checkpoints in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoints)
    best = trainer.state.best_metric
    return _Trained(student, step, watch.before, math.inf if best is None else best)


@contextmanager
def _room_on_disk(folder: Path) -> Iterator[None]:
    """Turns what the Trainer raises on a full disk, of whatever type, into one line."""
    try:
        with writing(folder):
            yield
    except (RuntimeError, SafetensorError):
        if shutil.disk_usage(folder.parent).free > _FULL:
            raise
        with writing(folder):
            raise OSError(errno.ENOSPC, "no room for a checkpoint") from None


def _check_words(student: Any, dense: Any, teacher: Path) -> None:
    words = [len(model.get_output_embeddings().weight) for model in (student, dense)]
    if words[0] != words[1]:
        raise BesaError(
            f"{teacher} knows {words[1]} words and the pruned model {words[0]}: give the model "
            "that it was pruned from"
        )


def _arguments(
    config: RecoverConfig, folder: Path, samples: int, device: torch.device, dtype: torch.dtype
) -> TrainingArguments:
    """What the Trainer is told."""
    steps = config.epochs * -(-samples // config.batch_size)
    between = max(1, steps // _LOOKS)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_checkpointing=config.gradient_checkpointing,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=between,
        save_strategy="steps",
        save_steps=between,
        save_total_limit=2,
        load_best_model_at_end=True,
        prediction_loss_only=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        dataloader_pin_memory=device.type != "cpu",
        seed=config.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # not by threads over all that there are
    return arguments


def _write(
    checkpoint: Checkpoint, student: nn.Module, workspace: Workspace
) -> list[dict[str, Any]]:
    """Writes all tensors in the layout of the pruned model's; gives the shards' records."""
    count = len(checkpoint.blocks) + 1
    trained = dict(student.named_parameters())
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
