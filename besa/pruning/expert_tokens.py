"""More calibration samples for experts that see few tokens: `besa prune --expert-tokens`.

A router sends most tokens to a few experts, and what an expert's weights are judged by is its own
tokens alone. So the dense model is asked before pruning: all spare windows of the text go through
it once, and those are added that bring most tokens to experts that lack them. They are known before
the first block is pruned, and go through all blocks like the others.

>>> counts = torch.tensor([[9, 0], [8, 1], [2, 7], [5, 4]])  # tokens of two experts, by window
>>> feeding(counts, seen=1, wanted=8)  # the first window is there; which ones follow?
[1, 2]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.model.checkpoint import Checkpoint
from besa.model.routing import Routed
from besa.pruning.batches import batches_of
from besa.pruning.dense_blocks import dense_blocks

# For each sample so many spare windows are looked at: a run takes at most four times the samples.
SPARE = 3


def feeding(counts: Tensor, seen: int, wanted: int) -> list[int]:
    """Which windows to add so that each expert sees enough tokens, or as many as there are.

    The next one is always that which brings most of the tokens that lack; of equals the first.

    Args:
        counts: tokens of each expert in each window, int64 [windows, experts].
        seen: how many windows, the first ones, are there anyway.
        wanted: tokens for each expert.

    Returns:
        The windows, in their order.
    """
    lacking = (wanted - counts[:seen].sum(0)).clamp_min(0)
    added: list[int] = []
    gains = torch.minimum(counts[seen:], lacking).sum(1)
    while len(gains) and int(gains.max()):
        best = int((gains == gains.max()).nonzero()[0])
        added.append(seen + best)
        lacking = (lacking - counts[seen + best]).clamp_min(0)
        gains = torch.minimum(counts[seen:], lacking).sum(1)
        gains[[i - seen for i in added]] = 0
    return sorted(added)


def routed_tokens(
    checkpoint: Checkpoint,
    windows: Tensor,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    directory: Path | None = None,
    on_block: Callable[[int], None] = lambda index: None,
) -> Tensor:
    """How many tokens of each window each expert of the dense model reads.

    Args:
        windows: token ids int64 [windows, tokens].
        directory: for activations; None: they stay in memory.
        on_block: is told the index of each block that is done.

    Returns:
        int64 [windows, experts of all blocks].

    Raises:
        BesaError: the model has no experts whose tokens can be told.
    """
    batches, _ = batches_of(windows)
    counts: dict[tuple[int, str], list[Tensor]] = {}

    def on_routed(block: int, batch: int, routed: Routed) -> None:
        by_window = routed.counts(len(batches[batch])).cpu()
        counts.setdefault((block, routed.stack.name), []).append(by_window)

    passed = dense_blocks(checkpoint, batches, dtype, on_routed, device, directory)
    for index, _ in enumerate(passed):
        on_block(index)
    if not counts:
        raise BesaError(
            f"the experts of {checkpoint.directory} are not told which tokens go where: leave "
            "--expert-tokens out"
        )
    return torch.cat([torch.cat(by_batch) for by_batch in counts.values()], 1)
