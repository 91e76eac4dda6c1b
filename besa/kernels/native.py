"""The C++ kernels: one shared library behind a plain C ABI, loaded with ctypes.

>>> found = library()
>>> found is None or found.besa_best_isa() >= 0     # None: the torch references serve
True

ctypes releases Python's lock during a call. The library knows nothing of torch, but uses OpenMP's
`libgomp.so.1` if GCC compiled it. torch brings one of the same name, and a process must have only
one, or two pools of threads fight for the cores: so torch is imported first, and the loader takes
what is there.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (before the library: see above)

import besa.kernels
from besa.errors import BesaWarning
from besa.kernels import abi

NAME = "libbesa_kernels.so"


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
    except OSError as error:
        return str(error)
    for name, (arguments, result) in abi.FUNCTIONS.items():
        function = getattr(loaded, name, None)
        if function is None:
            return f"{file} is of another version of besa, without {name}: install besa again"
        function.argtypes, function.restype = arguments, result
    built = loaded.besa_abi().decode()
    if built != abi.DESCRIPTION:
        return (
            f"{file} is of another version of besa ({built}; needed: {abi.DESCRIPTION}): install "
            "besa again"
        )
    return loaded
