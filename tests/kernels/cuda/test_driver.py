"""What the CUDA driver is asked to do, seen by a driver without a GPU (fake_libcuda.cpp)."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import threading
from collections.abc import Callable
from ctypes import c_int, c_void_p
from pathlib import Path
from shutil import which

import pytest
import torch

from besa.errors import BesaError, BesaWarning
from besa.kernels.cuda import cache, compiler, driver, libcuda
from besa.kernels.cuda.compiler import Cubin, Nvrtc

GPU, OTHER_GPU = torch.device("cuda:0"), torch.device("cuda:1")
CONTEXT, OTHER_CONTEXT = 1000, 1001
SOURCE = """
#include "shape.cuh"
template <int N> __global__ void fill(const Arguments a) { a.x[threadIdx.x] = N; }
__global__ void plain(const Arguments a) {}
"""
HEADER = "struct Arguments { float* x; int n; float f; };"

COMPILER = next((name for name in ("c++", "g++", "clang++") if which(name)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


class Arguments(ctypes.Structure):
    _fields_ = (("x", c_void_p), ("n", c_int), ("f", ctypes.c_float))


ARGUMENTS = Arguments(0x123456789A, 7, 0.5)


class Fake:
    """The driver's variables, by name."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __getitem__(self, name: str) -> int:
        return c_int.in_dll(self.library, name).value

    def __setitem__(self, name: str, value: int) -> None:
        c_int.in_dll(self.library, name).value = value

    def fail(self, function: str, status: int) -> None:
        (ctypes.c_char * 64).in_dll(self.library, "failing").value = function.encode()
        self["failing_status"] = status

    def set_capability(self, major: int, minor: int) -> None:
        (c_int * 2).in_dll(self.library, "capability")[:] = (major, minor)

    @property
    def config(self) -> libcuda.LaunchConfig:
        return libcuda.LaunchConfig.in_dll(self.library, "launched")

    @property
    def attributes(self) -> list[tuple[int, list[int]]]:
        array = (libcuda.LaunchAttribute * 4).in_dll(self.library, "launched_attributes")
        return [(a.id, a.value[:3]) for a in array[: self.config.attribute_count]]

    @property
    def context(self) -> int | None:
        """Of the last launch."""
        return c_void_p.in_dll(self.library, "launched_context").value

    def current(self) -> int | None:
        """This thread's context."""
        context = c_void_p()
        self.library.cuCtxGetCurrent(ctypes.byref(context))
        return context.value


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fake") / "libcuda.so"
    source = Path(__file__).with_name("fake_libcuda.cpp")
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", source, "-o", path]
    subprocess.run(command, check=True)
    return path


def forget() -> None:
    """What the modules keep between calls."""
    for cached in (
        libcuda.open_library,
        libcuda.device,
        libcuda.version,
        driver._reason,
        driver.headers,
        cache._say,
    ):
        cached.cache_clear()
    driver._kernels.clear()
    driver._cubins.clear()


@pytest.fixture
def fake(library, tmp_path, monkeypatch):
    """A machine with two GPUs of compute capability 9.0, and a folder of kernels."""
    # A copy for each test: variables of one's own.
    own = tmp_path / "libcuda.so"
    own.write_bytes(library.read_bytes())
    loaded = ctypes.CDLL(str(own))
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "fill.cu").write_text(SOURCE)
    (folder / "shape.cuh").write_text(HEADER)
    monkeypatch.setattr(driver, "FOLDER", folder)
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BESA_CUDA", raising=False)
    opened = ctypes.CDLL

    def open_fake(name: str, **options: int) -> ctypes.CDLL:
        return loaded if name == "libcuda.so.1" else opened(name, **options)

    monkeypatch.setattr(ctypes, "CDLL", open_fake)
    forget()
    found = Fake(loaded)
    found["argument_bytes"] = ctypes.sizeof(Arguments)
    yield found
    monkeypatch.undo()
    forget()


def launch(kernel: driver.Kernel, **changed: object) -> None:
    usual = {"grid": (5, 6, 7), "threads": 256, "shared": 1024, "stream": 0x7700}
    kernel.launch(**(usual | {"arguments": ARGUMENTS} | changed))  # type: ignore[arg-type]


def test_sizes_of_structures():
    assert ctypes.sizeof(libcuda.LaunchAttribute) == 72
    assert ctypes.sizeof(libcuda.LaunchConfig) == 56


