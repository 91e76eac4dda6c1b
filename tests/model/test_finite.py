"""NaN and Inf are refused: at once on the CPU, on a GPU once for many tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from besa.errors import BesaError
from besa.model.finite import FiniteCheck, check_finite

BAD = torch.tensor([1.0, torch.nan, -torch.inf])


def elsewhere(tensor: Tensor) -> Any:
    """A stand-in for a tensor on a GPU."""
    return SimpleNamespace(
        device=torch.device("cuda"),
        is_floating_point=tensor.is_floating_point,
        isfinite=tensor.isfinite,
    )


def test_a_sum_that_overflows_is_no_reason():
    check_finite(torch.full((4,), 3e38), "weight", "mend it")
    check_finite(torch.arange(3), "ids", "mend it")


def test_on_the_cpu_it_is_raised_at_once():
    check = FiniteCheck("the output", "try float32")
    check.add(torch.ones(3))
    with pytest.raises(BesaError, match="the output has 2 values that are NaN or Inf: try float32"):
        check.add(BAD)
    check.finish()


def test_on_a_gpu_it_is_raised_at_the_end_with_the_first_count():
    check = FiniteCheck("the output", "try float32")
    for tensor in (torch.ones(3), torch.arange(3), BAD, torch.full((5,), torch.nan)):
        check.add(elsewhere(tensor))
    with pytest.raises(BesaError, match="the output has 2 values that are NaN or Inf: try float32"):
        check.finish()
    check.finish()  # nothing was added since
