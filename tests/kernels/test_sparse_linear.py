"""`besa::sparse_linear` on every instruction set that this CPU has, against dense products.

test_arm.py runs the products' tests on those of Arm's CPUs.

Whole numbers small enough that float32 sums of them are exact in any order show every misplaced
weight; random ones show the rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from besa.errors import BesaError
from besa.formats import Packed, pack, quantize_int8
from besa.kernels import dense_linear, nibbles, sparse_linear, sparse_linear_reference
from besa.kernels.isa import ISAS, available
from tests.helpers import PATIENCE
from tests.kernels.damage import DAMAGES, Damage

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
HERE = available()

# Tokens around the borders of the kernels' blocks and of the tile's.
TOKENS = [1, 2, 3, 4, 5, 6, 7, 11, 16, 17, 18, 24, 65, 70]

pytestmark = pytest.mark.skipif(not HERE, reason="no native kernels here")


def whole(*shape: int, most: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).float()


def uneven(rows: int, cols: int, seed: int, most: int = 4) -> Tensor:
    """A weight of small whole numbers whose rows have from none to all of their weights."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(rows, 1, generator=generator)
    rates[:: max(1, rows // 3)] = 0.0
    rates[1 :: max(2, rows // 3)] = 1.0
    weight = whole(rows, cols, most=most, seed=seed + 1)
    weight[torch.rand(rows, cols, generator=generator) < rates] = 0
    return weight


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result = x.double() @ weight.double().T
    return (result if bias is None else result + bias.double()).to(x.dtype)


SHAPES = [(1, 1), (3, 7), (5, 33), (64, 128), (67, 131), (130, 512), (9, 1030)]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("values", FLOATS)
@pytest.mark.parametrize("inputs", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_whole_numbers_are_exact(
    values: torch.dtype, inputs: torch.dtype, shape: tuple[int, int]
):
    weight = uneven(*shape, seed=shape[1]).to(values)
    packed, bias = pack(weight), whole(shape[0], most=9, seed=3).to(inputs)
    for tokens in TOKENS:
        x = whole(tokens, shape[1], most=3, seed=tokens).to(inputs)
        expected = exact(x, weight, bias)
        assert torch.equal(sparse_linear(x, packed, bias), expected), tokens
        assert torch.equal(dense_linear(x, weight, bias), expected), tokens


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("inputs", FLOATS)
@pytest.mark.parametrize("int8_input", [True, False])
def test_int8_products_are_exact(group_size: int | None, inputs: torch.dtype, int8_input: bool):
    for rows, cols in SHAPES:
        weight = uneven(rows, cols, seed=cols, most=2).to(torch.int8)
        groups = 1 if group_size is None else -(-cols // group_size)
        scale = 2.0 ** whole(rows, groups, most=1, seed=5)  # powers of two keep sums exact
        packed = pack(weight, scale, group_size)
        dense = packed.unpack()
        for tokens in (1, 2, 6, 7, 17, 23):
            x = whole(tokens, cols, most=2, seed=tokens).to(inputs)
            if int8_input:
                x[:, 0] = 127  # a token's scale is 1
            result = sparse_linear(x, packed, None, int8_input)
            assert torch.equal(result, exact(x, dense)), tokens


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("inputs", FLOATS)
@pytest.mark.parametrize("int8_input", [True, False])
def test_int4_products_are_exact(group_size: int | None, inputs: torch.dtype, int8_input: bool):
    for rows, cols in SHAPES:
        numbers = uneven(rows, cols, seed=cols, most=7).to(torch.int8)
        groups = 1 if group_size is None else -(-cols // group_size)
        generator = torch.Generator().manual_seed(cols)
        steps = torch.randint(1, 19, (rows, groups), generator=generator).to(torch.uint8)
        scale = 2.0 ** whole(rows, 1, most=1, seed=5) / 64
        packed = pack(numbers, scale, group_size, steps)
        dense = packed.unpack()
        for tokens in (1, 2, 6, 7, 17, 23):
            x = whole(tokens, cols, most=2, seed=tokens).to(inputs)
            if int8_input:
                x[:, 0] = 127  # a token's scale is 1
            result = sparse_linear(x, packed, None, int8_input)
            assert torch.equal(result, exact(x, dense)), tokens


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("values", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(70, 300, 4500), (140, 300, 4500), (1030, 20, 70)])
def test_more_rows_columns_and_tokens_than_a_tile_has(
    values: torch.dtype, shape: tuple[int, int, int]
):
    tokens, rows, cols = shape
    weight = uneven(rows, cols, seed=2, most=2).to(values)
    x = whole(tokens, cols, most=3, seed=3).bfloat16()
    x[:, 0] = 127  # a token's scale is 1
    scale = torch.ones(rows, 1) if values == torch.int8 else None
    assert torch.equal(sparse_linear(x, pack(weight, scale)), exact(x, weight))
    assert torch.equal(dense_linear(x, weight, scale=scale), exact(x, weight))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 8])
def test_int8_sums_may_be_larger_than_int32(tokens: int):
    weight = torch.full((2, 140_000), 127, dtype=torch.int8)
    x = torch.full((tokens, 140_000), 127.0)
    assert torch.equal(sparse_linear(x, pack(weight, torch.ones(2, 1))), exact(x, weight))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("values", [*FLOATS, torch.int8])
@pytest.mark.parametrize("inputs", FLOATS)
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_random_products_are_as_near_as_their_types_allow(
    values: torch.dtype, inputs: torch.dtype, tokens: int
):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 1000, generator=generator)
    weight[torch.rand(96, 1000, generator=generator) < 0.6] = 0
    packed = pack(*quantize_int8(weight)) if values == torch.int8 else pack(weight.to(values))
    x, bias = torch.randn(tokens, 1000, generator=generator).to(inputs), torch.randn(96).to(inputs)
    expected = exact(x, packed.unpack(), bias).double()
    for int8_input in (True, False) if values == torch.int8 else (False,):
        result = sparse_linear(x, packed, bias, int8_input).double()
        error = float((result - expected).norm() / expected.norm())
        rounding = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}[inputs]
        assert error < (2e-2 if int8_input else rounding)
        oracle = sparse_linear_reference(
            x, packed.values, packed.bitmask, packed.row_ptr, packed.scale, bias, int8_input
        )
        error = float((result - oracle.double()).norm() / expected.norm())
        assert error < rounding


@pytest.mark.usefixtures("isa")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 300),
    st.integers(0, 20),
    st.sampled_from(FLOATS),
    st.integers(0, 10_000),
)
def test_any_shape(rows: int, cols: int, tokens: int, values: torch.dtype, seed: int):
    weight = uneven(rows, cols, seed).to(values) if rows else torch.zeros(0, cols, dtype=values)
    x = whole(tokens, cols, most=3, seed=seed)
    assert torch.equal(sparse_linear(x, pack(weight)), exact(x, weight))


