"""Importance of weights, and the input statistics that it is made from.

`InputNorms` gathers what Wanda needs (Sun et al., "A Simple and Effective Pruning Approach for
Large Language Models", arXiv 2306.11695): s_ij = |W_ij| * ||X_j||_2 over the calibration tokens.
`Hessians` gathers what SparseGPT needs (Frantar and Alistarh, arXiv 2301.00774): H = X^T X.
Both are fed by `besa.model.observe.observe` and keep one entry per group, so that an expert's
weights are judged by the tokens routed to it.

>>> linear = Linear("q_proj", "q_proj.weight", groups=1, rows=2, cols=2, transposed=False)
>>> norms = InputNorms([linear], torch.device("cpu"))
>>> norms.add(linear, 0, torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
>>> wanda(torch.tensor([[[1.0, -2.0], [2.0, 3.0]]]), norms.of(linear))
tensor([[[ 5.,  2.],
         [10.,  3.]]])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.model.blocks import Linear
from besa.processes.ranks import Ranks


class InputNorms:
    """Sums of squares of every linear's inputs, per column and group, and how many they are."""

    def __init__(self, linears: Sequence[Linear], device: torch.device) -> None:
        self.squares = {x.name: torch.zeros(x.groups, x.cols, device=device) for x in linears}
        self.tokens = {
            x.name: torch.zeros(x.groups, dtype=torch.int64, device=device) for x in linears
        }

    def add(self, linear: Linear, group: int, inputs: Tensor) -> None:
        """Adds inputs [tokens, cols] of one group."""
        squares = inputs.detach().float().square()
        self.squares[linear.name][group] += squares.sum(0)
        # Some models give each expert every token, zeros where it is another's.
        own = squares.any(1).sum() if linear.groups > 1 else len(inputs)
        self.tokens[linear.name][group] += own

    def sum_over(self, ranks: Ranks) -> None:
        """Adds the inputs that the other processes saw."""
        ranks.sum_(*self.squares.values(), *self.tokens.values())

    def of(self, linear: Linear) -> Tensor:
        """||X_j||_2 as float32 [groups, cols]; ones for a group that saw no token."""
        norms = self.squares[linear.name].sqrt()
        norms[self._saw_nothing(linear)] = 1.0
        return norms

    def unseen(self, linear: Linear) -> list[int]:
        """The groups that no token was routed to: their scores are plain magnitudes."""
        return self._saw_nothing(linear).nonzero().flatten().tolist()

    def _saw_nothing(self, linear: Linear) -> Tensor:
        """Which groups, bool [groups]."""
        return (self.squares[linear.name] == 0).all(1)


class Hessians:
    """X^T X of every linear's inputs, per group."""

    def __init__(self, linears: Sequence[Linear], device: torch.device) -> None:
        self.sums = {x.name: torch.zeros(x.groups, x.cols, x.cols, device=device) for x in linears}

    def add(self, linear: Linear, group: int, inputs: Tensor) -> None:
        """Adds inputs [tokens, cols] of one group."""
        inputs = inputs.detach().float()
        self.sums[linear.name][group].addmm_(inputs.T, inputs)

    def sum_over(self, ranks: Ranks) -> None:
        """Adds the inputs that the other processes saw."""
        ranks.sum_(*self.sums.values())

    def of(self, linear: Linear) -> Tensor:
        """X^T X as float32 [groups, cols, cols]."""
        return self.sums[linear.name]


def check_hessian(hessian: Tensor, linear: Linear, user: str, remedy: str) -> None:
    """Raises a BesaError with the remedy if what `user` needs of a linear's inputs overflowed."""
    if not hessian.isfinite().all():
        raise BesaError(
            f"the inputs of {linear.name} are too large for {user}'s statistics: {remedy}"
        )


def wanda(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2.

    Args:
        weight: [groups, rows, cols].
        norms: float32 [groups, cols].

    Returns:
        float32 [groups, rows, cols].
    """
    return weight.float().abs() * norms.unsqueeze(1)


def magnitude(weight: Tensor) -> Tensor:
    """|W_ij| as float32."""
    return weight.float().abs()
