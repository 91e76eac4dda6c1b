"""How far a model's next-token distributions are from its teacher's.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, at
temperature 1 and without the text's own tokens: the divergence of Kullback and Leibler from the
teacher's distribution, in nats a token.

>>> logits = torch.randn(2, 4, 257)
>>> divergence(logits, logits)
tensor(0.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Tokens whose distributions exist at once in float32: of 262,144 words, 128 MiB each.
_TOKENS = 128


def divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """The mean over tokens of KL(teacher || model), a float32 scalar.

    Args:
        logits, teacher: [..., words].
    """
    words = logits.shape[-1]
    mean: Tensor = _Divergence.apply(logits.reshape(-1, words), teacher.reshape(-1, words))
    return mean


class _Divergence(torch.autograd.Function):
    """Makes the gradient at once, so that only one tensor of the logits' size is kept for it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), _TOKENS):
            some = slice(start, start + _TOKENS)
            own = logits[some].float().log_softmax(-1)
            aim = teacher[some].to(own.device, torch.float32).log_softmax(-1)
            chances = aim.exp()
            total += (chances * (aim - own)).sum()
            if gradient is not None:
                gradient[some] = (own.exp_() - chances) / len(logits)
        ctx.gradient = gradient
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * grads[0], None