def test_launch(fake):
    assert driver.unavailable(GPU) is None
    kernel = driver.kernel("fill.cu", "fill<3>", GPU)
    launch(kernel)
    config = fake.config
    assert list(config.grid) == [5, 6, 7]
    assert list(config.block) == [256, 1, 1]
    assert (config.shared_bytes, config.stream) == (1024, 0x7700)
    assert fake.attributes == []
    size = ctypes.sizeof(Arguments)
    written = (ctypes.c_ubyte * size).in_dll(fake.library, "launched_arguments")
    assert bytes(written) == bytes(ARGUMENTS)
    assert fake["launches"] == 1
    assert fake["max_dynamic_shared"] == 0
    assert (kernel.registers, kernel.local_bytes) == (40, 16)
    assert str(kernel) == "fill<3> of fill.cu on cuda:0"


def test_default_stream(fake):
    launch(driver.kernel("fill.cu", "fill<3>", GPU), stream=0)
    assert fake.config.stream is None


def test_attributes(fake):
    kernel = driver.kernel("fill.cu", "fill<3>", GPU)
    early, cluster = (6, [1, 0, 0]), (4, [4, 1, 1])
    launch(kernel, early=True)
    assert fake.attributes == [early]
    launch(kernel, cluster=4)
    assert fake.attributes == [cluster]
    launch(kernel, early=True, cluster=4)
    assert fake.attributes == [early, cluster]
    launch(kernel)
    assert fake.attributes == []


def test_early_is_ignored_before_hopper(fake):
    fake.set_capability(8, 9)
    launch(driver.kernel("fill.cu", "fill<3>", GPU), early=True)
    assert fake.attributes == []


def test_prepared_launches_stay_right_and_few(fake):
    kernel = driver.kernel("fill.cu", "fill<3>", GPU)
    for n in [*range(1, 3 * driver.CONFIGS), 1, 2, 1]:
        launch(kernel, grid=(n, 1, 1), early=n % 2 == 0)
        gc.collect(0)
        assert fake.config.grid[0] == n
        assert len(fake.attributes) == (n % 2 == 0)
    assert len(kernel._configs) <= driver.CONFIGS


def test_large_shared_memory_is_asked_for_once(fake):
    fake["static_shared"] = 1000
    kernel = driver.kernel("fill.cu", "fill<3>", GPU)
    launch(kernel, shared=48 * 1024 - 1000)
    assert fake["max_dynamic_shared"] == 0
    launch(kernel, shared=48 * 1024 - 999)
    assert fake["max_dynamic_shared"] == 232448 - 1000
    fake["max_dynamic_shared"] = 0
    launch(kernel, shared=232448 - 1000)
    assert fake["max_dynamic_shared"] == 0
    with pytest.raises(BesaError, match=r"needs 231449 bytes of shared memory.* a block 231448"):
        launch(kernel, shared=232448 - 999)


def in_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_every_thread_and_gpu_has_the_right_context(fake):
    kernels = [driver.kernel("fill.cu", "fill<3>", device) for device in (GPU, OTHER_GPU)]
    assert kernels[0] is not kernels[1]

    def work() -> None:
        for kernel, context in zip(kernels, (CONTEXT, OTHER_CONTEXT), strict=True):
            launch(kernel)
            assert fake.context == context
        assert fake.current() is None  # as it was

    work()
    in_thread(work)

    def with_context() -> None:
        fake.library.cuCtxPushCurrent_v2(c_void_p(CONTEXT))
        switches = fake["context_switches"]
        launch(kernels[0])
        assert (fake.context, fake["context_switches"]) == (CONTEXT, switches)
        launch(kernels[1])
        assert (fake.context, fake.current()) == (OTHER_CONTEXT, CONTEXT)

    in_thread(with_context)


def test_threads_at_once_load_once(fake):
    barrier = threading.Barrier(8)
    found: list[driver.Kernel] = []

    def work() -> None:
        barrier.wait()
        found.append(driver.kernel("fill.cu", "fill<3>", GPU))
        for n in range(200):
            launch(found[0], grid=(n, 1, 1))

    driver.unavailable(GPU)
    loads = fake["loads"]
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert fake["loads"] == loads + 1
    assert fake["launches"] == 1600


