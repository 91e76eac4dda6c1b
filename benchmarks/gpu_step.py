"""A pass through transformers' Llama as one CUDA graph, with its blocks compiled.

    model = llama(config, "cuda")
    caches = [LayerCache(config, batch=1, context=512, device="cuda") for _ in model.model.layers]
    graph = Graph(Step(model, ids, positions, caches), compiled=True, device="cuda")
    graph.captured.replay()

The blocks are transformers' own, called one after the other as its model does; what that does
around them, the embedding, the last norm and the head, is done here, so that no mask is made.
"""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from common import one_line
from gpu_timing import Captured
from torch import Tensor, nn

from besa.formats.module import SparseLinear


def llama_on_meta(config: Any) -> Any:
    """Transformers' model without memory for its weights.

    Every block takes itself for the first: torch.compile would make a graph for each number.
    """
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0
    return model.requires_grad_(False).eval()


def llama(config: Any, device: str) -> Any:
    """The dense model, made where it is used."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model = llama_on_meta(config).to_empty(device=device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.02, generator=generator)
        else:
            parameter.fill_(1.0)
    return model


def linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The blocks' linears, by their names within `model.model.layers`."""
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, nn.Linear):
            yield name, module


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two tensors' directions; -1 if there is a NaN."""
    alike = torch.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0)
    return float(alike.nan_to_num(nan=-1.0))


class LayerCache:
    """One block's static cache, all of whose places are in use; the newest token takes the last.

    transformers' own asks for a mask of its unused places while a graph is captured, and the
    attention with a mask is a slower one.
    """

    def __init__(self, config: Any, batch: int, context: int, device: str) -> None:
        size = (batch, config.num_key_value_heads, context, config.head_dim)
        generator = torch.Generator(device).manual_seed(context)
        self.keys, self.values = (
            torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
            for _ in range(2)
        )
        self.last = torch.tensor([context - 1], device=device)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes the newest token's, gives all."""
        self.keys.index_copy_(2, self.last, keys)
        self.values.index_copy_(2, self.last, values)
        return self.keys, self.values


class NumberedLinear(nn.Module):
    """A packed linear that torch.compile knows by a tensor with its number, and by nothing else.

    Packed weights differ in length from block to block, and torch.compile would make a graph for
    each. The operator inside is an opaque call to it either way.
    """

    all: ClassVar[list[SparseLinear]] = []

    def __init__(self, linear: SparseLinear) -> None:
        super().__init__()
        self.out_features = linear.out_features
        self.number = torch.tensor(len(self.all))
        self.all.append(linear)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.besa_benchmark.linear(x, self.number, self.out_features)
        return output


_LIBRARY = torch.library.Library("besa_benchmark", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor number, int out) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.impl(
    "linear", lambda x, number, out: NumberedLinear.all[int(number)](x), "CompositeExplicitAutograd"
)
torch.library.register_fake(
    "besa_benchmark::linear",
    lambda x, number, out: x.new_empty(*x.shape[:-1], out),
    lib=_LIBRARY,
)


class Compiler:
    """torch.compile by inductor, and how many graphs came of it."""

    def __init__(self) -> None:
        self.graphs = 0
        self.inductor: Callable[..., Any] = torch._dynamo.lookup_backend("inductor")

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self.inductor(graph, inputs)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled copy. torch counts recompilations by a function's code: each has its own."""
        assert isinstance(function, types.FunctionType)
        copy = types.FunctionType(function.__code__.replace(), function.__globals__)
        compiled: Callable[..., Any] = torch.compile(copy, backend=self, dynamic=False)
        return compiled


def begin(model: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, Any]:
    """Embedded tokens, and the rotary embedding's cosines and sines."""
    hidden = model.model.embed_tokens(ids)
    return hidden, model.model.rotary_emb(hidden, position_ids=positions)


def block(layer: Any, hidden: Tensor, cache: LayerCache | None, cos_sin: Any) -> Tensor:
    """One decoder block. Without a mask torch takes its fastest attention: causal for a prompt."""
    output: Tensor = layer(
        hidden, attention_mask=None, past_key_values=cache, position_embeddings=cos_sin
    )
    return output


def end(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The last token's logits, and the choice of the next one."""
    logits = model.lm_head(model.model.norm(hidden[:, -1:]))
    return logits, logits.argmax(-1)


class Step:
    """One pass through a model: of a token for each sequence of a cache, or of a whole prompt."""

    def __init__(
        self, model: Any, ids: Tensor, positions: Tensor, caches: Sequence[LayerCache | None]
    ) -> None:
        self.model, self.ids, self.positions, self.caches = model, ids, positions, caches
        self.parts: list[Callable[..., Any]] = [begin, block, end]
        self.compiler = Compiler()

    def compile(self) -> None:
        self.parts = [self.compiler.compile(part) for part in self.parts]

    @torch.no_grad()
    def run(self) -> Tensor:
        """The last logits; the chosen token is the next step's."""
        begin, block, end = self.parts
        hidden, cos_sin = begin(self.model, self.ids, self.positions)
        for layer, cache in zip(self.model.model.layers, self.caches, strict=True):
            hidden = block(layer, hidden, cache, cos_sin)
        logits, chosen = end(self.model, hidden)
        if self.ids.shape[1] == 1:
            self.ids.copy_(chosen)
        result: Tensor = logits
        return result


class Graph:
    """A captured step, and how its logits agree with the step's that is not."""

    def __init__(self, step: Step, compiled: bool, device: str) -> None:
        ids = step.ids.clone()
        plain = step.run().clone()
        started = time.perf_counter()
        self.compile_failed: str | None = None
        if compiled:
            step.compile()
            try:
                step.run()
            except Exception as error:  # noqa: BLE001 - without a C compiler, say; then as it is
                self.compile_failed = one_line(error)
                step.parts = [begin, block, end]
        self.compile_seconds = time.perf_counter() - started
        self.graphs = step.compiler.graphs
        self.captured = Captured([step.run], 1, device)
        step.ids.copy_(ids)
        self.captured.replay()
        self.cosine = cosine(self.captured.output, plain)
