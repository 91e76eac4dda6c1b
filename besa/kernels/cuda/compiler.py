"""Compiles CUDA C++ at run time: NVRTC through ctypes, without nvcc and without a GPU.

>>> source = "template <int N> __global__ void k(float* x) { *x = N; }"
>>> cubin = compile_cubin(source, "sm_90", "k<3>")
>>> cubin.registers <= 64, cubin.spilled
(True, 0)

NVRTC is a library of the CUDA toolkit that torch's CUDA builds bring along (nvidia-cuda-nvrtc).
https://docs.nvidia.com/cuda/nvrtc describes its interface, which versions 12 and 13 share.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from besa.errors import BesaError

# Without -default-device, a function that is not marked would be one of the host's. ptxas's -v puts
# what a kernel needs into the log.
OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v")

# GPUs of boards with a CPU. Their code runs on them alone, not on cards of the same major version.
EMBEDDED = (72, 87, 88, 101, 110)


class CompileError(BesaError):
    """The compiler's first error, or why there is no compiler for this GPU."""


@dataclass(frozen=True)
class Cubin:
    """A kernel as machine code.

    Attributes:
        image: an ELF file, what cuModuleLoadData takes.
        symbol: the kernel's name in it, mangled.
        log: what the compiler said: warnings, registers, spills.
    """

    image: bytes
    symbol: str
    log: str

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return max(int(count) for count in re.findall(r"Used (\d+) registers", self._own_log))

    @property
    def spilled(self) -> int:
        """Bytes of a thread's registers that are kept in memory, reads and writes of them."""
        found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", self._own_log)
        return sum(int(stores) + int(loads) for stores, loads in found)

    @property
    def _own_log(self) -> str:
        # A file's kernels that are no templates are compiled along.
        kernels = self.log.split("Compiling entry function '")[1:]
        return next(log for log in kernels if log.startswith(f"{self.symbol}'"))


@dataclass(frozen=True)
class Nvrtc:
    """The loaded library.

    Attributes:
        version: of CUDA, such as (13, 0).
        architectures: those it compiles for, such as 90 for compute capability 9.0.
    """

    library: ctypes.CDLL
    version: tuple[int, int]
    architectures: tuple[int, ...]


@cache
def nvrtc() -> Nvrtc | None:
    """The first of `candidates` that loads; None where none does."""
    for candidate in candidates():
        try:
            library = _load(candidate)
        except OSError:
            continue
        major, minor, count = c_int(), c_int(), c_int()
        _check(library, library.nvrtcVersion(byref(major), byref(minor)))
        _check(library, library.nvrtcGetNumSupportedArchs(byref(count)))
        architectures = (c_int * count.value)()
        _check(library, library.nvrtcGetSupportedArchs(architectures))
        return Nvrtc(library, (major.value, minor.value), tuple(architectures))
    return None


def candidates() -> Iterator[str]:
    """Where libnvrtc may be, best first: paths, and names that the system's loader looks for."""
    # A second one beside that of torch would cost 100 MB and could be of another version.
    yield from _loaded()
    yield from _in_wheels()
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if root:
            yield f"{root}/lib64/libnvrtc.so"


def _loaded() -> list[str]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/libnvrtc.so." in line}
    return sorted(path for path in paths if Path(path).is_file())


def _in_wheels() -> list[str]:
    """In nvidia-cuda-nvrtc (nvidia/cu13/lib) and nvidia-cuda-nvrtc-cu12 (nvidia/cuda_nvrtc/lib)."""
    spec = find_spec("nvidia")  # a namespace of many wheels
    if spec is None or spec.submodule_search_locations is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    paths = [path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.[0-9]*")]
    major = (torch.version.cuda or "").split(".")[0]
    # torch's own version first: the driver is new enough for that one.
    paths.sort(key=lambda path: (path.name.split(".")[2] == major, path.name), reverse=True)
    return [str(path) for path in paths]


def _load(candidate: str) -> ctypes.CDLL:
    # NVRTC looks for its other half by name alone, on the loader's path: beside it is none of that.
    if "/" in candidate:
        for builtins in sorted(Path(candidate).parent.glob("libnvrtc-builtins.so.[0-9]*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(candidate)
    library.nvrtcGetErrorString.restype = c_char_p
    return library


def how_to_install() -> str:
    """The package that has NVRTC, in the version that fits torch."""
    version = torch.version.cuda
    if version is None:
        return "pip install nvidia-cuda-nvrtc"
    suffix = "-cu12" if version.startswith("12.") else ""
    return f"pip install 'nvidia-cuda-nvrtc{suffix}=={version}.*'"


def target_of(capability: tuple[int, int], nvrtc: Nvrtc, specific: bool = False) -> str:
    """What to compile for: (8, 9) gives "sm_89", or "sm_86" with an NVRTC that knows no newer one.

    Args:
        capability: the GPU's compute capability.
        specific: with instructions that no other GPU has, as in "sm_90a".

    Raises:
        CompileError: NVRTC knows no architecture whose code runs on this GPU.
    """
    major, minor = capability
    wanted = 10 * major + minor
    # Machine code runs on GPUs of the same major version and at least the same minor one.
    fitting = [
        known
        for known in nvrtc.architectures
        if known == wanted
        or (not specific and 10 * major <= known < wanted and known not in EMBEDDED)
    ]
    if not fitting:
        raise CompileError(
            f"NVRTC {nvrtc.version[0]}.{nvrtc.version[1]} can't compile for compute capability "
            f"{major}.{minor}: install a torch with a newer CUDA"
        )
    return f"sm_{max(fitting)}{'a' if specific else ''}"


def compile_cubin(
    source: str,
    target: str,
    name: str,
    headers: Mapping[str, str] | None = None,
    file: str = "kernel.cu",
) -> Cubin:
    """Machine code of one kernel.

    Args:
        source: CUDA C++.
        target: "sm_90", see `target_of`.
        name: the kernel, as an expression of C++: "multiply<Bf16, 2>".
        headers: what `source` may include: text by name.
        file: what messages call the source.

    Raises:
        CompileError: with the first error.
    """
    if (found := nvrtc()) is None:
        raise CompileError(f"no NVRTC (libnvrtc.so): {how_to_install()}")
    library, headers = found.library, headers or {}
    texts = (c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (c_char_p * len(headers))(*(name.encode() for name in headers))
    options = [option.encode() for option in (f"--gpu-architecture={target}", *OPTIONS)]
    program, lowered, expression = c_void_p(), c_char_p(), name.encode()
    _check(
        library,
        library.nvrtcCreateProgram(
            byref(program), source.encode(), file.encode(), len(headers), texts, names
        ),
    )
    try:
        _check(library, library.nvrtcAddNameExpression(program, expression))
        array = (c_char_p * len(options))(*options)
        status = library.nvrtcCompileProgram(program, len(options), array)
        log = _bytes(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        log = re.sub(r".*Compile time = .*\n", "", log)  # the same every time
        if status:
            what = _first_error(log) or library.nvrtcGetErrorString(status).decode()
            raise CompileError(f"could not compile {name} for {target}: {what}")
        _check(library, library.nvrtcGetLoweredName(program, expression, byref(lowered)))
        assert lowered.value is not None
        return Cubin(_bytes(library, program, "CUBIN"), lowered.value.decode(), log)
    finally:
        library.nvrtcDestroyProgram(byref(program))


def _bytes(library: ctypes.CDLL, program: c_void_p, what: str) -> bytes:
    size = c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _first_error(log: str) -> str | None:
    lines = (line.strip() for line in log.splitlines())
    return next((line for line in lines if re.search(r"\berror\b", line)), None)


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise CompileError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
