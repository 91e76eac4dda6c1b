"""BESA for N:M patterns: learns which N of every M neighbours stay.

An N:M pattern fixes the rate of every row, so there is nothing to allocate. What is learned
instead, towards the same block objective and through the same straight-through mask as in
`besa.pruning.allocate`, is the choice within the groups: each weight has a log-importance, at first
Wanda's, and the gradient of the loss to its mask, dL/dM = dL/dW' * W, moves it. The step is
divided by the gradient's root mean square over the matrix, so that no model needs its own.

>>> from besa.pruning.learn import learn
>>> weight, inputs = torch.randn(8, 16), torch.randn(4, 16, 16)
>>> learner = ChoiceLearner([weight], [weight.abs()], Pattern(2, 4))
>>> def forward(i, weights):
...     return inputs[i] @ weights[0]().T
>>> learned = learn(learner, forward, inputs @ weight.T, generator=torch.Generator())
>>> learned.value[0].sum(1)  # of the first matrix, the weights kept per row
tensor([8, 8, 8, 8, 8, 8, 8, 8])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from besa.pruning.config import Pattern
from besa.pruning.learn import Proposal
from besa.pruning.masked import MaskedMatrix
from besa.pruning.patterns import n_of_m


@dataclass(frozen=True, eq=False)
class ChoiceMask(MaskedMatrix):
    """weight * mask; its gradient is dL/dmask for all weights, kept or not.

    Attributes:
        parameter: the importances, float32 [rows, cols].
        weight: [rows, cols].
        mask: bool [rows, cols].
    """

    parameter: Tensor
    weight: Tensor
    mask: Tensor

    def make(self) -> Tensor:
        """`MaskedMatrix.make`."""
        return self.weight * self.mask

    def gradient(self, upstream: Tensor) -> Tensor:
        """`MaskedMatrix.gradient`."""
        return (upstream * self.weight).float()


class ChoiceLearner:
    """Learns the N:M masks of one block's matrices (`besa.pruning.learn.Learner`).

    Args:
        weights: [rows, cols], cols divisible by M.
        scores: where the importances start, positive float32 [rows, cols].
        pattern: N:M.
        lr: how far a typical weight's log-importance moves in the first step.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        scores: Sequence[Tensor],
        pattern: Pattern,
        *,
        lr: float = 0.1,
    ) -> None:
        self.weights, self.pattern, self.lr = weights, pattern, lr
        smallest = torch.finfo(torch.float32).tiny
        self.importances = [x.clamp_min(smallest).log().requires_grad_() for x in scores]

    def parameters(self) -> list[Tensor]:
        """The importances."""
        return self.importances

    def propose(self) -> Proposal:
        """The weights under the masks of the importances as they are."""
        parts = zip(self.importances, self.weights, self.result(), strict=True)
        weights = [ChoiceMask(*part) for part in parts]
        return Proposal(weights, 1 - self.pattern.n / self.pattern.m)

    @torch.no_grad()
    def update(self, size: float) -> None:
        """Moves the importances, each matrix by `lr * size` in the root mean square."""
        for importance in self.importances:
            gradient = importance.grad
            if gradient is not None:  # an expert that no token of the batch reached
                scale = gradient.square().mean().sqrt().clamp_min(1e-30)
                importance -= self.lr * size * gradient / scale
                importance.grad = None

    def result(self) -> list[Tensor]:
        """Bool masks [rows, cols], N of every M neighbours True."""
        n, m = self.pattern.n, self.pattern.m
        return [n_of_m(importance.detach(), n, m) for importance in self.importances]
