"""Where a model can be rotated, found by running it, never by a family's name.

The residual stream x of a model with norms that only scale (RMSNorm) can be rotated, x Q: what
reads the stream through such a norm undoes it (W Q), what writes to it does it (Q^T W), and the
function stays (Ashkboos et al., SliceGPT, arXiv 2401.15024). So can the values within each head,
which the output projection undoes, because attention only adds them up.

What reads and what writes is guessed here from shapes and from who gives whom a tensor. Whether the
guess holds, `besa.rotation.rotate` sees from the logits.

>>> from transformers import AutoModelForCausalLM
>>> found = structure_of(AutoModelForCausalLM.from_pretrained("path/to/model"))
>>> found.sites[0].norm, [reader.name for reader in found.sites[0].readers][0]
('model.layers.0.input_layernorm', 'model.layers.0.self_attn.q_proj.weight')
>>> found.writers[0].name
'model.layers.0.self_attn.o_proj.weight'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from besa.model.blocks import expert_count, find_blocks, find_linears
from besa.model.observe import products

_TOKENS = 8  # of the run that shows the structure


@dataclass(frozen=True)
class Matrix:
    """A weight of the model, by its name; `transposed` if it is stored [inputs, outputs]."""

    name: str
    transposed: bool = False

    def of(self, model: nn.Module) -> Tensor:
        """A view [..., outputs, inputs] of it."""
        weight = model.get_parameter(self.name).data
        return weight.mT if self.transposed else weight

    def bias(self, model: nn.Module) -> Tensor | None:
        """What is added to its outputs, [..., outputs]; None if nothing is."""
        owner, _, own = self.name.rpartition(".")
        module = model.get_submodule(owner)
        bias = getattr(module, "bias" if own == "weight" else f"{own}_bias", None)
        return bias.data if isinstance(bias, Tensor) else None


@dataclass(frozen=True)
class Site:
    """A norm of the residual stream, and what reads it.

    Attributes:
        norm: its name.
        neutral: what its weight is when it only scales: 1, or 0 where it is added to 1.
        readers: the weights that are multiplied with what it gives.
    """

    norm: str
    neutral: float
    readers: tuple[Matrix, ...]


@dataclass(frozen=True)
class Heads:
    """Values and what reads them.

    Attributes:
        value: [heads of values × size, width].
        output: [width, heads × size].
        size: of a head.
    """

    value: Matrix
    output: Matrix
    size: int


@dataclass(frozen=True)
class Structure:
    """What a rotation touches.

    Attributes:
        width: of the residual stream.
        sites: norms and their readers, the model's head among them; empty where the stream cannot
            be rotated.
        writers: the weights that add to the stream, without the embedding.
        heads: in each block, what may be values and their readers by its shape.
    """

    width: int
    sites: tuple[Site, ...]
    writers: tuple[Matrix, ...]
    heads: tuple[Heads, ...]


@torch.no_grad()
def structure_of(model: Any) -> Structure:
    """Runs a model on a few tokens, and sees who reads and who writes its residual stream."""
    width = model.get_input_embeddings().weight.shape[1]
    matrices = _matrices(model, width)
    norms = {name: module for name, module in model.named_modules() if _is_norm(module, width)}
    readers: dict[str, list[Matrix]] = {name: [] for name in norms}
    writers: list[Matrix] = []
    unclear = False
    last: tuple[str, Tensor] | None = None  # the norm that ran last, and what it gave

    def on_norm(name: str, output: Tensor) -> None:
        nonlocal last
        last = name, output

    def on_product(matrix: Matrix, inputs: Tensor) -> None:
        nonlocal unclear
        rows, cols = matrix.of(model).shape[-2:]
        of_norm = last is not None and _is_part(inputs, last[1])
        if cols == width and (rows != width or of_norm):
            if last is None:
                unclear = True
            elif matrix not in readers[last[0]]:
                readers[last[0]].append(matrix)
        elif rows == width and matrix not in writers:
            writers.append(matrix)

    with ExitStack() as stack:
        for name, norm in norms.items():
            hook = norm.register_forward_hook(lambda m, i, output, name=name: on_norm(name, output))
            stack.callback(hook.remove)
        stack.enter_context(observing(model, matrices, on_product))
        device = model.get_input_embeddings().weight.device
        model(input_ids=torch.arange(_TOKENS, device=device).unsqueeze(0), use_cache=False)

    sites = [
        Site(name, neutral, tuple(found))
        for name, found in readers.items()
        if found and (neutral := _neutral(norms[name], width)) is not None
    ]
    # A norm that nothing reads stands behind a block's linears, and what it gives is the stream.
    scaled = len(sites) == len(norms)
    heads = _heads(model, [reader for found in readers.values() for reader in found], writers)
    if unclear or not scaled:
        return Structure(width, (), (), heads)
    return Structure(width, tuple(sites), tuple(writers), heads)


def _is_part(inputs: Tensor, output: Tensor) -> bool:
    """Whether inputs are what a norm gave, or some tokens of it, as experts get them."""
    if inputs.shape[-1] != output.shape[-1] or not inputs.numel():
        return False
    first = inputs.reshape(-1, inputs.shape[-1])[0]
    return bool((output == first).all(-1).any())


def _matrices(model: Any, width: int) -> list[Matrix]:
    """All weights that may read the stream or write to it; fused experts among them."""
    name, blocks = find_blocks(model)
    experts = expert_count(model.config)
    transposed = {
        f"{name}.{index}.{linear.parameter}": linear.transposed
        for index, block in enumerate(blocks)
        for linear in find_linears(block, f"{name}.{index}", experts, strict=False)
    }
    embedding = model.get_input_embeddings().weight
    return [
        Matrix(own, transposed.get(own, False))
        for own, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim >= 2
        and width in parameter.shape[-2:]
        and (parameter is not embedding or own.rpartition(".")[0] == _head(model))
    ]


def _head(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether it has one weight, as wide as the stream, and nothing else."""
    parameters = dict(module.named_parameters())
    return list(parameters) == ["weight"] and tuple(parameters["weight"].shape) == (width,)


