"""Distillation by transformers' Trainer: the dense model is the teacher, zeros stay.

>>> from transformers import AutoModelForCausalLM
>>> student, teacher = (AutoModelForCausalLM.from_pretrained("path/to/pruned") for _ in range(2))
>>> rows = torch.randint(257, (4, 16))
>>> arguments = TrainingArguments("trained", use_cpu=True, report_to="none", save_strategy="no")
>>> optimizer = optimizer_of(list(student.parameters()), step=0.001)
>>> distiller = Distiller(student, teacher, arguments, rows, rows[:1], optimizer)
>>> distiller.evaluate()["eval_loss"]
0.0
"""

# ruff: noqa: ARG002 - the Trainer gives its callbacks more than these read

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from besa.processes.ranks import ALONE, Ranks
from besa.recovery.divergence import divergence

# What is there once all else of a checkpoint is: a run that was killed goes on from no other.
_WHOLE = "whole"

# What is there once training was ended, beside the checkpoints.
_HARMFUL = "harmful"


class Distiller(Trainer):  # type: ignore[misc]
    """Trains a model towards its teacher's next-token distributions.

    Args:
        student: is trained, where its parameters are not frozen.
        teacher: gives logits over the same words.
        arguments: of the Trainer.
        rows: token ids int64 [samples, tokens] to learn from.
        held_out: the same, to evaluate on.
        optimizer: of the student's parameters.
        callbacks: besides those that the Trainer has.
    """

    loss_is_scaled_for_ga = False  # a batch's loss is its mean

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        arguments: TrainingArguments,
        rows: Tensor,
        held_out: Tensor,
        optimizer: torch.optim.Optimizer,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            student,
            arguments,
            train_dataset=_Rows(rows),
            eval_dataset=_Rows(held_out),
            optimizers=(optimizer, None),
            callbacks=list(callbacks),
        )
        self.teacher = teacher.eval().requires_grad_(False)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """`besa.recovery.divergence` of a batch."""
        tokens = inputs["input_ids"]
        with torch.no_grad():
            aim = self.teacher(input_ids=tokens, use_cache=False).logits
        outputs = model(input_ids=tokens, use_cache=False)
        loss = divergence(outputs.logits, aim)
        return (loss, outputs) if return_outputs else loss


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Token ids, as the Trainer takes them; without labels it would not evaluate."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def optimizer_of(parameters: Sequence[nn.Parameter], step: float) -> torch.optim.Optimizer:
    """Adam, each parameter's step a share of its own root mean square; 8 bytes a weight."""
    groups = [{"params": [p], "lr": step * _rms(p)} for p in parameters]
    return torch.optim.AdamW(groups, lr=step, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def _rms(parameter: Tensor) -> float:
    return float(parameter.detach().float().square().mean().sqrt())


class Watch(TrainerCallback):  # type: ignore[misc]
    """Says where training is, ends it where it does harm, and marks whole checkpoints.

    Args:
        on_step: is given the steps done, the steps in all, and the last loss on held-out samples.
        ranks: the processes that train together; the first one marks.
        may_end: end at the first look at held-out samples if their loss is not lower by then.

    Attributes:
        before: the loss on held-out samples before the first step.
    """

    def __init__(
        self,
        on_step: Callable[[int, int, float | None], None],
        ranks: Ranks = ALONE,
        may_end: bool = False,
    ) -> None:
        self.on_step, self.ranks, self.may_end = on_step, ranks, may_end
        self.before = math.inf
        self.held_out: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        # What an interrupted run found out.
        begun = [entry for entry in state.log_history if entry["step"] == 0]
        self.before = next((x["eval_loss"] for x in begun if "eval_loss" in x), math.inf)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.ranks.gather(None)  # each has written its part of it
        self.ranks.from_leader((directory / _WHOLE).touch)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        self.on_step(state.global_step, state.max_steps, self.held_out)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **more: Any,
    ) -> None:
        self.held_out = metrics["eval_loss"]
        self.on_step(state.global_step, state.max_steps, self.held_out)
        if state.global_step == 0:
            self.before = self.held_out
        first = state.global_step == args.eval_steps
        if first and self.may_end and not self.held_out < self.before:
            self.ranks.from_leader((Path(args.output_dir) / _HARMFUL).touch)
            control.should_training_stop = True


def is_harmful(directory: Path) -> bool:
    """Whether training into a directory was ended because it did harm."""
    return (directory / _HARMFUL).exists()


def whole_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints that training can go on from, the oldest first."""
    marked = (path.parent for path in directory.glob(f"checkpoint-*/{_WHOLE}"))
    return sorted(marked, key=lambda path: int(re.sub(r"\D", "", path.name)))
