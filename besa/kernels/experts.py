"""A mixture's experts with packed weights: the torch operator `besa::sparse_experts`.

    y[t] = Σ_k weight[t, k] · down_e(act(gate_e(x[t]), up_e(x[t]))),   e = id[t, k]

Two experts of 4 → 2·1 → 4, of which a token takes the second:

>>> from besa.formats import pack
>>> gate_up = pack(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 9, 0], [0, 0, 0, 2]]))
>>> down = pack(torch.tensor([[1.0], [0], [0], [0], [0], [0], [3], [0]]))
>>> x, ids, weights = torch.ones(1, 4), torch.tensor([[1]]), torch.tensor([[0.5]])
>>> sparse_experts(x, gate_up, down, ids, weights, Activation("relu2"))
tensor([[  0.,   0., 243.,   0.]])

The weights of all experts are stacked: the rows of one lie together, in `gate_up` those of its gate
and its projection up. Only the rows of experts that a token takes are read. Works under
torch.compile; records no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.kernels import linear, native
from besa.kernels.abi import EXPERT_FUNCTIONS, Experts
from besa.kernels.describe import describe
from besa.kernels.linear import PackedWeight, contiguous, job_of, raise_problem

# What a gate goes through; silu has a factor within its sigmoid, see `Activation.alpha`.
FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "relu2": lambda x, _: F.relu(x).square(),
}


@dataclass(frozen=True)
class Activation:
    """What an expert does between its two products: function(gate) · (up + shift).

    GPT-OSS's clamped SwiGLU is `Activation("silu", interleaved=True, alpha=1.702, limit=7.0,
    shift=1.0)`.

    >>> Activation("silu")(torch.tensor([[2.0, 0.0, 1.0, 5.0]]))    # two gates, two projections up
    tensor([[1.7616, 0.0000]])

    Attributes:
        function: one of `FUNCTIONS`.
        gated: False: there are no projections beside the gates, and the result is function(gate).
        interleaved: gates are the even rows of `gate_up`, and projections up the odd ones; else the
            first half of an expert's rows are gates.
        alpha: silu is gate · sigmoid(alpha · gate).
        limit: a gate is at most this; a projection up at most this, and at least its negative.
            None: there is none.
        shift: is added to the projection up.

    Raises:
        ValueError: if there is no such function, or nothing to interleave.
    """

    function: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(f"function is {self.function}, but must be one of {list(FUNCTIONS)}")
        if self.interleaved and not self.gated:
            raise ValueError("without projections up there is nothing to interleave")

    @property
    def parts(self) -> int:
        """How many rows of `gate_up` make one column of `down`."""
        return 2 if self.gated else 1

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., parts · inner] to [..., inner], of the same type, in float32 between."""
        gate, up = rows.float(), None
        if self.interleaved:
            gate, up = gate[..., ::2], gate[..., 1::2]
        elif self.gated:
            gate, up = gate.chunk(2, -1)
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up if up is None else up.clamp(-self.limit, self.limit)
        result = FUNCTIONS[self.function](gate, self.alpha)
        return (result if up is None else result * (up + self.shift)).to(rows.dtype)


def sparse_experts(
    x: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    expert_ids: Tensor,
    expert_weights: Tensor,
    activation: Activation,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    int8_input: bool = True,
    weight_input: bool = False,
) -> Tensor:
    """The weighted sum of what each token's experts make of it.

    Products are those of `besa.kernels.sparse_linear`, with results of x's type; the sum over the
    experts of a token is float32, of a fixed order.

    Args:
        x: [tokens, hidden], bfloat16, float16 or float32.
        gate_up: the weight [experts · 2 · inner, hidden]; [experts · inner, hidden] without gates.
        down: the weight [experts · hidden, inner].
        expert_ids: int64 or int32 [tokens, k]; another number than those of the experts here is of
            an expert that is elsewhere, and adds nothing.
        expert_weights: floating point [tokens, k].
        gate_up_bias: [experts, 2 · inner].
        down_bias: [experts, hidden].
        int8_input: as `sparse_linear` has it.
        weight_input: what an expert gets is multiplied by its weight, not what it gives.

    Returns:
        [tokens, hidden], of x's type.

    Raises:
        ValueError: if shapes, types or devices do not fit.
        BesaError: if a packed weight is corrupt.
    """
    if weight_input:  # as many tokens as there are pairs, with an expert each
        tokens, chosen = expert_ids.shape
        x = (x.unsqueeze(1) * expert_weights.unsqueeze(2)).to(x.dtype).flatten(0, 1)
        expert_ids = expert_ids.reshape(-1, 1)
        expert_weights = torch.ones_like(expert_ids, dtype=torch.float32)
    result: Tensor = torch.ops.besa.sparse_experts(
        x,
        expert_ids,
        expert_weights,
        gate_up.values,
        gate_up.bitmask,
        gate_up.row_ptr,
        down.values,
        down.bitmask,
        down.row_ptr,
        activation.function,
        activation.gated,
        activation.interleaved,
        activation.alpha,
        activation.limit,
        activation.shift,
        gate_up.scale,
        gate_up.steps,
        gate_up_bias,
        down.scale,
        down.steps,
        down_bias,
        int8_input,
    )
    if weight_input:
        result = result.unflatten(0, (tokens, chosen)).sum(1, dtype=torch.float32).to(x.dtype)
    return result


class Weight(NamedTuple):
    """A packed weight, of one expert or of all of them, with its bias: `linear.Parts`."""

    values: Tensor
    bitmask: Tensor
    row_ptr: Tensor
    scale: Tensor | None
    steps: Tensor | None
    bias: Tensor | None


class Layer(NamedTuple):
    """What the operator is called with, checked."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    gate_up: Weight
    down: Weight
    activation: Activation
    experts: int
    int8_input: bool


def sparse_experts_reference(*arguments: Any, **more: Any) -> Tensor:
    """`besa::sparse_experts` in plain torch: the kernels' oracle, float32 within a product."""
    return _by_expert(_layer(*arguments, **more), linear.sparse_linear_reference)


def _expanded(*arguments: Any, **more: Any) -> Tensor:
    """One expert after the other, on any device."""
    return _by_expert(_layer(*arguments, **more), torch.ops.besa.sparse_linear)


def _sparse_experts_cpu(*arguments: Any, **more: Any) -> Tensor:
    layer, library = _layer(*arguments, **more), native.library()
    if library is None:
        return _by_expert(layer, torch.ops.besa.sparse_linear)
    x, activation = layer.x.contiguous(), layer.activation
    out, dtype = torch.empty_like(x), x.dtype
    ids, weights = layer.ids.long().contiguous(), layer.weights.float().contiguous()
    gate_up, down = contiguous(layer.gate_up, dtype), contiguous(layer.down, dtype)
    rows, hidden = len(layer.gate_up.bitmask) // layer.experts, x.shape[1]
    job = Experts(
        gate_up=job_of(gate_up, rows, hidden, dtype, layer.int8_input),
        down=job_of(down, hidden, rows // activation.parts, dtype, layer.int8_input),
        ids=ids.data_ptr(),
        weights=weights.data_ptr(),
        chosen=ids.shape[1],
        experts=layer.experts,
        function=EXPERT_FUNCTIONS.index(activation.function),
        gated=activation.gated,
        interleaved=activation.interleaved,
        alpha=activation.alpha,
        limit=math.inf if activation.limit is None else activation.limit,
        shift=activation.shift,
    )
    job.gate_up.tokens, job.gate_up.input, job.down.output = len(x), x.data_ptr(), out.data_ptr()
    raise_problem(library.besa_sparse_experts(job))
    return out


def _by_expert(layer: Layer, product: Callable[..., Tensor]) -> Tensor:
    """The layer by a product of the signature of `besa::sparse_linear`."""
    x = layer.x

    def times(rows: Tensor, weight: Weight, expert: int) -> Tensor:
        values, bitmask, row_ptr, scale, steps, bias = _part(weight, expert, layer.experts)
        return product(rows, values, bitmask, row_ptr, scale, bias, layer.int8_input, steps)

    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, tokens, slots in _chosen(layer.ids, layer.experts):
        inner = layer.activation(times(x[tokens], layer.gate_up, expert))
        outputs = times(inner, layer.down, expert).float()
        total.index_add_(0, tokens, outputs * layer.weights[tokens, slots, None].float())
    return total.to(x.dtype)


def _part(stacked: Weight, expert: int, experts: int) -> Weight:
    """The rows of one of so many experts."""
    values, bitmask, row_ptr, scale, steps, bias = stacked
    rows = len(bitmask) // experts
    own = slice(expert * rows, (expert + 1) * rows)
    pointers = row_ptr[own.start : own.stop + 1]
    begin, end = (max(0, int(pointer)) for pointer in pointers[[0, -1]])
    return Weight(
        values[begin:end],
        bitmask[own],
        pointers - begin,
        None if scale is None else scale[own],
        None if steps is None else steps[own],
        None if bias is None else bias[expert],
    )


def _chosen(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that is chosen, with the tokens that it serves and their slots for it."""
    for expert in ids.unique().tolist():
        if 0 <= expert < experts:
            yield expert, *(ids == expert).nonzero(as_tuple=True)


def _layer(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up_values: Tensor,
    gate_up_bitmask: Tensor,
    gate_up_row_ptr: Tensor,
    down_values: Tensor,
    down_bitmask: Tensor,
    down_row_ptr: Tensor,
    function: str,
    gated: bool = True,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    shift: float = 0.0,
    gate_up_scale: Tensor | None = None,
    gate_up_steps: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_scale: Tensor | None = None,
    down_steps: Tensor | None = None,
    down_bias: Tensor | None = None,
    int8_input: bool = True,
) -> Layer:
    """The operator's arguments in order, once shapes and types are found to fit."""
    activation = Activation(function, gated, interleaved, alpha, limit, shift)
    if x.ndim != 2:
        raise ValueError(f"x must be [tokens, hidden], not {describe(x)}")
    tokens, hidden = x.shape
    if expert_ids.dtype not in (torch.int64, torch.int32) or expert_ids.shape[:-1] != (tokens,):
        raise ValueError(
            f"expert_ids must be int64 or int32 [{tokens}, k], not {describe(expert_ids)}"
        )
    if not expert_weights.is_floating_point() or expert_weights.shape != expert_ids.shape:
        raise ValueError(
            f"expert_weights must be floating point {list(expert_ids.shape)}, not "
            f"{describe(expert_weights)}"
        )
    experts, rest = divmod(len(down_bitmask), max(1, hidden))
    if experts == 0 or rest or len(gate_up_bitmask) % (experts * activation.parts):
        raise ValueError(
            f"gate_up has {len(gate_up_bitmask)} rows and down {len(down_bitmask)}: no stacked "
            f"weights of experts for {hidden} columns"
        )
    gate_up = Weight(
        gate_up_values,
        gate_up_bitmask,
        gate_up_row_ptr,
        gate_up_scale,
        gate_up_steps,
        gate_up_bias,
    )
    down = Weight(down_values, down_bitmask, down_row_ptr, down_scale, down_steps, down_bias)
    inner = x.new_empty(0, len(gate_up_bitmask) // (experts * activation.parts))
    for inputs, weight in ((x, gate_up), (inner, down)):
        linear.check(
            inputs,
            weight.values,
            weight.bitmask,
            weight.row_ptr,
            weight.scale,
            None,
            weight.steps,
        )
        bias, width = weight.bias, len(weight.bitmask) // experts
        if bias is not None and (bias.shape != (experts, width) or not bias.is_floating_point()):
            raise ValueError(
                f"bias must be floating point [{experts}, {width}], not {describe(bias)}"
            )
    for tensor in (expert_ids, expert_weights, gate_up_bias, down_bias):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, but other arguments on {tensor.device}")
    return Layer(x, expert_ids, expert_weights, gate_up, down, activation, experts, int8_input)


def _fake(x: Tensor, *_rest: object, **_more: object) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY = torch.library.Library("besa", "FRAGMENT")
_LIBRARY.define(
    "sparse_experts(Tensor x, Tensor expert_ids, Tensor expert_weights, "
    "Tensor gate_up_values, Tensor gate_up_bitmask, Tensor gate_up_row_ptr, "
    "Tensor down_values, Tensor down_bitmask, Tensor down_row_ptr, "
    "str function, bool gated=True, bool interleaved=False, float alpha=1.0, "
    "float? limit=None, float shift=0.0, "
    "Tensor? gate_up_scale=None, Tensor? gate_up_steps=None, Tensor? gate_up_bias=None, "
    "Tensor? down_scale=None, Tensor? down_steps=None, Tensor? down_bias=None, "
    "bool int8_input=True) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
_LIBRARY.impl("sparse_experts", _sparse_experts_cpu, "CPU")
_LIBRARY.impl("sparse_experts", _expanded, "CUDA")
torch.library.register_fake("besa::sparse_experts", _fake, lib=_LIBRARY)
