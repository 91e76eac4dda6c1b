"""Fine-tuning that leaves a pruned model pruned: a callback for transformers' Trainer, or TRL's.

It is one of the `callbacks` that a Trainer is given. Weights that are zero when training begins get
no gradient, so that clipping and the optimizer's moments see the others alone, and are zero after
each step, whatever the optimizer did.

>>> from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments
>>> model = AutoModelForCausalLM.from_pretrained("path/to/pruned")
>>> keep, arguments = KeepZeros(), TrainingArguments("trained", use_cpu=True, report_to="none")
>>> keep.on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)
>>> weight = model.model.layers[0].mlp.up_proj.weight
>>> model(**model.dummy_inputs, labels=model.dummy_inputs["input_ids"]).loss.backward()
>>> bool((weight.grad[weight == 0] == 0).all()), bool(weight.grad.any())
(True, True)
"""

# ruff: noqa: ARG002 - the Trainer gives its callbacks more than these read

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from besa.errors import BesaError

# A matrix with a smaller share of zeros than that was not pruned.
_PRUNED = 0.01


class KeepZeros(TrainerCallback):  # type: ignore[misc]
    """Keeps what is zero in the matrices of a pruned model when training begins.

    Raises:
        BesaError: when training begins, if no matrix that is trained has zeros: the model is dense,
            or its weights are frozen (as with adapters), or split between processes.
    """

    def __init__(self) -> None:
        self.zeros: list[tuple[nn.Parameter, Tensor]] = []
        self.hooks: list[RemovableHandle] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **more: Any,
    ) -> None:
        """Finds the zeros, and masks gradients from now on."""
        assert model is not None
        self._let_go()
        for parameter in model.parameters():
            if not parameter.requires_grad or parameter.ndim < 2:
                continue
            zeros = parameter.detach() == 0
            if int(zeros.sum()) > _PRUNED * zeros.numel():
                self.zeros.append((parameter, zeros))
                self.hooks.append(parameter.register_hook(_masking(zeros)))
        if not self.zeros:
            raise BesaError(
                "KeepZeros found no zeros in the matrices that are trained: give it a pruned model "
                "whose weights are trained themselves, whole in this process"
            )

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Sets what was zero to zero again."""
        for parameter, zeros in self.zeros:
            parameter.masked_fill_(zeros, 0.0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Frees the masks."""
        self._let_go()

    def _let_go(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.zeros = [], []


def _masking(zeros: Tensor) -> Any:
    return lambda gradient: gradient.masked_fill(zeros, 0.0)
