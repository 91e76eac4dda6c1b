"""A layer of packed experts against the dense ones of transformers and of vLLM.

    python benchmarks/experts.py                # Qwen3-30B-A3B's layer, some 10 minutes, 6 GB
    python benchmarks/experts.py --experts 32 --tokens 1 4

Each round has tokens of its own, which choose their experts at random, so that what is read lies
beyond the caches as it does while a model decodes. The contenders take turns:

- `eager`, `grouped_mm`: transformers' experts with bfloat16 weights, expert by expert, and by
  torch's product of groups;
- `vllm`: its fused experts for CPUs, by AMX where the CPU has it; left out where vLLM is not there;
- `bfloat16 50%`, `int8 50%`: besa's, half of the weights zero.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, conditions, spread, write_json
from kernel_report import DENSE_EXPERTS, experts_table
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from besa.formats import Packed, pack, quantize_int8
from besa.kernels import Activation, sparse_experts
from besa.kernels.isa import chosen_isa

TOKENS = [1, 4, 16, 64, 256]

# A layer, of tokens [tokens, hidden], their experts and the weights of these [tokens, chosen].
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


@torch.no_grad()
def sparse_weight(rows: int, cols: int) -> Tensor:
    """Random bfloat16 [rows, cols], half of it zeros."""
    weight = torch.randn(rows, cols, dtype=torch.bfloat16).mul_(cols**-0.5)
    for part in weight.split(1 << 14):
        part[torch.rand(part.shape) < 0.5] = 0
    return weight


def in_eight_bits(weight: Tensor) -> Packed:
    whole, scale = zip(*map(quantize_int8, weight.split(1 << 14)), strict=True)
    return pack(torch.cat(whole), torch.cat(scale))


def packed_layer(gate_up: Packed, down: Packed) -> Layer:
    silu = Activation("silu")
    return lambda x, ids, weights: sparse_experts(x, gate_up, down, ids, weights, silu)


def contenders(experts: int, inner: int, hidden: int, chosen: int) -> dict[str, Layer]:
    gate_up = sparse_weight(experts * 2 * inner, hidden)
    down = sparse_weight(experts * hidden, inner)
    made = {
        "bfloat16 50%": packed_layer(pack(gate_up), pack(down)),
        "int8 50%": packed_layer(in_eight_bits(gate_up), in_eight_bits(down)),
    }
    stacked = gate_up.view(experts, -1, hidden), down.view(experts, -1, inner)
    config = Qwen3MoeConfig(
        num_experts=experts,
        num_experts_per_tok=chosen,
        hidden_size=hidden,
        moe_intermediate_size=inner,
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = map(torch.nn.Parameter, stacked)

    def of_transformers(name: str) -> Layer:
        def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            config._experts_implementation = name
            result: Tensor = module(x, ids, weights.to(x.dtype))
            return result

        return layer

    dense = {name: of_transformers(name) for name in ("eager", "grouped_mm")}
    if (of_vllm := vllm_layer(*stacked)) is not None:
        dense["vllm"] = of_vllm
    return {**dense, **made}


def vllm_layer(gate_up: Tensor, down: Tensor) -> Layer | None:
    """vLLM's fused experts; None without vLLM for CPUs."""
    try:
        import vllm._C  # noqa: F401  (registers the operators)
        from vllm import _custom_ops as ops
    except ImportError:
        return None
    isa = "amx" if torch.cpu._init_amx() else "vec"
    first, second = (ops.cpu_prepack_moe_weight(weight, isa) for weight in (gate_up, down))

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, first, second, None, None, weights, ids.int(), "silu", isa)
        return out

    return layer


@torch.no_grad()
def measure(
    made: dict[str, Layer], experts: int, hidden: int, chosen: int, tokens: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds a layer takes, round by round; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for counts in [False, *[True] * rounds]:
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        ids = torch.rand(tokens, experts).topk(chosen).indices
        weights = torch.rand(tokens, chosen)
        for name, layer in made.items():
            start = time.perf_counter()
            layer(x, ids, weights)
            if counts:
                times[name].append(time.perf_counter() - start)
    return times


def row_of(tokens: int, times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "contenders": {
            name: {
                "seconds": spread(own),
                **{
                    f"over_{other}": spread([a / b for a, b in zip(times[other], own, strict=True)])
                    for other in DENSE_EXPERTS
                    if other in times
                },
            }
            for name, own in times.items()
        },
    }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, default=RESULTS / "experts.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.experts, args.inner, args.hidden, args.chosen = 4, 64, 128, 2
        args.tokens, args.rounds = [1, 20], 2

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = {name: getattr(args, name) for name in ("experts", "inner", "hidden", "chosen")}
    made = contenders(**shape)
    results = []
    for tokens in args.tokens:
        times = measure(made, args.experts, args.hidden, args.chosen, tokens, args.rounds)
        results.append(row_of(tokens, times))
    record = {
        "conditions": {**conditions(), "isa": chosen_isa()[0]},
        "shape": shape,
        "rounds": args.rounds,
        "results": results,
    }
    write_json(args.json, record, quiet=True)
    print(experts_table(record))


if __name__ == "__main__":
    main()
