"""What is not as it should be on a machine, and what to do about it.

besa doctor --json     # under `warnings`
"""

from __future__ import annotations

from besa.doctor.report import DoctorReport


def advice(report: DoctorReport) -> list[str]:
    """A line for each thing that slows besa down here."""
    system, kernel, memory = report.system, report.kernel, report.system.memory
    lines = []
    if report.native.problem:
        lines.append(
            f"the native kernels are not in use ({report.native.problem}); torch serves instead, "
            "slower: install a C++ compiler, then besa again"
        )
    if kernel.isa is None:
        lines.append(f"{kernel.reason}: unset it, or correct it")
    elif kernel.overridden:
        lines.append(f"{kernel.reason} may hold the kernels back: unset it if speed matters")
    if len(report.openmp) > 1:
        lines.append(
            f"{len(report.openmp)} OpenMP runtimes are loaded, and their threads fight for the "
            f"cores ({', '.join(report.openmp)}): remove the package that brings the other one"
        )
    cores = min(system.cores, system.core_share or system.cores)
    if system.threads > cores:
        lines.append(
            f"{system.threads} threads share {cores:g} core{'s' if cores != 1 else ''}: set "
            f"OMP_NUM_THREADS={max(1, int(cores))}"
        )
    if report.busy_cores > max(0.3, system.cores / 16):
        lines.append(
            f"other programs kept {report.busy_cores:.1f} cores busy in the meantime: the machine "
            "is faster than measured; end them and try again"
        )
    if memory.swap_used > 256 * 2**20:
        lines.append(
            f"{memory.swap_used / 2**30:.1f} GiB of swap are in use, which slows everything: end "
            "what takes the memory"
        )
    return lines
