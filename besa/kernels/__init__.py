"""Fast paths in C++, each beside a plain torch reference of the same signature."""

from besa.kernels.linear import dense_linear, sparse_linear, sparse_linear_reference

__all__ = ["dense_linear", "sparse_linear", "sparse_linear_reference"]