@pytest.mark.usefixtures("isa")
def test_leading_shapes_and_layouts():
    weight = uneven(24, 40, seed=1)
    packed = pack(weight)
    for shape in [(40,), (2, 3, 40), (0, 40), (2, 0, 40), (1, 1, 1, 40)]:
        x = whole(*shape, most=3, seed=2)
        result = sparse_linear(x, packed)
        assert result.shape == (*shape[:-1], 24)
        assert torch.equal(result, exact(x, weight))
    x = whole(40, 9, most=3, seed=3).T
    assert torch.equal(sparse_linear(x, packed), exact(x, weight))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 5, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_go_through(tokens: int, dtype: torch.dtype):
    weight = uneven(12, 70, seed=4).to(dtype)
    weight[2, 5], weight[3, 69] = float("inf"), float("nan")
    x = whole(tokens, 70, most=3, seed=5).abs().to(dtype) + 1
    expected = torch.nn.functional.linear(x, weight)
    assert expected[:, 3].isnan().all()
    assert expected[:, 2].isinf().all()
    torch.testing.assert_close(sparse_linear(x, pack(weight)), expected, equal_nan=True)
    x[0, 1] = float("nan")
    assert sparse_linear(x, pack(weight))[0].isnan().all()
    quantized = pack(*quantize_int8(uneven(12, 70, seed=4)))
    result = sparse_linear(x, quantized)
    assert result[0].isnan().all()
    assert result[1:].isfinite().all()