def test_same_kernel_is_loaded_once(fake):
    kernel = driver.kernel("fill.cu", "fill<3>", GPU)
    loads = fake["loads"]
    assert driver.kernel("fill.cu", "fill<3>", GPU) is kernel
    assert fake["loads"] == loads
    assert driver.kernel("fill.cu", "fill<4>", GPU) is not kernel
    assert driver.kernel("fill.cu", "plain", GPU) is not kernel
    assert fake["load_capture_mode"] == libcuda.CAPTURE_RELAXED


def test_specific_kernel(fake):
    fake.set_capability(9, 0)
    driver.kernel("fill.cu", "fill<3>", GPU, specific=True)
    assert ("fill.cu", "fill<3>", "sm_90a") in driver._cubins


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    compile_cubin = compiler.compile_cubin

    def counted(source: str, target: str, name: str, headers: dict[str, str], file: str) -> Cubin:
        names.append(name)
        return compile_cubin(source, target, name, headers, file)

    monkeypatch.setattr(compiler, "compile_cubin", counted)
    return names


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("writable", [True, False])
def test_prepare_compiles_what_is_not_there(monkeypatch, tmp_path, writable):
    if not writable:
        (tmp_path / "file").touch()
        monkeypatch.setenv("BESA_CACHE", str(tmp_path / "file"))
        with pytest.warns(BesaWarning, match="can't keep compiled kernels"):
            assert driver.unavailable(GPU) is None
    names = [f"fill<{n}>" for n in range(6)]
    driver.kernel("fill.cu", names[0], GPU)
    compiled = count_compilations(monkeypatch)
    driver.prepare([("fill.cu", name) for name in names + names], GPU)
    assert sorted(compiled) == names[1:]
    for name in names:
        launch(driver.kernel("fill.cu", name, GPU))
    assert len(compiled) == 5


@pytest.mark.usefixtures("fake")
def test_another_process_finds_them_on_disk(monkeypatch):
    driver.prepare([("fill.cu", "fill<3>")], GPU)
    forget()
    compiled = count_compilations(monkeypatch)
    driver.kernel("fill.cu", "fill<3>", GPU)
    assert compiled == []


@pytest.mark.usefixtures("fake")
def test_prepare_says_what_is_wrong():
    with pytest.raises(compiler.CompileError, match="missing"):
        driver.prepare([("fill.cu", "fill<3>"), ("fill.cu", "missing<3>")], GPU)


def test_failing_launch_says_what_was_launched(fake):
    kernel = driver.kernel("fill.cu", "fill<3>", GPU)
    fake.fail("cuLaunchKernelEx", 700)
    with pytest.raises(libcuda.CudaError) as error:
        launch(kernel)
    assert error.value.status == 700
    assert str(error.value) == (
        "CUDA_ERROR_ILLEGAL_ADDRESS: could not launch fill<3> of fill.cu on cuda:0: (5, 6, 7) "
        "blocks of 256 threads with 1024 bytes of shared memory"
    )
    fake.fail("cuLaunchKernelEx", 12345)  # one that has no name
    with pytest.raises(libcuda.CudaError, match=r"^CUDA error 12345: "):
        launch(kernel)
    fake.fail("", 0)
    launch(kernel)


def test_failing_load(fake):
    assert driver.unavailable(GPU) is None
    fake.fail("cuModuleGetFunction", 1)
    with pytest.raises(
        libcuda.CudaError, match=r"CUDA_ERROR_INVALID_VALUE: could not find fill<3>"
    ):
        driver.kernel("fill.cu", "fill<3>", GPU)
    fake.fail("", 0)
    launch(driver.kernel("fill.cu", "fill<3>", GPU))


def test_cpu_is_not_for_them():
    assert driver.unavailable(torch.device("cpu")) == "cpu is not an NVIDIA GPU"


@pytest.mark.usefixtures("fake")
def test_turned_off(monkeypatch):
    monkeypatch.setenv("BESA_CUDA", "off")
    reason = "BESA_CUDA=off turns the GPU kernels off"
    assert driver.unavailable(GPU) == reason
    with pytest.raises(BesaError, match=reason):
        driver.kernel("fill.cu", "fill<3>", GPU)
    with pytest.raises(BesaError, match=reason):
        driver.prepare([("fill.cu", "fill<3>")], GPU)


