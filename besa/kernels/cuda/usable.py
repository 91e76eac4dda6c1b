"""Whether the kernels of this folder serve a device; said once where a GPU has to do without.

>>> usable(torch.device("cpu"))
False
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from besa.errors import BesaWarning
from besa.kernels.cuda import driver


def usable(device: torch.device) -> bool:
    """Whether kernels run on the device; if it is a GPU and they don't, one warning says why."""
    reason = driver.unavailable(device)
    if reason is not None and device.type == "cuda":
        _warn(reason)
    return reason is None


@cache
def _warn(reason: str) -> None:
    message = f"no GPU kernels, torch serves instead, slower: {reason}"
    warnings.warn(message, BesaWarning, stacklevel=3)
