"""Show what besa finds on this machine, and how fast that is; or check a model's files.

CPU features and the kernels chosen for them, threads, memory, GPUs, versions, the speed at which
memory is read, and a dense product against a sparse one; on each kind of GPU also which way
products of how many tokens go. Takes a few seconds, and more on a GPU the first time, when kernels
are compiled. Paste what it prints into a bug report.

With a MODEL it reads that instead, all of it: whether files, headers and packed weights fit each
other, and every file is what besa wrote, by the digests of besa.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from besa.typed_json import to_json

if TYPE_CHECKING:
    from rich.console import Console

    from besa.doctor.report import DoctorReport, GpuKernels, GpuProduct, Gpus, GpuWay, System
    from besa.machine import Gpu, Memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a directory, to be checked")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(args: argparse.Namespace) -> int:
    if args.model is not None:
        from besa.cli.checked_model import check_model

        found = check_model(args.model)
        print(json.dumps(to_json(found)) if args.json else found)
        return 0
    from rich.console import Console

    words = "measuring, a few seconds (on a GPU more, the first time)"
    with Console(stderr=True).status(words, refresh_per_second=4):
        from besa.doctor.examine import examine

        report = examine()
    if args.json:
        print(json.dumps(to_json(report)))
        return 0
    # A pipe has no width: do not fold its lines, unless someone wishes it.
    free = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    _print(report, Console(width=10_000 if free else None, highlight=False))
    return 0


def _print(report: DoctorReport, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(report):
        table.add_row(name, Text(value))
    with console.capture() as shown:
        console.print(table)
        for warning in report.warnings:
            console.print(Text.assemble("\n", ("warning: ", "yellow"), warning))
    # A table fills its last column with spaces.
    print("\n".join(line.rstrip() for line in shown.get().splitlines()))


def _lines(report: DoctorReport) -> Iterator[tuple[str, str]]:
    """Each thing and what there is to say about it."""
    prefix = report.prefix + "/"  # long, and the same for most paths
    yield "besa", f"{report.besa}, Python {report.versions['python']}"
    yield "", f"in {report.prefix}"
    yield from _system_lines(report.system, report.cpu_features)
    for index, path in enumerate(report.openmp):
        yield "" if index else "OpenMP", path.removeprefix(prefix)
    yield "memory", _memory(report.system.memory)
    yield from _gpu_lines(report.gpus, report.gpu_kernels)
    kernel = report.kernel
    yield "kernels", ": ".join(x for x in (kernel.isa, kernel.reason) if x)
    if report.native.path:
        yield "", report.native.path.removeprefix(prefix)
    yield from _speed_lines(report)
    for index, gpu in enumerate(report.gpu_kernels.gpus if report.gpu_kernels else ()):
        yield from _gpu_speed_lines(f"on {_title(index, report.gpus)}", gpu)
    versions = {name: number for name, number in report.versions.items() if name != "python"}
    yield "packages", ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    if lacking := [name for name, number in versions.items() if not number]:
        yield "", f"not installed: {', '.join(lacking)}"


def _system_lines(system: System, features: dict[str, bool]) -> Iterator[tuple[str, str]]:
    from besa.report.formatting import size

    yield "system", f"{system.os}, {system.architecture}"
    yield "CPU", f"{system.cpu}, {_cores(system)}, {size(system.cache)} of cache"
    if features:
        yield "", " ".join(name for name, there in features.items() if there) or "no extensions"
    if lacking := [name for name, there in features.items() if not there]:
        yield "", f"without {' '.join(lacking)}"
    setting = system.omp_num_threads
    told = f"OMP_NUM_THREADS={setting}" if setting else "OMP_NUM_THREADS is not set"
    yield "threads", f"{system.threads} ({told})"


def _cores(system: System) -> str:
    words = f"{system.cores} core{'s' if system.cores != 1 else ''}"
    if system.core_share is not None:
        words += f" (of which a container grants {system.core_share:g})"
    return words


def _memory(memory: Memory) -> str:
    from besa.report.formatting import size

    words = [size(memory.total), f"{size(memory.available)} available"]
    if memory.limit is not None:
        words.append(f"{size(memory.limit)} granted to this container")
    if memory.swap_used:
        words.append(f"{size(memory.swap_used)} swapped out")
    return ", ".join(words)


def _title(index: int, gpus: Sequence[Gpu]) -> str:
    return f"GPU {index}" if len(gpus) > 1 else "GPU"


def _gpu_lines(gpus: Sequence[Gpu], found: Gpus | None) -> Iterator[tuple[str, str]]:
    """Each GPU, and whether besa's kernels run there."""
    if not gpus:
        yield "GPU", "none that torch can use"
    kept = f", kept in {found.cache}" if found and found.cache else ""
    for index, gpu in enumerate(gpus):
        yield _title(index, gpus), _gpu(gpu)
        if found is None:
            continue
        if problem := found.gpus[index].problem:
            yield "", f"torch multiplies there, whatever the tokens: {problem}"
        else:
            yield "", f"besa's kernels run there, compiled by NVRTC {found.nvrtc}{kept}"
            kept = ""  # is said once


