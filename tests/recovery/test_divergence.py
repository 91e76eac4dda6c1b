"""The divergence against torch's own, with its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from besa.recovery.divergence import divergence


def of_torch(logits: Tensor, teacher: Tensor) -> Tensor:
    own, aim = (x.double().flatten(0, -2).log_softmax(-1) for x in (logits, teacher))
    return functional.kl_div(own, aim, reduction="batchmean", log_target=True)


# Some lengths are parts of the tokens that are taken at once, some are more of them.
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 40, 11), (1, 128, 5), (2, 200, 3)], ids=str)
def test_value_and_gradient(shape: tuple[int, ...]):
    torch.manual_seed(0)
    logits, teacher = 3 * torch.randn(shape), 3 * torch.randn(shape)
    logits.requires_grad_()
    found = divergence(logits, teacher)
    (2 * found).backward()
    gradient = logits.grad
    logits.grad = None
    expected = of_torch(logits, teacher)
    (2 * expected).backward()
    torch.testing.assert_close(found.double(), expected)
    torch.testing.assert_close(gradient, logits.grad)


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    logits, teacher = (torch.randn(1, 300, 1000).bfloat16() for _ in range(2))
    logits.requires_grad_()
    found = divergence(logits, teacher)
    found.backward()
    assert found.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), of_torch(logits, teacher), rtol=1e-5, atol=0)


def test_without_gradients():
    logits = torch.randn(4, 9, requires_grad=True)
    with torch.no_grad():
        assert divergence(logits, logits) == 0
