"""Which tokens a block's experts read, and how much each counts there.

transformers calls stacked experts of any family in the same way: with hidden states, the experts
that each token chose, and their weights. That call is what is watched here.

>>> from besa.model.checkpoint import Checkpoint
>>> block = Checkpoint.open("path/to/model").load_block(0)
>>> stacks(block, experts=None)  # a Llama has none
[]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from besa.model.blocks import find_linears


@dataclass(frozen=True)
class Stack:
    """The module of a block that holds its experts, stacked.

    Attributes:
        name: within the block.
        count: of experts.
    """

    name: str
    module: nn.Module
    count: int


@dataclass(frozen=True)
class Routed:
    """What a stack of experts is called with.

    Attributes:
        hidden: [tokens, width].
        ids: the experts that each token chose, int [tokens, chosen]; others than the stack's are
            experts without weights.
        weights: of their outputs, [tokens, chosen].
    """

    stack: Stack
    hidden: Tensor
    ids: Tensor
    weights: Tensor

    def counts(self, parts: int = 1) -> Tensor:
        """How many tokens each expert reads in each of equal parts, int64 [parts, experts]."""
        chosen = self.ids.reshape(parts, 1, -1)
        experts = torch.arange(self.stack.count, device=chosen.device).view(-1, 1)
        return (chosen == experts).sum(2)

    def of(self, expert: int) -> Routed:
        """The tokens of one expert, as if they had chosen no other."""
        token, place = (self.ids == expert).nonzero(as_tuple=True)
        ids, weights = self.ids[token, place, None], self.weights[token, place, None]
        return replace(self, hidden=self.hidden[token], ids=ids, weights=weights)

    def output(self) -> Tensor:
        """What the experts make of it, [tokens, width]; nobody is told of this call."""
        return self.stack.module.forward(self.hidden, self.ids, self.weights)


def stacks(block: nn.Module, experts: int | None) -> list[Stack]:
    """The stacked experts of a block.

    Args:
        experts: how many the config says (`besa.model.blocks.expert_count`).
    """
    found = {}
    for linear in find_linears(block, "", experts, strict=False):
        if block.get_parameter(linear.parameter).ndim == 3:
            name = linear.parameter.rpartition(".")[0]
            found[name] = Stack(name, block.get_submodule(name), linear.groups)
    return list(found.values())


@contextmanager
def routing(found: Sequence[Stack], on_routed: Callable[[Routed], None]) -> Iterator[None]:
    """While it is entered, tells of each call of stacked experts, before it is made.

    A call in another way than that above is passed over.
    """

    def told_of(stack: Stack) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = (*args, *kwargs.values())
            if _is_routed(values):
                on_routed(Routed(stack, *(value.flatten(0, -2) for value in values)))

        return before

    handles = [
        stack.module.register_forward_pre_hook(told_of(stack), with_kwargs=True) for stack in found
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_routed(values: Sequence[Any]) -> bool:
    """Whether these are hidden states, ids of experts and weights."""
    if len(values) != 3 or not all(isinstance(value, Tensor) for value in values):
        return False
    hidden, ids, weights = values
    return (
        ids.dtype in (torch.int32, torch.int64)
        and ids.shape == weights.shape
        and ids.shape[:-1].numel() == hidden.shape[:-1].numel()
    )
