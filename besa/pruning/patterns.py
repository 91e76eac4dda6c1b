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

from besa.kernels.cuda import n_of_m as on_gpu

# Elements whose int64 sort indices may exist at once (8 bytes each), and how many times as many on
# a GPU: it sorts a matrix faster in one piece than in several.
_CHUNK = 1 << 22
_MORE_ON_GPU = 4


def row_chunks(rows: int, cols: int, device: torch.device | None = None) -> list[slice]:
    """Slices of rows whose temporaries stay small on a device, the CPU if it is None."""
    chunk = _CHUNK * _MORE_ON_GPU if device is not None and device.type == "cuda" else _CHUNK
    step = max(1, chunk // max(1, cols))
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
    rows, cols = scores.shape
    ranks = torch.arange(cols, device=scores.device)
    for chunk in row_chunks(rows, cols, scores.device):
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
    radix = scores.is_cuda and scores.dtype == torch.float32
    threshold = kth_lowest(flat, count) if radix else flat.kthvalue(count).values
    mask = flat >= threshold
    equals = (flat == threshold).nonzero().flatten()
    mask[equals[: count - int((flat < threshold).sum())]] = False
    return mask.reshape(scores.shape)


def kth_lowest(values: Tensor, k: int) -> Tensor:
    """The k-th lowest of some numbers, from 1; NaN is the highest. `kthvalue`, made for GPUs.

    There `kthvalue` leaves one tensor to one of the many multiprocessors. A radix select looks at
    all numbers once a bit instead: float32's bits are in the order of the numbers, if those of
    negative numbers are flipped. The lower 16 bits matter only where the upper ones are the
    answer's.

    Args:
        values: float32 [n].
        k: 1 to n.

    Returns:
        float32, a scalar.
    """
    bits = values.view(torch.int32)
    keys = bits >> 31  # all bits are the sign's
    keys.bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    keys.masked_fill_(values.isnan(), 0x7FFFFFFF)
    digits = (keys >> 16).short()
    upper, among = _kth_digit(digits, k)
    lower, _ = _kth_digit(((keys[digits == upper] & 0xFFFF) - (1 << 15)).short(), among)
    key = (upper << 16) + (lower + (1 << 15))
    return (key ^ (key >> 31 & 0x7FFFFFFF)).view(torch.float32)


def _kth_digit(digits: Tensor, k: int | Tensor) -> tuple[Tensor, Tensor]:
    """The k-th lowest of int16 numbers as int32, and its place among its equals, from 1.

    It is the largest number with fewer than k below it, found bit by bit. Nothing waits for the
    device.
    """
    found = torch.full((), -(1 << 15), dtype=torch.int32, device=digits.device)
    below = torch.zeros((), dtype=torch.int64, device=digits.device)
    for bit in reversed(range(16)):
        larger = found + (1 << bit)
        below_larger = (digits < larger).sum()
        fits = below_larger < k
        found, below = torch.where(fits, larger, found), torch.where(fits, below_larger, below)
    return found, k - below


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Keep-mask with the `n` highest scores of every `m` neighbours; of equals, the last ones.

    Args:
        scores: float [rows, cols], cols divisible by m.

    Returns:
        bool [rows, cols].
    """
    if on_gpu.serves(scores, m):
        return on_gpu.n_of_m(scores, n, m)
    return n_of_m_reference(scores, n, m)


def n_of_m_reference(scores: Tensor, n: int, m: int) -> Tensor:
    """`n_of_m` in plain torch, for any device, floating type and m."""
    rows, cols = scores.shape
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    counter = torch.uint8 if m <= 256 else torch.int32
    for chunk in row_chunks(rows, cols * m, scores.device):
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
