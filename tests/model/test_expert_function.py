"""What modules of experts compute is told by what they answer, not by what they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from besa.kernels.experts import Activation
from besa.model.expert_function import function_of


class Experts(nn.Module):
    """Three experts of 24 inputs and 8 between, the plain way; their weights are on meta."""

    def __init__(
        self, gate: Callable[[Any, Tensor], Tensor], rows: int = 16, bias: bool = False
    ) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(3, rows, 24, device="meta"))
        self.second = nn.Parameter(torch.empty(3, 24, 8, device="meta"))
        if bias:
            self.added = nn.Parameter(torch.empty(3, rows, device="meta"))
        self.gate, self.factor, self.bound = gate, 1.5, 3.0

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in chosen.unique():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            rows = F.linear(x[token], self.first[expert])
            if hasattr(self, "added"):
                rows = rows + self.added[expert]
            out = F.linear(self.gate(self, rows), self.second[expert])
            total.index_add_(0, token, out * weights[token, slot, None])
        return total


def halves(function: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def gate(_: Any, rows: Tensor) -> Tensor:
        return function(rows.chunk(2, -1)[0]) * rows.chunk(2, -1)[1]

    return gate


def clamped(self: Any, rows: Tensor) -> Tensor:
    gate = rows[..., ::2].clamp(max=self.bound)
    up = rows[..., 1::2].clamp(-self.bound, self.bound)
    return (up + 1) * gate * torch.sigmoid(self.factor * gate)


KNOWN: dict[str, tuple[Experts, Activation]] = {
    "silu": (Experts(halves(F.silu)), Activation("silu")),
    "gelu": (Experts(halves(F.gelu)), Activation("gelu")),
    "gelu_tanh": (
        Experts(halves(lambda x: F.gelu(x, approximate="tanh"))),
        Activation("gelu_tanh"),
    ),
    "bias": (Experts(halves(F.silu), bias=True), Activation("silu")),
    "no gate": (
        Experts(lambda _, rows: F.relu(rows).square(), rows=8),
        Activation("relu2", gated=False),
    ),
    "clamped": (
        Experts(clamped, bias=True),
        Activation("silu", interleaved=True, alpha=1.5, limit=3.0, shift=1.0),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_activations_are_told(name: str):
    module, activation = KNOWN[name]
    found = function_of(module)
    assert found is not None
    assert found.activation == activation
    assert found.weights == ("first", "second")
    assert found.biases == ("added" if hasattr(module, "added") else None, None)
    assert all(parameter.is_meta for parameter in module.parameters())


class Scaled(Experts):
    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return 1.001 * super().forward(x, chosen, weights)


class Unrouted(Experts):
    def forward(self, x: Tensor) -> Tensor:
        return x


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "another activation": lambda: Experts(halves(torch.tanh)),
    "up before gate": lambda: Experts(lambda _, rows: F.silu(rows[:, 8:]) * rows[:, :8]),
    "more than the experts": lambda: Scaled(halves(F.silu)),
    "inputs of another kind": lambda: Unrouted(halves(F.silu)),
    "one stack": lambda: nn.Conv1d(8, 8, 3),
    "no experts": lambda: nn.Linear(8, 8),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told_is_none(name: str):
    assert function_of(UNKNOWN[name]()) is None
