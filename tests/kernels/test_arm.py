"""The kernels for Arm, cross-compiled and emulated, by the tests of those for this CPU.

Reading past an array's end is a crash (see remote.cpp). Emulation says nothing about speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from besa.kernels import linear, packing
from besa.kernels.abi import ISAS
from tests.kernels import arm, test_sparse_linear
from tests.kernels.test_sparse_linear import (  # noqa: F401
    test_any_shape,
    test_damage_is_an_error,
    test_int4_products_are_exact,
    test_int8_products_are_exact,
    test_leading_shapes_and_layouts,
    test_products_of_whole_numbers_are_exact,
    test_random_damage_neither_crashes_nor_goes_unseen,
    test_random_products_are_as_near_as_their_types_allow,
)

# Each instruction set, and one of QEMU's processors that has it and none after it.
CPUS = {"neon": "cortex-a53", "neon_dot": "neoverse-n1", "neon_bf16": "max"}

# Tokens around the borders of blocks, of the tile's, and between the two.
TOKENS = [1, 2, 3, 5, 7, 16, 17, 19, 22]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(arm.missing() is not None, reason=str(arm.missing())),
]


@pytest.fixture(scope="module", params=CPUS)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products are made on an emulated processor, by one of its instruction sets."""
    library = arm.emulated(CPUS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "native", SimpleNamespace(library=lambda: library))
        patch.setattr(linear, "isa_number", lambda: ISAS.index(request.param))
        patch.setattr(test_sparse_linear, "TOKENS", TOKENS)
        yield


@pytest.mark.parametrize("name", CPUS)
def test_a_processor_takes_the_last_that_it_has(name: str):
    library = arm.emulated(CPUS[name])
    has = [each for i, each in enumerate(ISAS) if library.besa_isas() >> i & 1]
    assert has == ["portable", *list(CPUS)[: list(CPUS).index(name) + 1]]
    assert ISAS[library.besa_best_isa()] == name
    missing = [i for i in range(len(ISAS)) if not library.besa_isas() >> i & 1]
    for number in missing:
        assert library.besa_sparse_linear(linear.Job(isa=number)) == 2  # lacks the instructions


# (instruction set, type of values, tokens): instructions a weight, as in test_instructions.py.
COUNTS = {
    ("neon", "bfloat16", 1): 1.96,
    ("neon", "bfloat16", 4): 3.55,
    ("neon", "bfloat16", 64): 40.2,
    ("neon", "int8", 1): 1.66,
    ("neon_dot", "int8", 1): 1.42,
    ("neon_dot", "int8", 64): 12.0,
    ("neon_bf16", "bfloat16", 1): 1.56,
    ("neon_bf16", "bfloat16", 4): 2.21,
    ("neon_bf16", "bfloat16", 64): 15.8,
}


@pytest.mark.parametrize(("isa", "dtype", "tokens"), COUNTS)
def test_no_more_instructions_than_it_took(isa: str, dtype: str, tokens: int):
    if arm.counter() is None:
        pytest.skip("QEMU takes no plugin of version 1")
    count, expected = arm.instructions(isa, dtype, tokens), COUNTS[isa, dtype, tokens]
    assert 0.7 * expected < count < 1.1 * expected, f"{count:.3f} instructions a weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_packing_and_back(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    weight = torch.randint(-9, 10, (23, 77)).relu().to(dtype)
    expected = packing.pack_mask_reference(weight)
    library = arm.emulated("cortex-a53")
    monkeypatch.setattr(packing, "native", SimpleNamespace(library=lambda: library))
    monkeypatch.setattr(packing, "chosen_isa", lambda: ("neon", ""))
    mask, row_ptr = packing.pack_mask(weight)
    assert torch.equal(mask, expected[0])
    assert torch.equal(row_ptr, expected[1])
    values = packing.compress(weight, mask, row_ptr)
    assert torch.equal(values, weight[weight != 0])
    assert torch.equal(packing.expand(values, mask, row_ptr, 77), weight)
