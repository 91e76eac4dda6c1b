"""The training of `besa recover`: towards the teacher, as far as held-out samples gain by it.

An eighth of the samples is held out and looked at eight times on the way. Where the first look
shows harm, training begins anew with a smaller step. The best of the states that were looked at is
the result. Each of them is one that an interrupted run can go on from.

>>> STEPS  # of Adam, as shares of a matrix's root mean square
(0.003, 0.001, 0.0003)
"""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from besa.errors import BesaError
from besa.model.blocks import expert_count
from besa.model.checkpoint import Checkpoint
from besa.model.loading import load_model
from besa.model.quiet import quiet
from besa.processes.ranks import Ranks
from besa.progress import Event, Tell
from besa.recovery.config import RecoverConfig
from besa.recovery.distill import Distiller, Watch, is_harmful, optimizer_of, whole_checkpoints
from besa.recovery.keep_zeros import KeepZeros
from besa.writing import writing

STEPS = (0.003, 0.001, 0.0003)

# How often what is held out is looked at.
_LOOKS = 8

# A disk with fewer bytes than that is full.
_FULL = 1 << 20


@dataclass(frozen=True)
class Trained:
    """The trained model, the step that it took, and its divergence on held-out samples."""

    student: nn.Module
    step: float
    before: float
    after: float


def train(
    checkpoint: Checkpoint,
    teacher: Path,
    config: RecoverConfig,
    windows: Tensor,
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    tell: Tell,
    ranks: Ranks,
) -> Trained:
    """Trains by the largest step that does no harm.

    Args:
        checkpoint: of the pruned model.
        teacher: the dense model's directory.
        windows: token ids int64 [samples, tokens], the last ones held out.
        directory: for what training goes on from.
        device, dtype: of the computation.
        tell: is given every step's event for display.
        ranks: the processes that share the samples of a step, each with all of both models.

    Raises:
        BesaError: the teacher has other words, or the disk is full.
    """
    trust = config.trust_remote_code
    dense = load_model(teacher, str(dtype).removeprefix("torch."), device, trust)
    seen = len(windows) - config.held_out

    def on_step(done: int, total: int, held_out: float | None) -> None:
        what = "" if held_out is None else f"held-out divergence {held_out:.4f}"
        tell(Event("distilling", done, total, what=what))

    steps = STEPS if config.step is None else (config.step,)
    for step in steps:
        folder = directory / f"{step:g}"
        if ranks.from_leader(partial(is_harmful, folder)):  # an earlier run found out
            continue
        student = load_model(checkpoint.directory, "float32", device, trust)
        _check_words(student, dense, teacher)
        blocks = student.get_submodule(checkpoint.blocks_name)
        student.requires_grad_(False)
        blocks.requires_grad_(True)
        watch = Watch(on_step, ranks, may_end=step != steps[-1])
        trainer = Distiller(
            student,
            dense,
            _arguments(config, folder, seen, device, dtype, ranks, checkpoint.config),
            windows[:seen],
            windows[seen:],
            optimizer_of(list(blocks.parameters()), step),
            [KeepZeros(), watch],
        )
        trainer.remove_callback(PrinterCallback)
        finished = ranks.from_leader(partial(whole_checkpoints, folder))
        with quiet(), _room_on_disk(folder):
            trainer.train(resume_from_checkpoint=str(finished[-1]) if finished else None)
        if not ranks.from_leader(partial(is_harmful, folder)):
            break
        ranks.from_leader(partial(_remove_checkpoints, folder))
    best = trainer.state.best_metric
    return Trained(student, step, watch.before, math.inf if best is None else best)


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


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
    config: RecoverConfig,
    folder: Path,
    samples: int,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
    model: Any,
) -> TrainingArguments:
    """What the Trainer is told.

    Args:
        model: its configuration.
    """
    own = config.batch_size // ranks.size
    steps = config.epochs * -(-samples // config.batch_size)
    between = max(1, steps // _LOOKS)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=own,
        per_device_eval_batch_size=own,
        gradient_checkpointing=config.gradient_checkpointing,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        max_grad_norm=1.0,
        # Not by `evaluate` before `train`: accelerate takes a model that was evaluated for one that
        # is ready to be trained, and several processes would each train their own.
        eval_on_start=True,
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
        # An expert that no token went to has no gradient, which its process says.
        ddp_find_unused_parameters=expert_count(model) is not None,
        dataloader_pin_memory=device.type != "cpu",
        seed=config.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # not by threads over all that there are
    return arguments
