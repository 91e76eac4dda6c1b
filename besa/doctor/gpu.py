"""What besa's kernels do on each GPU: whether they run, how fast, and which way products go.

>>> examine_gpus([]) is None     # for every GPU of `besa.machine.gpus()`
True

For one token a product takes as long as its weight is read, so all that is measured goes round more
weights than the L2 cache holds. Launches are replayed from CUDA graphs, without Python's time
between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.doctor.report import GpuKernels, GpuProduct, Gpus, GpuWay
from besa.doctor.speed import SIZE, SPARSITY
from besa.errors import BesaError
from besa.formats import Packed, pack, quantize_int8
from besa.kernels.cuda import cache, compiler, driver
from besa.kernels.cuda.expansion import Expand
from besa.kernels.cuda.linear import records_linear, tuned
from besa.kernels.cuda.records import Records, parts, to_records
from besa.kernels.cuda.tuning import BUCKETS, Table
from besa.machine import Gpu

DTYPE = torch.bfloat16

# What the copies of a matrix take together: twice the largest L2 cache that there is.
_WORKING_SET = 256 << 20
# Bytes that a copy reads for the bandwidth; as many are written.
_COPIED = 512 << 20
# Memory that has to be free: dense and packed copies, and what it takes to choose ways.
_NEEDED = 3 * _WORKING_SET + _COPIED

_ROUNDS = 15

Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of packed weight."""

    name: str
    two_four: bool = False
    int8: bool = False


KINDS = (
    Kind(f"{SPARSITY:.0%}"),
    Kind("2:4", two_four=True),
    Kind(f"int8 {SPARSITY:.0%}", int8=True),
)


def examine_gpus(gpus: Sequence[Gpu]) -> Gpus | None:
    """Finds out what besa's kernels do on the GPUs that torch sees; None where it sees none.

    GPUs of one kind are measured once. The first time on a machine that takes some seconds more,
    in which kernels are compiled.
    """
    if not gpus:
        return None
    found: list[GpuKernels] = []
    for index, gpu in enumerate(gpus):
        problem = driver.unavailable(torch.device("cuda", index))
        if problem is not None:
            found.append(GpuKernels(problem=problem))
            continue
        alike = (i for i in range(index) if gpus[i] == gpu and found[i].problem is None)
        first = next(alike, None)
        found.append(_measured(index) if first is None else GpuKernels(same_as=first))
    nvrtc, folder = compiler.nvrtc(), cache.folder()
    return Gpus(
        nvrtc=None if nvrtc is None else ".".join(map(str, nvrtc.version)),
        cache=None if folder is None else str(folder.parent),
        gpus=tuple(found),
    )


def _measured(index: int) -> GpuKernels:
    device = torch.device("cuda", index)
    try:
        free, _ = torch.cuda.mem_get_info(device)
        if free < _NEEDED:
            return GpuKernels(
                unmeasured=f"{free / 2**20:.0f} MiB of its memory are free, and to measure takes "
                f"{_NEEDED / 2**20:.0f}"
            )
        with torch.cuda.device(device):
            return measure(device)
    # torch raises RuntimeError for all that goes wrong on a GPU, a lack of memory included.
    except (RuntimeError, BesaError) as error:
        return GpuKernels(unmeasured=str(error).splitlines()[0])
    finally:
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


@torch.no_grad()
def measure(device: torch.device, size: int = SIZE) -> GpuKernels:
    """How fast a device reads, and products with each kind of weight [size, size]."""
    bandwidth = _bandwidth(device)
    return GpuKernels(
        read_bandwidth=bandwidth,
        products=tuple(_product(kind, device, size, bandwidth) for kind in KINDS),
    )


def _bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes: what any kernel may hope for."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (seconds,) = seconds_of([[lambda: target.copy_(source)]], device)
    return 2 * source.nbytes / seconds


def _product(kind: Kind, device: torch.device, size: int, bandwidth: float) -> GpuProduct:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(size, size, generator=generator, device=device)
    x = torch.randn(1, size, generator=generator, device=device).to(DTYPE)
    copies = max(1, _WORKING_SET // (2 * weight.numel()))
    # Not the pruned weight: dense kernels draw less power from zeros, and are faster by it.
    dense = [weight.to(DTYPE) for _ in range(copies)]
    packed = pruned(weight, kind, generator)
    records = to_records(*parts(packed), packed.in_features)
    table = tuned(records, packed.scale, DTYPE, int8_input=True)
    assert table is not None  # the kernels take bfloat16
    copies = max(1, _WORKING_SET // records.nbytes)
    dense_seconds, seconds = seconds_of(
        [
            [partial(F.linear, x, matrix) for matrix in dense],
            [partial(records_linear, x, _copy(records), packed.scale) for _ in range(copies)],
        ],
        device,
    )
    return GpuProduct(
        kind=kind.name,
        tokens=1,
        rows=size,
        cols=size,
        dtype=str(packed.values.dtype).removeprefix("torch."),
        dense_seconds=dense_seconds,
        sparse_seconds=seconds,
        speedup=dense_seconds / seconds,
        bytes=records.nbytes,
        share_of_read_bandwidth=records.nbytes / seconds / bandwidth,
        ways=tuple(ways_of(table, records.two_four)),
    )


def pruned(weight: Tensor, kind: Kind, generator: torch.Generator) -> Packed:
    """A random half of a weight, packed as the kind says."""
    noise = torch.rand(weight.shape, generator=generator, device=weight.device)
    if kind.two_four:
        keep = (noise.unflatten(1, (-1, 4)).argsort(2).argsort(2) < 2).flatten(1)
    else:
        keep = noise >= SPARSITY
    weight = weight * keep
    return pack(*quantize_int8(weight)) if kind.int8 else pack(weight.to(DTYPE))


def _copy(records: Records) -> Records:
    offsets = records.offsets
    return replace(
        records,
        data=records.data.clone(),
        offsets=None if offsets is None else offsets.clone(),
    )


def ways_of(table: Table, two_four: bool) -> Iterator[GpuWay]:
    """What a table says of each range of tokens."""
    first = 1
    for i, choice in enumerate(table.choices):
        last = BUCKETS[i] if i < len(BUCKETS) else None
        kernel = "2:4" if two_four else "kernel"
        yield GpuWay(
            first=first,
            last=last,
            path="expansion" if isinstance(choice.way, Expand) else kernel,
            way=str(choice.way),
            seconds=None if choice.us is None else choice.us / 1e6,
            candidates=choice.candidates,
        )
        first = (last or 0) + 1


def seconds_of(contenders: Sequence[Sequence[Product]], device: torch.device) -> list[float]:
    """Median seconds of a product of each contender, which take turns in going round theirs."""
    graphs = [_captured(products, device) for products in contenders]
    spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
    for graph in graphs:  # a first time that does not count
        graph.replay()
    for _ in range(_ROUNDS):  # all are queued before one is waited for
        for graph, times in zip(graphs, spans, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            times.append((begin, end))
    torch.cuda.synchronize(device)
    return [
        median(begin.elapsed_time(end) for begin, end in times) / 1e3 / len(products)
        for times, products in zip(spans, contenders, strict=True)
    ]


def _captured(products: Sequence[Product], device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of all of them. They run once before: a capture allows no preparations."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for product in products:
            product()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for product in products:
            product()
    return graph
