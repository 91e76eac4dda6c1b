"""A mixture's packed experts as a module: what its dense one computes, and the files' tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from besa.formats import Packed, pack, quantize_int4, quantize_int8
from besa.formats.experts import SparseExperts, Stack
from besa.kernels.experts import Activation
from tests.helpers import same_bytes

HIDDEN = 24


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[SparseExperts, dict[str, Tensor], dict[str, Packed]]:
    """Experts, their two weights [experts * out, in], and the packed parts that they are made of.

    Either in stacks, or each expert's gate, projection up and down apart, in any order.
    """
    count, inner = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    values = draw(st.sampled_from(("float32", "bfloat16", "int8", "int4")))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def packed(rows: int, cols: int) -> Packed:
        weight = torch.randn(rows, cols, generator=chance) * (torch.rand(rows, 1) < 0.8)
        weight[torch.rand(rows, cols, generator=chance) < 0.5] = 0
        if values == "int8":
            return pack(*quantize_int8(weight))
        if values == "int4":
            numbers, scale, steps = quantize_int4(weight, 32)
            return pack(numbers, scale, 32, steps)
        return pack(weight.to(getattr(torch, values)))

    dense = nn.Module()
    dense.up = nn.Parameter(torch.zeros(count, 2 * inner, HIDDEN))
    dense.bias = nn.Parameter(torch.randn(count, 2 * inner, generator=chance))
    dense.down = nn.Parameter(torch.zeros(count, HIDDEN, inner))
    parts: dict[str, Packed] = {}
    ups: dict[str, Tensor] = {}
    downs: dict[str, Tensor] = {}
    if draw(st.booleans()):
        parts = {"up": packed(2 * count * inner, HIDDEN), "down": packed(count * HIDDEN, inner)}
        ups, downs = ({name: torch.arange(parts[name].shape[0])} for name in ("up", "down"))
    else:
        for expert in draw(st.permutations(range(count))):
            for half, name in enumerate((f"{expert}.w1.weight", f"{expert}.w3.weight")):
                parts[name] = packed(inner, HIDDEN)
                ups[name] = torch.arange(inner) + (2 * expert + half) * inner
            name = f"{expert}.w2.weight"
            parts[name] = packed(HIDDEN, inner)
            downs[name] = torch.arange(HIDDEN) + expert * HIDDEN
    whole: dict[str, Tensor] = {}
    for own, stack in (("up", ups), ("down", downs)):
        whole[own] = torch.zeros(dense.get_parameter(own).flatten(0, 1).shape)
        for name, rows in stack.items():
            whole[own][rows] = parts[name].unpack(torch.float32)
    stacks = Stack("up", ups, "bias"), Stack("down", downs)
    module = SparseExperts(dense, stacks, parts, Activation("silu"), int8_input=False)
    return module.eval(), whole, parts


@settings(max_examples=25)
@given(mixtures(), st.integers(1, 6), st.integers(1, 3))
def test_it_is_its_dense_experts(
    mixture: tuple[SparseExperts, dict[str, Tensor], dict[str, Packed]], tokens: int, chosen: int
):
    module, whole, parts = mixture
    count = module.num_experts
    up, down = (whole[name].unflatten(0, (count, -1)) for name in ("up", "down"))
    x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, chosen)
    ids = torch.randint(count, (tokens, chosen))
    expected = torch.zeros(tokens, HIDDEN)
    for token in range(tokens):
        for slot, expert in enumerate(ids[token].tolist()):
            gate, rows = (up[expert] @ x[token] + module.bias[expert]).chunk(2)
            out = down[expert] @ (nn.functional.silu(gate) * rows)
            expected[token] += weights[token, slot] * out
    torch.testing.assert_close(module(x, ids, weights), expected, rtol=1e-4, atol=1e-4)

    state = module.state_dict()
    stored = {f"{name}_values": part.values for name, part in parts.items()}
    stored |= {f"{name}_bitmask": part.bitmask for name, part in parts.items()}
    assert {"bias", *stored} <= state.keys()
    assert all(same_bytes(state[name], tensor) for name, tensor in stored.items())
    dense = module.to_dense(torch.float32)
    assert dense.up.equal(up)
    assert dense.down.equal(down)


@given(mixtures())
@settings(max_examples=10)
def test_moves_and_casts_leave_values_alone(
    mixture: tuple[SparseExperts, dict[str, Tensor], dict[str, Packed]],
):
    module, _, _ = mixture
    before = [weight.values.clone() for weight in module.packed]
    other = copy.deepcopy(module).to(torch.float64).to(torch.bfloat16)
    assert other.dtype == other.bias.dtype == torch.bfloat16
    assert all(same_bytes(w.values, b) for w, b in zip(other.packed, before, strict=True))
    assert {name: t.shape for name, t in other.state_dict().items()} == {
        name: t.shape for name, t in module.state_dict().items()
    }


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_that_are_sorted_by_expert(bias: bool):
    """Every token for expert 0, then for expert 1: zeros where it does not go there."""
    dense = nn.Module()
    dense.up = nn.Parameter(torch.randn(3, 8, HIDDEN))
    if bias:
        dense.added = nn.Parameter(torch.randn(3, 8))
    dense.down = nn.Parameter(torch.randn(3, HIDDEN, 4))
    parts = {name: pack(dense.get_parameter(name).flatten(0, 1)) for name in ("up", "down")}
    stacks = [
        Stack("up", {"up": torch.arange(24)}, "added" if bias else None),
        Stack("down", {"down": torch.arange(3 * HIDDEN)}),
    ]
    module = SparseExperts(dense, stacks, parts, Activation("gelu"), sorted_input=True)
    x = torch.randn(3, 5, HIDDEN)
    x[0, 1:4], x[2, 0] = 0, 0
    rows = torch.einsum("eoi,eti->eto", dense.up, x) + (dense.added[:, None] if bias else 0)
    gate, up = rows.chunk(2, -1)
    expected = torch.einsum("eoi,eti->eto", dense.down, nn.functional.gelu(gate) * up)
    torch.testing.assert_close(
        module(x.flatten(0, 1)), expected.detach().flatten(0, 1), atol=1e-4, rtol=1e-4
    )
