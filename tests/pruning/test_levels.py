"""Levels: every linear after all that it reads from, experts and loops included."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from besa.model.blocks import find_linears
from besa.pruning.levels import levels


class Attention(nn.Module):
    """Two linears side by side, one behind them, and two behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(24, 16)  # defined first, used last
        self.q, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.gate, self.up = nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) * self.v(x))
        return x + self.down(self.gate(x) * self.up(x))


class Experts(nn.Module):
    """Experts in one parameter, the last of which no token reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 16))
        self.down = nn.Parameter(torch.randn(3, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = x + nn.functional.linear(nn.functional.linear(x, self.up[i]), self.down[i])
        return x


class Loop(nn.Module):
    """A linear that reads its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.again(x))


def names(block: nn.Module, experts: int | None = None) -> list[list[str]]:
    linears = find_linears(block, "block", experts)
    found = levels(block, linears, lambda: block(torch.randn(1, 4, 16)))
    assert sum(len(level.linears) for level in found) == len(linears)
    return [[linear.name for linear in level.linears] for level in found]


def test_levels_follow_the_computation_not_the_definitions():
    assert names(Attention()) == [["q", "v"], ["o"], ["gate", "up"], ["down"]]


def test_experts_that_follow_each_other_end_in_one_level():
    # The second expert's first matrix reads what the first expert gave: of two parameters that hold
    # the matrices of all experts, neither comes first.
    assert names(Experts(), experts=3) == [["up", "down"]]


def test_a_linear_that_reads_itself_has_a_level():
    assert names(Loop()) == [["again"]]


def test_calls_are_counted_and_gradients_are_left_as_they_were():
    block = Loop()
    block.again.weight.requires_grad_(False)
    linears = find_linears(block, "block", experts=None)
    (level,) = levels(block, linears, lambda: block(torch.randn(1, 4, 16)))
    assert level.calls == {("again", 0): 2}
    assert not block.again.weight.requires_grad
    assert block.again.bias.requires_grad
    assert all(parameter.grad is None for parameter in block.parameters())
