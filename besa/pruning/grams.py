"""What least squares need to know of a linear's inputs, in the pruned block and in the dense one.

A linear of a pruned block reads X, that of the dense model X'. The weight V that gives again what
the dense weight W gave minimises ||X V^T - X' W^T||^2, and so depends on X alone through X^T X and
X'^T X. Without zeros it is W X'^T X (X^T X)^-1, which is what V has to come near to (`aim`).

>>> x = torch.randn(64, 8)
>>> weight = torch.randn(4, 8)
>>> moved = Gram(x.T @ x, (2 * x).T @ x)  # the dense model's inputs were twice as large
>>> bool((moved.aim(weight) - 2 * weight).norm() < 0.5 * weight.norm())
True
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from besa.model.blocks import Linear
from besa.model.observe import observe
from besa.model.replay import Call
from besa.processes.ranks import Ranks
from besa.pruning.levels import Level
from besa.pruning.scores import check_hessian

_DAMPING = 0.1  # of an input's own square, towards the dense weight


@dataclass(frozen=True)
class Gram:
    """Products of a linear's inputs over the calibration tokens, float32 [cols, cols].

    Attributes:
        own: X^T X.
        cross: X'^T X; None where both are the same.
    """

    own: Tensor
    cross: Tensor | None = None

    def aim(self, weight: Tensor) -> Tensor:
        """The weight that would do best without zeros, float32 [rows, cols]."""
        if self.cross is None:
            return weight.float()
        damping = torch.diag(self._damping())
        lower = torch.linalg.cholesky(self.own + damping)
        return torch.cholesky_solve((weight.float() @ (self.cross + damping)).T, lower).T

    def check(self, linear: Linear) -> None:
        """Raises a BesaError if a sum overflowed."""
        for products in (self.own, self.cross):
            if products is not None:
                check_hessian(products, linear, "an update", "give --update none")

    def _damping(self) -> Tensor:
        """For each input in its own scale; an input that never fires keeps its weights."""
        diagonal = self.own.diagonal()
        return torch.where(diagonal > 0, _DAMPING * diagonal, 1.0)


# The inputs [tokens, cols] of every use of a linear in one batch, by its name and group.
Inputs = dict[tuple[str, int], list[Tensor]]


class LevelGrams:
    """The `Gram` of every matrix of a level, gathered batch by batch.

    Linears that are given the same tensor, as query, key and value are, share one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.places: dict[tuple[str, int], tuple[str, int]] = {}
        self.own: dict[tuple[str, int], Tensor] = {}
        self.cross: dict[tuple[str, int], Tensor | None] = {}

    def add(self, inputs: Inputs, dense: Inputs | None, tokens: int) -> None:
        """Adds a batch of so many tokens.

        Args:
            inputs: in the pruned block.
            dense: in the dense model; None where both are the same. Where a router sends tokens
                elsewhere there, a row of one is not a row of the other, and `cross` is left out.
        """
        first: dict[tuple[object, ...], tuple[str, int]] = {}
        for key, given in inputs.items():
            pieces = tuple((piece.data_ptr(), piece.shape) for piece in given)
            place = self.places.setdefault(key, first.setdefault(pieces, key))
            if place != key:
                continue
            x = torch.cat(given).float()
            cols = x.shape[1]
            if key not in self.own:
                self.own[key] = torch.zeros(cols, cols, device=self.device)
                self.cross[key] = None if dense is None else torch.zeros_like(self.own[key])
            self.own[key].addmm_(x.T, x)
            cross = self.cross[key]
            if cross is not None:
                other = torch.cat(dense[key]).float() if dense and key in dense else x[:0]
                if len(x) == len(other) == tokens:
                    cross.addmm_(other.T, x)
                else:
                    self.cross[key] = None

    def sum_over(self, ranks: Ranks) -> None:
        """Adds the inputs that the other processes saw: of experts, each may have seen others."""
        if ranks.size == 1:
            return
        whole = {key: (len(own), self.cross[key] is not None) for key, own in self.own.items()}
        places: dict[tuple[str, int], tuple[str, int]] = {}
        found: dict[tuple[str, int], tuple[int, bool]] = {}
        for their_places, theirs in ranks.gather((self.places, whole)):
            places = their_places | places
            for key, (cols, crossed) in theirs.items():
                found[key] = cols, crossed and found.get(key, (cols, True))[1]
        zeros = {
            key: torch.zeros(cols, cols, device=self.device) for key, (cols, _) in found.items()
        }
        own = {key: self.own.get(key, zeros[key]) for key in found}
        cross = {
            key: zeros[key].clone() if (mine := self.cross.get(key)) is None else mine
            for key, (_, crossed) in found.items()
            if crossed
        }
        ranks.sum_(*own.values(), *cross.values())
        self.places, self.own = places, own
        self.cross = {key: cross.get(key) for key in found}

    def of(self, linear: Linear) -> list[Gram | None]:
        """One for each group; None for a group that saw no token."""
        keys = [self.places.get((linear.name, group)) for group in range(linear.groups)]
        return [key and Gram(self.own[key], self.cross[key]) for key in keys]


class _Seen(Exception):
    """All inputs that are wanted were seen."""


def level_inputs(block: nn.Module, level: Level, call: Call, hidden: Tensor) -> Inputs:
    """The inputs of a level's linears on one batch; the block runs as far as it has to."""
    used = [level.calls[x.name, group] for x in level.linears for group in range(x.groups)]
    wanted = sum(used) if all(used) else None  # which experts are used differs by batch
    inputs: Inputs = {}
    seen = 0

    def on_input(linear: Linear, group: int, given: Tensor) -> None:
        nonlocal seen
        inputs.setdefault((linear.name, group), []).append(given.detach())
        seen += 1
        if seen == wanted:
            raise _Seen

    with suppress(_Seen), observe(block, level.linears, on_input):
        call.run(block, hidden)
    return inputs