@pytest.mark.usefixtures("fake")
def test_amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert "AMD" in str(driver.unavailable(GPU))


@pytest.mark.usefixtures("fake")
def test_no_driver(monkeypatch):
    def none(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert driver.unavailable(GPU) == "no NVIDIA driver is installed (libcuda.so.1)"


def test_driver_that_does_not_start(fake):
    fake.fail("cuInit", 100)
    reason = "the NVIDIA driver does not start: CUDA_ERROR_NO_DEVICE"
    assert driver.unavailable(GPU) == reason
    fake.fail("", 0)
    assert driver.unavailable(GPU) == reason  # asked once


@pytest.mark.usefixtures("fake")
def test_no_such_gpu():
    reason = driver.unavailable(torch.device("cuda:2"))
    assert reason == "CUDA_ERROR_INVALID_DEVICE: could not find GPU 2"


def test_old_gpu(fake):
    fake.set_capability(7, 5)
    reason = "GPU 0 has compute capability 7.5, and the kernels need 8.0 (Ampere)"
    assert driver.unavailable(GPU) == reason


@pytest.mark.usefixtures("fake")
def test_no_nvrtc(monkeypatch):
    monkeypatch.setattr(compiler, "nvrtc", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert driver.unavailable(GPU) == (
        "no NVRTC (libnvrtc.so), which compiles them: pip install 'nvidia-cuda-nvrtc-cu12==12.8.*'"
    )


def test_gpu_that_nvrtc_does_not_know(fake, monkeypatch):
    old = Nvrtc(ctypes.CDLL(None), (12, 4), (80, 86, 89, 90))
    monkeypatch.setattr(compiler, "nvrtc", lambda: old)
    fake.set_capability(12, 0)
    assert driver.unavailable(GPU) == (
        "NVRTC 12.4 can't compile for compute capability 12.0: install a torch with a newer CUDA"
    )


@pytest.mark.parametrize("status", [200, 209, 222])
def test_old_driver(fake, status):
    fake.fail("cuModuleLoadData", status)
    reason = driver.unavailable(GPU)
    assert reason is not None
    assert reason.startswith("the NVIDIA driver (CUDA 12.4) is too old for machine code of NVRTC ")
    assert reason.endswith(": update the driver")


def test_other_failure_of_the_probe(fake):
    fake.fail("cuModuleLoadData", 1)
    reason = driver.unavailable(GPU)
    assert reason == "CUDA_ERROR_INVALID_VALUE: could not load probe of probe.cu on cuda:0"


@pytest.mark.usefixtures("fake")
def test_device_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert driver.kernel("fill.cu", "fill<3>", torch.device("cuda")).device.index == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path, monkeypatch):
    """With the true driver: what it computes, from any thread, and in a CUDA graph."""
    (tmp_path / "fill.cu").write_text(SOURCE)
    (tmp_path / "shape.cuh").write_text(HEADER)
    monkeypatch.setattr(driver, "FOLDER", tmp_path)
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    forget()
    try:
        assert driver.unavailable(GPU) is None
        x = torch.zeros(64, device=GPU)
        arguments = Arguments(x.data_ptr(), 64, 0)

        def fill(n: int, **options: int) -> None:
            kernel = driver.kernel("fill.cu", f"fill<{n}>", GPU)
            stream = torch.cuda.current_stream(GPU).cuda_stream
            usual = {"shared": 0, "arguments": arguments, "stream": stream}
            kernel.launch(**({"grid": (1, 1, 1), "threads": 64} | usual | options))

        fill(1)
        assert x.tolist() == [1] * 64
        fill(2, early=True)
        assert x.tolist() == [2] * 64
        fill(3, shared=64 * 1024)
        assert x.tolist() == [3] * 64
        if torch.cuda.get_device_capability(GPU) >= (9, 0):
            fill(4, grid=(4, 1, 1), cluster=2, early=True)
            assert x.tolist() == [4] * 64
        in_thread(lambda: fill(5))
        torch.cuda.synchronize()
        assert x.tolist() == [5] * 64

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fill(6, early=True)  # loaded while the graph is recorded
        assert x.tolist() == [5] * 64
        graph.replay()
        assert x.tolist() == [6] * 64
        with pytest.raises(libcuda.CudaError, match="CUDA_ERROR_INVALID_VALUE"):
            fill(1, threads=5000)
    finally:
        forget()
