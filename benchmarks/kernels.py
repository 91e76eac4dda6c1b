"""The packed product against torch's dense one, against our own dense one, and against the memory.

    python benchmarks/kernels.py                       # all of it, some 25 minutes on two cores
    python benchmarks/kernels.py --shapes 4096x4096 --dtypes bfloat16 --tokens 1 --threads 2

For each shape, type, number of threads and of tokens the contenders take turns, round by round,
and each goes through as many copies of its weight as make up far more than the last-level cache:

- `torch`: `torch.nn.functional.linear` in that type; for int8 `torch._int_mm`, the fastest int8
  product that torch has on a CPU (inputs quantized beforehand, result left as int32);
- `dense`: besa's kernels on the dense weight;
- 50%, 60%, 70%, 80% and 2:4: besa's kernels on the packed weight. int8 and int4 have activations
  quantized within the timed call.

int4 weights, of groups of 64, are held against the dense ones of int8, and against the packed ones:
`int8 50%`.

The limit of a product is the bytes of its weight over the read bandwidth, which is measured in
every round too, with the same threads; the best round counts, since other tenants of a machine
can only take away from it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, conditions, spread, table, write_json
from torch import Tensor

from besa.doctor.speed import readers
from besa.formats import Packed, pack, quantize_int4
from besa.kernels import dense_linear, linear, sparse_linear
from besa.kernels.abi import WHOLE
from besa.kernels.isa import chosen_isa
from besa.machine import cache_size

SHAPES = ["4096x4096", "11008x4096", "4096x11008", "5632x2048", "2048x5632"]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 256]
SPARSITIES = {"50%": 0.5, "60%": 0.6, "70%": 0.7, "80%": 0.8, "2:4": 0.5}
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "int8": torch.int8,
    "int4": torch.int8,
}
GROUP = 64  # columns that share a step of int4

Work = Callable[[Tensor, int], object]


class Contender:
    """Copies of one weight, and how to multiply by one of them."""

    def __init__(self, nbytes: int, copies: Sequence[Any], product: Callable[[Tensor, Any], Any]):
        self.nbytes = nbytes
        self.copies = copies
        self.product = product
        self.next = 0

    def run(self, x: Any, seconds: float, most: int) -> float:
        """Seconds a product, over as many as fit in `seconds`, at least two."""
        start, done = time.perf_counter(), 0
        while True:
            self.product(x, self.copies[self.next])
            self.next = (self.next + 1) % len(self.copies)
            done += 1
            taken = time.perf_counter() - start
            if done >= most or (done >= 2 and taken >= seconds):
                return taken / done


def sparse_weight(rows: int, cols: int, name: str, generator: torch.Generator) -> Tensor:
    """Random float32 [rows, cols] with zeros: a share of each row, uneven; or two of four."""
    weight = torch.randn(rows, cols, generator=generator)
    if name == "2:4":
        order = torch.rand(rows, cols // 4, 4, generator=generator).argsort(2)
        return (weight.view(rows, -1, 4) * (order < 2)).view(rows, cols)
    rates = (SPARSITIES[name] + 0.1 * torch.randn(rows, 1, generator=generator)).clamp(0, 1)
    rates += SPARSITIES[name] - rates.mean()
    weight[torch.rand(rows, cols, generator=generator) < rates] = 0
    return weight


def copies_of(nbytes: int, working_set: int) -> int:
    return max(2, -(-working_set // nbytes))


def contenders(
    rows: int, cols: int, dtype: str, sparsities: Sequence[str], working_set: int
) -> dict[str, Contender]:
    """All that take turns for one shape and type."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Contender] = {}
    dense = torch.randn(rows, cols, generator=generator)
    if dtype in WHOLE:
        whole = (dense * 40).round().clamp(-127, 127).to(torch.int8)
        scale = torch.full((rows, 1), 1 / 40)
        count = copies_of(whole.nbytes, working_set)
        made["torch"] = Contender(
            whole.nbytes,
            [whole.clone().t() for _ in range(count)],
            lambda x, w: torch._int_mm(x["int8"], w),
        )
        made["dense"] = Contender(
            whole.nbytes,
            [whole.clone() for _ in range(count)],
            lambda x, w: linear.dense_linear(x["x"], w, scale=scale),
        )
    else:
        weight = dense.to(DTYPES[dtype])
        weights = [weight.clone() for _ in range(copies_of(weight.nbytes, working_set))]
        made["torch"] = Contender(
            weight.nbytes, weights, lambda x, w: torch.nn.functional.linear(x["x"], w)
        )
        made["dense"] = Contender(weight.nbytes, weights, lambda x, w: dense_linear(x["x"], w))
    for name in sparsities:
        weight = sparse_weight(rows, cols, name, generator)
        if dtype == "int4":
            made[name] = sparse(in_four_bits(weight), working_set)
            if name == "50%":
                made["int8 50%"] = sparse(in_eight_bits(weight), working_set)
        elif dtype == "int8":
            made[name] = sparse(in_eight_bits(weight), working_set)
        else:
            made[name] = sparse(pack(weight.to(DTYPES[dtype])), working_set)
    return made


