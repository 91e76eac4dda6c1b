"""Tokens a second of a whole model on a GPU: packed linears against dense ones in transformers.

    PYTHONPATH=. python benchmarks/gpu_decode.py --shape llama-7b     # or benchmarks/gpu.sh

The model is transformers' Llama with seeded random weights, made on the GPU; the packed one has a
`SparseLinear` for each linear of the blocks and all else in common with it. A step of greedy
decoding, from the last token's embedding to the choice of the next one, is one CUDA graph. In it
the blocks are compiled by torch.compile, for dense and packed weights alike, so that norms, rotary
positions and activations cost both the same little; a block is compiled once and serves all 32.
The cache has `--context` places, all of them in use. Steps of the two models take turns.

Checked: the logits of a short prompt, by transformers' own forward pass, against those of the
dense model with the very same weights; and the logits of each replayed graph against the same step
neither compiled nor captured.

Memory is what torch's allocator handed out for the packed linears and still holds once they are
made, and for all else the tensors' sizes.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, SHAPES, llama_config
from gpu_kernels import KINDS, Kind, random_mask, random_weight
from gpu_step import Graph, LayerCache, NumberedLinear, Step, cosine, linears, llama, llama_on_meta
from gpu_timing import Record, allocated, relative_error, taking_turns
from torch import Tensor, nn

from besa.formats import Packed, pack, quantize_int8
from besa.formats.module import SparseLinear

VOCABULARY = {"llama-7b": 32000, "llama-3-8b": 128256, "tiny": 96}
COMPARED = ("50%", "2:4", "int8 50%")

# The least cosine of logits that ought to be equal. Roundings of bfloat16 add up over the blocks,
# and those of int8 activations more so.
LEAST_COSINE = {False: 0.995, True: 0.98}
# Of a graph against the same step as it is: a compiled norm rounds otherwise, which moves int8
# activations by whole steps.
LEAST_COSINE_OF_GRAPH = {False: 0.995, True: 0.95}


class Bench:
    """A dense model and the packed ones."""

    def __init__(self, shape: str, layers: int, device: str, context: int, compiled: bool) -> None:
        self.device, self.context, self.compiled = device, context, compiled
        self.config = llama_config(SHAPES[shape], layers, VOCABULARY[shape], 4096)
        self.dense = llama(self.config, device)
        self.packed: dict[str, Any] = {}

    @torch.no_grad()
    def pack(self, kind: Kind, tokens: int) -> dict[str, Any]:
        """Makes the packed model of a kind, and the dense one's weights the same; compares them."""
        model = llama_on_meta(self.config)
        for name in ("embed_tokens", "norm", "rotary_emb"):
            setattr(model.model, name, getattr(self.dense.model, name))
        model.lm_head = self.dense.lm_head
        for ours, theirs in zip(model.model.layers, self.dense.model.layers, strict=True):
            ours.input_layernorm = theirs.input_layernorm
            ours.post_attention_layernorm = theirs.post_attention_layernorm
        started, before, size = time.perf_counter(), allocated(self.device), 0
        for seed, (name, linear) in enumerate(linears(self.dense)):
            packed = self._prune(linear, kind, seed)
            size += packed.nbytes
            sparse = NumberedLinear(SparseLinear(packed, dtype=kind.dtype))
            model.model.layers.set_submodule(name, sparse)
        del packed
        seconds = time.perf_counter() - started
        size = allocated(self.device) - before or size
        self.packed[kind.name] = model.eval()
        dense_size = sum(linear.weight.nbytes for _, linear in linears(self.dense))
        whole_size = sum(parameter.nbytes for parameter in self.dense.parameters())
        ids = self.random_ids(1, tokens)
        logits, expected = (m(input_ids=ids, use_cache=False).logits for m in (model, self.dense))
        agreement = cosine(logits, expected)
        same = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
        return {
            "linears_of_dense": size / dense_size,
            "bytes_of_dense": (whole_size - dense_size + size) / whole_size,
            "dense_bytes": whole_size,
            "seconds_to_pack": seconds,
            "cosine": agreement,
            "error": relative_error(logits, expected),
            "same_tokens": same,
            "right": agreement >= LEAST_COSINE[kind.int8],
        }

    def _prune(self, linear: nn.Linear, kind: Kind, seed: int) -> Packed:
        """Gives a dense linear a pruned weight, and the same weight packed."""
        rows, cols = linear.weight.shape
        weight = random_weight(rows, cols, seed, self.device)
        weight *= random_mask(rows, cols, kind.sparsity, seed, self.device)
        if not kind.int8:
            linear.weight.copy_(weight)
            return pack(weight.to(kind.dtype))
        whole, scale = quantize_int8(weight)
        linear.weight.copy_(whole.float() * scale)
        return pack(whole, scale)

    def random_ids(self, batch: int, tokens: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(tokens)
        size = (batch, tokens)
        vocabulary = self.config.vocab_size
        return torch.randint(vocabulary, size, generator=generator, device=self.device)

    def graphs(self, batch: int, tokens: int = 1) -> Callable[[str | None], Graph]:
        """Gives the graph of a pass through the dense model (None) or a packed one.

        One token a sequence is a step of decoding: both models share the cache, in which each puts
        its newest token where the other's was. More are a prompt's pass, which keeps none.
        """
        count = self.config.num_hidden_layers

        @functools.cache
        def caches() -> list[LayerCache | None]:
            if tokens > 1:
                return [None] * count
            return [LayerCache(self.config, batch, self.context, self.device) for _ in range(count)]

        @functools.cache
        def graph(kind: str | None) -> Graph:
            model = self.dense if kind is None else self.packed[kind]
            first = 0 if tokens > 1 else self.context - 1
            positions = torch.arange(first, first + tokens, device=self.device).unsqueeze(0)
            step = Step(model, self.random_ids(batch, tokens), positions, caches())
            return Graph(step, self.compiled, self.device)

        return graph

    def compare(
        self, graphs: Callable[[str | None], Graph], kind: str, tokens: int, rounds: int
    ) -> dict[str, Any]:
        """The dense model and a packed one in turns; `tokens` are one pass's."""
        dense, packed = graphs(None), graphs(kind)
        times = taking_turns(dense.captured, packed.captured, rounds, self.device)
        return {
            **times,
            "dense_tokens_a_second": tokens * 1e6 / times["dense_us"]["median"],
            "tokens_a_second": tokens * 1e6 / times["us"]["median"],
            "graphs": packed.graphs,
            "dense_graphs": dense.graphs,
            "compile_seconds": packed.compile_seconds,
            "dense_compile_seconds": dense.compile_seconds,
            "compile_failed": packed.compile_failed or dense.compile_failed,
            "cosine": packed.cosine,
            "dense_cosine": dense.cosine,
            "right": dense.cosine >= LEAST_COSINE_OF_GRAPH[False]
            and packed.cosine >= LEAST_COSINE_OF_GRAPH["int8" in kind],
        }


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="llama-7b", choices=VOCABULARY)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=COMPARED, choices=COMPARED)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of a case that count")
    parser.add_argument("--seconds", type=float, default=165, help="begin no case after so many")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on cuda")
    parser.add_argument("--json", type=Path, help="default: results/gpu/decode-SHAPE.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: give --device cpu")
    if args.tiny:
        args.shape, args.layers, args.batches, args.rounds = "tiny", 4, [1, 2], 2
        args.context, args.prompt = 32, 16
    compiled = args.device == "cuda" if args.compile is None else args.compile
    # Should blocks not share a graph, then not for 32 compilations: the row's `graphs` tells.
    torch._dynamo.config.recompile_limit = 2

    settings = {
        "shape": {"name": args.shape, **vars(SHAPES[args.shape]), "layers": args.layers},
        "vocabulary": VOCABULARY[args.shape],
        "context": args.context,
        "compiled": compiled,
        "tiny": args.tiny,
    }
    path = args.json or RESULTS / "gpu" / f"decode-{args.shape}.json"
    record = Record(path, args.device, args.seconds, settings, resume=False)
    bench = Bench(args.shape, args.layers, args.device, args.context, compiled)
    for kind in KINDS:
        if kind.name in args.kinds:
            case = {"what": "model", "kind": kind.name}
            record.attempt(case, partial(bench.pack, kind, 16 if args.tiny else 64))

    def pass_of(case: dict[str, Any], graphs: Callable[[str | None], Graph], tokens: int) -> None:
        for name in bench.packed:
            work = partial(bench.compare, graphs, name, tokens, args.rounds)
            record.attempt({**case, "kind": name}, work)

    # In the order of importance: the time may be up before the last.
    for batch in args.batches[:2]:
        pass_of({"what": "decode", "batch": batch}, bench.graphs(batch), batch)
    prompt = bench.graphs(1, args.prompt)
    pass_of({"what": "prompt", "tokens": args.prompt}, prompt, args.prompt)
    del prompt
    for batch in args.batches[2:]:
        pass_of({"what": "decode", "batch": batch}, bench.graphs(batch), batch)
    record.finish()


if __name__ == "__main__":
    main()
