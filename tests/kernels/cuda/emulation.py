"""Runs the GPU kernels of besa/kernels/cuda on the CPU: compiled by g++ or clang++, warps emulated.

>>> emulated = Emulated("pruning.cu", ["segment_sum<Bf16>"])
>>> emulated.launch("segment_sum<Bf16>", (rows, 1, 1), 256, 0, arguments)

`arguments` is the kernel's structure as for a GPU, its pointers those of CPU tensors. emulator.h
has the GPU's instructions. What a kernel does wrong (lanes that wait for each other, an access past
the end of shared memory or a misaligned one) is a `KernelError`; bytes that it reads before they
have arrived are 0xFF. Constant offsets escape the check of alignment: see FLAGS.

>>> with driver_on_cpu():
...     y = operator(x)  # its driver.kernel(...).launch(...) run here, on CPU tensors
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_long, c_void_p
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from besa.kernels.cuda import driver

HERE = Path(__file__).parent
KERNELS = Path(driver.__file__).parent

FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",  # lines, for messages
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # kernels read bytes as what they are, as nvcc lets them
    "-ffp-contract=off",
    # What a GPU faults at or leaves undefined: a trap, so that no library is needed. GCC checks the
    # alignment of a pointer before a constant is added to it.
    "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
    "-DBESA_EMULATOR",
]


class KernelError(AssertionError):
    """What a kernel did wrong, in one line."""


class _Launch(ctypes.Structure):
    """emulator::Launch of launch.h."""

    _fields_ = [
        ("argument", c_void_p),
        ("size", c_long),
        ("grid", c_int * 3),
        ("threads", c_int),
        ("shared", c_int),
        ("error", c_char_p),
        ("error_size", c_int),
        ("where", ctypes.POINTER(c_long)),
    ]


@cache
def compiler() -> list[str] | None:
    """The command of the machine's C++ compiler; None if there is none."""
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


needs_compiler = pytest.mark.skipif(
    compiler() is None, reason="no C++ compiler, which kernels are emulated with"
)


class Emulated:
    """Kernels of one source, compiled for the CPU.

    Args:
        source: a file of besa/kernels/cuda, or the path of another.
        names: the kernels in it, as expressions of C++: "segment_sum<Bf16>".

    Raises:
        KernelError: it does not compile.
    """

    def __init__(self, source: str | Path, names: Sequence[str]) -> None:
        path = KERNELS / source
        text = f'#include "{path}"\n' + "".join(
            f"EMULATE(launch_{i}, &{name})\n" for i, name in enumerate(names)
        )
        self._path = compiled(path, text)
        # Keeps Python's lock: a library runs one launch at a time.
        self._library = ctypes.PyDLL(str(self._path))
        self._functions = {name: self._library[f"launch_{i}"] for i, name in enumerate(names)}

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: ctypes.Structure,
        cluster: int = 1,
    ) -> None:
        """Runs the blocks one after another; `shared` are bytes of a block.

        Those of a cluster run three times: emulator_wgmma.h says why.

        Raises:
            KernelError: the kernel did something wrong.
        """
        error, where = ctypes.create_string_buffer(2000), c_long()
        launch = _Launch(
            ctypes.addressof(arguments),
            ctypes.sizeof(arguments),
            (c_int * 3)(*grid),
            threads,
            shared,
            ctypes.cast(error, c_char_p),
            len(error),
            ctypes.pointer(where),
        )
        for again in range(1 if cluster == 1 else 3):
            if hasattr(self._library, "emulate_cluster"):
                self._library.emulate_cluster(cluster, again)
            else:
                assert cluster == 1, "only kernels that include hopper.cuh have clusters"
            if self._functions[name](ctypes.byref(launch)):
                raise KernelError(f"{name}: {error.value.decode()}{self._line(where.value)}")

    def _line(self, code: int) -> str:
        """Where the source has the instruction at byte `code` of the library; "" if not known."""
        if not code or not shutil.which("addr2line"):
            return ""
        command = ["addr2line", "-s", "-i", "-e", str(self._path), hex(code)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        # An inlined function's line, its caller's and so on: "name.cu:12 (discriminator 2)".
        lines = [line.split()[0] for line in found.stdout.splitlines() if line]
        return f" ({' in '.join(lines)})" if found.returncode == 0 else ""


def compiled(path: Path, text: str) -> Path:
    """The library of `text`, which includes a kernel's source."""
    command = compiler()
    assert command is not None, "no C++ compiler"
    command = [*command, *FLAGS, f"-I{KERNELS}", f"-I{HERE}", "-x", "c++", "-"]
    return library_of(path, command, [*KERNELS.glob("*.cuh"), *HERE.glob("*.h")], text)


def library_of(
    path: Path, command: Sequence[str], includes: Iterable[Path], text: str = ""
) -> Path:
    """What a compiler makes of `path`: of an earlier run, if all that it is made of is the same.

    Args:
        command: the compiler's, without an output.
        includes: what else it reads.
        text: its standard input.

    Raises:
        KernelError: it does not compile.
    """
    digest = hashlib.sha256("\0".join([*command, _version(command[0]), text]).encode())
    for source in (path, *sorted(includes)):
        digest.update(source.read_bytes() + b"\0")
    folder = Path(tempfile.gettempdir()) / f"besa-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{path.stem}-{digest.hexdigest()[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "library.so"
            done = subprocess.run(
                [*command, "-o", str(made)], input=text, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise KernelError(f"{path.name} does not compile:\n{done.stderr}")
            made.replace(library)  # at once: another process may be doing the same
    return library


@cache
def _version(command: str) -> str:
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


class EmulatedKernel:
    """A kernel with the interface of `driver.Kernel`."""

    def __init__(self, source: str, name: str) -> None:
        self.source, self.name = source, name
        self.registers, self.local_bytes = 0, 0
        self._emulated = Emulated(source, [name])

    def launch(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: ctypes.Structure,
        stream: int,  # noqa: ARG002 - there is one
        early: bool = False,  # noqa: ARG002 - kernels run one after another
        cluster: int = 1,
    ) -> None:
        """Runs the kernel; it has ended when this returns."""
        self._emulated.launch(self.name, grid, threads, shared, arguments, cluster)


@cache
def _kernel(source: str, name: str) -> EmulatedKernel:
    return EmulatedKernel(source, name)


@contextmanager
def driver_on_cpu() -> Iterator[None]:
    """Meanwhile, `besa.kernels.cuda.driver` runs kernels on CPU tensors, whatever the device."""

    def kernel(source: str, name: str, *_: torch.device, **__: bool) -> EmulatedKernel:
        return _kernel(source, name)

    stream = SimpleNamespace(cuda_stream=0)
    with (
        mock.patch.object(driver, "kernel", kernel),
        mock.patch.object(driver, "unavailable", return_value=None),
        mock.patch.object(driver, "prepare", return_value=None),
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
    ):
        yield


def guarded(tensor: Tensor) -> Tensor:
    """A copy that no memory follows: a kernel that reads or writes past its end is told so."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    view = torch.frombuffer(memory, dtype=torch.uint8)
    end = view.data_ptr() + pages
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(c_void_p(end), ctypes.c_size_t(page), 0) == 0
    copy = view[pages - size : pages].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
