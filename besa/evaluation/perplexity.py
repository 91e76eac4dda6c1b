"""Perplexity by the field's protocol, with its standard error.

The text is cut into windows that do not overlap; of each window the model predicts every token
but the first, and sees nothing outside the window. With ℓ_i the mean negative log-likelihood of
window i (nats a token) and n windows,

    perplexity     = exp(ℓ̄),  ℓ̄ = Σ ℓ_i / n
    standard error = exp(ℓ̄) · s / √n,  s² = Σ (ℓ_i − ℓ̄)² / (n − 1)     (delta method)

Two models that read the same windows are compared window by window (`paired`). That a window is
hard for both falls out of the difference, so its standard error is far below that of either
perplexity.

>>> losses = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)     # of `window_losses`
>>> found = Perplexity.of(losses, seqlen=512)
>>> print(f"{found.perplexity:.2f} ± {found.standard_error:.2f}")
20.09 ± 11.60
>>> nats, error = paired(losses, losses - 0.1)
>>> print(f"{nats:.2f} ± {error:.2f}")
0.10 ± 0.00
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from besa.data.windows import check_known
from besa.errors import BesaError
from besa.model.skeleton import known_tokens
from besa.processes.ranks import ALONE, Ranks

# Logits turned into float32 at a time: 64 MiB of them.
_LOGITS_AT_A_TIME = 1 << 24

# Called with windows done and windows in all.
Progress = Callable[[int, int], None]


@torch.inference_mode()
def window_losses(
    model: nn.Module,
    windows: Tensor,
    batch_size: int = 1,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The mean negative log-likelihood of each window's tokens but the first.

    The logits are held in the model's dtype for one batch; the log-softmax is taken in float32,
    a bounded number of positions at a time.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        windows: int64 [n, seqlen], seqlen ≥ 2.
        batch_size: windows in one call of the model.
        progress: called with windows done and windows in all, first with none done.
        ranks: the processes that share the windows; each gets the losses of all.

    Returns:
        float64 [n] on the CPU, nats a token.

    Raises:
        BesaError: the windows hold tokens that the model does not know, or it wants images, too.
    """
    check_known(windows, known_tokens(model))
    device = next(model.parameters()).device
    own = ranks.share(windows)
    losses: list[Tensor] = []
    if progress:
        progress(0, len(windows))
    for batch in own.split(batch_size) if len(own) else ():
        tokens = batch.to(device)
        try:
            logits = model(input_ids=tokens, use_cache=False).logits
        except (TypeError, ValueError) as error:  # its signature's, or its own check's
            name, reason = type(model).__name__, str(error).split("\n")[0]
            raise BesaError(f"a {name} does not take text alone: {reason}") from None
        losses += [_loss(row[:-1], window[1:]) for row, window in zip(logits, tokens, strict=True)]
        if progress:
            progress(min(len(losses) * ranks.size, len(windows)), len(windows))
    found = torch.zeros(len(windows), dtype=torch.float64)
    if losses:
        ranks.share(found).copy_(torch.stack(losses))
    ranks.sum_(found)
    return found


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats, float64 []; logits [positions, vocabulary]."""
    rows = max(1, _LOGITS_AT_A_TIME // logits.shape[-1])
    parts = [
        F.cross_entropy(part.float(), wanted, reduction="none").double().sum()
        for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return torch.stack(parts).sum() / len(targets)


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and its conditions.

    Attributes:
        perplexity: exp of the mean loss; infinite or not a number for a model that is broken.
        standard_error: by the delta method from the windows' spread; NaN for a single window.
        tokens: how many tokens were predicted, windows × (seqlen − 1).
        windows: how many windows were read.
        seqlen: tokens in a window.
        losses: float64 [windows], nats a token.
    """

    perplexity: float
    standard_error: float
    tokens: int
    windows: int
    seqlen: int
    losses: Tensor = field(repr=False, compare=False)

    @classmethod
    def of(cls, losses: Tensor, seqlen: int) -> Perplexity:
        """From the losses of the windows, float64 [n]."""
        mean, error = _mean(losses)
        perplexity = math.exp(mean) if mean < 709 else mean * math.inf  # exp overflows; NaN stays
        n = len(losses)
        return cls(perplexity, perplexity * error, n * (seqlen - 1), n, seqlen, losses)


def paired(losses: Tensor, reference: Tensor) -> tuple[float, float]:
    """How much worse than the reference on the same windows, in nats a token.

    Args:
        losses: float64 [n], the mean negative log-likelihood of each window.
        reference: float64 [n], the same of the model to compare with.

    Returns:
        The mean of `losses - reference` (positive: the reference predicts better; exp of it is
        the ratio of the perplexities) and its standard error, NaN for a single window.
    """
    return _mean(losses - reference)


def _mean(values: Tensor) -> tuple[float, float]:
    error = values.std(correction=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)
