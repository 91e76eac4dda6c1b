"""Prunes one block of LLaMA-7B's shape with every method on a GPU, and checks the masks.

    PYTHONPATH=. python benchmarks/gpu.py --json pruning.json     # or benchmarks/gpu.sh

Weights and hidden states are random and seeded; a hundredth of the hidden columns is twenty times
larger than the rest, as in trained models, so that Wanda and magnitude disagree. Times run from
the block's weights and input statistics to its masks (BESA: all of the learning), and are
medians after one run that does not count, unless that one took seconds: then it is the figure.
Gathering the statistics is timed by itself. Memory is the most that torch's allocator handed out
during a run, beyond what was there before. Once `--seconds` are over no method is begun.

What the masks are checked for:

- the number of zeros, to the weight; for N:M, of every group.
- magnitude and Wanda: the same masks as on the CPU from the same float32 statistics. Scores are
  products of two floats and sorting is stable, so nothing may differ.
- BESA: the same rank buckets, and from the same learned rates the same projected masks. The
  learning itself is repeated in float32 on a small block on both devices.
- SparseGPT: a slice of rows of one linear, from the same Hessian.

The last two are long chains of floating-point steps whose order differs between the devices, so a
few near ties fall the other way: hence a least share of equal entries instead of equality.
"""

from __future__ import annotations

import argparse
import copy
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    SHAPES,
    conditions,
    llama_block,
    one_line,
    seconds_of,
    spread,
    table,
    write_json,
)
from torch import Tensor

from besa.model.blocks import find_linears
from besa.pruning.allocate import rank_buckets
from besa.pruning.batches import single
from besa.pruning.block_run import BlockRun, Pruned, Tensors
from besa.pruning.budget import Budget
from besa.pruning.config import Pattern, PruneConfig
from besa.pruning.methods import load
from besa.pruning.methods.besa import allocated_masks
from besa.pruning.methods.magnitude import magnitude_masks
from besa.pruning.methods.sparsegpt import sparsegpt
from besa.pruning.methods.wanda import wanda_masks
from besa.pruning.scores import wanda

RATE = 0.5
UNSTRUCTURED, TWO_OF_FOUR = "unstructured", "2:4"
RUNS = [
    ("magnitude", UNSTRUCTURED),
    ("magnitude", TWO_OF_FOUR),
    ("wanda", UNSTRUCTURED),
    ("wanda", TWO_OF_FOUR),
    ("besa row", UNSTRUCTURED),
    ("besa layer", UNSTRUCTURED),
    ("besa", TWO_OF_FOUR),
    ("sparsegpt", UNSTRUCTURED),
    ("sparsegpt", TWO_OF_FOUR),
]
# A method that takes longer the first time is not run again.
LONG_SECONDS = 3.0

# Rows of the linear on which SparseGPT is compared: each costs the CPU time.
SPARSEGPT_ROWS = 256
# Least shares of equal mask entries. On one CPU, noise of 1e-5 on the Hessian (a hundred float32
# roundings) leaves 0.9997 of SparseGPT's, and noise of 1e-6 on the hidden states 0.9998 of BESA's.
LEAST_SPARSEGPT = 0.999
LEAST_LEARNED = 0.99


