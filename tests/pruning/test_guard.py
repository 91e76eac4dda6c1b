"""The guard: what is tried, what is kept, and that no update of a block does harm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from besa.errors import BesaError
from besa.model.prune_record import BlockUpdate
from besa.pruning import guard
from besa.pruning.block_run import BlockRun, Pruned
from besa.pruning.config import PruneConfig
from besa.pruning.guard import FIRST, STEPS, guarded, held_out_of, steps_for
from besa.pruning.methods import load
from tests.pruning.test_block_run import block_run, budget_of


def held_out_run() -> tuple[BlockRun, Pruned]:
    """A run of 16 batches, four of which are held out, and Wanda's masks."""
    run = block_run(batches=16, held_out=4)
    with torch.no_grad():
        return run, load("wanda").mask(run, budget_of(run))


def learnt(step: float) -> BlockUpdate:
    return BlockUpdate(chosen="learn", step=step)


OTHER = BlockUpdate(chosen="admm")


@pytest.mark.parametrize(
    ("earlier", "steps"),
    [
        ([], STEPS),
        ([OTHER], STEPS),
        ([learnt(STEPS[0])] * FIRST, STEPS[:1]),
        ([learnt(STEPS[0])] * FIRST + [OTHER], STEPS[1:2]),
        ([learnt(STEPS[0])] * FIRST + [OTHER] * 2, STEPS[2:3]),
        ([learnt(STEPS[0])] * FIRST + [OTHER] * 9, STEPS[-1:]),
        ([OTHER] * FIRST, STEPS[-1:]),
        ([OTHER] * FIRST + [learnt(STEPS[-1])], STEPS[-1:]),
        ([learnt(STEPS[0]), learnt(STEPS[1])], STEPS[1:2]),
    ],
)
def test_steps_follow_those_that_helped(earlier: list[BlockUpdate], steps: tuple[float, ...]):
    assert steps_for(earlier) == steps


@torch.no_grad()
def test_the_best_on_held_out_windows_is_kept():
    run, pruned = held_out_run()
    best, update = guarded(run, pruned, [])
    tried = [(each.update, each.step) for each in update.tried]
    assert tried == [("none", None), ("admm", None), *(("learn", step) for step in STEPS)]
    run.put(best)
    errors = [each.error for each in update.tried]
    assert run.held_out_error() == min(errors) < errors[0]
    for name, mask in pruned.masks.items():
        assert torch.equal(best.masks[name], mask)
        assert best.weights is not None
        assert (best.weights[name][~mask] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("better", [True, False])
def test_the_better_of_two_masks_is_kept(better: bool):
    run, wanda = held_out_run()
    worst = Pruned({name: ~mask for name, mask in wanda.masks.items()}, losses=[0.5])
    own, other = (worst, wanda) if better else (wanda, worst)
    best, update = guarded(run, own, [], others={"magnitude": other})
    assert [(each.update, each.mask) for each in update.tried] == [
        *(("none", None), ("admm", None), ("none", "magnitude"), ("admm", "magnitude")),
        *[("learn", "magnitude" if better else None)] * len(STEPS),
    ]
    assert update.mask == ("magnitude" if better else None)
    for name, mask in wanda.masks.items():
        assert torch.equal(best.masks[name], mask)
    assert best.losses == own.losses


@torch.no_grad()
def test_an_update_that_does_harm_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    run, pruned = held_out_run()
    monkeypatch.setattr(guard, "STEPS", (30.0, 10.0))  # weights are thrown about
    monkeypatch.setattr(guard.admm, "update", lambda weight, mask, _: -weight * mask)
    best, update = guarded(run, pruned, [])
    assert (update.chosen, update.step) == ("none", None)
    assert best is pruned
    assert all(each.error > update.tried[0].error for each in update.tried[1:])


@torch.no_grad()
def test_not_a_number_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    run, pruned = held_out_run()

    monkeypatch.setattr(guard, "STEPS", (float("nan"),))
    monkeypatch.setattr(guard.admm, "update", lambda weight, *_: weight * torch.nan)
    best, update = guarded(run, pruned, [])
    assert best is pruned
    assert update.chosen == "none"
    assert [math.isnan(each.error) for each in update.tried] == [False, True]


@torch.no_grad()
def test_statistics_that_overflow_leave_learning(monkeypatch: pytest.MonkeyPatch):
    def overflow(*_: object) -> Pruned:
        raise BesaError("too large")

    run, pruned = held_out_run()
    monkeypatch.setattr(guard, "updated", overflow)
    _, update = guarded(run, pruned, [])
    assert [each.update for each in update.tried] == ["none", *["learn"] * len(STEPS)]


@torch.no_grad()
def test_nothing_is_learned_from_what_is_held_out():
    def result(noise: float) -> tuple[dict[str, Tensor], ...]:
        run = block_run(batches=16, held_out=4)
        for i in range(12, 16):  # the last ones, spoilt: neither statistics nor steps see them
            run.stream[i].add_(noise)
            run.targets[i].sub_(noise)
        run.observe(False, lambda i, output: None)
        pruned = load("wanda").mask(run, budget_of(run))
        solved = guard.updated(run, pruned, guard.admm.update)
        learned = guard.learned(run, solved, STEPS[0])
        assert solved.weights is not None
        assert learned.weights is not None
        return pruned.masks, solved.weights, learned.weights

    for ours, theirs in zip(result(0.0), result(100.0), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("samples", "count"), [(1, 0), (7, 0), (8, 1), (64, 8), (128, 16)])
def test_an_eighth_is_held_out(samples: int, count: int, tmp_path: Path):
    assert held_out_of(PruneConfig(out=tmp_path, samples=samples)) == count
    assert held_out_of(PruneConfig(out=tmp_path, samples=samples, method="wanda")) == 0
    if count:
        learned = PruneConfig(out=tmp_path, samples=samples, method="wanda", update="learn")
        assert held_out_of(learned) == count
    else:
        with pytest.raises(BesaError, match=f"of {samples} samples none .* --samples 8"):
            PruneConfig(out=tmp_path, samples=samples, method="wanda", update="learn")
