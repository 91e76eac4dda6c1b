"""Learns rotations after which few weights of a row carry most of its importance.

The importance of a weight is w^2 times the square of its input's norm, as Wanda has it. What is
minimized over rotations is the entropy of each row's normalized importance, summed over all rows
(the idea of DenoiseRotator, arXiv 2505.23049, whose rotations stay in the model at run time; these
are folded into it). A rotation is the exponential of a skew matrix, which Adam moves.

>>> w = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
>>> entropy(w, torch.ones(2))
tensor(0.6931)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from besa.rotation.apply import values_in
from besa.rotation.structure import Matrix, Structure, observing

STEPS = 100
_SIZE = 0.005  # Adam's, of the skew matrix's entries


@dataclass(frozen=True)
class Statistics:
    """What the importance of weights needs to know of their inputs.

    Attributes:
        stream: X^T X behind each norm, float32 [width, width], by the norm's name.
        inputs: the same of what an output projection reads, [heads, size, size], by its name.
        squares: sums of squares of all other writers' inputs, [cols], by name.
    """

    stream: dict[str, Tensor]
    inputs: dict[str, Tensor]
    squares: dict[str, Tensor]


@dataclass(frozen=True)
class Rotations:
    """What was learned.

    Attributes:
        stream: [width, width]; None where the stream is not rotated.
        heads: [heads of values, size, size] for each pair of the structure.
    """

    stream: Tensor | None
    heads: list[Tensor]


@torch.no_grad()
def statistics_of(model: Any, structure: Structure, windows: Tensor) -> Statistics:
    """Runs a model whose gains are folded on windows, one at a time."""
    stream: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    first = {site.readers[0]: site.norm for site in structure.sites}  # the others read the same
    sizes = {heads.output: heads.size for heads in structure.heads}
    values = () if structure.sites else [heads.value for heads in structure.heads]

    def on_product(matrix: Matrix, given: Tensor) -> None:
        x = given.reshape(-1, given.shape[-1]).float()
        if matrix in first:
            _add(stream, first[matrix], x.T @ x)
        elif matrix in sizes:
            parts = x.unflatten(1, (-1, sizes[matrix])).transpose(0, 1)
            _add(inputs, matrix.name, parts.mT @ parts)
        elif not matrix.transposed and matrix.of(model).ndim == 2:
            _add(squares, matrix.name, x.square().sum(0))

    watched = dict.fromkeys([*first, *structure.writers, *values, *sizes])
    with observing(model, list(watched), on_product):
        for window in windows:
            model(input_ids=window.unsqueeze(0), use_cache=False, logits_to_keep=1)
    return Statistics(stream, inputs, squares)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def entropy(weight: Tensor, squares: Tensor) -> Tensor:
    """Of the normalized importance of each row, summed over the rows of [..., rows, cols].

    Args:
        squares: of the inputs' norms, [cols].
    """
    importance = weight.square() * squares
    shares = importance / importance.sum(-1, keepdim=True).clamp_min(1e-20)
    return -(shares * (shares + 1e-12).log()).sum()


def learn_rotations(
    model: Any,
    structure: Structure,
    statistics: Statistics,
    steps: int = STEPS,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Rotations:
    """The rotations that make what a row's weights carry most uneven.

    Args:
        model: its gains are folded if the stream is to be rotated.
        statistics: of the same model.
        on_step: is told of the steps done, and in all.
    """
    device = model.get_input_embeddings().weight.device
    width = structure.width
    stream = torch.zeros(width, width, device=device) if structure.sites else None
    heads = [
        torch.zeros(values_in(model, one), one.size, one.size, device=device)
        for one in structure.heads
    ]
    skews = [skew.requires_grad_() for skew in (*([] if stream is None else [stream]), *heads)]
    optimizer = torch.optim.Adam(skews, lr=_SIZE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _SIZE * (1 + math.cos(math.pi * step / steps)) / 2
        found = [_rotation(skew) for skew in skews]
        # Gradients gather on copies, so that no graph is larger than that of one matrix.
        leaves = [rotation.detach().requires_grad_() for rotation in found]
        q = None if stream is None else leaves[0]
        r = leaves[len(leaves) - len(heads) :]
        for term in _terms(model, structure, statistics, q, r):
            term.backward()
        torch.autograd.backward(found, [leaf.grad for leaf in leaves])
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, steps)
    with torch.no_grad():
        found = [_rotation(skew) for skew in skews]
    return Rotations(None if stream is None else found[0], found[len(found) - len(heads) :])


def _rotation(skew: Tensor) -> Tensor:
    return torch.matrix_exp(skew - skew.mT)


def _terms(
    model: Any,
    structure: Structure,
    statistics: Statistics,
    q: Tensor | None,
    r: list[Tensor],
) -> Iterator[Tensor]:
    """The entropy of each weight as it would be rotated."""
    of_value = {one.value: (one, own) for one, own in zip(structure.heads, r, strict=True)}
    of_output = {one.output: (one, own) for one, own in zip(structure.heads, r, strict=True)}

    def value(matrix: Matrix, weight: Tensor) -> Tensor:
        if matrix not in of_value:
            return weight
        one, own = of_value[matrix]
        return (own.mT @ weight.unflatten(0, (-1, one.size))).flatten(0, 1)

    for site in structure.sites:
        assert q is not None
        gram = statistics.stream[site.norm]
        for reader in site.readers:
            squares = (q * (gram @ q)).sum(0)
            yield entropy(value(reader, reader.of(model).float() @ q), squares)
    for matrix in () if structure.sites else of_value:
        yield entropy(value(matrix, matrix.of(model).float()), statistics.squares[matrix.name])
    for matrix in structure.writers if structure.sites else of_output:
        weight = matrix.of(model).float()
        if matrix in of_output:
            one, own = of_output[matrix]
            gram = statistics.inputs[matrix.name]
            shared = own.repeat_interleave(len(gram) // len(own), 0)
            columns = weight.unflatten(1, (-1, one.size)).transpose(0, 1) @ shared
            weight = columns.transpose(0, 1).flatten(1)
            squares = (shared * (gram @ shared)).sum(1).flatten()
        elif matrix.name in statistics.squares:
            squares = statistics.squares[matrix.name]
        else:
            continue  # fused experts, whose inputs differ
        yield entropy(weight if q is None else q.T @ weight, squares)
