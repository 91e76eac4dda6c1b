"""The C++ kernels: one shared library behind a plain C ABI, loaded with ctypes.

>>> found = library()
>>> found is None or found.besa_best_isa() >= 0     # None: the torch references serve
True

ctypes releases Python's lock during a call. The library knows nothing of torch, but uses OpenMP's
`libgomp.so.1`. torch brings one of the same name, and a process must have only one, or two pools
of threads fight for the cores: so torch is imported first, and the loader takes what is there.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (before the library: see above)

import besa.kernels
from besa.errors import BesaWarning

NAME = "libbesa_kernels.so"

_SIGNATURES = {
    # weight, bitmask, row_ptr, rows, cols, element size, threads, wide
    "besa_pack_mask": [*[c_void_p] * 3, *[c_int64] * 3, *[c_int] * 2],
    # bitmask, row_ptr, rows, row bytes, threads, wide
    "besa_row_pointers": [*[c_void_p] * 2, *[c_int64] * 2, *[c_int] * 2],
    # weight, bitmask, row_ptr, values, rows, cols, element size, n_values, threads, wide; gives a
    # status
    "besa_compress": [*[c_void_p] * 4, *[c_int64] * 4, *[c_int] * 2],
    # values, bitmask, row_ptr, dense, then as above; gives a status
    "besa_expand": [*[c_void_p] * 4, *[c_int64] * 4, *[c_int] * 2],
    # values, weight or None, buckets, out, rows, cols, n_buckets, threads
    "besa_segment_sum_f32": [*[c_void_p] * 4, *[c_int64] * 3, c_int],
    "besa_last_isa": [],
    "besa_best_isa": [],
    # values, dtype, count, bitmask, row_ptr, scale, group_size, bias, input, dtype, output,
    # tokens, rows, cols, int8_input, isa, threads; gives a status
    "besa_sparse_linear": [
        *[c_void_p, c_int, c_int64],
        *[c_void_p, c_void_p, c_void_p, c_int64, c_void_p],
        *[c_void_p, c_int, c_void_p],
        *[c_int64] * 3,
        *[c_int] * 3,
    ],
}


def path() -> Path | None:
    """Where the library is: what BESA_KERNELS in the environment says, or with this package."""
    if override := os.environ.get("BESA_KERNELS"):
        return Path(override)
    # An editable install has two folders: the sources', and the one that the build installs to.
    found = (Path(folder, NAME) for folder in besa.kernels.__path__)
    return next((file for file in found if file.is_file()), None)


@cache
def library() -> ctypes.CDLL | None:
    """The library with its functions' types declared; None, with one warning, if it can't load."""
    found = load()
    if isinstance(found, ctypes.CDLL):
        return found
    message = f"no native kernels, torch serves instead, slower: {found}"
    warnings.warn(message, BesaWarning, stacklevel=2)
    return None


def load() -> ctypes.CDLL | str:
    """The library, or the reason why it cannot be loaded."""
    if (file := path()) is None:
        return f"{NAME} was not built with this installation"
    try:
        loaded = ctypes.CDLL(str(file))
        for name, argtypes in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = argtypes, c_int
    except (OSError, AttributeError) as error:  # not to be loaded, or of another version
        return str(error)
    return loaded
