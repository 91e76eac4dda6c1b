"""`besa::sparse_experts` on every instruction set that this CPU has, against dense experts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from besa.formats import pack
from besa.kernels.experts import Activation, sparse_experts

GPT_OSS = Activation("silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0)


def halves(expert: Tensor) -> tuple[Tensor, Tensor]:
    return expert.chunk(2, -1)


# Each activation, written out as models have it, on an expert's rows [tokens, rows].
WRITTEN_OUT = {
    Activation("silu"): lambda h: F.silu(halves(h)[0]) * halves(h)[1],
    Activation("gelu"): lambda h: F.gelu(halves(h)[0]) * halves(h)[1],
    Activation("gelu_tanh"): lambda h: F.gelu(halves(h)[0], approximate="tanh") * halves(h)[1],
    Activation("silu", interleaved=True): lambda h: F.silu(h[:, ::2]) * h[:, 1::2],
    Activation("silu", limit=2.0): lambda h: (
        F.silu(halves(h)[0].clamp(max=2)) * halves(h)[1].clamp(-2, 2)
    ),
    Activation("relu2", gated=False): lambda h: F.relu(h) ** 2,
    GPT_OSS: lambda h: (
        (h[:, 1::2].clamp(-7, 7) + 1)
        * (h[:, ::2].clamp(max=7) * torch.sigmoid(1.702 * h[:, ::2].clamp(max=7)))
    ),
}


def sparse(*shape: int, seed: int, rate: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
    return weight.masked_fill_(torch.rand(shape, generator=generator) < rate, 0)


def dense_experts(x, gate_up, down, ids, weights, act, gate_up_bias=None, down_bias=None):
    """The definition, token by token in float64: [experts, rows, columns] weights."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            if 0 <= expert < len(down):
                bias = None if gate_up_bias is None else gate_up_bias[expert].double()
                h = F.linear(x[token, None].double(), gate_up[expert].double(), bias)
                bias = None if down_bias is None else down_bias[expert].double()
                out[token] += weight * F.linear(act(h), down[expert].double(), bias)[0]
    return out


@pytest.mark.parametrize("activation", WRITTEN_OUT)
@pytest.mark.parametrize("biases", [False, True])
def test_a_layer_of_floats_is_what_its_definition_says(activation: Activation, biases: bool):
    experts, inner, hidden, tokens, k = 5, 19, 37, 9, 3
    gate_up = 4 * sparse(experts, activation.parts * inner, hidden, seed=1)
    down = sparse(experts, hidden, inner, seed=2)
    gate_up_bias = torch.randn(experts, activation.parts * inner) if biases else None
    down_bias = torch.randn(experts, hidden) if biases else None
    x, weights = torch.randn(tokens, hidden), torch.rand(tokens, k)
    ids = torch.randint(-1, experts + 1, (tokens, k))
    result = sparse_experts(
        x, pack(gate_up.flatten(0, 1)), pack(down.flatten(0, 1)), ids, weights, activation,
        gate_up_bias, down_bias,
    )  # fmt: skip
    expected = dense_experts(
        x, gate_up, down, ids, weights, WRITTEN_OUT[activation], gate_up_bias, down_bias
    )
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_the_input():
    experts, inner, hidden, tokens, k = 3, 8, 16, 4, 2
    gate_up, down = (
        sparse(experts, 2 * inner, hidden, seed=1),
        sparse(experts, hidden, inner, seed=2),
    )
    packed = pack(gate_up.flatten(0, 1)), pack(down.flatten(0, 1))
    x, weights, ids = (
        torch.randn(tokens, hidden),
        torch.rand(tokens, k),
        torch.randint(0, experts, (tokens, k)),
    )
    result = sparse_experts(x, *packed, ids, weights, Activation("silu"), weight_input=True)
    expected = sum(
        sparse_experts(
            x * weights[:, i : i + 1],
            *packed,
            ids[:, i : i + 1],
            torch.ones(tokens, 1),
            Activation("silu"),
        )
        for i in range(k)
    )
    torch.testing.assert_close(result, expected)


def test_torch_takes_it_for_a_well_behaved_operator():
    gate_up, down = pack(sparse(3 * 16, 24, seed=1)), pack(sparse(3 * 24, 8, seed=2))
    torch.library.opcheck(
        torch.ops.besa.sparse_experts.default,
        (
            torch.randn(4, 24), torch.randint(0, 3, (4, 2)), torch.rand(4, 2),
            gate_up.values, gate_up.bitmask, gate_up.row_ptr,
            down.values, down.bitmask, down.row_ptr, "silu",
        ),
    )  # fmt: skip
