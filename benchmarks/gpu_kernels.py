"""The product with a packed weight against torch's dense one on a GPU, for one linear at a time.

    PYTHONPATH=. python benchmarks/gpu_kernels.py --json kernels.json     # or benchmarks/gpu.sh

What is timed is `besa.formats.module.SparseLinear` as a model calls it, against
`torch.nn.functional.linear` with the dense weight in the activations' type: CUDA graphs of some
fifty calls that go round as many copies of the weight as make up more than the L2 cache, replayed
in turns. int8 weights are against the same bfloat16 product, and the quantization of the
activations is inside the time.

Weights are random and seeded, and rows uneven: the standard deviation of a row's rate is 0.05. The
output of the replayed graph is compared with the float32 product of the same weight; for int8 with
`besa.kernels.linear.sparse_linear_reference`, which quantizes activations, too.

`floor_us` is the time that a copy of as many bytes as the packed weight has would take to read
them, at the bandwidth of a large copy. A small matrix never sees that: a kernel starts and ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS
from gpu_timing import Captured, Record, allocated, copy_bandwidth, relative_error, taking_turns
from torch import Tensor

from besa.formats import Packed, pack, quantize_int8
from besa.formats.module import SparseLinear
from besa.kernels.linear import sparse_linear_reference

# out x in: LLaMA-7B's, Llama-3-8B's up projection, Llama-70B's down projection.
SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096), (8192, 28672)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
TINY_SHAPES = [(64, 128), (96, 72)]
TINY_TOKENS = [1, 5]

# The most that a right result may differ from the reference: bfloat16's rounding is 1.7e-3.
LARGEST_ERROR = 5e-3
# Bytes of packed weights to go round: five times the H100's and H200's L2 cache.
WORKING_SET = 256 << 20
ROW_DEVIATION = 0.05


@dataclass(frozen=True)
class Kind:
    """A kind of packed weight."""

    name: str
    sparsity: float | None  # None: 2:4
    dtype: torch.dtype = torch.bfloat16  # of the activations, and of float values
    int8: bool = False
    group_size: int | None = None
    few: bool = False  # only some shapes and tokens


# The most important ones first: the time may be up before the last.
KINDS = [
    Kind("50%", 0.5),
    Kind("int8 50%", 0.5, int8=True),
    Kind("2:4", None),
    Kind("70%", 0.7),
    Kind("int8 50%, groups of 128", 0.5, int8=True, group_size=128, few=True),
    Kind("fp16 50%", 0.5, dtype=torch.float16, few=True),
]
FEW_SHAPES, FEW_TOKENS = 2, (1, 5, 8, 64, 1024)


def random_weight(rows: int, cols: int, seed: int, device: str) -> Tensor:
    """Seeded float32 [rows, cols], as spread as a trained linear's."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, device=device).mul_(0.02)


