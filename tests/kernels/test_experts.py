"""`besa::sparse_experts` on every instruction set that this CPU has, against dense experts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from besa.errors import BesaError
from besa.formats import Packed, pack, quantize_int8
from besa.kernels import Activation, native, sparse_experts, sparse_experts_reference
from tests.kernels.damage import DAMAGES, Damage

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
SILU = Activation("silu")
GPT_OSS = Activation("silu", interleaved=True, alpha=1.702, limit=7.0, shift=1.0)

# How far two ways to make the same layer may be apart: what is between the products is rounded to
# these types, and once more to int8.
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 2e-6}
INT8_ROUNDING = 2e-2


def sparse(*shape: int, seed: int) -> Tensor:
    """Random numbers, of which each row keeps another part."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) / math.sqrt(max(1, shape[-1]))
    return weight.masked_fill_(
        torch.rand(shape, generator=generator) < torch.rand(shape[0], 1, generator=generator), 0
    )


def four_bits(weight: Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / 126
    groups = -(-weight.shape[1] // 32)
    steps = torch.full((len(weight), groups), 18, dtype=torch.uint8)
    return pack((weight / scale / 18).round().to(torch.int8), scale, 32, steps)


KINDS: dict[str, Callable[[Tensor], Packed]] = {
    "bfloat16": lambda weight: pack(weight.bfloat16()),
    "float16": lambda weight: pack(weight.half()),
    "float32": pack,
    "int8": lambda weight: pack(*quantize_int8(weight)),
    "int8 in groups": lambda weight: pack(*quantize_int8(weight, 32), 32),
    "int4": four_bits,
}


class Case:
    """The tensors of a layer, and what it makes of them by the operator and otherwise."""

    def __init__(
        self,
        experts: int,
        inner: int,
        hidden: int,
        tokens: int,
        chosen: int,
        activation: Activation = SILU,
        kind: str = "float32",
        dtype: torch.dtype = torch.float32,
        biases: bool = False,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = activation.parts * inner
        self.experts, self.activation = experts, activation
        self.gate_up = KINDS[kind](4 * sparse(experts * rows, hidden, seed=seed + 1))
        self.down = KINDS[kind](sparse(experts * hidden, inner, seed=seed + 2))
        self.x = torch.randn(tokens, hidden, generator=generator).to(dtype)
        # Ids of experts elsewhere, too, and some experts twice.
        self.ids = torch.randint(-1, experts + 1, (tokens, chosen), generator=generator)
        self.weights = torch.rand(tokens, chosen, generator=generator)
        self.biases: tuple[Tensor | None, Tensor | None] = (None, None)
        if biases:
            self.biases = (
                torch.randn(experts, rows, generator=generator).to(dtype),
                torch.randn(experts, hidden, generator=generator).to(dtype),
            )

    def made(self, int8_input: bool = True) -> Tensor:
        return sparse_experts(
            self.x,
            self.gate_up,
            self.down,
            self.ids,
            self.weights,
            self.activation,
            *self.biases,
            int8_input,
        )

    def arguments(self, int8_input: bool = True) -> list[object]:
        """Those of the operator."""
        gate_up, down, a = self.gate_up, self.down, self.activation
        return [
            *(self.x, self.ids, self.weights),
            *(gate_up.values, gate_up.bitmask, gate_up.row_ptr),
            *(down.values, down.bitmask, down.row_ptr),
            *(a.function, a.gated, a.interleaved, a.alpha, a.limit, a.shift),
            *(gate_up.scale, gate_up.steps, self.biases[0]),
            *(down.scale, down.steps, self.biases[1], int8_input),
        ]

    def reference(self, int8_input: bool = True) -> Tensor:
        return sparse_experts_reference(*self.arguments(int8_input))

    def defined(self, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """The definition, token by token in float64."""
        gate_up = self.gate_up.unpack().double().unflatten(0, (self.experts, -1))
        down = self.down.unpack().double().unflatten(0, (self.experts, -1))
        biases = [None if bias is None else bias.double() for bias in self.biases]
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        for token, slot in torch.cartesian_prod(*map(torch.arange, self.ids.shape)).tolist():
            e = int(self.ids[token, slot])
            if 0 <= e < self.experts:
                first, second = (None if bias is None else bias[e] for bias in biases)
                inner = activation(F.linear(self.x[token].double(), gate_up[e], first))
                out[token] += self.weights[token, slot].double() * F.linear(inner, down[e], second)
        return out


def error(result: Tensor, expected: Tensor) -> float:
    size = max(float(expected.double().norm()), 1e-9)
    return float((result.double() - expected.double()).norm()) / size


def gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda rows: function(rows.chunk(2)[0]) * rows.chunk(2)[1]


def gpt_oss(rows: Tensor) -> Tensor:
    """As transformers' `GptOssExperts` has it."""
    gate, up = rows[::2].clamp(max=7), rows[1::2].clamp(-7, 7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


# Each activation, and how a model writes it.
WRITTEN_OUT = {
    SILU: gated(F.silu),
    Activation("gelu"): gated(F.gelu),
    Activation("gelu_tanh"): gated(lambda gate: F.gelu(gate, approximate="tanh")),
    Activation("silu", interleaved=True): lambda rows: F.silu(rows[::2]) * rows[1::2],
    Activation("relu2", gated=False): lambda rows: F.relu(rows) ** 2,
    Activation("silu", gated=False): F.silu,
    GPT_OSS: gpt_oss,
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("activation", WRITTEN_OUT)
@pytest.mark.parametrize("biases", [False, True])
def test_a_layer_is_what_its_definition_says(activation: Activation, biases: bool):
    for tokens in (1, 9, 70):
        case = Case(5, 67, 131, tokens, 3, activation, biases=biases)
        assert error(case.made(), case.defined(WRITTEN_OUT[activation])) < 1e-6


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_type_is_as_near_as_it_allows(kind: str, dtype: torch.dtype):
    for tokens, activation in ((1, SILU), (6, GPT_OSS), (40, SILU)):
        case = Case(4, 96, 200, tokens, 2, activation, kind, dtype, biases=True)
        for int8_input in (True, False) if kind.startswith("int") else (True,):
            quantized = kind.startswith("int") and int8_input
            most = INT8_ROUNDING if quantized else ROUNDING[dtype]
            assert error(case.made(int8_input), case.reference(int8_input)) < most


@pytest.mark.usefixtures("isa")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(0, 60),
    st.integers(1, 8),
    st.sampled_from([SILU, GPT_OSS, Activation("relu2", gated=False)]),
    st.sampled_from(["float32", "bfloat16", "int8", "int4"]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_any_shape(
    experts: int,
    inner: int,
    hidden: int,
    tokens: int,
    chosen: int,
    activation: Activation,
    kind: str,
    biases: bool,
    seed: int,
):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    case = Case(experts, inner, hidden, tokens, chosen, activation, kind, dtype, biases, seed)
    assert error(case.made(), case.reference()) < 5 * ROUNDING[dtype]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [("float32", torch.float32, 1e-6), ("bfloat16", torch.bfloat16, 1e-2)],
)
def test_more_pairs_than_are_worked_on_at_a_time(kind: str, dtype: torch.dtype, most: float):
    case = Case(6, 16, 32, 700, 2, kind=kind, dtype=dtype)
    case.ids[:600, 0] = 2  # of one expert alone, too
    case.ids[:, 1] = torch.where(case.ids[:, 1] == 4, 5, case.ids[:, 1])
    case.ids[:2, 1] = 4  # and one with few
    assert error(case.made(), case.reference()) < most


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 4, 300])
def test_bits_do_not_depend_on_threads_or_runs(tokens: int):
    case = Case(8, 200, 260, tokens, 3, kind="bfloat16", dtype=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results += [case.made() for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("isa")
def test_experts_that_are_all_elsewhere_add_nothing():
    case = Case(4, 16, 32, 5, 2)
    for elsewhere in (-1, 4, 2**40, -(2**40)):
        case.ids = torch.full((5, 2), elsewhere)
        assert torch.equal(case.made(), torch.zeros(5, 32))
    case.ids = torch.full((5, 2), 3, dtype=torch.int32)
    assert error(case.made(), case.reference()) < 1e-6


@pytest.mark.usefixtures("isa")
def test_nan_and_infinity_stay_with_their_token():
    case = Case(2, 16, 32, 4, 2, GPT_OSS)
    case.ids[:] = torch.tensor([0, 1])
    case.x[1, 3], case.x[2, 3] = math.nan, math.inf
    result = case.made()
    assert result[1].isnan().any()
    assert not result[2].isfinite().all()
    assert result[[0, 3]].isfinite().all()


def test_weights_of_the_input():
    case = Case(3, 8, 16, 4, 2)
    given = (case.gate_up, case.down)
    result = sparse_experts(case.x, *given, case.ids, case.weights, SILU, weight_input=True)
    expected = sum(
        sparse_experts(case.x * weight, *given, ids, torch.ones(4, 1), SILU)
        for ids, weight in zip(case.ids.split(1, 1), case.weights.split(1, 1), strict=True)
    )
    torch.testing.assert_close(result, expected)


def test_without_the_library_torch_makes_the_same(monkeypatch: pytest.MonkeyPatch):
    case = Case(4, 16, 32, 9, 2, GPT_OSS, biases=True)
    expected = case.reference()
    monkeypatch.setattr(native, "library", lambda: None)
    assert error(case.made(), expected) < 1e-6


# ---------------------------------------------------------------------------- what does not fit


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("which", ["gate_up", "down"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error(damage: Damage, which: str, tokens: int):
    case = Case(2, 16, 32, tokens, 2)
    case.ids[:] = torch.tensor([0, 1])
    arguments, at = case.arguments(), 3 if which == "gate_up" else 6
    packed = getattr(case, which)
    arguments[at : at + 3] = damage(packed.values.clone(), packed.bitmask.clone(), packed.row_ptr)
    with pytest.raises(BesaError, match="corrupt"):
        torch.ops.besa.sparse_experts(*arguments)


def test_what_does_not_fit_is_refused():
    case = Case(3, 16, 32, 4, 2, biases=True)
    given = case.arguments()
    for at, wrong, word in [
        (0, case.x[:, :20], "no stacked weights"),
        (0, case.x[0], "x must be"),
        (0, case.x.int(), "x must be"),
        (1, case.ids[:3], "expert_ids"),
        (1, case.ids.float(), "expert_ids"),
        (2, case.weights[:, :1], "expert_weights"),
        (2, case.weights.int(), "expert_weights"),
        (4, given[4][:-1], "no stacked weights"),
        (5, given[5][:-1], "row_ptr"),
        (7, given[7][:32], "bias"),
        (9, "swish", "function"),
        (10, False, "interleave|bitmask"),
        (17, case.biases[0][:1], "bias"),
        (15, torch.ones(96, 1), "scale"),
    ]:
        with pytest.raises(ValueError, match=word):
            torch.ops.besa.sparse_experts(*given[:at], wrong, *given[at + 1 :])


# ------------------------------------------------------------------------------ as torch's op


def test_torch_takes_it_for_a_well_behaved_operator():
    for kind in ("float32", "int8"):
        case = Case(3, 8, 24, 4, 2, GPT_OSS, kind, biases=True)
        torch.library.opcheck(torch.ops.besa.sparse_experts.default, case.arguments())


@pytest.mark.slow
def test_compiled_as_a_whole():
    case = Case(3, 16, 24, 6, 2, GPT_OSS)

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return sparse_experts(x * 2, case.gate_up, case.down, ids, weights, GPT_OSS).relu() + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 6):
        given = case.x[:tokens], case.ids[:tokens], case.weights[:tokens]
        assert torch.equal(compiled(*given), layer(*given))
