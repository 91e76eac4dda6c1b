"""Which instruction set the native kernels use.

One library holds them all. It takes what this CPU is fastest with, or what `BESA_ISA` in the
environment names: portable, avx2, avx2_vnni, avx512, avx512_bf16, avx512_dpbf16 or avx512_amx; on
Arm portable, neon, neon_dot or neon_bf16. avx512_bf16 and avx512_dpbf16 need the same instructions
and differ in those that bfloat16 is multiplied with; AMD's CPUs are faster with the second.
avx2_vnni and avx512_amx are not there if the compiler is older than these instructions, and
avx512_amx not if the system does not let the process use AMX, as only Linux does.

>>> name, reason = chosen_isa()     # "avx512_bf16", "the best that this CPU has"
>>> name in (*ISAS, "torch")
True
"""

from __future__ import annotations

import os
from functools import cache

from besa.errors import BesaError
from besa.kernels import native
from besa.kernels.abi import ISAS

__all__ = ["ISAS", "available", "best_isa", "chosen_isa", "isa_number"]


def available() -> tuple[str, ...]:
    """Those of `ISAS` that this CPU has; none without the native library."""
    library = native.library()
    if library is None:
        return ()
    there = library.besa_isas()
    return tuple(name for number, name in enumerate(ISAS) if there >> number & 1)


def best_isa() -> str | None:
    """The one of `ISAS` that this CPU is fastest with; None without the native library."""
    library = native.library()
    return None if library is None else ISAS[library.besa_best_isa()]


def chosen_isa() -> tuple[str, str]:
    """The instruction set in use and why; "torch" where there is no native library.

    Raises:
        BesaError: BESA_ISA names none, or one that this CPU does not have.
    """
    wanted, best = os.environ.get("BESA_ISA"), best_isa()
    if wanted and wanted not in ISAS:
        raise BesaError(f"BESA_ISA={wanted} is none of {', '.join(ISAS)}")
    if best is None:
        return "torch", "the native library is not there"
    if not wanted:
        return best, "the best that this CPU has"
    if wanted not in available():
        raise BesaError(f"BESA_ISA={wanted}, but this CPU has {', '.join(available())}")
    return wanted, f"BESA_ISA={wanted}"


@cache
def isa_number() -> int:
    """`chosen_isa` as the kernels take it; read once in a process."""
    return ISAS.index(chosen_isa()[0])
