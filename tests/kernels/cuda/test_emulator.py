"""That the emulator sees what a kernel does wrong, and what stands in for the driver."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p

import pytest
import torch

from besa.kernels.cuda import driver
from tests.kernels.cuda.emulation import Emulated, KernelError, driver_on_cpu, needs_compiler
from tests.kernels.cuda.primitives import POISON, SOURCE, Arrays, primitives, random_words, run

pytestmark = needs_compiler


@pytest.fixture
def emulated() -> Emulated:
    return primitives()


def test_copies_that_no_group_has_never_arrive(emulated):
    values = random_words(64, 3, 4)
    out = run(emulated, "copies", values, 9 * 64, mode=1, threads=64, shared=48 * 64)
    assert torch.equal(out.view(64, 3, 3)[:, 2, :2], values[:, :2, 1])
    assert bool((out.view(64, 3, 3)[:, :, 2] == POISON).all())


def test_a_missing_barrier_shows(emulated):
    blocks = 8
    out = run(
        emulated, "neighbours", random_words(1), 256 * blocks, n=1, mode=1, blocks=blocks,
        threads=256, shared=1024,
    )  # fmt: skip
    assert bool((out.view(blocks, 256) == POISON).any(1).all())  # shared memory was poisoned


MISTAKES = [
    (0, "62 threads, thread 0 the first, wait at __shfl_xor_sync .*; 2 threads, .* have ended"),
    (1, r"waits at \w+ \(primitives.cu:\d+\) .*, and lane \d+ at \w+ \(primitives.cu:\d+\)"),
    (2, "32 threads, thread 0 the first, wait at __syncthreads .* have ended"),
    (3, r"__syncthreads .*, and lane \d+ of its warp at another"),
    (4, r"__shfl_sync with mask ffff0000 reads lane 0"),
    (5, r"an access to byte \d+ of 256 bytes of shared memory"),
    (6, "a misaligned access"),
    (7, "copy16 from .* to byte 8: not multiples of 16"),
    (8, "copy16 to byte 256 of 256 bytes of shared memory"),
    (9, "an access to address .*, where nothing is"),
    (10, "mask 00000001, which leaves the thread out"),
    (11, "a shift too far"),
    (12, "row 0 keeps numbers 1 and 1 of columns 0 to 3, not in order"),
]


@pytest.mark.parametrize(("mode", "message"), MISTAKES)
def test_mistakes_are_named(emulated, mode, message):
    n = 34  # past the end of the input, misaligned as bytes, too far as a shift
    with pytest.raises(KernelError, match=message):
        run(emulated, "mistakes", random_words(32), 64, n=n, mode=mode, threads=64, shared=256)
    # And the next launch is as good as any.
    test_copies_that_no_group_has_never_arrive(emulated)


@pytest.mark.parametrize(
    ("grid", "threads", "shared", "message"),
    [
        ((1, 1, 1), 2048, 0, "threads: 2048, not 1024"),
        ((1, 1, 1), 32, 300_000, "bytes of shared memory: 300000"),
        ((0, 1, 1), 32, 0, "blocks along x: 0"),
        ((1, 70_000, 1), 32, 0, "blocks along y: 70000"),
    ],
)
def test_launches_that_a_gpu_would_refuse(emulated, grid, threads, shared, message):
    with pytest.raises(KernelError, match=message):
        emulated.launch("words", grid, threads, shared, Arrays())


def test_arguments_of_another_size(emulated):
    class Short(ctypes.Structure):
        _fields_ = [("input", c_void_p)]

    with pytest.raises(KernelError, match="bytes of the argument: 8, not 24"):
        emulated.launch("words", (1, 1, 1), 32, 0, Short())


def test_what_does_not_compile():
    with pytest.raises(KernelError, match="does not compile"):
        Emulated(SOURCE, ["nothing_of_that_name"])


def test_the_driver_on_a_cpu():
    cpu = torch.device("cpu")
    assert driver.unavailable(cpu) is not None
    values, out = random_words(64), torch.zeros(12 * 64, dtype=torch.int32)
    with driver_on_cpu():
        assert driver.unavailable(cpu) is None
        kernel = driver.kernel(str(SOURCE), "warps", cpu)
        arguments = Arrays(values.data_ptr(), out.data_ptr(), 0, 0)
        stream = torch.cuda.current_stream(cpu).cuda_stream
        kernel.launch(
            (1, 1, 1), threads=64, shared=0, arguments=arguments, stream=stream, early=True
        )
    assert torch.equal(out.view(2, 32, 12)[0, :, 0], values[:32].long().cumsum(0).int())
    assert driver.unavailable(cpu) is not None
