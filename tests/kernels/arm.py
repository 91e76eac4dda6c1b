"""The kernels for Arm on another machine: cross-compiled, and run by QEMU.

>>> library = emulated("max")            # QEMU's processor with everything
>>> ISAS[library.besa_best_isa()]
'neon_bf16'

`Emulated` has functions of the native library, under their names, and may stand in its place.
Debian has what it needs: g++-aarch64-linux-gnu, qemu-user.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path

from besa.kernels.abi import DTYPES, ISAS, Job
from tests.helpers import REPOSITORY

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSTEM = "/usr/aarch64-linux-gnu"  # its C library
HERE = Path(__file__).parent

BYTES = (2, 2, 4, 1, 1)  # of each of abi.DTYPES; int4 are counted in bytes


def missing() -> str | None:
    """What is not installed here."""
    needed = (COMPILER, EMULATOR, cmake())
    return next((f"no {name}" for name in needed if not shutil.which(name)), None)


def cmake() -> str:
    beside = Path(sys.executable).with_name("cmake")  # of the development tools
    return str(beside) if beside.exists() else "cmake"


@cache
def library() -> Path:
    """The native library for Arm; what has not changed is not compiled again.

    As with other compilers than GCC, its threads are its own: those of OpenMP run everywhere else.
    """
    folder = REPOSITORY / "build" / "arm"
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_DISABLE_FIND_PACKAGE_OpenMP": "ON",
        "ORT_INCLUDE": "OFF",
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    run(cmake(), "-S", REPOSITORY, "-B", folder, *options)
    run(cmake(), "--build", folder)
    return folder / "libbesa_kernels.so"


@cache
def program(name: str) -> Path:
    """The program NAME.cpp of this folder for Arm."""
    out = library().with_name(name)
    headers = f"-I{REPOSITORY / 'besa' / 'kernels'}"
    run(COMPILER, "-O1", "-std=c++17", headers, HERE / f"{name}.cpp", "-o", out, "-ldl")
    return out


def run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@cache
def counter() -> Path | None:
    """QEMU's plugin that counts instructions; None if this QEMU does not take it."""
    out = library().with_name("qemu_count.so")
    run("g++", "-O1", "-std=c++17", "-shared", "-fPIC", HERE / "qemu_count.cpp", "-o", out)
    command = [*on("max"), "-plugin", str(out), str(program("remote")), str(library())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return out if done.returncode == 0 and done.stdout.strip().isdigit() else None


def instructions(isa: str, dtype: str, tokens: int) -> float:
    """Those of a product with a packed weight, half of it zeros, for each of its weights."""
    words = (program("count"), library(), DTYPES[dtype], tokens, ISAS.index(isa))
    counts = []
    for times in (1, 2):
        command = [*on("max"), "-plugin", str(counter()), *map(str, words), str(times)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    return (counts[1] - counts[0]) / (64 * 2048)


def on(cpu: str) -> list[str]:
    """The emulator, as one of its processors."""
    return [EMULATOR, "-cpu", cpu, "-L", SYSTEM]


@cache
def emulated(cpu: str) -> Emulated:
    return Emulated(cpu)


class Emulated:
    """The library in a process of its own, on one of QEMU's processors."""

    def __init__(self, cpu: str) -> None:
        command = [*on(cpu), str(program("remote")), str(library())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self._process.communicate)  # it ends with its input

    def besa_isas(self) -> int:
        return self._call("besa_isas")

    def besa_best_isa(self) -> int:
        return self._call("besa_best_isa")

    def besa_sparse_linear(self, job: Job) -> int:
        value, x = BYTES[job.values_dtype], BYTES[job.input_dtype]
        groups, steps = (
            -(-job.cols // size) if size else 1 for size in (job.group_size, job.step_size)
        )
        sizes = {
            "values": job.n_values * value,
            "bitmask": job.rows * -(-job.cols // 8),
            "row_ptr": 8 * (job.rows + 1),
            "scale": 4 * job.rows * groups,
            "steps": job.rows * steps,
            "bias": job.rows * x,
            "input": job.tokens * job.cols * x,
            "output": job.tokens * job.rows * x,
        }
        there = Job.from_buffer_copy(job)
        for name, size in sizes.items():
            if address := getattr(job, name):
                setattr(there, name, self._store(ctypes.string_at(address, size)))
        status = self._call("besa_sparse_linear", self._store(bytes(there)))
        if job.output:
            self._load(there.output, job.output, sizes["output"])
        self._free()
        return status

    def besa_pack_mask(
        self, weight: int, bitmask: int, row_ptr: int, rows: int, cols: int, size: int, *rest: int
    ) -> None:
        arrays = (weight, rows * cols * size), (bitmask, rows * -(-cols // 8))
        self._pass("besa_pack_mask", (*arrays, (row_ptr, 8 * (rows + 1))), rows, cols, size, *rest)

    def besa_compress(self, *arguments: int) -> int:
        return self._convert("besa_compress", *arguments)

    def besa_expand(self, *arguments: int) -> int:
        return self._convert("besa_expand", *arguments)

    def _convert(self, function: str, *arguments: int) -> int:
        one, bitmask, row_ptr, other, rows, cols, size, n_values, *rest = arguments
        dense, values = rows * cols * size, n_values * size
        sizes = (dense, values) if function == "besa_compress" else (values, dense)
        arrays = (one, sizes[0]), (bitmask, rows * -(-cols // 8)), (row_ptr, 8 * (rows + 1))
        numbers = rows, cols, size, n_values, *rest
        return self._pass(function, (*arrays, (other, sizes[1])), *numbers)

    def _pass(self, function: str, arrays: tuple[tuple[int, int], ...], *numbers: int) -> int:
        """Calls a function with copies of arrays, (address, bytes), and copies them back."""
        there = [self._store(ctypes.string_at(address, size)) for address, size in arrays]
        result = self._call(function, *there, *numbers)
        for copy, (address, size) in zip(there, arrays, strict=True):
            self._load(copy, address, size)
        self._free()
        return result

    # ------------------------------------------------------------------ requests of remote.cpp

    def _store(self, data: bytes) -> int:
        return self._ask("s", len(data), data=data)

    def _load(self, there: int, here: int, size: int) -> None:
        self._ask("l", there, size)
        ctypes.memmove(here, self._process.stdout.read(size), size)

    def _call(self, function: str, *arguments: int) -> int:
        result = self._ask("c", 0, *arguments, data=function.encode().ljust(32, b"\0"))
        return ctypes.c_int(result).value

    def _free(self) -> None:
        self._ask("f")

    def _ask(self, request: str, *numbers: int, data: bytes = b"") -> int:
        words = (ord(request), *numbers)
        self._process.stdin.write(struct.pack("<12q", *words, *[0] * (12 - len(words))) + data)
        self._process.stdin.flush()
        answer = self._process.stdout.read(8)
        assert len(answer) == 8, f"{EMULATOR} ended: {self._process.wait()}"
        return struct.unpack("<q", answer)[0]
