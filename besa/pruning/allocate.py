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

import torch
from torch import Tensor

from besa.kernels.mask_buckets import mask_buckets
from besa.kernels.segment_sum import segment_sum
from besa.pruning.learn import Proposal
from besa.pruning.masked import MaskedMatrix
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


@dataclass(frozen=True, eq=False)
class RateMask(MaskedMatrix):
    """weight * mask, with the straight-through gradient to the keep-probabilities of buckets.

    mask_ij = [bucket_ij >= first_kept_i], and
    dL/dP_ib = sum over j in bucket b of dL/dmasked_ij * weight_ij.

    Attributes:
        parameter: P, the probability that a bucket is kept, float [rows, candidates].
        weight: [rows, cols].
        buckets: uint8 [rows, cols].
        first_kept: uint8 [rows].
    """

    parameter: Tensor
    weight: Tensor
    buckets: Tensor
    first_kept: Tensor

    def make(self) -> Tensor:
        """`MaskedMatrix.make`."""
        return mask_buckets(self.weight, self.buckets, self.first_kept)

    def gradient(self, upstream: Tensor) -> Tensor:
        """`MaskedMatrix.gradient`."""
        return segment_sum(upstream, self.buckets, self.parameter.shape[1], weight=self.weight)


@dataclass(frozen=True)
class KeptBuckets:
    """What rows keep.

    Attributes:
        keep: the probability that a bucket is kept, float [rows, candidates].
        rates: the rate that is pruned, float [rows].
        first: the first bucket that the hard mask keeps, uint8 [rows].
    """

    keep: Tensor
    rates: Tensor
    first: Tensor


def kept_buckets(theta: Tensor, candidates: Tensor) -> KeptBuckets:
    """What rows keep by their logits [rows, candidates]; differentiable but for the hard mask."""
    beta = theta.softmax(1)
    rates = beta @ candidates
    first = (rates.detach() * len(candidates)).round().to(torch.uint8)
    return KeptBuckets(beta.cumsum(1), rates, first)


@dataclass(frozen=True)
class RankedMatrix:
    """A weight [rows, cols] whose rates are learned, and its uint8 rank buckets."""

    weight: Tensor
    buckets: Tensor


def rate_mask(matrix: RankedMatrix, keep: Tensor, first: Tensor) -> RateMask:
    """The mask of a matrix by what its rows keep, or all of them alike if one row is given."""
    rows = len(matrix.weight)
    if len(keep) != rows:
        keep, first = keep.expand(rows, -1), first.expand(rows).contiguous()
    return RateMask(keep, matrix.weight, matrix.buckets, first)


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
        # The logits of all matrices, one below the other: a small operation costs a GPU the time
        # of its start, so that each is done once for the block.
        self.rows = [len(x.weight) if granularity == "row" else 1 for x in matrices]
        self.theta = start.repeat(sum(self.rows), 1).requires_grad_()
        fused = True if device.type == "cuda" else None  # one kernel instead of a dozen
        self.optimizer = torch.optim.Adam([self.theta], lr=lr, betas=(0.9, 0.99), fused=fused)
        sizes = torch.tensor([x.weight.numel() for x in matrices], device=device)
        self.shares = sizes / sizes.sum()
        self.rates: Tensor = self.theta.new_full((len(self.theta),), sparsity)

    def parameters(self) -> list[Tensor]:
        """theta."""
        return [self.theta]

    def propose(self) -> Proposal:
        """The weights under the hard masks of the rates as they are."""
        rows = kept_buckets(self.theta, self.candidates)
        given = self.matrices, rows.keep.split(self.rows), rows.first.split(self.rows)
        weights = [rate_mask(*one) for one in zip(*given, strict=True)]
        means = [rates.mean() for rates in rows.rates.split(self.rows)]
        overall = torch.stack(means) @ self.shares
        penalty = self.penalty * ((overall - self.sparsity) / self.sparsity) ** 2
        self.rates = rows.rates.detach()
        return Proposal(weights, overall, penalty)

    def update(self, size: float) -> None:
        """A step of Adam on theta."""
        self.optimizer.param_groups[0]["lr"] = self.lr * size
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def result(self) -> list[Tensor]:
        """The rates of the last proposal, float32 [rows] per matrix."""
        rates = zip(self.matrices, self.rates.split(self.rows), strict=True)
        return [rate.expand(len(x.weight)) for x, rate in rates]