def _neutral(norm: nn.Module, width: int) -> float | None:
    """The weight with which a norm only scales its inputs; None if none does it."""
    weight = norm.get_parameter("weight")
    before = weight.data.clone()
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    expected = x / x.float().square().mean(-1, keepdim=True).sqrt().to(x.dtype)
    try:
        for value in (1.0, 0.0):
            weight.data.fill_(value)
            if torch.allclose(norm(x), expected, rtol=1e-2, atol=1e-2):
                return value
    finally:
        weight.data.copy_(before)
    return None


def _heads(model: Any, readers: list[Matrix], writers: list[Matrix]) -> tuple[Heads, ...]:
    """Pairs of values and outputs by their shapes, in each block; of queries and keys, too."""
    config = model.config.get_text_config()
    count = getattr(config, "num_attention_heads", None)
    if not isinstance(count, int):
        return ()
    name, blocks = find_blocks(model)
    found = []
    for index in range(len(blocks)):
        prefix = f"{name}.{index}."
        outputs = [x for x in writers if x.name.startswith(prefix) and x.of(model).ndim == 2]
        sources = [x for x in readers if x.name.startswith(prefix) and x.of(model).ndim == 2]
        for output in outputs:
            size, rest = divmod(output.of(model).shape[1], count)
            for source in sources:
                rows = source.of(model).shape[0]
                if not rest and size > 1 and rows % size == 0 and count % (rows // size) == 0:
                    found.append(Heads(source, output, size))
    return tuple(found)


def observing(
    model: nn.Module, matrices: Sequence[Matrix], report: Callable[[Matrix, Tensor], None]
) -> products[Matrix]:
    """While it is entered, reports each product of a model's weights, with its inputs."""
    weights = {matrix: model.get_parameter(matrix.name) for matrix in matrices}
    return products(weights, lambda matrix, inputs, weight, turned: report(matrix, inputs))
