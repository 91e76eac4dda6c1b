"""The loop by which a block's masks are learned, towards the dense block's output.

BESA's objective (arXiv 2402.16880, equation 2): the squared error of the block's output over that
of the dense block, plus what the learner adds to it. What is learned is the learner's own:
`besa.pruning.allocate` learns how sparse each row is, `besa.pruning.nm` which N of every M
neighbours stay. Both give masked weights with straight-through gradients to their parameters, and
their examples show the loop at work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from besa.pruning.masked import WeightFactory

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# The learners do not mind the loss's scale; float16 gradients would vanish without one.
LOSS_SCALE = 2.0**16

# The block's output for batch i with masked weights, one factory for each matrix.
Forward = Callable[[int, Sequence[WeightFactory]], Tensor]


@dataclass(frozen=True)
class Proposal:
    """The masked weights that a learner's parameters stand for.

    Attributes:
        weights: what makes each of them, so that none need exist longer than it is used.
        rate: the fraction of weights that they prune, a scalar.
        penalty: what joins the error in the loss, a scalar.
    """

    weights: Sequence[WeightFactory]
    rate: Tensor | float
    penalty: Tensor | float = 0.0


class Learner(Protocol[T_co]):
    """Parameters, how they make masks, and how they move."""

    def propose(self) -> Proposal:
        """The masked weights of the parameters as they are, differentiable."""

    def update(self, size: float) -> None:
        """Moves the parameters against their gradients and forgets these.

        Args:
            size: of the step, as a share of the first step's.
        """

    def result(self) -> T_co:
        """What was learned."""


@dataclass(frozen=True)
class Step:
    """A finished step of learning: its error, and the fraction of weights that it pruned."""

    done: int
    total: int
    loss: float
    rate: float


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Learned(Generic[T]):
    """A learner's result, and the mean error of each epoch."""

    value: T
    losses: list[float]


def learn(
    learner: Learner[T],
    forward: Forward,
    targets: Sequence[Tensor],
    *,
    epochs: int = 1,
    generator: torch.Generator,
    on_step: OnStep = lambda step: None,
) -> Learned[T]:
    """Learns for some epochs, with steps that shrink to nothing along a cosine.

    Args:
        targets: the dense block's outputs, one tensor a batch.
        generator: orders the batches.
    """
    total = epochs * len(targets)
    losses: list[float] = []
    for _ in range(epochs):
        for i in torch.randperm(len(targets), generator=generator).tolist():
            size = (1 + math.cos(math.pi * len(losses) / total)) / 2
            loss, rate = learn_step(learner, forward, i, targets[i], size)
            losses.append(loss)
            on_step(Step(len(losses), total, loss, rate))
    return Learned(learner.result(), torch.tensor(losses).view(epochs, -1).mean(1).tolist())


def learn_step(
    learner: Learner[object], forward: Forward, i: int, target: Tensor, size: float = 1.0
) -> tuple[float, float]:
    """One step on batch `i`; gives the error before it and the rate."""
    with torch.enable_grad():
        proposal = learner.propose()
        output = forward(i, proposal.weights).float()
        target = target.to(output.device).float()
        error = (output - target).square().mean() / target.square().mean()
        ((error + proposal.penalty) * LOSS_SCALE).backward()
    learner.update(size)
    return float(error.detach()), float(torch.as_tensor(proposal.rate).detach())
