"""Loads and launches the kernels of this folder on torch's GPUs.

>>> device = torch.device("cpu")
>>> if unavailable(device) is None:
...     multiply = kernel("sparse_linear.cu", "quantize<Bf16>", device)
...     multiply.launch((16, 1, 1), 256, shared=32, arguments=problem, stream=stream(device))

A kernel takes one structure by value, `arguments` (a ctypes.Structure of the same fields). The CUDA
driver is called directly: torch's own launch of such a kernel (torch.cuda._compile_kernel) takes
three times as long (53 µs of Python's time, measured beside an H100) and has neither early starts
nor clusters.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_int, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.kernels.cuda import cache as disk
from besa.kernels.cuda import compiler, libcuda
from besa.kernels.cuda.compiler import Cubin
from besa.kernels.cuda.libcuda import CudaError, check

FOLDER = Path(__file__).parent

# Asynchronous copies to shared memory and bfloat16 in tensor cores.
LEAST_CAPABILITY = (8, 0)
# Of shared memory, what every launch may have; more has to be asked for.
USUAL_SHARED_BYTES = 48 * 1024
# Prepared launches that a kernel keeps.
CONFIGS = 256

Grid = tuple[int, int, int]

_Pointer = c_void_p * 1
_lock = threading.Lock()
_cubins: dict[tuple[str, str, str], Cubin] = {}
_kernels: dict[tuple[str, str, int, bool], Kernel] = {}


def unavailable(device: torch.device) -> str | None:
    """Why the kernels can't run on this device, in one line; None if they can.

    `BESA_CUDA=off` in the environment, read once, turns them off.
    """
    if device.type != "cuda":
        return f"{device} is not an NVIDIA GPU"
    return _reason(_index(device))


@cache
def _reason(index: int) -> str | None:
    if os.environ.get("BESA_CUDA") == "off":
        return "BESA_CUDA=off turns the GPU kernels off"
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs, and the kernels are for NVIDIA's"
    try:
        gpu = libcuda.device(index)
        if gpu.capability < LEAST_CAPABILITY:
            return (
                f"GPU {index} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and "
                "the kernels need 8.0 (Ampere)"
            )
        if (nvrtc := compiler.nvrtc()) is None:
            return f"no NVRTC (libnvrtc.so), which compiles them: {compiler.how_to_install()}"
        probe = "__global__ void probe(const int) {}"
        target = compiler.target_of(gpu.capability, nvrtc)
        cubin = disk.cached_cubin(probe, target, "probe", {}, "probe.cu", libcuda.version())
    except BesaError as error:
        return str(error)
    try:
        Kernel("probe.cu", "probe", cubin, gpu)
    except CudaError as error:
        if error.status in libcuda.CODE_IS_TOO_NEW:
            major, minor = divmod(libcuda.version() // 10, 100)
            return (
                f"the NVIDIA driver (CUDA {major}.{minor}) is too old for machine code of NVRTC "
                f"{nvrtc.version[0]}.{nvrtc.version[1]}: update the driver"
            )
        return str(error)
    return None


def kernel(source: str, name: str, device: torch.device, *, specific: bool = False) -> Kernel:
    """A kernel, compiled (or from the cache) and loaded; the second time, the same one.

    Args:
        source: a file of this folder.
        name: the kernel in it, as an expression of C++: "segment_sum<Bf16>".
        specific: it uses instructions that only this very architecture has ("sm_90a").

    Raises:
        BesaError: the kernels are `unavailable`, or this one does not compile or load.
    """
    index = _index(device)
    key = (source, name, index, specific)
    if (found := _kernels.get(key)) is not None:
        return found
    if (reason := _reason(index)) is not None:
        raise BesaError(f"no GPU kernels on cuda:{index}: {reason}")
    gpu = libcuda.device(index)
    cubin = _cubin(source, name, _target(gpu, specific))
    with _lock:
        if key not in _kernels:
            _kernels[key] = Kernel(source, name, cubin, gpu)
        return _kernels[key]


def prepare(
    jobs: Sequence[tuple[str, str]], device: torch.device, *, specific: bool = False
) -> None:
    """Compiles kernels, (source, name), side by side, where `kernel` would do one after another."""
    index = _index(device)
    if (reason := _reason(index)) is not None:
        raise BesaError(f"no GPU kernels on cuda:{index}: {reason}")
    target = _target(libcuda.device(index), specific)
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        # ctypes lets go of Python's lock, and NVRTC has none around its compiler (12.4 to 13.0).
        running = [pool.submit(_cubin, source, name, target) for source, name in set(jobs)]
        for one in running:
            one.result()


class Kernel:
    """A kernel that is loaded into a GPU.

    Attributes:
        registers: of a thread.
        local_bytes: what a thread has in memory because its registers do not suffice.
    """

    def __init__(self, source: str, name: str, cubin: Cubin, device: libcuda.Device) -> None:
        self.source, self.name, self.device = source, name, device
        driver = libcuda.library()
        self._module, self._function = c_void_p(), c_void_p()
        with libcuda.current(device), libcuda.while_capturing():
            status = driver.cuModuleLoadData(byref(self._module), cubin.image)
            check(status, f"load {self}")
            symbol = cubin.symbol.encode()
            status = driver.cuModuleGetFunction(byref(self._function), self._module, symbol)
            check(status, f"find {self} in what was compiled")
            self.registers = self._attribute(libcuda.REGISTERS)
            self.local_bytes = self._attribute(libcuda.LOCAL_BYTES)
            self._static_shared_bytes = self._attribute(libcuda.STATIC_SHARED_BYTES)
        self._large = False  # whether launches may have more than USUAL_SHARED_BYTES
        self._configs: dict[tuple[object, ...], object] = {}
        # Looked up once: a launch takes a few microseconds, and an attribute of a CDLL counts.
        self._launch, self._get_current = driver.cuLaunchKernelEx, driver.cuCtxGetCurrent

    def __str__(self) -> str:
        return f"{self.name} of {self.source} on cuda:{self.device.index}"

    def launch(
        self,
        grid: Grid,
        threads: int,
        shared: int,
        arguments: ctypes.Structure,
        stream: int,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        """Queues the kernel; it may run after this returns, as with all that a stream does.

        Args:
            grid: blocks in x, y and z.
            threads: of a block.
            shared: bytes of dynamic shared memory of a block.
            arguments: what the kernel takes. It is copied, and need not live on.
            stream: where, as `stream` gives it.
            early: the kernel may start before the one before it has ended, and waits in its code
                (programmatic dependent launch). GPUs before compute capability 9.0 ignore it.
            cluster: neighbouring blocks in x that share memory, from 9.0 on.

        Raises:
            CudaError: the driver refused, or an earlier kernel has failed meanwhile.
        """
        key = (grid, threads, shared, stream, early, cluster)
        config = self._configs.get(key)
        if config is None:
            config = self._configure(grid, threads, shared, stream, early, cluster)
            if len(self._configs) >= CONFIGS:
                self._configs = {}
            self._configs[key] = config
        pointers = _Pointer(ctypes.addressof(arguments))
        context = c_void_p()
        self._get_current(byref(context))
        if context.value == self.device.context:
            status = self._launch(config, self._function, pointers, None)
        else:  # a new thread has none, and one that works on another GPU has that one's
            with libcuda.current(self.device):
                status = self._launch(config, self._function, pointers, None)
        if status:
            check(
                status,
                f"launch {self}: {grid} blocks of {threads} threads with {shared} bytes of shared "
                "memory",
            )

    def _configure(
        self, grid: Grid, threads: int, shared: int, stream: int, early: bool, cluster: int
    ) -> object:
        """What the driver is told of such a launch. It only reads it: threads can share it."""
        if shared + self._static_shared_bytes > USUAL_SHARED_BYTES:
            self._allow_large(shared)
        attributes = []
        if early and self.device.capability >= (9, 0):
            serialization = libcuda.PROGRAMMATIC_STREAM_SERIALIZATION
            attributes.append(libcuda.LaunchAttribute(serialization, 0, (1,)))
        if cluster > 1:
            size = (cluster, 1, 1)
            attributes.append(libcuda.LaunchAttribute(libcuda.CLUSTER_DIMENSION, 0, size))
        array = (libcuda.LaunchAttribute * len(attributes))(*attributes)
        config = libcuda.LaunchConfig(grid, (threads, 1, 1), shared, stream, array, len(attributes))
        return byref(config)  # holds it

    def _allow_large(self, shared: int) -> None:
        most = self.device.shared_bytes - self._static_shared_bytes
        if shared > most:
            raise BesaError(
                f"{self} needs {shared} bytes of shared memory, and the GPU gives a block {most}"
            )
        if not self._large:
            with libcuda.current(self.device):
                status = libcuda.library().cuFuncSetAttribute(
                    self._function, libcuda.MAX_DYNAMIC_SHARED_BYTES, most
                )
            check(status, f"give {self} {most} bytes of shared memory")
            self._large = True

    def _attribute(self, which: int) -> int:
        value = c_int()
        status = libcuda.library().cuFuncGetAttribute(byref(value), which, self._function)
        check(status, f"read attribute {which} of {self}")
        return value.value


def stream(device: torch.device) -> int:
    """torch's current stream on a GPU, for `Kernel.launch`."""
    return torch.cuda.current_stream(device).cuda_stream


def at(tensor: Tensor | None) -> int | None:
    """Where a tensor is, for a kernel's arguments."""
    return None if tensor is None else tensor.data_ptr()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _target(gpu: libcuda.Device, specific: bool) -> str:
    nvrtc = compiler.nvrtc()
    assert nvrtc is not None  # `_reason` has seen it
    return compiler.target_of(gpu.capability, nvrtc, specific)


def _cubin(source: str, name: str, target: str) -> Cubin:
    """From memory (what `prepare` made), from the disk, or compiled."""
    key = (source, name, target)
    if (found := _cubins.get(key)) is None:
        text = (FOLDER / source).read_text(encoding="utf-8")
        found = disk.cached_cubin(text, target, name, headers(), source, libcuda.version())
        _cubins[key] = found
    return found


@cache
def headers() -> dict[str, str]:
    """The text of all headers of this folder, by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.cuh"))}
