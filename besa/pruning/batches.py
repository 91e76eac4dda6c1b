"""Calibration windows by batches.

>>> import torch
>>> batches, held_out = batches_of(torch.zeros(7, 128), held_out=2)
>>> [len(batch) for batch in batches], held_out
([4, 1, 2], 1)
"""

from __future__ import annotations

from torch import Tensor

# Tokens that go through a block at once: enough to keep the cores busy, few enough to fit. A longer
# sample is a batch of its own, as are the paper's of 2,048 tokens, which keep a GPU busy. Larger
# batches of short samples would mean fewer steps for BESA, which takes one for each batch.
_BATCH_TOKENS = 512


def batches_of(windows: Tensor, held_out: int = 0) -> tuple[list[Tensor], int]:
    """Windows by batches, those that are held out in the last ones; and how many these are.

    Args:
        windows: token ids int64 [windows, tokens].
        held_out: so many of the windows, the last ones.
    """
    size = max(1, _BATCH_TOKENS // windows.shape[1])
    seen = len(windows) - held_out
    last = windows[seen:].split(size) if held_out else ()
    return [*windows[:seen].split(size), *last], len(last)
