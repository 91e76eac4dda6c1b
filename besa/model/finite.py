"""Refuses tensors that hold NaN or Inf: a damaged checkpoint, or a dtype that overflows.

>>> check_finite(torch.tensor([1.0, math.nan]), "norm.weight", "mend the checkpoint")
Traceback (most recent call last):
besa.errors.BesaError: norm.weight has 1 values that are NaN or Inf: mend the checkpoint
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from besa.errors import BesaError


def check_finite(tensor: Tensor, name: str, remedy: str) -> None:
    """Raises a BesaError that names the tensor and the remedy if it holds NaN or Inf."""
    if tensor.is_floating_point() and not math.isfinite(tensor.sum().item()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise _not_finite(bad, name, remedy)


@dataclass
class FiniteCheck:
    """The same for many tensors of one name: on a GPU, the host waits once for all of them.

    On the CPU `add` raises; elsewhere `finish` does.
    """

    name: str
    remedy: str
    _bad: list[Tensor] = field(default_factory=list)

    def add(self, tensor: Tensor) -> None:
        """Checks a tensor, or has the device count what is wrong in it."""
        if tensor.device.type == "cpu":
            check_finite(tensor, self.name, self.remedy)
        elif tensor.is_floating_point():
            self._bad.append(tensor.isfinite().logical_not().sum())

    def finish(self) -> None:
        """Raises a BesaError if a tensor held NaN or Inf: of the first one that did."""
        counts = torch.stack(self._bad).tolist() if self._bad else []
        self._bad.clear()
        for bad in counts:
            if bad:
                raise _not_finite(bad, self.name, self.remedy)


def _not_finite(bad: int, name: str, remedy: str) -> BesaError:
    return BesaError(f"{name} has {bad} values that are NaN or Inf: {remedy}")
