"""The C++ kernels: one shared library behind a plain C ABI, loaded with ctypes.

    from besa.kernels import native

    library = native.library()
    if library is not None:  # else take the torch reference
        library.besa_segment_sum_f32(...)

ctypes releases Python's lock during a call. The library knows nothing of torch, but uses OpenMP's
`libgomp.so.1`. torch brings one of the same name, and a process must have only one, or two pools
of threads fight for the cores: so torch is imported first, and the loader takes what is there.
"""

from __future__ import annotations

import ctypes
import warnings
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (before the library: see above)

import besa.kernels

NAME = "libbesa_kernels.so"

_SIGNATURES = {
    # values, weight or None, buckets, out, rows, cols, n_buckets, threads
    "besa_segment_sum_f32": [*[c_void_p] * 4, *[c_int64] * 3, c_int],
}


@cache
def library() -> ctypes.CDLL | None:
    """The library with its functions' types declared; None, with one warning, if it can't load."""
    # An editable install has two folders: the sources', and the one that the build installs to.
    found = [path for folder in besa.kernels.__path__ if (path := Path(folder, NAME)).is_file()]
    reason: object = f"{NAME} was not built with this installation"
    if found:
        try:
            loaded = ctypes.CDLL(str(found[0]))
        except OSError as error:
            reason = error
        else:
            for name, argtypes in _SIGNATURES.items():
                function = getattr(loaded, name)
                function.argtypes, function.restype = argtypes, None
            return loaded
    warnings.warn(f"no native kernels, torch serves instead, slower: {reason}", stacklevel=2)
    return None
