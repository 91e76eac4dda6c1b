"""Chooses by held-out windows what follows a mask: nothing, ADMM, or learned weights.

How far an update carries depends on how many calibration tokens a weight sees. With many, learned
weights are best; with few, they fit the windows instead of the text, and a step that suits one
model ruins another. So an eighth of the windows is held out, no candidate sees it, and in a block
that candidate stays whose output is nearest to the dense model's there (`balanced_error`). None is
kept that is not better than all cheaper ones.

A method that learns which N of every M weights stay may choose worse than a plain rule where it has
few tokens to learn from. So the masks of `others` are tried, too.

The size of a step is tried on the first blocks; later ones go on with the last that helped, or a
smaller one where it no longer does.

>>> steps_for([])
(0.05, 0.02, 0.006, 0.002)
>>> learned = BlockUpdate(chosen="learn", step=0.006)
>>> steps_for([learned] * 5)
(0.006,)
>>> steps_for([learned] * 5 + [BlockUpdate(chosen="admm")])
(0.002,)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from besa.data.held_out import HELD_OUT
from besa.errors import BesaError
from besa.model.prune_record import BlockUpdate, TriedUpdate
from besa.pruning.block_run import BlockRun, Pruned
from besa.pruning.config import PruneConfig
from besa.pruning.kept_weights import WeightLearner, rms
from besa.pruning.learn import balanced_error
from besa.pruning.updates import admm, updated

# Of a step of Adam, as shares of a matrix's root mean square, the largest first.
STEPS = (0.05, 0.02, 0.006, 0.002)

# Blocks that try all of them.
FIRST = 2


def held_out_of(config: PruneConfig) -> int:
    """How many of a run's windows are held out; 0 where none are needed, or too few are there."""
    return config.sample_count // HELD_OUT if config.update in ("auto", "learn") else 0


def steps_for(earlier: Sequence[BlockUpdate]) -> tuple[float, ...]:
    """The steps that a block tries, after the blocks before it."""
    if len(earlier) < FIRST:
        return STEPS
    place = len(STEPS) - 1
    for number, update in enumerate(earlier):
        if update.step is not None:
            place = STEPS.index(update.step)
        elif number >= FIRST:
            place = min(place + 1, len(STEPS) - 1)
    return (STEPS[place],)


def guarded(
    run: BlockRun,
    pruned: Pruned,
    earlier: Sequence[BlockUpdate],
    solve: bool = True,
    others: Mapping[str, Pruned] | None = None,
) -> tuple[Pruned, BlockUpdate]:
    """What of a mask's updates stays, and what was tried, the cheapest first.

    Args:
        pruned: the masks, and weights if the method made any.
        earlier: what was chosen in the blocks before.
        solve: try ADMM, and learn from there if it helps.
        others: masks of other methods that are tried as well, by the methods' names.
    """
    tried: list[TriedUpdate] = []
    best, best_error, chosen = pruned, math.inf, TriedUpdate(update="none")

    def consider(
        candidate: Pruned, update: str, step: float | None = None, mask: str | None = None
    ) -> None:
        nonlocal best, best_error, chosen
        run.put(candidate)
        error = run.held_out_error()
        tried.append(TriedUpdate(update=update, step=step, mask=mask, error=error))
        if error < best_error:  # False where it is not a number
            best, best_error, chosen = candidate, error, tried[-1]

    masks: list[tuple[str | None, Pruned]] = [(None, pruned)]
    for name, other in (others or {}).items():
        masks.append((name, replace(other, losses=pruned.losses)))
    for mask, candidate in masks:
        consider(candidate, "none", mask=mask)
        if solve:
            with suppress(BesaError):  # its statistics overflowed: the error of `none` stands alone
                consider(updated(run, candidate, admm.update), "admm", mask=mask)
    start, mask = best, chosen.mask
    for step in steps_for(earlier):
        consider(learned(run, start, step), "learn", step, mask)
    update = BlockUpdate(
        chosen=chosen.update, step=chosen.step, mask=chosen.mask, tried=tuple(tried)
    )
    return best, update


def learned(run: BlockRun, pruned: Pruned, step: float) -> Pruned:
    """The same masks, with the weights that they keep learned on the seen windows, float32."""
    weights = run.matrices(run.kept(pruned))
    masks = run.matrices(pruned.masks)
    scales = [rms(weight) for weight in run.matrices(run.weights)]
    learner = WeightLearner(weights, masks, scales, step, run.dtype, run.steps(weights))
    found = run.learn(learner, loss=balanced_error)
    parts = zip(run.linears, run.by_linear(found.value), strict=True)
    return replace(pruned, weights={x.name: torch.stack(matrices) for x, matrices in parts})
