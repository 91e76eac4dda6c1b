"""Weights that several blocks share: pruned once, in the first block, by the inputs of all uses.

A block that comes later borrows them (`Checkpoint.borrowed`). It finds them pruned, and has fewer
linears of its own to prune.

>>> from besa.model.checkpoint import Checkpoint
>>> later_uses(Checkpoint.open("path/to/model"), 0, [])     # a Llama shares nothing
{}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from besa.model.blocks import Linear
from besa.model.checkpoint import Checkpoint


def own_linears(checkpoint: Checkpoint, index: int, linears: Sequence[Linear]) -> list[Linear]:
    """The linears of a block whose weights are not another block's."""
    prefix = f"{checkpoint.blocks_name}.{index}."
    return [x for x in linears if prefix + x.parameter not in checkpoint.borrowed]


def borrows(checkpoint: Checkpoint, index: int) -> bool:
    """Whether a block uses weights of another one."""
    prefix = f"{checkpoint.blocks_name}.{index}."
    return any(name.startswith(prefix) for name in checkpoint.borrowed)


def later_uses(
    checkpoint: Checkpoint, index: int, linears: Sequence[Linear]
) -> dict[int, dict[Linear, Linear]]:
    """The later blocks that use a block's linears, each as it is called there.

    Returns:
        By the later block's index: the linear as that block names it, and as this one does.
    """
    prefix = f"{checkpoint.blocks_name}.{index}."
    lent = {prefix + x.parameter: x for x in linears}
    uses: dict[int, dict[Linear, Linear]] = {}
    for name, key in checkpoint.borrowed.items():
        linear = lent.get(checkpoint.targets[key])
        if linear is None or not name.startswith(checkpoint.blocks_name + "."):
            continue
        number, _, parameter = name[len(checkpoint.blocks_name) + 1 :].partition(".")
        there = replace(linear, name=parameter.removesuffix(".weight"), parameter=parameter)
        uses.setdefault(int(number), {})[there] = linear
    return uses
