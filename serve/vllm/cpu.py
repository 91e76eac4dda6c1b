"""How much of a machine without GPU vLLM gets, where the user does not say.

>>> binding([[0, 1]], ranks=1)  # one thread for each of two cores
'0-1'
>>> binding([[0, 1]], ranks=2)  # a core for each half of the model
'0|1'
>>> gib = 1 << 30
>>> cache_space(16 * gib, weights=2 * gib, sequence=None, ranks=1)  # GiB for keys and values
5

vLLM's own `auto` leaves one core of each rank idle for its other processes. They have nothing to do
while a step is computed, so that on few cores this costs more than it gives. And its default for
the cache is 92% of the machine's memory, which fails as soon as anything else runs.

A rank stays on one memory node: its weights lie there. On a machine with several,
`--tensor-parallel-size` uses them all.
"""

from __future__ import annotations

import math
from pathlib import Path

from besa.machine import memory
from besa.model.json_files import read_object
from besa.serve.cpu import longest_sequence, most_threads, physical_cores

_GIB = 1 << 30

# What the engine's processes take besides weights and cache.
PROCESSES = 3 * _GIB
# More of the longest sequences than this do not run at the same time on a CPU.
_SEQUENCES = 64


def allow_amx() -> bool:
    """Asks Linux to let this process use AMX.

    On a CPU that has it, vLLM 0.32's attention uses it in bfloat16 without asking, which ends the
    engine at its first request (illegal instruction), unless something else in the process asked
    before.

    Returns:
        Whether the process may use it; False on CPUs without AMX.
    """
    import torch  # whose import takes seconds: this module also plans for engines yet to start

    return bool(torch.cpu._init_amx())


def thread_binding(ranks: int) -> str | None:
    """VLLM_CPU_OMP_THREADS_BIND for so many ranks on this machine.

    None where a rank would get no core, which vLLM then says in its own words.
    """
    return binding(physical_cores(), ranks, most_threads(ranks))


def binding(nodes: list[list[int]], ranks: int, most: int | None = None) -> str | None:
    """The cores of each rank: "0-3|4-7".

    Args:
        nodes: the cores that may be used, memory node by memory node.
        ranks: processes that share the work.
        most: threads that a rank may have at most.
    """
    if ranks <= len(nodes):
        parts = nodes[:ranks]
    else:
        cores = [core for node in nodes for core in node]
        each = len(cores) // ranks
        parts = [cores[rank * each : (rank + 1) * each] for rank in range(ranks)]
    if not all(parts):
        return None
    return "|".join(_ranges(part[:most]) for part in parts)


def _ranges(numbers: list[int]) -> str:
    """Numbers as vLLM reads them: "0-1,4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{start}-{end}" if end > start else f"{start}" for start, end in runs)


def cache_gib(directory: Path, ranks: int) -> int:
    """VLLM_CPU_KVCACHE_SPACE for a model on this machine, in GiB for each rank."""
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    config = read_object(directory / "config.json")
    return cache_space(memory().available, weights, longest_sequence(config), ranks)


def cache_space(available: int, weights: int, sequence: int | None, ranks: int) -> int:
    """Half of what is free beside the model, but no more than its sequences can use; at least 1.

    Args:
        available: bytes of memory that nothing uses yet.
        weights: bytes of the model.
        sequence: bytes of the longest sequence's keys and values.

    Returns:
        GiB for each of the ranks.
    """
    spare = (available - weights * 1.2 - PROCESSES) / 2
    fits = int(spare / _GIB / ranks)
    useful = fits if sequence is None else math.ceil(_SEQUENCES * sequence / _GIB / ranks)
    return max(1, min(fits, useful))
