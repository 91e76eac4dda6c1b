"""Learns the weights that a mask keeps, so that the block gives again what it gave when dense.

Block-wise reconstruction: the mask stays, and Adam moves what it keeps towards the dense model's
output of the block, by the loop of `besa.pruning.learn`. A step is a share of the root mean square
of a matrix's dense weights, so that no model needs one in its own units.

>>> from besa.pruning.learn import learn
>>> weight, inputs = torch.randn(8, 16), torch.randn(32, 4, 16)
>>> mask = weight.abs() > 0.7
>>> learner = WeightLearner([weight * mask], [mask], [rms(weight)], step=0.02)
>>> def forward(i, weights):
...     return inputs[i] @ weights[0]().T
>>> learned = learn(learner, forward, inputs @ weight.T, generator=torch.Generator())
>>> bool((learned.value[0][~mask] == 0).all())
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from besa.pruning.learn import Proposal
from besa.pruning.masked import MaskedMatrix
from besa.pruning.rounding import Steps

# Steps in which Adam's comes to its full size: its moments know nothing before them.
_WARM_UP = 5


def rms(weight: Tensor) -> float:
    """The root mean square of a matrix."""
    return float(weight.float().square().mean().sqrt())


@dataclass(frozen=True, eq=False)
class KeptWeights(MaskedMatrix):
    """The weights that a mask keeps.

    Attributes:
        parameter: float32 [rows, cols], zero where the mask is False.
        mask: bool [rows, cols].
        dtype: of the computation.
        steps: what the weights are rounded to, straight through for the gradient; None: they stay.
    """

    parameter: Tensor
    mask: Tensor
    dtype: torch.dtype
    steps: Steps | None = None

    def make(self) -> Tensor:
        """`MaskedMatrix.make`."""
        weight = self.parameter.detach()
        return (weight if self.steps is None else self.steps.round(weight)).to(self.dtype)

    def gradient(self, upstream: Tensor) -> Tensor:
        """`MaskedMatrix.gradient`."""
        return upstream.float() * self.mask


class WeightLearner:
    """Learns one block's matrices at fixed masks (`besa.pruning.learn.Learner`).

    Args:
        weights: where it starts, [rows, cols], zero where a mask is False.
        masks: bool [rows, cols].
        scales: of each matrix, what its step is a share of.
        step: Adam's step, as that share.
        dtype: of the computation.
        steps: of each matrix, where it is to be rounded.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        masks: Sequence[Tensor],
        scales: Sequence[float],
        step: float,
        dtype: torch.dtype = torch.float32,
        steps: Sequence[Steps] = (),
    ) -> None:
        self.masks, self.dtype, self.done = masks, dtype, 0
        self.steps: Sequence[Steps | None] = steps or [None] * len(masks)
        self.weights = [w.detach().float().clone().requires_grad_() for w in weights]
        self.lrs = [step * scale for scale in scales]
        groups = [
            {"params": [weight], "lr": lr}
            for weight, lr in zip(self.weights, self.lrs, strict=True)
        ]
        # Where neither gradient nor moment was ever anything but zero, Adam moves nothing.
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
        zeros = sum(int((~mask).sum()) for mask in masks)
        self.rate = zeros / sum(mask.numel() for mask in masks)

    def parameters(self) -> list[Tensor]:
        """The weights."""
        return self.weights

    def propose(self) -> Proposal:
        """The weights as they are."""
        parts = zip(self.weights, self.masks, self.steps, strict=True)
        kept = [KeptWeights(weight, mask, self.dtype, steps) for weight, mask, steps in parts]
        return Proposal(kept, self.rate)

    def update(self, size: float) -> None:
        """A step of Adam."""
        self.done += 1
        size *= min(1.0, self.done / _WARM_UP)
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * size
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def result(self) -> list[Tensor]:
        """The weights, rounded where they are to be, float32 [rows, cols]."""
        weights = (weight.detach() for weight in self.weights)
        parts = zip(weights, self.steps, strict=True)
        return [weight if steps is None else steps.round(weight) for weight, steps in parts]
