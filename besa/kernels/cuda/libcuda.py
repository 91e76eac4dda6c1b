"""What is used of the CUDA driver's C interface, through ctypes.

Every call is `check(library().cuModuleLoadData(byref(module), image), "load the kernel")`, inside
of `with current(device(0))`.

https://docs.nvidia.com/cuda/cuda-driver-api has the functions, numbers and structures, which keep
their meaning from version to version (and get another suffix, _v2, where they do not).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache

from besa.errors import BesaError

# CUdevice_attribute
CAPABILITY_MAJOR, CAPABILITY_MINOR, SHARED_BYTES_OPT_IN = 75, 76, 97
# CUfunction_attribute
STATIC_SHARED_BYTES, LOCAL_BYTES, REGISTERS, MAX_DYNAMIC_SHARED_BYTES = 1, 3, 4, 8
# CUlaunchAttributeID
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
# CUstreamCaptureMode
CAPTURE_RELAXED = 2
# CUresult of loading machine code that the driver is too old for: CUDA_ERROR_INVALID_IMAGE,
# CUDA_ERROR_NO_BINARY_FOR_GPU and CUDA_ERROR_UNSUPPORTED_PTX_VERSION.
CODE_IS_TOO_NEW = (200, 209, 222)


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; `value` is a union of 64 bytes."""

    _fields_ = (("id", c_int), ("padding", c_int), ("value", c_uint * 16))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", c_uint),
    )


class CudaError(BesaError):
    """The driver refused something; `status` is its CUresult."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@cache
def open_library() -> ctypes.CDLL | str:
    """The driver's library, initialized, or the reason why there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed (libcuda.so.1)"
    if not hasattr(library, "cuLaunchKernelEx"):
        return "the NVIDIA driver is older than CUDA 11.8: update the driver"
    if status := library.cuInit(0):
        return f"the NVIDIA driver does not start: {error_name(library, status)}"
    return library


def library() -> ctypes.CDLL:
    """The driver's library.

    Raises:
        BesaError: there is none.
    """
    found = open_library()
    if isinstance(found, str):
        raise BesaError(found)
    return found


def error_name(library: ctypes.CDLL, status: int) -> str:
    """Such as CUDA_ERROR_LAUNCH_FAILED."""
    name = c_char_p()
    library.cuGetErrorName(status, byref(name))
    return f"CUDA error {status}" if name.value is None else name.value.decode()


def check(status: int, what: str) -> None:
    """Raises CudaError if `status`, what one of the driver's functions returned, is an error."""
    if status:
        raise CudaError(f"{error_name(library(), status)}: could not {what}", status)


@cache
def version() -> int:
    """Of CUDA, the newest that the driver supports: 13000 is 13.0."""
    number = c_int()
    check(library().cuDriverGetVersion(byref(number)), "read the driver's version")
    return number.value


@dataclass(frozen=True)
class Device:
    """A GPU and its primary context, the one that torch uses.

    Attributes:
        capability: the compute capability, such as (9, 0).
        shared_bytes: what a block can have of shared memory, static and dynamic.
    """

    index: int
    capability: tuple[int, int]
    shared_bytes: int
    context: int


@cache
def device(index: int) -> Device:
    """The GPU that torch calls cuda:`index`: both number those that CUDA_VISIBLE_DEVICES leaves."""
    driver, number, context = library(), c_int(), c_void_p()
    check(driver.cuDeviceGet(byref(number), index), f"find GPU {index}")

    def attribute(which: int) -> int:
        value = c_int()
        check(driver.cuDeviceGetAttribute(byref(value), which, number), f"read attribute {which}")
        return value.value

    capability = attribute(CAPABILITY_MAJOR), attribute(CAPABILITY_MINOR)
    shared_bytes = attribute(SHARED_BYTES_OPT_IN)
    check(driver.cuDevicePrimaryCtxRetain(byref(context), number), f"use GPU {index}")
    assert context.value is not None
    return Device(index, capability, shared_bytes, context.value)


@contextmanager
def current(device: Device) -> Iterator[None]:
    """Makes the device's context this thread's, which may have another or, if new, none."""
    driver = library()
    check(driver.cuCtxPushCurrent_v2(c_void_p(device.context)), f"use GPU {device.index}")
    try:
        yield
    finally:
        driver.cuCtxPopCurrent_v2(byref(c_void_p()))


@contextmanager
def while_capturing() -> Iterator[None]:
    """Allows what is done once, such as loading code, while a CUDA graph is recorded."""
    driver, mode = library(), c_int(CAPTURE_RELAXED)
    check(driver.cuThreadExchangeStreamCaptureMode(byref(mode)), "change the capture mode")
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(byref(mode))
