"""Learned weights: towards the least squares, within the mask, whatever the dtype."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from besa.pruning.batches import Group
from besa.pruning.kept_weights import WeightLearner, rms
from besa.pruning.learn import learn, learn_step, relative_error, token_error
from besa.pruning.masked import WeightFactory


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a mask of half of it, and inputs [batches, tokens, cols] that are correlated."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 24, generator=generator)
    mask = torch.rand(12, 24, generator=generator) > 0.5
    mixing = torch.eye(24) + 0.4 * torch.randn(24, 24, generator=generator)
    return weight, mask, torch.randn(64, 16, 24, generator=generator) @ mixing


def error(x: Tensor, weight: Tensor, other: Tensor) -> float:
    return float((x.flatten(0, 1) @ (weight - other).T).square().sum())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_learning_comes_near_to_the_least_squares_at_any_scale(scale: float):
    weight, mask, x = problem()
    weight = weight * scale
    rows = [
        torch.linalg.lstsq(x.flatten(0, 1)[:, kept], x.flatten(0, 1) @ row).solution
        for row, kept in zip(weight, mask, strict=True)
    ]
    best = torch.zeros_like(weight)
    for row, (kept, found) in enumerate(zip(mask, rows, strict=True)):
        best[row, kept] = found
    learner = WeightLearner([weight * mask], [mask], [rms(weight)], step=0.05)

    def forward(i: int, weights: Sequence[WeightFactory]) -> Tensor:
        return x[i] @ weights[0]().T

    found = learn(learner, forward, x @ weight.T, epochs=4, generator=torch.Generator())
    (own,) = found.value
    assert (own[~mask] == 0).all()
    before, least = error(x, weight, weight * mask), error(x, weight, best)
    assert least < error(x, weight, own) < least + 0.1 * (before - least)


def test_a_step_is_a_share_of_the_matrix_and_warms_up():
    weight, mask, x = problem()
    learner = WeightLearner([weight * mask], [mask], [rms(weight)], step=0.02)
    moved = []
    for i in range(6):
        before = learner.weights[0].detach().clone()
        group = Group(len(x[i]), range(i, i + 1))
        learn_step(learner, lambda i, weights: x[i] @ weights[0]().T, group, x @ weight.T)
        moved.append(float((learner.weights[0].detach() - before).abs().max()))
    # Adam's first step is its full size for every weight; the first of five is a fifth of it.
    assert moved[0] == pytest.approx(0.02 / 5 * rms(weight), rel=1e-3)
    assert max(moved) < 1.5 * 0.02 * rms(weight)
    assert moved[4] > 2 * moved[0]


def test_weights_stay_float32_where_the_computation_is_not():
    weight, mask, x = problem()
    learner = WeightLearner(
        [(weight * mask).bfloat16()], [mask], [rms(weight)], step=1e-4, dtype=torch.bfloat16
    )
    start = learner.weights[0].detach().clone()
    proposal = learner.propose()
    assert proposal.weights[0]().dtype == torch.bfloat16
    assert proposal.rate == pytest.approx(float((~mask).float().mean()))
    for i in range(4):  # steps that bfloat16 would round away
        group = Group(len(x[i]), range(i, i + 1))
        learn_step(learner, lambda i, w: x[i].bfloat16() @ w[0]().T, group, x @ weight.T)
    (found,) = learner.result()
    assert found.dtype == torch.float32
    assert (found[mask] != start[mask]).float().mean() > 0.9


def test_a_token_counts_by_its_own_size():
    target = torch.ones(1, 4, 8)
    target[:, 0] = 100.0  # as a beginning token's state is
    output = target.clone()
    output[:, 0] *= 1.1
    assert float(token_error(output, target)) == pytest.approx(0.01 / 4)
    assert float(relative_error(output, target)) == pytest.approx(0.01, rel=1e-3)
    output, target[:, 1:] = target.clone(), 0.0
    assert token_error(target, target) == 0  # a token without a state is harmless
