"""Runs one decoder block alone, with the arguments that its model gives it.

`capture` runs the model around its blocks once and keeps what each block was called with, position
embeddings and masks verbatim. With these arguments (`Call`) a block runs on any hidden states,
whatever its family wants to be given.

>>> from pathlib import Path
>>> from besa.model.loading import load_model
>>> model = load_model(Path("path/to/model"), "float32", "cpu")
>>> blocks = model.model.layers
>>> hidden, calls = capture(model, blocks, [torch.tensor([[1, 2, 3, 4]])])
>>> calls[0][0].run(blocks[0], hidden[0]).shape     # of the first batch, through the first block
torch.Size([1, 4, 64])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from besa.errors import BesaError

# A block returns its hidden states, alone or in front of attention weights and a state.
_MOST_VALUES = 3


@dataclass(frozen=True)
class Call:
    """How the model calls one block: all arguments but the hidden states, verbatim."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden states [batch, tokens, width]."""
        output = block(hidden, *self.args, **self.kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> Call:
        """The same call with its tensors on `device`, floating ones in `dtype`."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype if value.is_floating_point() else value.dtype)

        return Call(*pytree.tree_map(move, (self.args, self.kwargs)))


def on_device(
    calls: Sequence[Sequence[Call]], index: int, device: torch.device, dtype: torch.dtype
) -> list[Call]:
    """The calls of one block on a device; batches that share one there share one here.

    Args:
        calls: `calls[batch][block]`.
    """
    own = [batch[index] for batch in calls]
    moved = {id(call): call.to(device, dtype) for call in own}
    return [moved[id(call)] for call in own]


def _same(a: Any, b: Any) -> bool:
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    return spec_a == spec_b and all(
        x is y
        or (isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y))
        or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y)
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )


def capture(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Tensor]
) -> tuple[list[Tensor], list[list[Call]]]:
    """What enters the first block, and how each block is called, for batches of token ids.

    The blocks themselves do not run (their weights may be on the meta device): each hands its
    hidden states on untouched.

    Args:
        batches: int64 token ids [batch, tokens].

    Returns:
        hidden: per batch, the hidden states [batch, tokens, width] that enter block 0.
        calls: `calls[batch][block]`; batches called alike share one `Call`.

    Raises:
        BesaError: the model changes the hidden states between its blocks.
    """
    hidden: list[Tensor] = []
    calls: list[list[Call]] = []
    values = 0
    for tokens in batches:
        first, row, values = _capture_batch(model, blocks, tokens, values)
        known = calls[0] if calls else row
        row = [
            old if _same((old.args, old.kwargs), (new.args, new.kwargs)) else new
            for old, new in zip(known, row, strict=True)
        ]
        hidden.append(first)
        calls.append(row)
    return hidden, calls


class _NotReplayed(Exception):
    """The model fails where stand-ins are its blocks; says why."""


class _HandedOnChanged(_NotReplayed):
    """A block did not receive what the one before it handed on."""

    def __init__(self) -> None:
        super().__init__("it changes the hidden states between its blocks")


def _capture_batch(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, least: int
) -> tuple[Tensor, list[Call], int]:
    """One batch, with as few values from each block as the model unpacks, and at least `least`."""
    failures: list[_NotReplayed] = []
    for values in range(least, _MOST_VALUES + 1):
        try:
            return (*_capture_with(model, blocks, tokens, values), values)
        except _NotReplayed as error:
            failures.append(error)  # perhaps the model unpacks more values
    changed = [error for error in failures if isinstance(error, _HandedOnChanged)]
    reason = (changed or failures)[0]
    raise BesaError(f"{type(model).__name__} is not supported: {reason}") from reason


def _capture_with(
    model: nn.Module, blocks: Sequence[nn.Module], tokens: Tensor, values: int
) -> tuple[Tensor, list[Call]]:
    """One batch; a stand-in returns a tuple of `values`, or the bare hidden states for 0."""
    seen: list[Call] = []
    first: list[Tensor] = []

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if not args:  # hidden states given by keyword: always the first one
            name = next(iter(kwargs))
            args = (kwargs.pop(name),)
        hidden = args[0]
        if first and hidden is not first[0]:
            raise _HandedOnChanged
        first.append(hidden)
        seen.append(Call(args[1:], kwargs))
        return (hidden, *[None] * (values - 1)) if values else hidden

    for block in blocks:
        block.forward = stand_in
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        reason = "its blocks hand on more than hidden states" if seen else "it wants more than text"
        raise _NotReplayed(reason) from error
    finally:
        for block in blocks:
            del block.forward
    if len(seen) != len(blocks):
        raise BesaError(
            f"{type(model).__name__} is not supported: it called {len(seen)} of its "
            f"{len(blocks)} blocks"
        )
    return first[0], seen
