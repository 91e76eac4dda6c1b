"""Masks: which weights are kept, exactly as many as asked for.

A mask is a bool tensor shaped like the weight [rows, cols], True where the weight is kept. Rates
are fractions of *pruned* weights. Unstructured masks prune each row's least important weights, as
many as `counts_for` hands out; N:M masks keep the N most important of every M neighbours along
the inputs.

>>> counts = counts_for(torch.tensor([0.25, 0.5]), cols=8, total=8)
>>> counts
tensor([3, 5])
>>> lowest_pruned(torch.rand(2, 8), counts).sum(1)
tensor([5, 3])
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements whose int64 sort indices may exist at once (8 bytes each).
_CHUNK = 1 << 22


def row_chunks(rows: int, cols: int) -> list[slice]:
    """Slices of rows whose temporaries stay small."""
    step = max(1, _CHUNK // max(1, cols))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def counts_for(rates: Tensor, cols: int | Tensor, total: int) -> Tensor:
    """Whole numbers of weights to prune per row that follow `rates` and sum to `total`.

    All rates are shifted by one and the same amount until the sum fits; what is left after
    rounding down goes to the rows with the largest remainders.

    Args:
        rates: float [rows], the wished fraction of pruned weights.
        cols: weights per row, one number or int [rows].
        total: weights to prune in all, at most the sum of `cols`.

    Returns:
        int64 [rows].
    """
    rates = rates.double()
    cols = torch.as_tensor(cols, device=rates.device).expand(rates.shape).double()
    low, high = -1.0, 1.0
    for _ in range(60):
        shift = (low + high) / 2
        if ((rates + shift).clamp(0, 1) * cols).sum() < total:
            low = shift
        else:
            high = shift
    wished = (rates + high).clamp(0, 1) * cols
    # A hair's breadth under a whole number is that number: 60 halvings leave rounding noise.
    counts = (wished + 1e-6).floor()
    counts = torch.minimum(counts, cols)
    remainder = wished - counts
    left = total - int(counts.sum())
    if left > 0:
        room = torch.where(counts < cols, remainder, -torch.inf)
        counts[room.argsort(descending=True, stable=True)[:left]] += 1
    elif left < 0:
        room = torch.where(counts > 0, remainder, torch.inf)
        counts[room.argsort(stable=True)[:-left]] -= 1
    return counts.long()


def lowest_pruned(scores: Tensor, counts: Tensor) -> Tensor:
    """Keep-mask that prunes each row's `counts` lowest scores; of equals, the first ones.

    Args:
        scores: float [rows, cols].
        counts: int64 [rows].

    Returns:
        bool [rows, cols].
    """
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    for chunk in row_chunks(*scores.shape):
        order = scores[chunk].argsort(dim=1, stable=True)
        mask[chunk] = torch.empty_like(mask[chunk]).scatter_(
            1, order, ranks >= counts[chunk].unsqueeze(1)
        )
    return mask


def lowest_pruned_overall(scores: Tensor, count: int) -> Tensor:
    """Keep-mask that prunes the `count` lowest scores of a whole tensor; of equals, the first."""
    flat = scores.flatten()
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    mask = flat >= threshold
    equals = (flat == threshold).nonzero().flatten()
    mask[equals[: count - int((flat < threshold).sum())]] = False
    return mask.reshape(scores.shape)


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep-mask with the `n` highest scores of every `m` neighbours; of equals, the last ones.

    Args:
        scores: float [rows, cols], cols divisible by m.

    Returns:
        bool [rows, cols].
    """
    rows, cols = scores.shape
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    counter = torch.uint8 if m <= 256 else torch.int32
    for chunk in row_chunks(rows, cols * m):
        members = scores[chunk].reshape(-1, cols // m, m).unbind(2)
        kept = []
        for j, score in enumerate(members):
            higher = torch.zeros(score.shape, dtype=counter, device=score.device)
            for k, other in enumerate(members):
                if k != j:
                    higher += other >= score if k > j else other > score
            kept.append(higher < n)
        mask[chunk] = torch.stack(kept, dim=2).reshape(-1, cols)
    return mask