def _gpu(gpu: Gpu) -> str:
    from besa.report.formatting import size

    return (
        f"{gpu.name}, {size(gpu.memory)}, compute capability {gpu.compute_capability}, "
        f"driver {gpu.driver or 'unknown'}"
    )


def _speed_lines(report: DoctorReport) -> Iterator[tuple[str, str]]:
    limit = report.read_bandwidth
    threads = f"{limit.threads} thread{'s' if limit.threads != 1 else ''}"
    yield "reading", f"{limit.bytes_per_second / 1e9:.1f} GB/s from memory, {threads}"
    for i, figure in enumerate(report.dense_against_sparse):
        if i == 0:
            yield (
                "1 token",
                f"{figure.rows}×{figure.cols}, {figure.sparsity:.0%} zeros: "
                f"F.linear {1e3 * figure.dense_seconds:.2g} ms",
            )
        yield (
            "",
            f"{figure.dtype} {1e3 * figure.sparse_seconds:.2g} ms ({figure.speedup:.1f}×, "
            f"{figure.share_of_read_bandwidth:.0%} of the read limit)",
        )


def _gpu_speed_lines(title: str, gpu: GpuKernels) -> Iterator[tuple[str, str]]:
    """What was measured on a GPU whose kernels run, or why nothing was."""
    if gpu.unmeasured is not None:
        yield title, f"not measured: {gpu.unmeasured}"
    if gpu.same_as is not None:
        yield title, f"as on GPU {gpu.same_as}"
    if gpu.read_bandwidth is not None:
        yield title, f"{gpu.read_bandwidth / 1e9:.0f} GB/s from and to its memory, by a copy"
    for product in gpu.products:
        dense, sparse = 1e6 * product.dense_seconds, 1e6 * product.sparse_seconds
        yield (
            product.kind,
            f"{product.rows}×{product.cols}, 1 token: F.linear {dense:.1f} µs, besa {sparse:.1f} "
            f"µs ({product.speedup:.1f}×, {product.share_of_read_bandwidth:.0%} of the read limit)",
        )
        yield from (("", line) for line in _ways(product))


def _ways(product: GpuProduct) -> Iterator[str]:
    """A line for each range of tokens that goes one path."""
    run: list[GpuWay] = []
    for way in product.ways:
        if run and (way.path, way.seconds is None) != (run[-1].path, run[-1].seconds is None):
            yield _way(run)
            run = []
        run.append(way)
    yield _way(run)


def _way(run: Sequence[GpuWay]) -> str:
    """Which way these numbers of tokens go, how long it takes, and why this one."""
    first, last = run[0].first, run[-1].last
    tokens = f"from {first} tokens" if last is None else f"{first} to {last} tokens"
    if first == last:
        tokens = f"{first} token{'s' if first != 1 else ''}"
    times = [1e6 * way.seconds for way in run if way.seconds is not None]
    counts = sorted({way.candidates for way in run})
    if not times:
        why = "the only way" if counts == [1] else "not measured, the first guess"
        return f"{tokens}: {run[0].path}, {why}"
    return f"{tokens}: {run[0].path}, {_range(times)} µs, the fastest of {_range(counts)} ways"


def _range(values: Sequence[float]) -> str:
    """From the first to the last value, or one if they are the same."""
    ends = [f"{value:.3g}" for value in (values[0], values[-1])]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
