"""The activations between blocks: of the pruned model so far, and of the dense one beside it.

>>> import torch
>>> hidden = [torch.ones(1, 4, 8)]
>>> pruned, dense, targets = (Activations.of(hidden, torch.float32, None, "-") for _ in range(3))
>>> targets[0] = 2 * hidden[0]  # what a block of the dense model gave
>>> streams = Streams(pruned, dense, targets)
>>> streams.advance_dense()
>>> streams.dense[0].mean()
tensor(2.)
"""

from __future__ import annotations

from dataclasses import dataclass

from besa.pruning.activations import Activations


@dataclass
class Streams:
    """What enters a block, and what it is to give.

    Attributes:
        pruned: what enters the block behind the pruned ones; its output takes its place.
        dense: what enters it in the dense model; None where the teacher is the dense block on
            `pruned`.
        targets: what the dense block gives on `pruned`, for which masks are learned; then on
            `dense`, if there is one, for which weights are. Of all batches, or of the first ones
            where no more are wanted.
    """

    pruned: Activations
    dense: Activations | None
    targets: Activations

    def advance_dense(self) -> None:
        """The dense block's outputs enter the next one; their place takes what that one gives."""
        if self.dense is not None:
            self.dense, self.targets = self.targets, self.dense

    def close(self) -> None:
        """Frees memory and files."""
        for activations in (self.pruned, self.dense, self.targets):
            if activations is not None:
                activations.close()
