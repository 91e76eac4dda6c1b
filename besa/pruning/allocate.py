"""BESA: learns how sparse each row (or each linear) of a block should be.

Xu et al., "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity
Allocation", ICLR 2024, arXiv 2402.16880. Candidate rates are p_d = d/D; a row's rate is
alpha = sum_d beta_d p_d with beta = softmax(theta). A weight whose rank within its row lies in
bucket b (the fraction b/D to (b+1)/D of less important weights) is kept with probability
P_b = sum_{d <= b} beta_d; the hard mask keeps the buckets from alpha on, and the gradient passes
straight through to P. theta is learned to minimise the squared error of the block's output,
with the block's overall rate held at the target.

What differs from the paper's code: a weight's rank is one uint8 bucket instead of an int64 sort
index; the gradient to P is a segment sum over buckets, so that no probability per weight ever
exists; theta starts as a narrow bell around the target, so that learning starts from Wanda's
mask; and the learned rates are projected so that the block has exactly the zeros asked for.

    buckets = rank_buckets(scores)
    rates = learn_rates(forward, targets, [AllocatedLinear(weight, buckets), ...], 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from besa.kernels.segment_sum import segment_sum
from besa.pruning.patterns import row_chunks

# The learning rules do not mind the loss's scale; float16 gradients would vanish without one.
LOSS_SCALE = 2.0**16

CANDIDATES = 100  # D; bucket numbers fit in uint8


def rank_buckets(scores: Tensor, candidates: int = CANDIDATES) -> Tensor:
    """Which of `candidates` equal parts of its row a weight's rank falls in.

    Args:
        scores: float [rows, cols].

    Returns:
        uint8 [rows, cols]; 0 holds the least important weights of the row.
    """
    rows, cols = scores.shape
    buckets = torch.empty(rows, cols, dtype=torch.uint8, device=scores.device)
    of_rank = torch.arange(cols, device=scores.device) * candidates // cols
    of_rank = of_rank.to(torch.uint8)
    for chunk in row_chunks(rows, cols):
        order = scores[chunk].argsort(dim=1, stable=True)
        buckets[chunk] = torch.empty_like(buckets[chunk]).scatter_(
            1, order, of_rank.expand(order.shape)
        )
    return buckets


class RateMask(torch.autograd.Function):
    """weight * mask, with the straight-through gradient to the keep-probabilities of buckets.

    forward: mask_ij = [bucket_ij >= first_kept_i].
    backward: dL/dP_ib = sum over j in bucket b of dL/dmasked_ij * weight_ij.
    """

    @staticmethod
    def forward(
        ctx: Any, keep: Tensor, weight: Tensor, buckets: Tensor, first_kept: Tensor
    ) -> Tensor:
        ctx.save_for_backward(weight, buckets)
        ctx.candidates = keep.shape[1]
        return weight * (buckets >= first_kept.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, buckets = ctx.saved_tensors
        return segment_sum(grads[0], buckets, ctx.candidates, weight=weight), None, None, None


@dataclass(frozen=True)
class AllocatedLinear:
    """A linear whose rates are learned: weight [rows, cols] and its uint8 rank buckets."""

    weight: Tensor
    buckets: Tensor


def learn_rates(
    forward: Callable[[int, Sequence[Callable[[], Tensor]]], Tensor],
    targets: Sequence[Tensor],
    linears: Sequence[AllocatedLinear],
    sparsity: float,
    *,
    granularity: str = "row",
    epochs: int = 1,
    lr: float = 0.2,
    width: float = 0.1,
    penalty: float = 5.0,
    generator: torch.Generator,
) -> Iterator[tuple[float, float, list[Tensor]]]:
    """Learns the rates of one block; yields (loss, overall rate, rates) after each step.

    Args:
        forward: gives the block's output for batch i with the masked weights; each is given as
            a function that makes it, so that it need not exist longer than it is used.
        targets: the dense block's outputs, one tensor a batch.
        linears: what is masked.
        sparsity: the target rate of the block.
        granularity: "row" learns a rate per row, "layer" one per linear (per expert).
        lr: Adam's step on theta, decayed to zero along a cosine.
        width: the standard deviation of the bell that theta starts as.
        penalty: the weight of ((rate - sparsity) / sparsity)^2 in the loss.
        generator: orders the batches.
    """
    device = linears[0].weight.device
    candidates = torch.arange(CANDIDATES, device=device) / CANDIDATES
    start = -((candidates - sparsity) ** 2) / (2 * width**2)
    rows = [len(x.weight) if granularity == "row" else 1 for x in linears]
    thetas = [start.repeat(n, 1).requires_grad_() for n in rows]
    sizes = torch.tensor([x.weight.numel() for x in linears], device=device)
    shares = sizes / sizes.sum()
    optimizer = torch.optim.Adam(thetas, lr=lr, betas=(0.9, 0.99))
    steps = epochs * len(targets)
    step = 0
    for _ in range(epochs):
        for i in torch.randperm(len(targets), generator=generator).tolist():
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            betas = [theta.softmax(1) for theta in thetas]
            rates = [beta @ candidates for beta in betas]
            masked = []
            for linear, beta, rate in zip(linears, betas, rates, strict=True):
                keep = beta.cumsum(1).expand(len(linear.weight), -1)
                first = (rate.detach() * CANDIDATES).round().expand(len(linear.weight))
                masked.append(
                    partial(
                        RateMask.apply, keep, linear.weight, linear.buckets, first.to(torch.uint8)
                    )
                )
            target = targets[i].to(device)
            error = (forward(i, masked).float() - target.float()).square().mean()
            error = error / target.float().square().mean()
            overall = torch.stack([rate.mean() for rate in rates]) @ shares
            loss = error + penalty * ((overall - sparsity) / sparsity) ** 2
            optimizer.zero_grad(set_to_none=True)
            (loss * LOSS_SCALE).backward()
            optimizer.step()
            step += 1
            yield (
                float(error.detach()),
                float(overall.detach()),
                [r.detach().expand(len(x.weight)) for r, x in zip(rates, linears, strict=True)],
            )
