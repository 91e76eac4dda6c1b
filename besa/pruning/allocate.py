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

>>> from besa.pruning.learn import learn
>>> weight, inputs = torch.randn(8, 200), torch.randn(4, 16, 200)
>>> learner = RateLearner([RankedMatrix(weight, rank_buckets(weight.abs()))], sparsity=0.5)
>>> def forward(i, weights):
...     return inputs[i] @ weights[0]().T
>>> learned = learn(learner, forward, inputs @ weight.T, generator=torch.Generator())
>>> learned.value[0].shape  # of the first matrix, a rate per row
torch.Size([8])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from besa.kernels.mask_buckets import mask_buckets
from besa.kernels.segment_sum import segment_sum
from besa.pruning.learn import Proposal
from besa.pruning.patterns import row_chunks

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
    bucket_of_rank = torch.arange(cols, device=scores.device) * candidates // cols
    bucket_of_rank = bucket_of_rank.to(torch.uint8)
    for chunk in row_chunks(rows, cols, scores.device):
        order = scores[chunk].argsort(dim=1, stable=True)
        buckets[chunk] = torch.empty_like(buckets[chunk]).scatter_(
            1, order, bucket_of_rank.expand(order.shape)
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
        return mask_buckets(weight, buckets, first_kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, buckets = ctx.saved_tensors
        return segment_sum(grads[0], buckets, ctx.candidates, weight=weight), None, None, None


@dataclass(frozen=True)
class RankedMatrix:
    """A weight [rows, cols] whose rates are learned, and its uint8 rank buckets."""

    weight: Tensor
    buckets: Tensor


class RateLearner:
    """Learns the rates of one block's matrices (`besa.pruning.learn.Learner`).

    Args:
        matrices: what is masked.
        sparsity: the target rate of the block.
        granularity: "row" learns a rate per row, "layer" one per matrix (so one per expert).
        lr: Adam's first step on theta.
        width: the standard deviation of the bell that theta starts as.
        penalty: the weight of ((rate - sparsity) / sparsity)^2 in the loss.
    """

    def __init__(
        self,
        matrices: Sequence[RankedMatrix],
        sparsity: float,
        granularity: str = "row",
        *,
        lr: float = 0.2,
        width: float = 0.1,
        penalty: float = 5.0,
    ) -> None:
        self.matrices, self.sparsity, self.lr, self.penalty = matrices, sparsity, lr, penalty
        device = matrices[0].weight.device
        self.candidates = torch.arange(CANDIDATES, device=device) / CANDIDATES
        start = -((self.candidates - sparsity) ** 2) / (2 * width**2)
        rows = [len(x.weight) if granularity == "row" else 1 for x in matrices]
        self.thetas = [start.repeat(n, 1).requires_grad_() for n in rows]
        self.optimizer = torch.optim.Adam(self.thetas, lr=lr, betas=(0.9, 0.99))
        sizes = torch.tensor([x.weight.numel() for x in matrices], device=device)
        self.shares = sizes / sizes.sum()
        self.rates: list[Tensor] = []

    def propose(self) -> Proposal:
        """The weights under the hard masks of the rates as they are."""
        betas = [theta.softmax(1) for theta in self.thetas]
        rates = [beta @ self.candidates for beta in betas]
        weights = []
        for matrix, beta, rate in zip(self.matrices, betas, rates, strict=True):
            keep = beta.cumsum(1).expand(len(matrix.weight), -1)
            first = (rate.detach() * CANDIDATES).round().expand(len(matrix.weight))
            weights.append(
                partial(RateMask.apply, keep, matrix.weight, matrix.buckets, first.to(torch.uint8))
            )
        overall = torch.stack([rate.mean() for rate in rates]) @ self.shares
        penalty = self.penalty * ((overall - self.sparsity) / self.sparsity) ** 2
        self.rates = [rate.detach() for rate in rates]
        return Proposal(weights, overall, penalty)

    def update(self, size: float) -> None:
        """A step of Adam on theta."""
        self.optimizer.param_groups[0]["lr"] = self.lr * size
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def result(self) -> list[Tensor]:
        """The rates of the last proposal, float32 [rows] per matrix."""
        return [r.expand(len(x.weight)) for r, x in zip(self.rates, self.matrices, strict=True)]
