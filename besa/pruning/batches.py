"""Calibration windows by batches: those of this process, and which of them belong together.

>>> import torch
>>> batches, groups = batches_of(torch.zeros(7, 128), held_out=2)
>>> [len(batch) for batch in batches], groups.steps[1], groups.held_out
([4, 1, 2], Group(windows=1, batches=range(1, 2)), [Group(windows=2, batches=range(2, 3))])

Windows are dealt to processes in turn. What belongs together, the windows of a step of learning
above all, is the same however many processes there are, and so is what is learned.

>>> from besa.processes.launch import Launch
>>> second_of_two = Ranks(Launch(rank=1, size=2))
>>> batches, groups = batches_of(torch.zeros(7, 128), held_out=2, ranks=second_of_two)
>>> [len(batch) for batch in batches], groups.steps[1]
([2, 1], Group(windows=1, batches=range(1, 1)))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from besa.errors import BesaError
from besa.processes.ranks import ALONE, Ranks

# Tokens that go through a block at once: enough to keep the cores busy, few enough to fit. A longer
# sample is a batch of its own, as are the paper's of 2,048 tokens, which keep a GPU busy. Larger
# batches of short samples would mean fewer steps for BESA, which takes one for each batch.
_BATCH_TOKENS = 512

# A block's error is measured on the first of so many parts of its batches.
_ERROR_PARTS = 8


@dataclass(frozen=True)
class Group:
    """Windows that belong together, and this process's batches of them.

    Attributes:
        windows: how many there are in all processes.
        batches: the indices of this process's batches; it may have none.
    """

    windows: int
    batches: range


@dataclass(frozen=True)
class Groups:
    """Which batches belong together.

    Attributes:
        steps: what a step of learning sees, each.
        held_out: what is judged together of what is held out, each; in the last batches.
    """

    steps: list[Group]
    held_out: list[Group]

    @property
    def seen(self) -> int:
        """How many of this process's batches, the first ones, are learned from."""
        return self.steps[-1].batches.stop if self.steps else 0

    @property
    def measured(self) -> int:
        """How many of this process's batches, the first ones, a block's error is measured on."""
        groups = [*self.steps, *self.held_out]
        return groups[max(1, len(groups) // _ERROR_PARTS) - 1].batches.stop


def single(lengths: Sequence[int], held_out: int = 0) -> Groups:
    """Batches of so many windows of one process, each by itself, the last ones held out."""
    groups = [Group(length, range(i, i + 1)) for i, length in enumerate(lengths)]
    seen = len(lengths) - held_out
    return Groups(groups[:seen], groups[seen:])


def windows_at_once(tokens: int) -> int:
    """How many windows of so many tokens go through a block at once."""
    return max(1, _BATCH_TOKENS // tokens)


def batches_of(
    windows: Tensor, held_out: int = 0, step: int | None = None, ranks: Ranks = ALONE
) -> tuple[list[Tensor], Groups]:
    """This process's windows by batches, and which of them belong together.

    Args:
        windows: token ids int64 [windows, tokens], of all processes.
        held_out: so many of the windows, the last ones.
        step: the windows of a step of learning; None: as many as go through a block at once.
        ranks: the processes that share them.

    Raises:
        BesaError: there are more processes than windows to learn from.
    """
    size, seen = windows_at_once(windows.shape[1]), len(windows) - held_out
    if seen < ranks.size:
        raise BesaError(
            f"{ranks.size} processes need as many samples to learn from, not {seen}: give more "
            "--samples, or start fewer processes"
        )
    tokens: list[Tensor] = []

    def groups(first: int, last: int, count: int) -> Iterator[Group]:
        for start in range(first, last, count):
            stop = min(start + count, last)
            own = windows[start + (ranks.rank - start) % ranks.size : stop : ranks.size]
            before = len(tokens)
            tokens.extend(own.split(size) if len(own) else ())
            yield Group(stop - start, range(before, len(tokens)))

    steps = [*groups(0, seen, step or size)]
    return tokens, Groups(steps, [*groups(seen, len(windows), size)])
