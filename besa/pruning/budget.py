"""How many weights a block loses, and where its zeros may be.

>>> from besa.model.blocks import Linear
>>> linears = [Linear(name, f"{name}.weight", 1, 4, 8, transposed=False) for name in ("q", "k")]
>>> Budget(zeros=33, rate=33 / 64).shares(linears)
{'q': [17], 'k': [16]}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from besa.model.blocks import Linear
from besa.pruning.config import UNSTRUCTURED, Pattern, PruneConfig
from besa.pruning.patterns import counts_for


@dataclass(frozen=True)
class Budget:
    """What a block loses.

    Attributes:
        zeros: the weights to prune in all. An N:M pattern fixes them by itself.
        rate: the same as a fraction of the weights, as it was asked for.
        pattern: where zeros may be.
    """

    zeros: int
    rate: float
    pattern: Pattern = UNSTRUCTURED

    def shares(self, linears: Sequence[Linear]) -> dict[str, list[int]]:
        """How many of the zeros each group of each linear gets, all at the same rate."""
        matrices = [x for x in linears for _ in range(x.groups)]
        sizes = torch.tensor([x.rows * x.cols for x in matrices])
        rates = torch.full((len(matrices),), self.rate)
        shares = iter(counts_for(rates, sizes, self.zeros).tolist())
        return {x.name: [next(shares) for _ in range(x.groups)] for x in linears}


def budgets(plan: Sequence[Sequence[Linear]], config: PruneConfig) -> list[Budget]:
    """What each block loses, so that all blocks together lose the target to the weight."""
    result = []
    before = 0
    for linears in plan:
        upto = before + sum(linear.size for linear in linears)
        zeros = round(config.rate * upto) - round(config.rate * before)
        result.append(Budget(zeros, config.rate, config.pattern))
        before = upto
    return result
