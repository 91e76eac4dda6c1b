"""How fast this machine is, in some seconds: what memory allows, and what packed weights gain.

>>> nbytes = bytes_to_measure()
>>> for figure in dense_against_sparse(nbytes, read_bandwidth(nbytes)):
...     print(f"{figure.dtype} is {figure.speedup:.1f} times as fast as dense weights")
bfloat16 is ... times as fast as dense weights
int8 is ... times as fast as dense weights
int4 is ... times as fast as dense weights

A model generates text at the speed at which its weights are read: for one token each weight is
used once, and no cache holds them all. So both measure on more memory than the caches have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from besa.doctor.report import DenseAgainstSparse
from besa.formats import Packed, pack, quantize_int4, quantize_int8
from besa.kernels import sparse_linear
from besa.kernels.isa import available
from besa.machine import cache_size, memory

SIZE = 4096  # rows and columns of the matrices
SPARSITY = 0.5
GROUP = 64  # columns that share a step of int4

# The time for each measurement, and the least number of calls.
_SECONDS, _TIMES = 0.4, 5

T = TypeVar("T")


def bytes_to_measure() -> int:
    """How many bytes to measure on: far more than the caches hold, of what memory there is."""
    wanted = max(512 * 2**20, 2 * (cache_size() or 0))
    return min(wanted, memory().available // 4)


def read_bandwidth(nbytes: int) -> float:
    """The bytes a second that torch's threads read from memory, at best.

    Args:
        nbytes: how much to read at a time.
    """
    return max(nbytes / min(_times(reader)) for reader in readers(nbytes))


def readers(nbytes: int) -> list[Callable[[], object]]:
    """Two ways to read `nbytes` of memory from end to end; the faster one counts."""
    # Written to, or all of it would be one page of zeros.
    buffer = torch.ones(nbytes // 8 * 2)
    first, second = buffer.chunk(2)
    # Two streams keep more reads on their way than one. Two threads of a Xeon (2.3 GHz, AVX-512)
    # read 27 GB/s in the dot product of the halves, as much as in loops of C++ written for it; 20
    # in a sum, 13 in a maximum. But not every BLAS shares a dot product among threads.
    return [partial(torch.dot, first, second), buffer.sum]


@torch.no_grad()
def dense_against_sparse(nbytes: int, bandwidth: float) -> tuple[DenseAgainstSparse, ...]:
    """One token through dense matrices of bfloat16, and then through packed ones of each type; of
    bfloat16 alone where there are no native kernels.

    Args:
        nbytes: how much memory the matrices of each kind take.
        bandwidth: what `read_bandwidth` measured.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, SIZE, dtype=torch.bfloat16, generator=generator)
    weight += weight.sign()  # none so small that quantizing would make it zero
    weight[torch.rand(SIZE, SIZE, generator=generator) < SPARSITY] = 0
    token = torch.randn(1, SIZE, dtype=torch.bfloat16, generator=generator)
    # The dense ones are gone before there are packed ones.
    dense = _seconds(
        [weight.clone() for _ in range(_count(nbytes, weight.nbytes))],
        lambda matrix: torch.nn.functional.linear(token, matrix),
    )

    def figure(dtype: str, packed: Packed) -> DenseAgainstSparse:
        sparse = _seconds(
            [packed.clone() for _ in range(_count(nbytes, packed.nbytes))],
            lambda matrix: sparse_linear(token, matrix),
        )
        return DenseAgainstSparse(
            tokens=1,
            rows=SIZE,
            cols=SIZE,
            sparsity=SPARSITY,
            dtype=dtype,
            threads=torch.get_num_threads(),
            dense_seconds=dense,
            sparse_seconds=sparse,
            speedup=dense / sparse,
            bytes=packed.nbytes,
            share_of_read_bandwidth=packed.nbytes / sparse / bandwidth,
        )

    figures = [figure("bfloat16", pack(weight))]
    if available():  # torch in the kernels' place takes a second for each product of int4
        numbers, scale, steps = quantize_int4(weight, GROUP)
        figures += [
            figure("int8", pack(*quantize_int8(weight))),
            figure("int4", pack(numbers, scale, GROUP, steps)),
        ]
    return tuple(figures)


def _count(nbytes: int, each: int) -> int:
    return max(1, nbytes // each)


def _seconds(matrices: Sequence[T], product: Callable[[T], Tensor]) -> float:
    turn = cycle(matrices)
    return median(_times(lambda: product(next(turn))))


def _times(call: Callable[[], object]) -> list[float]:
    """Seconds of as many calls as the time allows; a first one goes untimed."""
    call()
    times: list[float] = []
    while len(times) < _TIMES or sum(times) < _SECONDS:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times