def random_mask(rows: int, cols: int, sparsity: float | None, seed: int, device: str) -> Tensor:
    """Seeded bool [rows, cols], true where a weight is kept: 2:4, or uneven rows.

    A group of 2:4 keeps one of the six pairs that there are.
    """
    generator = torch.Generator(device).manual_seed(seed)
    if sparsity is None:
        pairs = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], device=device)
        bits = (pairs[:, None] >> torch.arange(4, device=device)) & 1
        chosen = torch.randint(6, (rows, cols // 4), generator=generator, device=device)
        return bits.bool()[chosen].view(rows, cols)
    rates = torch.randn(rows, 1, generator=generator, device=device).mul_(ROW_DEVIATION)
    rates = (rates - rates.mean() + sparsity).clamp_(0, 1)
    return torch.rand(rows, cols, generator=generator, device=device) >= rates


class Weights:
    """One weight of a kind, dense and packed, in as many copies as it takes to miss the cache."""

    def __init__(self, kind: Kind, rows: int, cols: int, device: str, working_set: int) -> None:
        self.kind, self.rows, self.cols = kind, rows, cols
        self.device, self.working_set = device, working_set

    @cached_property
    def packed(self) -> Packed:
        weight = random_weight(self.rows, self.cols, self.rows + self.cols, self.device)
        mask = random_mask(self.rows, self.cols, self.kind.sparsity, self.cols, self.device)
        weight = weight.mul_(mask)
        if self.kind.int8:
            return pack(*quantize_int8(weight, self.kind.group_size), self.kind.group_size)
        return pack(weight.to(self.kind.dtype))

    @cached_property
    def dense(self) -> list[Tensor]:
        """The weight before it was pruned: dense kernels draw less power from zeros."""
        weight = random_weight(self.rows, self.cols, self.rows + self.cols, self.device)
        weight = weight.to(self.kind.dtype)
        return [weight.clone() for _ in self.linears]

    @cached_property
    def linears(self) -> list[SparseLinear]:
        copies = max(3, -(-self.working_set // self.packed.nbytes))
        linears = [self._linear()]
        before = allocated(self.device)  # what the first needs of a workspace is no weight's
        linears += [self._linear() for _ in range(copies - 1)]
        held = (allocated(self.device) - before) / (copies - 1)
        self.bytes = held or float(self.packed.nbytes)
        return linears

    def _linear(self) -> SparseLinear:
        return SparseLinear(self.packed.clone(), dtype=self.kind.dtype).eval()

    def expected(self, x: Tensor) -> Tensor:
        """The product by the reference."""
        packed = self.packed
        if packed.scale is not None:
            return sparse_linear_reference(
                x, packed.values, packed.bitmask, packed.row_ptr, packed.scale
            )
        return x.float() @ packed.unpack(torch.float32).T

    @torch.inference_mode()
    def measure(self, tokens: int, rounds: int, bandwidth: float) -> dict[str, Any]:
        """Times, memory and the error for `tokens` tokens."""
        generator = torch.Generator(self.device).manual_seed(tokens)
        x = torch.randn(tokens, self.cols, generator=generator, device=self.device)
        x = x.to(self.kind.dtype)
        copies = len(self.linears)
        least = 48 if tokens <= 64 else 12 if tokens <= 512 else 1
        launches = copies * -(-least // copies)
        sparse = Captured([partial(one, x) for one in self.linears], launches, self.device)
        dense = Captured([partial(F.linear, x, w) for w in self.dense], launches, self.device)
        times = taking_turns(dense, sparse, rounds, self.device)
        error = relative_error(sparse.output, self.expected(x))
        return {
            **times,
            "floor_us": self.packed.nbytes / bandwidth * 1e6,
            "bytes_of_dense": self.bytes / self.dense[0].nbytes,
            "density": self.packed.density,
            "copies": copies,
            "error": error,
            "right": error <= LARGEST_ERROR,
        }


def cases(tiny: bool) -> list[tuple[Kind, tuple[int, int], list[int]]]:
    """Kind, shape and tokens, in the order in which they are measured."""
    found = []
    for kind in KINDS:
        shapes, tokens = (TINY_SHAPES, TINY_TOKENS) if tiny else (SHAPES, TOKENS)
        if kind.few:
            shapes = shapes[:FEW_SHAPES]
            tokens = [count for count in tokens if count in FEW_TOKENS]
        found += [(kind, shape, tokens) for shape in shapes]
    return found


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS])
    parser.add_argument("--rounds", type=int, default=11, help="rounds of a case that count")
    parser.add_argument("--seconds", type=float, default=150, help="begin no case after so many")
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu" / "kernels.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: give --device cpu")
    if args.tiny:
        args.rounds = 2
    working_set = 0 if args.tiny else WORKING_SET
    settings = {"tiny": args.tiny, "rounds": args.rounds, "row_deviation": ROW_DEVIATION}
    record = Record(args.json, args.device, args.seconds, settings)
    bandwidth = copy_bandwidth(args.device, 1 << (20 if args.tiny else 30))
    record.result["copy_bytes_a_second"] = bandwidth
    for kind, (rows, cols), tokens in cases(args.tiny):
        if args.kinds and kind.name not in args.kinds:
            continue
        weights = Weights(kind, rows, cols, args.device, working_set)
        for count in tokens:
            case = {"kind": kind.name, "shape": f"{rows}x{cols}", "tokens": count}
            measure: Callable[[], dict[str, Any]] = partial(
                weights.measure, count, args.rounds, bandwidth
            )
            record.attempt(case, measure)
        del weights, measure  # of the largest shape there is room for one
    record.finish()


if __name__ == "__main__":
    main()
