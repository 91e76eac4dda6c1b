"""GPUs that stand for all, and a kernel compiled for one of them."""

from __future__ import annotations

from besa.kernels.cuda import driver
from besa.kernels.cuda.call import Needed
from besa.kernels.cuda.candidates import Gpu
from besa.kernels.cuda.compiler import Cubin, compile_cubin

GPUS = {
    "A100": Gpu(108, (8, 0), 164 * 1024),
    "RTX 4090": Gpu(128, (8, 9), 100 * 1024),
    "H100": Gpu(132, (9, 0)),
    "B200": Gpu(148, (10, 0)),
    "RTX 5090": Gpu(170, (12, 0), 100 * 1024),
}

# The same ones, by what is compiled for them.
TARGETS = {f"sm_{gpu.capability[0]}{gpu.capability[1]}": gpu for gpu in GPUS.values()}


def compiled(needed: Needed, target: str) -> Cubin:
    """The kernel for a target of `TARGETS`."""
    text = (driver.FOLDER / needed.source).read_text(encoding="utf-8")
    target += "a" if needed.specific else ""
    return compile_cubin(text, target, needed.name, driver.headers(), needed.source)
