"""KeepZeros in a real Trainer: zeros stay, all else is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import besa
from besa.errors import BesaError
from besa.recovery.keep_zeros import KeepZeros


@pytest.fixture
def model(tiny_model: Path) -> Any:
    """The tiny model, half of each matrix of its blocks zero."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for parameter in model.model.layers.parameters():
        if parameter.ndim > 1:
            parameter.data[parameter.abs() < parameter.abs().median()] = 0.0
    return model


def train(model: Any, out: Path, **more: Any) -> Trainer:
    tokens = torch.randint(1, 257, (8, 16), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        out,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        **more,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[KeepZeros()])
    trainer.train()
    return trainer


def matrices(model: Any) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.model.layers.named_parameters()
        if parameter.ndim > 1
    }


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optim": "sgd"},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=str,
)
def test_zeros_stay_and_all_else_is_trained(model: Any, tmp_path: Path, more: dict[str, Any]):
    before = matrices(model)
    train(model, tmp_path, **more)
    for name, after in matrices(model).items():
        assert torch.equal(after == 0, before[name] == 0), name
        kept = before[name] != 0
        assert (after[kept] != before[name][kept]).float().mean() > 0.9, name


def test_a_step_that_moves_everything_is_undone(model: Any):
    class Shaken(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(0.01)

    before = matrices(model)
    keep = KeepZeros()
    keep.on_train_begin(None, None, None, model=model)
    optimizer = Shaken(model.parameters(), lr=0.1)
    tokens = torch.randint(1, 257, (2, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    keep.on_step_end(None, None, None)
    for name, after in matrices(model).items():
        assert torch.equal(after == 0, before[name] == 0), name


def test_no_mask_is_left_behind(model: Any, tmp_path: Path):
    (callback,) = [
        each
        for each in train(model, tmp_path).callback_handler.callbacks
        if isinstance(each, KeepZeros)
    ]
    assert callback.zeros == callback.hooks == []
    tokens = torch.randint(1, 257, (2, 16))
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.grad[weight == 0] != 0).any()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_without_zeros_to_train_is_refused(
    model: Any, tiny_model: Path, tmp_path: Path, frozen: bool
):
    if frozen:
        model.model.layers.requires_grad_(False)
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(BesaError, match="found no zeros in the matrices that are trained"):
        train(model, tmp_path)


def test_it_is_part_of_the_api():
    assert besa.KeepZeros is KeepZeros
