"""The pruning methods: one file each, which ends in its `METHOD`.

To add one, write `besa/pruning/methods/NAME.py` and name it in `besa/methods.py`. The example of
`besa.pruning.block_run` prunes a block with one.

>>> load("sparsegpt").hessians, load("besa").targets
(True, True)

Pruning a block has up to three steps: a mask is chosen, the weights that it keeps are updated, the
block's output is reconstructed by learning them. A step gives a `Pruned`, and the next one goes
on from there. Today every method has only the first; SparseGPT updates the weights in that same
pass, because it chooses a column's mask from weights that are already updated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from besa.pruning.block_run import BlockRun, Pruned
from besa.pruning.budget import Budget


@dataclass(frozen=True)
class Method:
    """A method's steps, and what it must know of a block.

    Attributes:
        mask: chooses what a block loses.
        hessians: it needs X^T X of every linear's inputs (`BlockRun.hessians`).
        targets: it needs the dense block's output for every batch, to learn from.
    """

    mask: Callable[[BlockRun, Budget], Pruned]
    hessians: bool = False
    targets: bool = False


def load(name: str) -> Method:
    """The method that `besa.methods.METHODS` lists under this name."""
    method: Method = import_module(f"{__name__}.{name}").METHOD
    return method