@pytest.mark.usefixtures("isa")
def test_a_token_of_zeros():
    packed = pack(*quantize_int8(uneven(12, 70, seed=4), 32), group_size=32)
    assert torch.equal(sparse_linear(torch.zeros(3, 70), packed), torch.zeros(3, 12))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 4, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_or_runs(tokens: int, dtype: torch.dtype):
    weight = torch.randn(700, 520, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[weight.abs() < 0.6] = 0
    packed, x = pack(weight), torch.randn(tokens, 520).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results += [sparse_linear(x, packed) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("isa")
def test_several_python_threads_at_once():
    weights = [uneven(200, 300, seed=i) for i in range(8)]
    packed = [pack(weight) for weight in weights]
    x = whole(3, 300, most=3, seed=9)

    def work(i: int) -> bool:
        return all(
            torch.equal(sparse_linear(x, packed[i]), exact(x, weights[i])) for _ in range(30)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# -------------------------------------------------------------------------- damaged weights


def parts(packed: Packed) -> list[Tensor]:
    return [packed.values.clone(), packed.bitmask.clone(), packed.row_ptr.clone()]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error(damage: Damage, dtype: torch.dtype, tokens: int):
    given = damage(*parts(pack(uneven(16, 64, seed=1).to(dtype))))
    with pytest.raises(BesaError, match="corrupt"):
        torch.ops.besa.sparse_linear(torch.ones(tokens, 64, dtype=dtype), *given)


@pytest.mark.usefixtures("isa")
@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False))
def test_random_damage_neither_crashes_nor_goes_unseen(random):
    rows, cols = random.randint(1, 12), random.randint(1, 300)
    weight = uneven(rows, cols, seed=random.randint(0, 99))
    int4 = random.random() < 0.5
    if int4:
        values, mask, row_ptr = nibbles.pack(weight.to(torch.int8))
    else:
        values, mask, row_ptr = parts(pack(weight))
    for _ in range(random.randint(1, 4)):
        kind = random.choice(["mask", "row_ptr", "values"])
        if kind == "mask":
            mask.view(-1)[random.randrange(mask.numel())] = random.randint(0, 255)
        elif kind == "row_ptr":
            size = random.choice([1, 100, 2**62])
            row_ptr[random.randrange(rows + 1)] = random.randint(-size, size)
        else:
            values = values[: random.randint(0, values.numel())]
    lengths = values_by_row(mask, cols, 2 if int4 else 1)
    sound = torch.equal(row_ptr.diff(), lengths) and row_ptr[0] >= 0
    sound = sound and row_ptr[-1] <= values.numel()
    x = torch.ones(random.choice([1, 2, 18]), cols)
    whole = (torch.ones(rows, 1), None, True, torch.ones(rows, 1, dtype=torch.uint8))
    arguments = (x, values, mask, row_ptr, *(whole if int4 else ()))
    if sound:
        torch.ops.besa.sparse_linear(*arguments)
    else:
        with pytest.raises(BesaError):
            torch.ops.besa.sparse_linear(*arguments)


def values_by_row(mask: Tensor, cols: int, kinds: int) -> Tensor:
    """How many of the most numerous kind, of which each has 64 columns in turn: int64 [rows]."""
    bits = ((mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)[:, :cols]
    padded = torch.nn.functional.pad(bits, (0, -cols % (64 * kinds)))
    return padded.view(len(mask), -1, kinds, 64).sum((1, 3)).amax(1)


def test_what_does_not_fit_is_refused():
    packed = pack(uneven(16, 64, seed=1))
    x, given = torch.ones(2, 64), (packed.values, packed.bitmask, packed.row_ptr)
    op = torch.ops.besa.sparse_linear
    for wrong, word in [
        ((x[:, :50], *given), "columns"),
        ((x.int(), *given), "x must be"),
        ((x, given[0].double(), *given[1:]), "values"),
        ((x, given[0], given[1].int(), given[2]), "bitmask"),
        ((x, given[0], given[1].T.contiguous().T, given[2]), "bitmask"),
        ((x, *given[:2], given[2].int()), "row_ptr"),
        ((x, *given[:2], given[2][:-1]), "row_ptr"),
        ((x, *given, torch.ones(16, 1)), "scale"),
        ((x, given[0].to(torch.int8), *given[1:]), "scale"),
        ((x, given[0].to(torch.int8), *given[1:], torch.ones(16, 9)), "group"),
        ((x, *given, None, torch.ones(15)), "bias"),
    ]:
        with pytest.raises(ValueError, match=word):
            op(*wrong)


# ------------------------------------------------------------------------------ as torch's op


def test_torch_takes_it_for_a_well_behaved_operator():
    packed = pack(uneven(16, 64, seed=1))
    given = (packed.values, packed.bitmask, packed.row_ptr)
    int8 = pack(*quantize_int8(uneven(16, 64, seed=1)))
    for args in [
        (torch.ones(2, 64), *given),
        (torch.ones(3, 2, 64, dtype=torch.bfloat16), *given, None, torch.ones(16)),
        (torch.ones(1, 64), int8.values, int8.bitmask, int8.row_ptr, int8.scale),
    ]:
        torch.library.opcheck(torch.ops.besa.sparse_linear.default, args)


@pytest.mark.slow
def test_compiled_as_a_whole():
    packed, weight = pack(uneven(16, 64, seed=1)), uneven(16, 64, seed=1)

    def block(x: Tensor) -> Tensor:
        return sparse_linear(x * 2, packed).relu() + 1

    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (1, 5, 20):
        x = whole(tokens, 64, most=3, seed=tokens)
        assert torch.equal(compiled(x), exact(x * 2, weight).relu() + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("values", [*FLOATS, torch.int8])
def test_cuda(values: torch.dtype):
    weight = uneven(67, 131, seed=1)
    packed = pack(*quantize_int8(weight)) if values == torch.int8 else pack(weight.to(values))
    for tokens in (1, 20):
        x, bias = torch.randn(tokens, 131), torch.randn(67)
        expected = sparse_linear(x, packed, bias, int8_input=False)
        result = sparse_linear(x.cuda(), packed.to("cuda"), bias.cuda(), int8_input=False)
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------- in a process


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("name", HERE)
def test_the_environment_forces_an_instruction_set(name: str):
    code = """
from besa.kernels.isa import chosen_isa, isa_number
print(*chosen_isa(), sep="|"), print(isa_number())
"""
    lines = python(code, BESA_ISA=name).stdout.splitlines()
    assert lines == [f"{name}|BESA_ISA={name}", str(ISAS.index(name))]


def test_an_instruction_set_that_is_none():
    process = python("from besa.kernels.isa import chosen_isa; chosen_isa()", BESA_ISA="sse9")
    assert "BesaError: BESA_ISA=sse9 is none of portable, avx2, avx2_vnni, avx512, " in (
        process.stderr
    )


def test_one_openmp_runtime_in_the_process():
    code = """
import json, torch
from besa.formats import pack
from besa.kernels import sparse_linear
weight = torch.randn(2048, 512).relu()
sparse_linear(torch.randn(40, 512), pack(weight)), weight @ weight.T
found = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line}
print(json.dumps(sorted(found)))
"""
    process = python(code, OMP_NUM_THREADS="2")
    runtimes = [name for name in json.loads(process.stdout) if ".so" in name]
    assert len([name for name in runtimes if "libgomp" in name or "libiomp" in name]) == 1
