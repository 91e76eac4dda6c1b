"""How fast this machine is at what pruning does, in two seconds of measurement.

>>> speed = measure(torch.device("cpu"), torch.float32, tokens=64, width=128)
>>> speed.products > 1e8, 0 < speed.launch < 1
(True, True)

The shortest of several runs counts, so that another program's share of the machine is left out as
far as that goes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from besa.planning.work import Speed

# Of each measurement; together some two seconds.
_SECONDS, _TIMES = 0.3, 3

# Sizes that stay within a small machine's memory and time, and beyond its caches.
_WIDEST = 2048
_NUMBERS = 1 << 24
_FILE_BYTES = 1 << 25
_SMALL = 200  # operations on a few numbers, at a time


def measure(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    file: Path | None = None,
) -> Speed:
    """The speeds of a device.

    Args:
        dtype: of the computation.
        tokens: of a batch.
        width: of the model.
        file: of the weights, which is read; None: a file takes no time beyond its digest.
    """
    width, tokens = min(width, _WIDEST), min(tokens, _WIDEST)

    def seconds(run: Callable[[], object], warm: bool = True) -> float:
        return _shortest(run, device, warm)

    x = torch.ones(tokens, width, device=device, dtype=dtype)
    weight = torch.ones(4 * width, width, device=device, dtype=dtype)
    products = 2 * tokens * weight.numel() / seconds(lambda: functional.linear(x, weight))
    square = torch.eye(width, device=device) * 2
    inverse = seconds(lambda: torch.cholesky_inverse(torch.linalg.cholesky(square)))
    numbers = torch.ones(_NUMBERS, device=device)
    moved = 12 * _NUMBERS / seconds(lambda: numbers * numbers)
    rows = torch.rand(max(1, (1 << 20) // width), width, device=device)
    ordered = rows.numel() / seconds(lambda: rows.argsort(dim=1, stable=True))
    few = torch.ones(8, device=device)
    small = seconds(lambda: [few.add(1) for _ in range(_SMALL)]) / _SMALL
    read = _read_speed(file)
    return Speed(products, width**3 / inverse, moved, ordered, small, read)


def _read_speed(file: Path | None) -> float:
    """Bytes a second that are read from a file, or from memory without one, and digested."""
    if file is None:
        data = bytes(_FILE_BYTES)
        return _FILE_BYTES / _shortest(lambda: hashlib.sha256(data), torch.device("cpu"), False)

    def read() -> None:
        with file.open("rb") as opened:
            hashlib.sha256(opened.read(_FILE_BYTES))

    size = min(_FILE_BYTES, file.stat().st_size)
    return size / _shortest(read, torch.device("cpu"), warm=False)


def _shortest(run: Callable[[], object], device: torch.device, warm: bool) -> float:
    """The seconds of the fastest run."""
    if warm:
        run()
        _wait(device)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < _TIMES or time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - before)
        if time.perf_counter() - started > 2 * _SECONDS:
            break
    return max(min(times), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
