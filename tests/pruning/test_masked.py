"""Masked weights that exist only while they are used: same results and gradients, less memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from besa.model.blocks import Linear, find_linears
from besa.pruning.masked import MaskedMatrix, WeightFactory, masked


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Experts(nn.Module):
    """Fused experts, used as the given function does."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], transposed: bool) -> None:
        super().__init__()
        shape = (3, 16, 10) if transposed else (3, 10, 16)
        self.weight = nn.Parameter(random(*shape, seed=5), requires_grad=False)
        self.is_transposed = transposed
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


def by_expert(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([nn.functional.linear(x, weight[i]) for i in (0, 2)]).sum(0)


def by_tensor_index(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([x @ weight[i] for i in torch.tensor([2, 1])]).sum(0)


def all_at_once(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.expand(weight.shape[0], -1, -1), weight.mT).sum(0)


def by_slice(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight[1:].transpose(1, 2)).sum(0)


class Block(nn.Module):
    """Two linears with an activation between them, so that inputs need gradients too."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        assert self.first.weight.shape == (16, 12)
        return self.middle(self.first(x).tanh())


class ByHand(nn.Linear):
    """A linear that takes its weight in another way than most."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


BLOCKS = {
    "linear": (lambda: nn.Linear(16, 10), None),
    "linear by hand": (lambda: ByHand(16, 10), None),
    "conv1d": (lambda: Conv1D(10, 16), None),
    "experts one by one": (lambda: Experts(by_expert, False), 3),
    "experts by tensor": (lambda: Experts(by_tensor_index, True), 3),
    "experts at once": (lambda: Experts(all_at_once, False), 3),
    "experts by slice": (lambda: Experts(by_slice, False), 3),
}


class Case:
    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        make, experts = BLOCKS[name]
        self.block = Block(make()).requires_grad_(False)
        self.linears = find_linears(self.block, "block", experts)
        self.weights = {
            x.name: [
                m.contiguous() for m in x.matrix(self.block.get_parameter(x.parameter)).unbind()
            ]
            for x in self.linears
        }
        self.masks = {
            name: [random(*m.shape, seed=9 + i).sigmoid() for i, m in enumerate(matrices)]
            for name, matrices in self.weights.items()
        }
        self.x = random(4, 12, seed=3)

    def leaves(self) -> dict[str, list[Tensor]]:
        return {n: [m.clone().requires_grad_() for m in ms] for n, ms in self.masks.items()}


def product(weight: Tensor, mask: Tensor) -> Tensor:
    return weight * mask


@dataclass(frozen=True, eq=False)
class Product(MaskedMatrix):
    """`product`, with its gradient to the mask."""

    parameter: Tensor
    weight: Tensor

    def make(self) -> Tensor:
        return self.weight * self.parameter

    def gradient(self, upstream: Tensor) -> Tensor:
        return upstream * self.weight


def as_function(weight: Tensor, mask: Tensor) -> WeightFactory:
    return partial(product, weight, mask)


def as_matrix(weight: Tensor, mask: Tensor) -> WeightFactory:
    return Product(mask, weight)


def gradients(masks: dict[str, list[Tensor]]) -> list[Tensor]:
    return [
        torch.zeros_like(mask) if mask.grad is None else mask.grad
        for row in masks.values()
        for mask in row
    ]


@pytest.mark.parametrize("way", [as_function, as_matrix])
@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_gradients_are_those_of_plain_autograd(
    name: str, way: Callable[[Tensor, Tensor], WeightFactory]
):
    case = Case(name)
    lazy, plain = case.leaves(), case.leaves()
    makes = {n: [way(w, m) for w, m in zip(case.weights[n], lazy[n], strict=True)] for n in lazy}
    with masked(case.block, case.linears, makes):
        output = case.block(case.x)
    output.square().sum().backward()

    stand_ins = {}
    for x in case.linears:
        matrix = torch.stack(
            [w * m for w, m in zip(case.weights[x.name], plain[x.name], strict=True)]
        )
        stand_ins[x.parameter] = x.stored(matrix, case.block.get_parameter(x.parameter))
    expected = torch.func.functional_call(case.block, stand_ins, (case.x,))
    expected.square().sum().backward()

    assert not torch.equal(output, case.block(case.x)), "the masks do something"
    torch.testing.assert_close(output, expected)
    for a, b in zip(gradients(lazy), gradients(plain), strict=True):
        torch.testing.assert_close(a, b)
    assert sum(float(g.abs().sum()) > 0 for g in gradients(lazy)) >= 2


def test_nothing_masked_outlives_its_use():
    block = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)]).requires_grad_(False)
    linears = find_linears(block, "block", None)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def make(linear: Linear, mask: Tensor) -> Tensor:
        nonlocal most
        made = block.get_parameter(linear.parameter) * mask
        alive.append(weakref.ref(made))
        most = max(most, sum(reference() is not None for reference in alive))
        return made

    masks = {x.name: random(16, 16).requires_grad_() for x in linears}
    makes = {x.name: [partial(make, x, masks[x.name])] for x in linears}
    with masked(block, linears, makes):
        loss = block(random(3, 16)).square().sum()
    assert most == 1
    assert all(reference() is None for reference in alive)
    loss.backward()
    # The first linear's own weight is not needed again: its input takes no gradient.
    assert len(alive) == 6 + 5
    assert most == 1
    assert all(mask.grad is not None for mask in masks.values())


