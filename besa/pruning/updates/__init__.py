"""The updates: what makes the weights that a mask keeps make up for those that it takes.

An update solves one least-squares problem for each matrix: with the inputs' Gram matrix H = X^T X,
the kept weights are to minimise ||X (W - V)^T||^2 = trace((W - V) H (W - V)^T) over the V that are
zero where the mask is. W is the dense weight, or what would serve best in its place now that the
inputs have changed (`besa.pruning.grams`). An update changes no mask, so that it can follow any
method that leaves the weights as they were.

To add one, write `besa/pruning/updates/NAME.py` with a function `update(weight, mask, hessian)`,
and name it in `besa/methods.py`.

>>> load("admm").__module__
'besa.pruning.updates.admm'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

from besa.model.blocks import Linear
from besa.pruning.block_run import BlockRun, Pruned
from besa.pruning.grams import Gram
from besa.pruning.rounding import compensated

# Of an update, products with a matrix of the inputs' size: those of ADMM.
_STEPS = 40

# weight [rows, cols], mask bool [rows, cols], hessian float32 [cols, cols] -> float32 [rows, cols]
Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def load(name: str) -> Update:
    """The update that `besa.methods.UPDATES` lists under this name."""
    update: Update = import_module(f"{__name__}.{name}").update
    return update


def updated(run: BlockRun, pruned: Pruned, update: Update) -> Pruned:
    """The same masks, with the weights that they keep updated, float32.

    Linears are updated in the order in which the block uses them, each for what it reads in the
    block as updated so far, and towards what it gives in the dense model: it makes up for its own
    zeros and for what the ones before it could not. Experts that saw no token keep their weights.
    Where the settings ask for rounded weights, each linear is rounded before the next one's turn.
    Several processes share the linears of a level, and all of them get all.

    Raises:
        BesaError: a linear's statistics overflowed.
    """
    weights = run.kept(pruned)
    for level in run.levels():
        grams = run.grams(level, weights)
        for linear in level.linears:
            for gram in grams.of(linear):
                if gram is not None:
                    gram.check(linear)
        pieces = [piece for x in level.linears for piece in _pieces(run, x, grams.of(x), pruned)]
        solved = {
            x.name: torch.empty(x.groups, x.rows, x.cols, device=run.device) for x in level.linears
        }
        places = [solved[x.linear.name][x.group, x.rows] for x in pieces]
        owners = run.ranks.deal([x.cost for x in pieces])
        for piece, place, owner in zip(pieces, places, owners, strict=True):
            if owner == run.ranks.rank:
                place.copy_(piece.solved(run, update))
        run.ranks.exchange_(zip(places, owners, strict=True))
        weights |= solved
    return replace(pruned, weights=weights)


@dataclass(frozen=True)
class _Piece:
    """Rows of a matrix, which one process solves for.

    Attributes:
        weight, mask: [rows, cols] of these rows, the dense weight and what is kept of it.
        gram: of the matrix's inputs; None: it had none.
    """

    linear: Linear
    group: int
    rows: slice
    weight: Tensor
    mask: Tensor
    gram: Gram | None

    @property
    def cost(self) -> float:
        """In multiplications, roughly: an inverse, and steps that multiply rows by it."""
        rows, cols = self.weight.shape
        return 0.0 if self.gram is None else cols**2 * (cols + _STEPS * rows)

    def solved(self, run: BlockRun, update: Update) -> Tensor:
        """The rows, updated and rounded, float32 [rows, cols]."""
        weight, mask, gram, grid = self.weight, self.mask, self.gram, run.config.quantize
        if gram is not None:
            weight = update(gram.aim(weight), mask, gram.own)
            if grid is not None:
                stored = run.stored_dtype(self.linear)
                weight = compensated(weight, mask, gram.own, grid, stored)
        return torch.where(mask, weight.float(), 0.0)


def _pieces(
    run: BlockRun, linear: Linear, grams: Sequence[Gram | None], pruned: Pruned
) -> Iterator[_Piece]:
    """A linear's matrices; where they are fewer than processes, in parts: rows are independent."""
    parts = max(1, run.ranks.size // linear.groups)
    size = -(-linear.rows // parts)
    weights, masks = run.weights[linear.name], pruned.masks[linear.name]
    for group, gram in enumerate(grams):
        for start in range(0, linear.rows, size):
            rows = slice(start, min(start + size, linear.rows))
            weight, mask = weights[group, rows], masks[group, rows]
            yield _Piece(linear, group, rows, weight, mask, gram)


def squared_error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """||X (weight - other)^T||^2 of each row, float32 [rows]."""
    difference = weight.float() - other.float()
    return ((difference @ hessian) * difference).sum(1)
