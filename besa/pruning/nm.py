"""BESA for N:M patterns: learns which N of every M neighbours stay.

An N:M pattern fixes the rate of every row, so there is nothing to allocate. What is learned
instead, towards the same block objective and through the same straight-through mask as in
`besa.pruning.allocate`, is the choice within the groups: each weight has a log-importance, at first
Wanda's, and the gradient of the loss to its mask, dL/dM = dL/dW' * W, moves it. The step is
divided by the gradient's root mean square over the matrix, so that no model needs its own.

    for loss, masks in learn_choice(forward, targets, weights, scores, n=2, m=4, ...):
        ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from besa.pruning.allocate import LOSS_SCALE
from besa.pruning.patterns import n_of_m


class ChoiceMask(torch.autograd.Function):
    """weight * mask; the backward pass gives dL/dmask for all weights, kept or not."""

    @staticmethod
    def forward(ctx: Any, _importance: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return (grads[0] * weight).float(), None, None


def learn_choice(
    forward: Callable[[int, Sequence[Callable[[], Tensor]]], Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    scores: Sequence[Tensor],
    n: int,
    m: int,
    *,
    epochs: int = 1,
    lr: float = 0.1,
    generator: torch.Generator,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Learns the masks of one block; yields (loss, masks) after each step.

    Args:
        forward: gives the block's output for batch i with the masked weights, each given as a
            function that makes it.
        targets: the dense block's outputs, one tensor a batch.
        weights: [rows, cols], cols divisible by m.
        scores: where the importances start, positive float32 [rows, cols].
        lr: how far a typical weight's log-importance moves in the first step; decays to zero
            along a cosine.
        generator: orders the batches.

    Returns:
        bool masks [rows, cols], n of every m neighbours True.
    """
    importances = [s.clamp_min(torch.finfo(torch.float32).tiny).log() for s in scores]
    for importance in importances:
        importance.requires_grad_()
    masks = [n_of_m(x.detach(), n, m) for x in importances]
    steps = epochs * len(targets)
    step = 0
    for _ in range(epochs):
        for i in torch.randperm(len(targets), generator=generator).tolist():
            masked = [
                partial(ChoiceMask.apply, x, weight, mask)
                for x, weight, mask in zip(importances, weights, masks, strict=True)
            ]
            target = targets[i].to(weights[0].device).float()
            loss = (forward(i, masked).float() - target).square().mean() / target.square().mean()
            (loss * LOSS_SCALE).backward()
            size = lr * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.no_grad():
                for j, importance in enumerate(importances):
                    gradient = importance.grad
                    if gradient is not None:
                        scale = gradient.square().mean().sqrt().clamp_min(1e-30)
                        importance -= size * gradient / scale
                        importance.grad = None
                    masks[j] = n_of_m(importance, n, m)
            step += 1
            yield float(loss.detach()), masks