def in_eight_bits(weight: Tensor) -> Packed:
    """As dense as the others: what would round to zero becomes 1."""
    whole = (weight * 40).round().clamp(-127, 127)
    whole[(weight != 0) & (whole == 0)] = 1
    return pack(whole.to(torch.int8), torch.full((len(weight), 1), 1 / 40))


def in_four_bits(weight: Tensor) -> Packed:
    numbers, scale, steps = quantize_int4(weight, GROUP)
    numbers[(weight != 0) & (numbers == 0)] = 1
    return pack(numbers, scale, GROUP, steps)


def sparse(packed: Packed, working_set: int) -> Contender:
    copies = [packed.clone() for _ in range(copies_of(packed.nbytes, working_set))]
    return Contender(packed.nbytes, copies, lambda x, w: sparse_linear(x["x"], w))


class Memory:
    """Reads far more memory than the caches hold."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.readers = readers(nbytes)

    def bandwidth(self) -> float:
        """Bytes a second, now."""
        return max(self.nbytes / _seconds(reader) for reader in self.readers)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    made: dict[str, Contender], memory: Memory, x: dict[str, Tensor], rounds: int, seconds: float
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds a product of each contender, round by round, and the read bandwidth in B/s."""
    times: dict[str, list[float]] = {name: [] for name in made}
    bandwidths = []
    for counts in [False, *[True] * rounds]:
        bandwidth = memory.bandwidth()
        for name, contender in made.items():
            taken = contender.run(x, seconds if counts else 0.0, 10_000)
            if counts:
                times[name].append(taken)
        if counts:
            bandwidths.append(bandwidth)
    return times, bandwidths


def inputs(tokens: int, cols: int, dtype: str) -> dict[str, Tensor]:
    """Activations: bfloat16 for whole numbers too, and as int8 for torch's product."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, cols, generator=generator)
    kind = torch.bfloat16 if dtype in WHOLE else DTYPES[dtype]
    return {"x": x.to(kind), "int8": (x * 30).round().clamp(-127, 127).to(torch.int8)}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--sparsities", nargs="+", default=list(SPARSITIES), choices=SPARSITIES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.03, help="a contender's turn")
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    cache = cache_size() or 32 << 20
    working_set = max(1 << 29, 2 * cache)
    if args.tiny:
        args.shapes, args.tokens, args.rounds, args.seconds = ["64x96"], [1, 20], 1, 0.001
        working_set = 1 << 16

    memory = Memory(working_set)
    results: list[dict[str, Any]] = []
    for shape in args.shapes:
        rows, cols = map(int, shape.split("x"))
        for dtype in args.dtypes:
            made = contenders(rows, cols, dtype, args.sparsities, working_set)
            for threads in args.threads:
                torch.set_num_threads(threads)
                block = []
                for tokens in args.tokens:
                    x = inputs(tokens, cols, dtype)
                    times, bandwidths = measure(made, memory, x, args.rounds, args.seconds)
                    block.append(row_of(shape, dtype, threads, tokens, made, times, bandwidths))
                    write(args.json, results + block, args)
                results += block
                show(block, list(made))


def row_of(
    shape: str,
    dtype: str,
    threads: int,
    tokens: int,
    made: dict[str, Contender],
    times: dict[str, list[float]],
    bandwidths: list[float],
) -> dict[str, Any]:
    """One cell of the benchmark."""
    best = max(bandwidths)
    return {
        "shape": shape,
        "dtype": dtype,
        "threads": threads,
        "tokens": tokens,
        "read_bandwidth": {"best": best, "median": statistics.median(bandwidths)},
        "contenders": {
            name: {
                "seconds": spread(times[name]),
                "bytes": made[name].nbytes,
                "of_limit": made[name].nbytes / best / statistics.median(times[name]),
                "over_torch": _ratio(times["torch"], times[name]),
                "over_dense": _ratio(times["dense"], times[name]),
            }
            for name in made
        },
    }


def _ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def write(path: Path, results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    isa, reason = chosen_isa()
    write_json(
        path,
        {
            "conditions": {**conditions(), "isa": isa, "isa_reason": reason},
            "last_level_cache": cache_size(),
            "rounds": args.rounds,
            "results": results,
        },
        quiet=True,
    )


def show(block: list[dict[str, Any]], names: list[str]) -> None:
    first = block[0]
    print(f"\n{first['shape']} {first['dtype']}, {first['threads']} threads: ms (of the limit)")
    rows = []
    for row in block:
        cells = [str(row["tokens"]), f"{row['read_bandwidth']['best'] / 1e9:.1f}"]
        for name in names:
            one = row["contenders"][name]
            cells.append(f"{one['seconds']['median'] * 1e3:.3f} ({one['of_limit']:.0%})")
        fifty = row["contenders"].get("50%")
        if fifty:
            times = (fifty[f"over_{other}"]["median"] for other in ("torch", "dense"))
            cells.append(" ".join(f"{value:.2f}×" for value in times))
        rows.append(cells)
    print(table(["tokens", "GB/s", *names, "50%: over torch, dense"], rows), flush=True)


if __name__ == "__main__":
    main()
