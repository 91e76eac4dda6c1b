"""Fast paths in C++, each beside a plain torch reference of the same signature.

>>> from besa.kernels import sparse_linear
>>> from besa.formats import pack
>>> import torch
>>> weight = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
>>> sparse_linear(torch.ones(1, 3), pack(weight))
tensor([[2., 1.]])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from besa.kernels.experts import Activation, sparse_experts, sparse_experts_reference
    from besa.kernels.linear import dense_linear, sparse_linear, sparse_linear_reference

__all__ = [
    "Activation",
    "dense_linear",
    "sparse_experts",
    "sparse_experts_reference",
    "sparse_linear",
    "sparse_linear_reference",
]

_OF_EXPERTS = ("Activation", "sparse_experts", "sparse_experts_reference")


def __getattr__(name: str) -> Any:
    """The functions, once asked for: they import torch, which `besa.kernels.abi` does without."""
    if name in __all__:
        module = "experts" if name in _OF_EXPERTS else "linear"
        return getattr(import_module(f"besa.kernels.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
