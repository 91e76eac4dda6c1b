"""What `besa doctor` finds out, as a type; `besa doctor --json` prints it under the fields' names.

Bytes, seconds and bytes a second throughout; None is what could not be found out.

>>> from besa.typed_json import to_json
>>> to_json(Kernel("avx2", "the best that this CPU has"))
{'isa': 'avx2', 'reason': 'the best that this CPU has'}
"""

from __future__ import annotations

from dataclasses import dataclass, field

from besa.machine import Gpu, Memory
from besa.typed_json import ABSENT_IF_DEFAULT


@dataclass(frozen=True, kw_only=True)
class System:
    """The machine, and how many threads torch uses of it."""

    os: str
    architecture: str
    cpu: str
    cores: int
    core_share: float | None
    threads: int
    omp_num_threads: str | None
    cache: int | None
    memory: Memory


@dataclass(frozen=True)
class NativeLibrary:
    """Where the native library was loaded from, or why it was not."""

    path: str | None
    problem: str | None


@dataclass(frozen=True)
class Kernel:
    """The instruction set of the kernels and why; `isa` is None where BESA_ISA names a wrong one.

    Attributes:
        overridden: whether it is the one that BESA_ISA names.
    """

    isa: str | None
    reason: str
    overridden: bool = field(default=False, metadata=ABSENT_IF_DEFAULT)


@dataclass(frozen=True)
class ReadBandwidth:
    """How fast torch's threads read memory."""

    bytes_per_second: float
    threads: int


@dataclass(frozen=True, kw_only=True)
class DenseAgainstSparse:
    """One token through dense matrices of bfloat16 and through packed ones: median seconds each.

    Attributes:
        dtype: of the packed values.
        speedup: the dense time over the sparse one.
        bytes: of a packed matrix.
        share_of_read_bandwidth: how fast its bytes were read, of what the memory allows.
    """

    tokens: int
    rows: int
    cols: int
    sparsity: float
    dtype: str
    threads: int
    dense_seconds: float
    sparse_seconds: float
    speedup: float
    bytes: int
    share_of_read_bandwidth: float


@dataclass(frozen=True, kw_only=True)
class GpuWay:
    """How products of some numbers of tokens go on a GPU.

    Attributes:
        first, last: the numbers of tokens; None: all from `first` on.
        path: "kernel", from the packed weight; "2:4", the same by the sparse tensor cores;
            "expansion", cuBLAS with a dense matrix that is there for as long as it takes.
        way: which kernel, with its sizes.
        seconds: of `last` tokens; None where nothing was timed.
        candidates: how many ways were considered.
    """

    first: int
    last: int | None
    path: str
    way: str
    seconds: float | None
    candidates: int


@dataclass(frozen=True, kw_only=True)
class GpuProduct:
    """Products with one kind of packed weight on a GPU, against `F.linear` in bfloat16.

    Attributes:
        kind: "50%", "2:4" or "int8 50%".
        tokens: of the two times below, median seconds.
        dtype: of the packed values.
        speedup: the dense time over the sparse one.
        bytes: of the packed matrix.
        share_of_read_bandwidth: how fast its bytes were read, of what the memory allows.
        ways: for all numbers of tokens, ascending.
    """

    kind: str
    tokens: int
    rows: int
    cols: int
    dtype: str
    dense_seconds: float
    sparse_seconds: float
    speedup: float
    bytes: int
    share_of_read_bandwidth: float
    ways: tuple[GpuWay, ...]


@dataclass(frozen=True, kw_only=True)
class GpuKernels:
    """Whether besa's kernels run on a GPU, and how fast.

    Attributes:
        problem: why they do not, so that torch multiplies; None where they do.
        unmeasured: why nothing was measured.
        same_as: the number of the GPU of the same kind that was measured.
        read_bandwidth: bytes a second of a large copy.
    """

    problem: str | None = None
    unmeasured: str | None = None
    same_as: int | None = None
    read_bandwidth: float | None = None
    products: tuple[GpuProduct, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """besa's kernels on the GPUs that torch sees.

    Attributes:
        nvrtc: the version of the library that compiles them.
        cache: the folder where they are kept, and which way is the fastest for what shape.
        gpus: as `DoctorReport.gpus` has them.
    """

    nvrtc: str | None
    cache: str | None
    gpus: tuple[GpuKernels, ...]


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """What a user or a bug report needs to know of a machine and of what is installed on it.

    Attributes:
        cpu_features: whether the processor has each of the extensions that matter.
        prefix: the directory of this Python installation.
        versions: of Python and of packages; None for one that is not installed.
        dense_against_sparse: on the CPU, by type; empty where the kernels cannot run.
        gpu_kernels: None where torch sees no GPU.
        openmp: the OpenMP libraries that this process has loaded.
        busy_cores: how many cores other programs kept busy in the meantime.
        warnings: what is not as it should be, and what to do about it, a line each.
    """

    besa: str
    system: System
    cpu_features: dict[str, bool]
    gpus: list[Gpu]
    native: NativeLibrary
    kernel: Kernel
    prefix: str
    versions: dict[str, str | None]
    read_bandwidth: ReadBandwidth
    dense_against_sparse: tuple[DenseAgainstSparse, ...]
    openmp: list[str]
    busy_cores: float
    gpu_kernels: Gpus | None = None
    warnings: list[str] = field(default_factory=list)
    record_version: int = 2
