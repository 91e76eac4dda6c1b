"""What a module of stacked experts computes: found by asking it, for any family alike.

The module's own forward is run on a few random numbers, with small weights in place of its own, and
compared with `besa.kernels.experts.sparse_experts` until an activation gives the same. Numbers that
the activation needs, as a limit or a factor, are among the module's attributes.

>>> from besa.model.checkpoint import Checkpoint
>>> block = Checkpoint.open("path/to/mixture").blocks[0]
>>> found = function_of(block.mlp.experts)
>>> found.activation, found.weights, found.sorted_input
(Activation(function='silu', ...), ('gate_up_proj', 'down_proj'), False)
>>> function_of(block.self_attn) is None
True
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from besa.formats import pack
from besa.kernels.experts import FUNCTIONS, Activation, sparse_experts
from besa.model.blocks import is_transposed

# What is asked with: few experts and tokens, narrow between the products. The model's own width
# is kept, as a forward may name it, but for the first few columns it is zeros.
_EXPERTS, _TOKENS, _INNER, _COLS = 2, 12, 8, 16

# How far gates and projections up spread: to show functions apart, and beyond their limits.
_SPREADS = (1.5, 12.0)

_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExpertFunction:
    """What it takes to compute a module's experts by `sparse_experts`.

    Attributes:
        activation: between the two products.
        weights: the names of the parameters [experts, out, in] of the first and the second one.
        biases: the names of what is added to each, [experts, out], None where nothing is.
        transposed: whether the weights are [experts, in, out].
        sorted_input: whether it is called as Llama 4's experts are: with each token for expert 0,
            then each for expert 1 and so on, weighted by the router. Else with the tokens, the
            numbers of their experts and the weights of these.
    """

    activation: Activation
    weights: tuple[str, str]
    biases: tuple[str | None, str | None]
    transposed: bool
    sorted_input: bool


def function_of(module: nn.Module) -> ExpertFunction | None:
    """What a module of stacked experts computes; None if it is none, or none that can be told.

    Args:
        module: its parameters may be on the meta device.
    """
    parameters = dict(module.named_parameters())
    names = [name for name, each in parameters.items() if each.ndim == 3]
    if len(names) != 2 or len({len(each) for each in parameters.values()}) != 1:
        return None
    transposed = is_transposed(module)
    stacks = [parameters[name].mT if transposed else parameters[name] for name in names]
    (_, rows, hidden), (_, outputs, inner) = (stack.shape for stack in stacks)
    parts, rest = divmod(rows, inner)
    biases = _biases(parameters, (rows, outputs))
    arguments = len(inspect.signature(_forward(module)).parameters) - 1
    if (
        outputs != hidden
        or rest
        or parts not in (1, 2)
        or biases is None
        or arguments not in (1, 3)
    ):
        return None
    form = (names[0], names[1]), biases, transposed, arguments == 1
    questions = [_ask(module, parts, hidden, spread, *form) for spread in _SPREADS]
    numbers = sorted((n for n in vars(module).values() if type(n) is float), reverse=True)
    for activation in _activations(parts == 2, numbers):
        if all(question.is_answered_by(activation) for question in questions):
            return ExpertFunction(activation, *form)
    return None


def _forward(module: nn.Module) -> Any:
    """A module's own forward, not what `use_experts_implementation` puts around it."""
    return inspect.unwrap(type(module).forward)


def _biases(
    parameters: dict[str, nn.Parameter], rows: Sequence[int]
) -> tuple[str | None, str | None] | None:
    """Which parameters are added to each product; None if there are others."""
    found: list[str | None] = [None, None]
    for name, each in parameters.items():
        if each.ndim == 3:
            continue
        fits = [i for i in (0, 1) if each.shape[1:] == (rows[i],) and found[i] is None]
        if not fits:
            return None
        found[fits[0]] = name
    return found[0], found[1]


def _activations(gated: bool, numbers: Sequence[float]) -> Iterator[Activation]:
    """The usual ones first, then those with a module's numbers in them."""
    layouts = (False, True) if gated else (False,)
    shifts = (0.0, 1.0) if gated else (0.0,)
    for limit, alpha, shift in product((None, *numbers), (1.0, *numbers), shifts):
        for function, interleaved in product(FUNCTIONS, layouts):
            if alpha == 1.0 or function == "silu":
                yield Activation(function, gated, interleaved, alpha, limit, shift)


@dataclass(frozen=True, eq=False)
class _Question:
    """Random numbers for `sparse_experts`, and what a module made of them; None if it failed."""

    x: Tensor
    weights: tuple[Any, Any]
    ids: Tensor
    shares: Tensor
    biases: tuple[Tensor | None, Tensor | None]
    answer: Tensor | None

    def is_answered_by(self, activation: Activation) -> bool:
        if self.answer is None:
            return False
        expected = sparse_experts(
            self.x, *self.weights, self.ids, self.shares, activation, *self.biases
        )
        return bool((self.answer - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _ask(
    module: nn.Module,
    parts: int,
    hidden: int,
    spread: float,
    names: tuple[str, str],
    biases: tuple[str | None, str | None],
    transposed: bool,
    sorted_input: bool,
) -> _Question:
    """Runs a module with small random weights in place of its own."""
    chance = torch.Generator("cpu").manual_seed(0)
    # Where a model is loaded, other types and devices may be the usual ones.
    like: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance, **like)

    up = random(_EXPERTS, parts * _INNER, hidden) * spread / _COLS**0.5
    down = random(_EXPERTS, hidden, _INNER) / _INNER**0.5
    added = tuple(
        random(*stack.shape[:2]) if name else None
        for name, stack in zip(biases, (up, down), strict=True)
    )
    x = random(_TOKENS, hidden)
    x[:, _COLS:] = 0
    if sorted_input:
        ids = torch.arange(_EXPERTS, device="cpu").repeat_interleave(_TOKENS // _EXPERTS)[:, None]
        shares = torch.ones(ids.shape, **like)
    else:
        first = torch.arange(_TOKENS, device="cpu") % _EXPERTS
        ids, shares = torch.stack([first, 1 - first], 1), random(_TOKENS, 2).softmax(1)
    own = copy.copy(module)
    own._parameters = {
        name: nn.Parameter(tensor, requires_grad=False)
        for name, tensor in (
            *zip(names, (s.mT.contiguous() if transposed else s for s in (up, down)), strict=True),
            *zip(biases, added, strict=True),
        )
        if name is not None and tensor is not None
    }
    try:
        with torch.no_grad():
            answer = _forward(module)(own, *((x,) if sorted_input else (x, ids, shares)))
    except Exception:  # noqa: BLE001 - what such numbers raise is the module's own affair
        answer = None
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        answer = None
    packed = pack(up.flatten(0, 1)), pack(down.flatten(0, 1))
    return _Question(x, packed, ids, shares, (added[0], added[1]), answer)
