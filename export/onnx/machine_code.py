"""The machine code of a graph for NVIDIA GPUs: kernels compiled here, in a table that C++ reads.

>>> from besa.formats import pack
>>> from besa.kernels.cuda.records import parts, to_records
>>> weight = torch.ones(16, 64, dtype=torch.float16)
>>> wanted = instances(to_records(*parts(pack(weight)), cols=64), None, torch.float16)
>>> sorted(instance.tokens for instance in wanted)
[8, 16, 32, 64]

For each of `ARCHITECTURES` that NVRTC knows it has the kernel `multiply` of sparse_linear.cu in
besa/kernels/cuda, for up to 8, 16, 32 and 64 tokens; longer inputs are cut into pieces of 64. In
torch each shape of weight has the sizes that are measured to be best for it. Here one serves all
shapes: for one token it was at most 19% slower than the best (50% and 70% zeros, on an H100,
outside ONNX Runtime). besa/kernels/cuda_code.h says how the table is laid out.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass

import torch

from besa.errors import BesaError
from besa.kernels.cuda import cache, compiler, driver
from besa.kernels.cuda.call import Shape
from besa.kernels.cuda.compiler import Cubin
from besa.kernels.cuda.multiply import Multiply, group_of, pieces_of
from besa.kernels.cuda.records import Records

# Code for one of these also runs on later GPUs of the same generation.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

# Warps of a thread block for up to so many tokens, and thread blocks whose registers shall fit a
# multiprocessor.
SIZES = {8: (16, 2), 16: (12, 2), 32: (8, 2), 64: (8, 1)}

# Stages, and one fewer where they take more shared memory than a block has on the least GPU.
_STAGES, _SHARED = 3, 99 * 1024

_SOURCE = "sparse_linear.cu"
_MAGIC, _VERSION = b"BESACODE", 1
_HEADER = struct.Struct("<8s2I")
_ENTRY = struct.Struct("<10I3Q")
_TYPES = (torch.bfloat16, torch.float16)  # by their numbers in the table
_KINDS = {"VALUES": 0, "TWO_FOUR": 1, "INT8_FLOAT": 4}


@dataclass(frozen=True)
class Instance:
    """The kernel with template arguments: see sparse_linear.cu.

    Attributes:
        dtype: of activations and results, float16 or bfloat16.
        kind: "VALUES", "TWO_FOUR" or "INT8_FLOAT".
        group: columns that share a scale as the kernel knows them: 0, 32 or 64.
        tokens: at most.
        pieces: of 512 bytes that a record has, at most.
        warps: of a thread block, which has 16 rows.
        resident: thread blocks whose registers shall fit a multiprocessor.
        stages: steps of a warp that are under way or in use.
    """

    dtype: torch.dtype
    kind: str
    group: int
    tokens: int
    pieces: int
    warps: int
    resident: int
    stages: int

    @property
    def name(self) -> str:
        """As an expression of C++."""
        values = torch.int8 if self.kind == "INT8_FLOAT" else self.dtype
        two_four, capacity = self.kind == "TWO_FOUR", 512 * self.pieces
        shape = Shape(16, 64, values, self.dtype, two_four, capacity, self.group, int8_input=False)
        return Multiply(1, self.warps, self.stages, self.resident).name(shape, self.tokens)

    @property
    def _order(self) -> tuple[object, ...]:
        """The operator takes the first that fits."""
        return (str(self.dtype), self.kind, self.group, self.tokens, self.pieces, -self.stages)


@dataclass(frozen=True)
class Entry:
    """An instance for one architecture, as the table has it; `at` and `bytes` are of the file."""

    architecture: int
    dtype: int
    kind: int
    group: int
    tokens: int
    pieces: int
    blocks: int
    warps: int
    stages: int
    name_bytes: int
    name_at: int
    image_at: int
    image_bytes: int


def instances(records: Records, group_size: int | None, dtype: torch.dtype) -> list[Instance]:
    """What the operator needs for a weight, for any number of tokens.

    Args:
        group_size: columns that share a scale of int8 values; None if a row does.
        dtype: of the activations.
    """
    shape = Shape.of(records, group_size or 0, dtype, int8_input=False)
    group, pieces = group_of(shape), pieces_of(shape)
    found = []
    for tokens, (warps, resident) in SIZES.items():
        way = Multiply(1, warps, _STAGES, resident)
        stages = _STAGES if way.shared(shape, tokens) <= _SHARED else _STAGES - 1
        kind = way.kind(shape, tokens)
        found.append(Instance(dtype, kind, group, tokens, pieces, warps, resident, stages))
    return found


def need_nvrtc() -> None:
    """Nothing, if there is a compiler.

    Raises:
        BesaError: there is none; with what to install.
    """
    if compiler.nvrtc() is None:
        raise BesaError(
            "--device cuda needs NVRTC (libnvrtc.so), which compiles its kernels: "
            f"{compiler.how_to_install()}"
        )


def machine_code(wanted: Iterable[Instance]) -> bytes:
    """The table with all instances for all architectures that NVRTC knows.

    Raises:
        BesaError: there is no compiler, or it fails.
    """
    need_nvrtc()
    nvrtc = compiler.nvrtc()
    assert nvrtc is not None
    ordered = sorted(set(wanted), key=lambda one: one._order)
    known = [one for one in ARCHITECTURES if one in nvrtc.architectures]
    if not known:
        raise BesaError(f"this NVRTC knows none of sm_{', sm_'.join(map(str, ARCHITECTURES))}")
    jobs = [(architecture, one) for architecture in known for one in ordered]
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        cubins = list(pool.map(_compile, jobs))
    return _table([(*job, cubin) for job, cubin in zip(jobs, cubins, strict=True)])


def _compile(job: tuple[int, Instance]) -> Cubin:
    architecture, one = job
    text = (driver.FOLDER / _SOURCE).read_text(encoding="utf-8")
    target = f"sm_{architecture}"
    return cache.cached_cubin(text, target, one.name, driver.headers(), _SOURCE, driver=0)


def _table(compiled: list[tuple[int, Instance, Cubin]]) -> bytes:
    entries, body = [], bytearray()
    start = _HEADER.size + len(compiled) * _ENTRY.size

    def place(data: bytes) -> int:
        body.extend(bytes(-(start + len(body)) % 16))
        body.extend(data)
        return start + len(body) - len(data)

    for architecture, one, cubin in compiled:
        name = cubin.symbol.encode()
        entries.append(
            Entry(
                architecture=architecture,
                dtype=_TYPES.index(one.dtype),
                kind=_KINDS[one.kind],
                group=one.group,
                tokens=one.tokens,
                pieces=one.pieces,
                blocks=1,
                warps=one.warps,
                stages=one.stages,
                name_bytes=len(name),
                name_at=place(name),
                image_at=place(cubin.image),
                image_bytes=len(cubin.image),
            )
        )
    header = _HEADER.pack(_MAGIC, _VERSION, len(entries))
    return header + b"".join(_ENTRY.pack(*astuple(entry)) for entry in entries) + bytes(body)


def read_table(code: bytes) -> list[Entry]:
    """The entries of what `machine_code` made."""
    magic, version, count = _HEADER.unpack_from(code)
    if (magic, version) != (_MAGIC, _VERSION):
        raise BesaError("no machine code of besa's, or of another version")
    rest = code[_HEADER.size : _HEADER.size + count * _ENTRY.size]
    return [Entry(*numbers) for numbers in _ENTRY.iter_unpack(rest)]
