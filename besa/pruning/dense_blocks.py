"""Sends text through the dense model, one block at a time, to see where its routers send tokens.

>>> checkpoint = Checkpoint.open("path/to/model")
>>> batches = torch.randint(256, (2, 2, 16)).unbind()
>>> list(dense_blocks(checkpoint, batches, torch.float32, print))  # a Llama has no experts
[[], [], []]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.model.blocks import expert_count
from besa.model.checkpoint import Checkpoint
from besa.model.replay import capture, on_device
from besa.model.routing import Routed, Stack, routing, stacks
from besa.pruning.activations import Activations
from besa.pruning.block_run import copy_to
from besa.pruning.transfers import copies_for

# Is given the indices of the block and of the batch.
OnRouted = Callable[[int, int, Routed], None]


def check_experts(checkpoint: Checkpoint, flag: str) -> None:
    """Raises a BesaError if a flag for stacked experts is given, and there are none."""
    experts = expert_count(checkpoint.config)
    if not any(stacks(block, experts) for block in checkpoint.blocks):
        raise BesaError(f"{checkpoint.directory} has no stacked experts: leave {flag} out")


@torch.no_grad()
def dense_blocks(
    checkpoint: Checkpoint,
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    on_routed: OnRouted,
    device: torch.device | str = "cpu",
    directory: Path | None = None,
) -> Iterator[list[Stack]]:
    """Gives the experts of each block once all batches are through it.

    Args:
        batches: token ids int64 [batch, tokens].
        dtype, device: of the computation.
        on_routed: is told of all calls of stacked experts.
        directory: where activations go; None: they stay in memory.
    """
    device = torch.device(device)
    experts = expert_count(checkpoint.config)
    with checkpoint.loaded_base() as base:
        first, calls = capture(base, list(checkpoint.blocks), batches)
    hidden = Activations.of(first, dtype, directory, "dense", copies_for(device))
    del first
    for index in range(len(checkpoint.blocks)):
        block = copy_to(checkpoint.load_block(index), device, dtype)
        checkpoint.unload_block(index)
        found = stacks(block, experts)
        hidden.expect(range(len(batches)))
        for i, call in enumerate(on_device(calls, index, device, dtype)):
            with routing(found, partial(on_routed, index, i)):
                hidden[i] = call.run(block, hidden[i].to(device))
        yield found
    hidden.close()