class Bench:
    """A block with its calibration samples and their statistics."""

    def __init__(
        self, shape: str, dtype: torch.dtype, device: str, samples: int, tokens: int
    ) -> None:
        self.device, self.dtype = device, dtype
        hidden = SHAPES[shape].hidden
        self.block, self.call = llama_block(SHAPES[shape], dtype, device, tokens)
        self.linears = find_linears(self.block, "block", None)
        self.zeros = round(RATE * sum(x.size for x in self.linears))
        generator = torch.Generator().manual_seed(2)
        scale = torch.ones(hidden)
        scale[torch.randperm(hidden, generator=generator)[: max(1, hidden // 100)]] = 20.0
        self.hidden = [
            (torch.randn(1, tokens, hidden, generator=generator) * scale).to(device, dtype)
            for _ in range(samples)
        ]
        self.run = self.block_run()

    def block_run(self) -> BlockRun:
        """The dense block on all samples, not yet observed."""
        return BlockRun(
            stored=copy.deepcopy(self.block),
            linears=self.linears,
            calls=[self.call] * len(self.hidden),
            stream=self.hidden,
            targets=[],
            groups=single([len(one) for one in self.hidden]),
            device=torch.device(self.device),
            dtype=self.dtype,
            config=PruneConfig(out="nowhere"),
        )

    @torch.no_grad()
    def gather(self, hessians: bool) -> None:
        """Runs the dense block on all samples; keeps its outputs and the inputs' statistics."""
        targets: list[Tensor] = []
        self.run.observe(hessians, lambda i, output: targets.append(output))
        self.run.targets = targets

    @torch.no_grad()
    def prune(self, method: str, pattern: str) -> Pruned:
        """One method, from weights and statistics to masks."""
        name, *granularity = method.split()
        self.run.config = PruneConfig(out="nowhere", granularity=(granularity or ["row"])[0])
        self.run.generator.manual_seed(0)
        return load(name).mask(self.run, self.budget(pattern))

    def budget(self, pattern: str) -> Budget:
        return Budget(self.zeros, RATE, Pattern.parse(pattern))

    @torch.no_grad()
    def error(self, pruned: Pruned) -> float:
        """||dense - pruned||^2 / ||dense||^2 of the block's output over the samples."""
        run = self.block_run()
        run.targets = self.run.targets
        run.put(pruned)
        return run.error(len(self.hidden))


def measure(bench: Bench, method: str, pattern: str, runs: int) -> tuple[dict[str, Any], Pruned]:
    """Time, memory and exactness of one method."""
    kept: list[Pruned] = []

    def work() -> None:
        kept.clear()
        kept.append(bench.prune(method, pattern))

    on_gpu = bench.device == "cuda"

    def restart_peak() -> int:
        kept.clear()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() if on_gpu else 0

    before = restart_peak()
    seconds = [seconds_of(work, bench.device)]
    if seconds[0] < LONG_SECONDS:
        before = restart_peak()
        seconds = [seconds_of(work, bench.device) for _ in range(runs)]
    result = {
        "method": method,
        "pattern": pattern,
        "seconds": spread(seconds),
        "peak_extra_bytes": torch.cuda.max_memory_allocated() - before if on_gpu else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "error": bench.error(kept[0]),
        "zeros": sum(int((~mask).sum()) for mask in kept[0].masks.values()),
        "zeros_wanted": bench.zeros,
    }
    return result, kept[0]


def exact(bench: Bench, pruned: Pruned, pattern: Pattern) -> float:
    """1.0 if the masks have the zeros asked for; for N:M the share of groups that do."""
    if not pattern.m:
        return float(sum(int((~m).sum()) for m in pruned.masks.values()) == bench.zeros)
    groups = [m.reshape(-1, pattern.m).sum(1) == pattern.n for m in pruned.masks.values()]
    return float(torch.cat(groups).float().mean())


def equal_share(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The share of equal entries in two sets of tensors, of the same names and shapes."""
    same = sum(int((a[name].cpu() == b[name].cpu()).sum()) for name in a)
    return same / sum(tensor.numel() for tensor in a.values())


@dataclass
class Checks:
    """What was checked, and how it went."""

    rows: list[dict[str, Any]]

    def add(self, what: str, share: float, least: float = 1.0) -> None:
        row = {"check": what, "equal": share, "least": least, "passed": share >= least}
        self.rows.append(row)
        print(f"{'ok  ' if row['passed'] else 'FAIL'} {what}: {share:.6f} (at least {least})")


def check_simple(bench: Bench, masks: Mapping[tuple[str, str], Tensors], checks: Checks) -> None:
    """Magnitude and Wanda on the CPU, from the same weights and norms."""
    weights = {name: weight.cpu() for name, weight in bench.run.weights.items()}
    scored = {x.name: wanda(weights[x.name], bench.run.norms.of(x).cpu()) for x in bench.linears}
    for (method, pattern), on_gpu in masks.items():
        budget = bench.budget(pattern)
        if method == "magnitude":
            on_cpu = magnitude_masks(bench.linears, weights, budget)
        elif method == "wanda":
            on_cpu = wanda_masks(bench.linears, scored, budget)
        else:
            continue
        checks.add(f"{method} {pattern}: masks as on the CPU", equal_share(on_gpu, on_cpu))


def check_projection(bench: Bench, learned: Pruned, checks: Checks) -> None:
    """BESA's buckets and projection on the CPU, from the same weights, norms and rates.

    The rates are those of the masks learned on the GPU: projecting them must give these masks.
    """
    scores = bench.run.scores()
    scored = {name: tensor.cpu() for name, tensor in scores.items()}
    first = bench.linears[0].name
    checks.add(
        f"besa: rank buckets of {first} as on the CPU",
        equal_share(
            {first: rank_buckets(scores[first][0])},
            {first: rank_buckets(scored[first][0])},
        ),
    )
    rates = [1 - learned.masks[x.name].cpu().double().mean(2).flatten() for x in bench.linears]
    on_cpu = allocated_masks(bench.linears, scored, rates, bench.zeros)
    checks.add(
        "besa: projected masks as on the CPU, from the same rates",
        equal_share(learned.masks, on_cpu),
    )


def check_learning(device: str, shape: str, checks: Checks) -> None:
    """BESA from start to end on a small float32 block, here and on the CPU."""
    for method, pattern in RUNS:
        if not method.startswith("besa"):
            continue
        masks = []
        for where in (device, "cpu"):
            small = Bench(shape, torch.float32, where, samples=8, tokens=128)
            small.gather(hessians=False)
            masks.append(small.prune(method, pattern).masks)
        checks.add(
            f"{method} {pattern}: masks of a small block learned as on the CPU",
            equal_share(*masks),
            LEAST_LEARNED,
        )


def check_sparsegpt(bench: Bench, checks: Checks) -> None:
    """SparseGPT on some rows of the first linear, here and on the CPU, from the same Hessian."""
    linear = bench.linears[0]
    weight = bench.run.weights[linear.name][0][:SPARSEGPT_ROWS]
    assert bench.run.hessians is not None
    hessian = bench.run.hessians.of(linear)[0]
    zeros = round(RATE * weight.numel())
    for pattern in (UNSTRUCTURED, TWO_OF_FOUR):
        masks = [
            sparsegpt(weight.to(where), hessian.to(where), zeros, Pattern.parse(pattern))[1]
            for where in (bench.device, "cpu")
        ]
        checks.add(
            f"sparsegpt {pattern}: mask of {len(weight)} rows of {linear.name} as on the CPU",
            equal_share({"": masks[0]}, {"": masks[1]}),
            LEAST_SPARSEGPT,
        )


@contextmanager
def recorded(what: str, failed: dict[str, str]) -> Iterator[None]:
    """Notes an error inside and goes on: the other methods and checks have their turn."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - of any kind
        traceback.print_exc()
        failed[what] = one_line(error)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="llama-7b", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="in a sample")
    parser.add_argument("--runs", type=int, default=3, help="runs of a method that count")
    parser.add_argument("--seconds", type=float, default=600, help="begin no method after so many")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu" / "pruning.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.samples, args.tokens, args.runs = "tiny", 2, 16, 1
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: give --device cpu")

    deadline = time.monotonic() + args.seconds
    bench = Bench(args.shape, getattr(torch, args.dtype), args.device, args.samples, args.tokens)
    gathering: dict[str, list[float]] = {"norms": [], "norms and Hessians": []}
    for counts in [False, *[True] * args.runs]:
        for what, hessians in (("norms", False), ("norms and Hessians", True)):

            def gather(hessians: bool = hessians) -> None:
                bench.gather(hessians)

            taken = seconds_of(gather, args.device)
            if counts:
                gathering[what].append(taken)

    checks = Checks([])
    record: dict[str, Any] = {
        "conditions": conditions(args.device),
        "finished": False,
        "tiny": args.tiny,
        "shape": {"name": args.shape, **vars(SHAPES[args.shape])},
        "dtype": args.dtype,
        "samples": args.samples,
        "tokens": args.tokens,
        "epochs": PruneConfig.epochs,
        "rate": RATE,
        "statistics_seconds": {what: spread(times) for what, times in gathering.items()},
        "methods": [],
        "left_out": [],
        "failed": {},
        "checks": checks.rows,
    }
    masks: dict[tuple[str, str], Tensors] = {}
    for method, pattern in RUNS:
        if time.monotonic() > deadline:
            record["left_out"].append(f"{method} {pattern}")
            continue
        with recorded(f"{method} {pattern}", record["failed"]):
            result, pruned = measure(bench, method, pattern, args.runs)
            record["methods"].append(result)
            print(f"{method} {pattern}: {result['seconds']['median']:.3f} s", flush=True)
            checks.add(
                f"{method} {pattern}: zeros as asked", exact(bench, pruned, Pattern.parse(pattern))
            )
            masks[method, pattern] = {name: mask.cpu() for name, mask in pruned.masks.items()}
            if method == "besa row":
                check_projection(bench, pruned, checks)
            del pruned
        write_json(args.json, record, quiet=True)  # what is cut off is not all lost
    small = "tiny" if args.tiny else "small"
    comparisons: dict[str, Callable[[], None]] = {
        "magnitude and Wanda as on the CPU": lambda: check_simple(bench, masks, checks),
        "SparseGPT as on the CPU": lambda: check_sparsegpt(bench, checks),
        "BESA as on the CPU": lambda: check_learning(args.device, small, checks),
    }
    for what, compare in comparisons.items():
        if time.monotonic() > deadline:
            record["left_out"].append(what)
            continue
        with recorded(what, record["failed"]):
            compare()

    record["finished"] = not record["left_out"]
    print(table(["method", "s", "error", "extra MiB"], map(_row, record["methods"])))
    write_json(args.json, record)
    if record["left_out"]:
        print(f"left out, the time was up: {'; '.join(record['left_out'])}")
    failed = [row["check"] for row in checks.rows if not row["passed"]] + list(record["failed"])
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def _row(result: dict[str, Any]) -> list[str]:
    extra = result["peak_extra_bytes"]
    return [
        f"{result['method']} {result['pattern']}",
        f"{result['seconds']['median']:.3f}",
        f"{result['error']:.2e}",
        "-" if extra is None else f"{extra / 2**20:.0f}",
    ]


if __name__ == "__main__":
    main()
