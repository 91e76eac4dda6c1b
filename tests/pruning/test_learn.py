"""The learning loop: a GPU's figures are read a step late, and are the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from besa.pruning import learn as module
from besa.pruning.allocate import RankedMatrix, RateLearner, rank_buckets
from besa.pruning.batches import Group
from besa.pruning.learn import (
    Learned,
    Loss,
    Step,
    balanced_error,
    learn,
    learn_step,
    relative_error,
)
from besa.pruning.masked import WeightFactory

EPOCHS, BATCHES = 2, 3


def learned() -> tuple[Learned[list[Tensor]], list[Step], list[int]]:
    """What is learned, what is told, and how many batches had been queued whenever it was."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 200, generator=generator)
    inputs = torch.randn(BATCHES, 16, 200, generator=generator)
    learner = RateLearner([RankedMatrix(weight, rank_buckets(weight.abs()))], sparsity=0.5)
    queued, told, steps = 0, [], []

    def forward(i: int, weights: Sequence[WeightFactory]) -> Tensor:
        nonlocal queued
        queued += 1
        return inputs[i] @ weights[0]().T

    def on_step(step: Step) -> None:
        told.append(queued)
        steps.append(step)

    targets = list(inputs @ weight.T)
    found = learn(learner, forward, targets, epochs=EPOCHS, generator=generator, on_step=on_step)
    return found, steps, told


def test_figures_that_are_read_late_are_the_same(monkeypatch: pytest.MonkeyPatch):
    at_once, steps, told = learned()
    assert told == [1, 2, 3, 4, 5, 6]
    assert [step.done for step in steps] == told
    assert len(at_once.losses) == EPOCHS

    class Late(module._Figures):
        def __init__(self, error: Tensor, rate: Tensor) -> None:
            super().__init__(error, rate)
            self.on_gpu = True

    monkeypatch.setattr(module, "_Figures", Late)
    late, late_steps, late_told = learned()
    assert late_told == [2, 3, 4, 5, 6, 6]
    assert late_steps == steps
    assert late.losses == at_once.losses
    assert all(torch.equal(a, b) for a, b in zip(late.value, at_once.value, strict=True))


@pytest.mark.parametrize("loss", [relative_error, balanced_error])
def test_a_step_is_the_same_however_it_is_cut_up(loss: Loss):
    """Into batches of unequal sizes, whose targets have unequal norms."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 200, generator=generator)
    inputs = torch.randn(6, 16, 200, generator=generator)
    inputs[:2] *= 5
    gradients, errors = [], []
    for sizes in ([6], [1, 2, 3], [4, 2]):
        parts = inputs.split(sizes)
        learner = RateLearner([RankedMatrix(weight, rank_buckets(weight.abs()))], sparsity=0.4)
        with torch.no_grad():
            learner.theta += torch.randn(learner.theta.shape, generator=generator.manual_seed(1))
        learner.update = lambda size: None  # type: ignore[method-assign]

        def forward(
            i: int, weights: Sequence[WeightFactory], parts: Sequence[Tensor] = parts
        ) -> Tensor:
            return parts[i] @ weights[0]().T

        group = Group(6, range(len(sizes)))
        error, _ = learn_step(learner, forward, group, [x @ weight.T for x in parts], loss=loss)
        gradients.append(learner.theta.grad)
        errors.append(float(error))
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=1e-5)
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], rtol=1e-4, atol=1e-3)
    assert gradients[0].abs().max() > 1
