"""Which of a block's linears read what others of them give, and so come after them.

>>> from besa.model.blocks import find_linears
>>> class Block(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.down, self.gate, self.up = nn.Linear(32, 16), nn.Linear(16, 32), nn.Linear(16, 32)
...     def forward(self, x):
...         return self.down(self.gate(x) * self.up(x))
>>> block = Block()
>>> linears = find_linears(block, "block", experts=None)
>>> for level in levels(block, linears, lambda: block(torch.ones(1, 16))):
...     print([linear.name for linear in level.linears])
['gate', 'up']
['down']
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from besa.model.blocks import Linear
from besa.model.observe import observe


@dataclass(frozen=True)
class Level:
    """Linears that do not depend on each other, but on those of earlier levels.

    Attributes:
        linears: in the block's order.
        calls: how often the block used each of them, by name and group.
    """

    linears: list[Linear]
    calls: Counter[tuple[str, int]]


def levels(block: nn.Module, linears: Sequence[Linear], run: Callable[[], object]) -> list[Level]:
    """The linears by levels; those that `run` does not use are in the first.

    Args:
        run: runs the block on some batch.
    """
    parameters = {x.name: block.get_parameter(x.parameter) for x in linears}
    wanted = [(parameter, parameter.requires_grad) for parameter in block.parameters()]
    found, rest = [], list(linears)
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        while rest:
            level = _first_level(block, rest, parameters, run)
            found.append(level)
            rest = [linear for linear in rest if linear not in level.linears]
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
    return found


def _first_level(
    block: nn.Module,
    linears: Sequence[Linear],
    parameters: dict[str, nn.Parameter],
    run: Callable[[], object],
) -> Level:
    """The linears whose inputs have no gradient to any of their weights."""
    later: set[str] = set()
    calls: Counter[tuple[str, int]] = Counter()

    def on_input(linear: Linear, group: int, inputs: Tensor) -> None:
        calls[linear.name, group] += 1
        if inputs.requires_grad:
            later.add(linear.name)

    for linear in linears:
        parameters[linear.name].requires_grad_(True)
    with torch.enable_grad(), observe(block, linears, on_input):
        run()
    for linear in linears:
        parameters[linear.name].requires_grad_(False)
    # A linear that reads its own output, as of a loop, would never have its turn.
    first = [linear for linear in linears if linear.name not in later] or list(linears)
    names = {linear.name for linear in first}
    return Level(first, Counter({key: n for key, n in calls.items() if key[0] in names}))