def test_of_a_masked_matrix_and_the_gradient_to_it_one_exists():
    block = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)]).requires_grad_(False)
    linears = find_linears(block, "block", None)
    made: list[weakref.ref[Tensor]] = []
    gradients: list[weakref.ref[Tensor]] = []

    def alive() -> int:
        return sum(reference() is not None for reference in (*made, *gradients))

    class Watched(Product):
        def make(self) -> Tensor:
            assert alive() == 0
            matrix = super().make()
            made.append(weakref.ref(matrix))
            return matrix

        def gradient(self, upstream: Tensor) -> Tensor:
            assert alive() == 0
            gradients.append(weakref.ref(upstream))
            return super().gradient(upstream)

    masks = {x.name: random(16, 16).requires_grad_() for x in linears}
    weights = {x.name: block.get_parameter(x.parameter) for x in linears}
    makes = {x.name: [Watched(masks[x.name], weights[x.name])] for x in linears}
    with masked(block, linears, makes):
        loss = block(random(3, 16)).square().sum()
    assert alive() == 0
    loss.backward()
    assert len(made) == 6 + 5
    assert len(gradients) == 6
    assert all(mask.grad is not None for mask in masks.values())


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 5, 12), (2, 0, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_masked_linear_takes_any_batch_and_hands_gradients_to_inputs_and_bias(
    shape: tuple[int, ...], bias: bool
):
    block = nn.Sequential(nn.Linear(12, 9, bias=bias))
    block[0].weight.requires_grad_(False)
    linears = find_linears(block, "block", None)
    mask = random(9, 12).sigmoid().requires_grad_()
    x = random(*shape, seed=1).requires_grad_()
    leaves = [x, mask, *([block[0].bias] if bias else [])]
    with masked(block, linears, {"0": [Product(mask, block[0].weight)]}):
        output = block(x)
    found = torch.autograd.grad(output.tanh().sum(), leaves)
    expected = nn.functional.linear(x, block[0].weight * mask, block[0].bias)
    torch.testing.assert_close(output, expected)
    for a, b in zip(found, torch.autograd.grad(expected.tanh().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_experts_in_use_are_made():
    case = Case("experts one by one")
    made: list[int] = []

    def make(index: int) -> Tensor:
        made.append(index)
        return case.weights["middle.weight"][index] * 1.0

    makes = {
        "first": [case.weights["first"][0].clone],
        "middle.weight": [partial(make, i) for i in range(3)],
    }
    with masked(case.block, case.linears, makes):
        case.block(case.x)
    assert made == [0, 2]


def test_other_tensors_in_a_freed_place_are_kept_as_they_are():
    """An activation may be allocated where a masked weight was."""
    block = nn.Linear(64, 64, bias=False).requires_grad_(False)
    linears = find_linears(nn.Sequential(block), "block", None)
    mask = torch.ones(64, 64, requires_grad=True)
    model = nn.Sequential(block)
    with masked(model, linears, {linears[0].name: [lambda: block.weight.detach() * mask]}):
        x = random(64, 64)
        for _ in range(20):
            x = model(x).sigmoid()  # saves its own output, of the weight's very size
    x.sum().backward()
    lazy, mask.grad = mask.grad, None
    x = random(64, 64)
    for _ in range(20):
        x = nn.functional.linear(x, block.weight * mask).sigmoid()
    x.sum().backward()
    assert lazy is not None
    assert mask.grad is not None
    torch.testing.assert_close(lazy, mask.grad)
