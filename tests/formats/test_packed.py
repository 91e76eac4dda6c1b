"""Packing and unpacking, native and reference, against numpy on bit patterns."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from besa.errors import BesaError
from besa.formats import FormatError, Packed, pack, quantize_int8
from besa.kernels import native, packing
from besa.kernels.abi import ISAS

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="no C++ compiler, so no native kernels",
)
every_path = pytest.mark.parametrize(
    "path",
    [
        pytest.param("native", marks=needs_compiler),
        pytest.param("portable", marks=needs_compiler),
        "reference",
    ],
)
every_dtype = pytest.mark.parametrize("dtype", packing.DTYPES, ids=str)

# Unsigned and signed integers of each type's size, and its bits that tell a zero.
BITS = {
    torch.bfloat16: (np.uint16, torch.int16, 0x7FFF),
    torch.float16: (np.uint16, torch.int16, 0x7FFF),
    torch.float32: (np.uint32, torch.int32, 0x7FFFFFFF),
    torch.int8: (np.uint8, torch.int8, 0xFF),
}
# ±0, the least and the largest denormal, ±infinity, and NaNs quiet and signalling with payloads.
SPECIAL = {
    torch.bfloat16: [0, 0x8000, 1, 0x807F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFD5],
    torch.float16: [0, 0x8000, 1, 0x83FF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFE55],
    torch.float32: [0, 1 << 31, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFC12345],
    torch.int8: [0, 0x80, 1, 0xFF, 0x7F],
}


@contextmanager
def using(path: str) -> Iterator[None]:
    """One of the implementations; a context, because hypothesis and fixtures do not mix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BESA_ISA", raising=False)
        if path == "portable":
            patch.setenv("BESA_ISA", "portable")
        if path == "reference":
            patch.setattr(native, "library", lambda: None)
        else:
            for name in ("pack_mask", "row_pointers", "compress", "expand"):
                patch.setattr(packing, f"{name}_reference", None)  # must not serve
        yield


def patterns(dtype: torch.dtype, shape: tuple[int, int], density: float, seed: int) -> np.ndarray:
    """Any bits at all, a quarter of them special; and zeros of both signs."""
    rng = np.random.default_rng(seed)
    unsigned, _, magnitude = BITS[dtype]
    bits = rng.integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True)
    special = np.array(SPECIAL[dtype], unsigned)
    bits = np.where(rng.random(shape) < 0.25, rng.choice(special, shape), bits)
    zeros = rng.choice(np.array([0, magnitude + 1], np.uint64).astype(unsigned), shape)
    return np.where(rng.random(shape) < density, bits, zeros)


def tensor(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    _, signed, _ = BITS[dtype]
    return torch.from_numpy(bits.copy()).view(signed).view(dtype)


def bits_of(weight: Tensor) -> np.ndarray:
    unsigned, signed, _ = BITS[weight.dtype]
    return weight.view(signed).numpy().view(unsigned)


def random_weight(rows: int, cols: int, density: float = 0.5, dtype=torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    return (weight * (torch.rand(rows, cols, generator=generator) < density)).to(dtype)


def ones(rows: int, groups: int) -> Tensor:
    return torch.ones(rows, groups)


def scale_for(dtype: torch.dtype, rows: int) -> Tensor | None:
    return ones(rows, 1) if dtype == torch.int8 else None


@every_path
@given(
    dtype=st.sampled_from(packing.DTYPES),
    rows=st.integers(0, 5),
    cols=st.integers(0, 70) | st.integers(120, 300),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_equals_numpy_and_comes_back(path, dtype, rows, cols, density, seed):
    bits = patterns(dtype, (rows, cols), density, seed)
    keep = (bits & BITS[dtype][2]) != 0
    with using(path):
        packed = pack(tensor(bits, dtype), scale_for(dtype, rows))
        back = packed.unpack_values()
        loaded = Packed.from_tensors(packed.values, packed.bitmask, cols, packed.scale)

    np.testing.assert_array_equal(bits_of(packed.values), bits[keep])
    expected = np.packbits(keep, axis=1, bitorder="little")
    np.testing.assert_array_equal(packed.bitmask.numpy(), expected, strict=True)
    row_ptr = np.concatenate([[0], np.cumsum(keep.sum(1))])
    np.testing.assert_array_equal(packed.row_ptr.numpy(), row_ptr, strict=True)
    np.testing.assert_array_equal(loaded.row_ptr.numpy(), row_ptr, strict=True)

    assert (back.dtype, back.shape) == (dtype, (rows, cols))
    np.testing.assert_array_equal(bits_of(back), np.where(keep, bits, 0))
    assert packed.shape == (rows, cols)
    assert packed.density == pytest.approx(keep.mean() if keep.size else 0)


@every_path
@every_dtype
def test_special_values(path, dtype):
    bits = np.array([SPECIAL[dtype]], BITS[dtype][0])
    with using(path):
        packed = pack(tensor(bits, dtype), scale_for(dtype, 1))
        back = bits_of(packed.unpack_values())
    zeros = 1 if dtype == torch.int8 else 2
    np.testing.assert_array_equal(bits_of(packed.values), bits[0, zeros:])
    np.testing.assert_array_equal(back[0], [0] * zeros + SPECIAL[dtype][zeros:])


@every_path
def test_denormals_survive_a_processor_that_takes_them_for_zeros(path):
    bits = np.array([[1, 0x80000001, 0, 0x007FFFFF]], np.uint32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        with using(path):
            back = pack(tensor(bits, torch.float32)).unpack()
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(bits_of(back), bits)


@every_path
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_has_even_rows(path, n, m):
    weight = torch.randn(6, 120).view(6, -1, m)
    kept = weight.abs().topk(n, dim=2).indices
    weight = torch.zeros_like(weight).scatter(2, kept, weight.gather(2, kept)).view(6, 120).half()
    with using(path):
        packed = pack(weight)
        assert torch.equal(packed.unpack(), weight)
    assert packed.row_ptr.tolist() == [r * 120 * n // m for r in range(7)]
    assert torch.equal(packed.values.view(6, -1), weight[weight != 0].view(6, -1))


@every_path
@every_dtype
def test_any_layout(path, dtype):
    plain = tensor(patterns(dtype, (77, 40), 0.5, 0), dtype)
    spread = torch.empty(77, 80, dtype=dtype)
    spread[:, ::2] = plain
    with using(path):
        expected = packing.pack_mask(plain)
        values = packing.compress(plain, *expected)
        for other in (plain.t().contiguous().t(), spread[:, ::2]):
            assert not other.is_contiguous()
            assert all(map(torch.equal, packing.pack_mask(other), expected))
            for packed in (
                packing.compress(other, *expected),
                pack(other, scale_for(dtype, 77)).values,
            ):
                np.testing.assert_array_equal(bits_of(packed), bits_of(values))


@every_path
def test_every_byte_is_counted(path):
    bitmask = torch.arange(256, dtype=torch.uint8)
    expected = [bin(byte).count("1") for byte in range(256)]
    with using(path):
        assert packing.row_pointers(bitmask[:, None]).diff().tolist() == expected
        for width in (7, 8, 9, 256):
            total = sum(expected[:width])
            assert packing.row_pointers(bitmask[None, :width]).tolist() == [0, total]
        assert packing.row_pointers(bitmask.view(16, 16).t()).tolist()[-1] == sum(expected)


def test_references_in_chunks(monkeypatch):
    weight = random_weight(10, 30)
    bitmask, row_ptr = packing.pack_mask_reference(weight)
    values = packing.compress_reference(weight, bitmask, row_ptr)
    for chunk in (1, 61, 90):  # one, two and three rows at a time
        monkeypatch.setattr(packing, "_CHUNK", chunk)
        assert torch.equal(packing.pack_mask_reference(weight)[0], bitmask)
        assert torch.equal(packing.compress_reference(weight, bitmask, row_ptr), values)
        assert torch.equal(packing.expand_reference(values, bitmask, row_ptr, 30), weight)


@needs_compiler
@pytest.mark.parametrize("path", ["native", "portable"])
@every_dtype
def test_the_same_on_any_threads(monkeypatch, path, dtype):
    weight = tensor(patterns(dtype, (37, 517), 0.5, 0), dtype)
    expected = packing.pack_mask_reference(weight)
    values = packing.compress_reference(weight, *expected)
    dense = packing.expand_reference(values, *expected, 517)
    monkeypatch.setattr(packing, "_ELEMENTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            with using(path):
                assert all(map(torch.equal, packing.pack_mask(weight), expected))
                assert torch.equal(packing.row_pointers(expected[0]), expected[1])
                got = packing.compress(weight, *expected)
                np.testing.assert_array_equal(bits_of(got), bits_of(values))
                got = packing.expand(values, *expected, 517)
                np.testing.assert_array_equal(bits_of(got), bits_of(dense))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("last", "best", "wanted", "used"),
    [
        ("avx512_amx", "avx512_amx", "avx512_bf16", "avx512_bf16"),
        ("avx512_amx", "avx512_amx", None, "avx512_amx"),
        ("avx512_dpbf16", "avx512_dpbf16", "portable", "portable"),
        ("avx512_dpbf16", "avx512_dpbf16", "avx2", "avx2"),
        ("avx512_dpbf16", "avx512_dpbf16", "avx512", "avx512"),
        ("avx512_dpbf16", "avx512_dpbf16", "avx512_bf16", "avx512_bf16"),
        ("avx512_dpbf16", "avx512_dpbf16", None, "avx512_dpbf16"),
        ("avx512_dpbf16", "avx512_bf16", None, "avx512_bf16"),
        ("avx2_vnni", "avx2_vnni", None, "avx2_vnni"),
        ("avx2", "avx2", "portable", "portable"),
        ("avx2", "avx2", None, "avx2"),
        ("avx2", "avx2", "avx512", BesaError),
        ("portable", "portable", None, "portable"),
        ("portable", "portable", "avx2", BesaError),
    ],
)
def test_the_environment_can_forbid_avx512(monkeypatch, last, best, wanted, used):
    """On CPUs that have the instruction sets up to `last` and are fastest with `best`."""
    calls = []
    library = SimpleNamespace(
        besa_isas=lambda: (2 << ISAS.index(last)) - 1,
        besa_best_isa=lambda: ISAS.index(best),
        besa_row_pointers=lambda *arguments: calls.append(arguments),
    )
    monkeypatch.setattr(native, "library", lambda: library)
    monkeypatch.delenv("BESA_ISA", raising=False)
    if wanted is not None:
        monkeypatch.setenv("BESA_ISA", wanted)
    bitmask = torch.zeros(2, 2, dtype=torch.uint8)
    if used is BesaError:
        with pytest.raises(BesaError, match=f"BESA_ISA={wanted}, but this CPU has portable"):
            packing.row_pointers(bitmask)
    else:
        packing.row_pointers(bitmask)
        assert calls[0][-1] == ISAS.index(used)


# ---- what is not sound ---------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("bitmask", "row_ptr", "n_values"),
    [
        ([[0xFF] * 10] * 3, [0, 2, 4, 6], 6),  # more bits than values
        ([[1] * 10] * 3, [0, 11, 22, 33], 33),  # fewer
        ([[1] * 10] * 3, [0, 10, 20, 30], 29),  # values cut short
        ([[1] * 10] * 3, [0, 10, 20, 30], 31),
        ([[1] * 9 + [0x80]] * 3, [0, 10, 20, 30], 30),  # a bit past the 77 columns
        ([[1] * 10] * 3, [1, 11, 21, 31], 31),
        ([[1] * 10] * 3, [0, 20, 10, 30], 30),
        ([[1] * 10] * 3, [0, -10, 0, 10], 10),
        ([[1] * 10] * 3, [0, 1 << 40, 1 << 41, 30], 30),
    ],
)
def test_native_code_stays_within_its_arrays(isa, size, bitmask, row_ptr, n_values):
    """The C functions alone, on arrays between guards, given what Python would refuse or not."""
    guard = 512
    weight = np.full(3 * 77 * size, 7, np.uint8)

    def guarded(bytes_: int) -> np.ndarray:
        return np.full(bytes_ + 2 * guard, 0xA5, np.uint8)

    def within(array: np.ndarray) -> int:
        return array.ctypes.data + guard

    bits, pointers = np.array(bitmask, np.uint8), np.array(row_ptr, np.int64)
    values, dense = guarded(n_values * size), guarded(3 * 77 * size)
    common = (3, 77, size, n_values, 2, ISAS.index(isa))
    layout = (bits.ctypes.data, pointers.ctypes.data)
    for function, source, target in (
        ("besa_compress", weight.ctypes.data, values),
        ("besa_expand", within(values), dense),
    ):
        status = getattr(native.library(), function)(source, *layout, within(target), *common)
        assert status == 1
        assert (target[:guard] == 0xA5).all()
        assert (target[-guard:] == 0xA5).all()


@every_path
def test_kernels_refuse_what_disagrees(path):
    weight = random_weight(3, 77)
    with using(path):
        bitmask, row_ptr = packing.pack_mask(weight)
        values = packing.compress(weight, bitmask, row_ptr)
        flipped, stray, moved, beyond = bitmask.clone(), bitmask.clone(), *row_ptr.repeat(2, 1)
        flipped[1, 3] ^= 4
        stray[2, -1] |= 0x80
        moved[1] += 1
        beyond[-1] = 1 << 40
        for bits, pointers in (
            (flipped, row_ptr),
            (stray, row_ptr),
            (stray, packing.row_pointers(stray)),
            (bitmask, moved),
            (bitmask, beyond),
            (bitmask, -row_ptr),
        ):
            message = "past its 77 columns" if bits is stray else "disagree"
            with pytest.raises(ValueError, match=message):
                packing.compress(weight, bits, pointers)
            with pytest.raises(ValueError, match=message):
                packing.expand(values, bits, pointers, 77)
        for wrong in (values[:-1], torch.cat([values, values[:1]])):
            with pytest.raises(ValueError, match="disagree"):
                packing.expand(wrong, bitmask, row_ptr, 77)


@every_path
@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("pack_mask", (torch.ones(4),), "weight must be a matrix"),
        ("pack_mask", (torch.ones(2, 2).double(),), "float64"),
        ("pack_mask", (torch.ones(2, 2).to_sparse(),), "weight must be"),
        ("row_pointers", (torch.ones(2, 2).int(),), "bitmask must be a uint8 matrix"),
        ("row_pointers", (torch.ones(2).byte(),), "bitmask must be a uint8 matrix"),
        ("compress", (torch.ones(2, 9), torch.ones(2, 1).byte(), torch.arange(3)), "bitmask is"),
        ("compress", (torch.ones(2, 8), torch.ones(3, 1).byte(), torch.arange(4)), "bitmask is"),
        ("compress", (torch.ones(2, 8), torch.ones(2, 1).byte(), torch.arange(2)), "row_ptr must"),
        ("compress", (torch.ones(2, 8), torch.ones(2, 1).byte(), torch.ones(3)), "row_ptr must"),
        ("expand", (torch.ones(2, 1), torch.ones(2, 1).byte(), torch.arange(3), 8), "values must"),
        ("expand", (torch.ones(2), torch.ones(2, 1).byte(), torch.arange(3), 9), "bitmask is"),
        ("expand", (torch.ones(2), torch.ones(2, 0).byte(), torch.arange(3), -1), "bitmask is"),
    ],
)
def test_kernels_name_wrong_arguments(path, function, arguments, message):
    suffix = "_reference" if path == "reference" else ""
    with pytest.raises(ValueError, match=message):
        getattr(packing, function + suffix)(*arguments)


def parts(group_size: int | None = None) -> dict[str, object]:
    """The arguments of `from_tensors` for an int8 weight [5, 77]."""
    packed = pack(*quantize_int8(random_weight(5, 77), group_size), group_size)
    return {
        "values": packed.values,
        "bitmask": packed.bitmask,
        "in_features": 77,
        "scale": packed.scale,
        "group_size": group_size,
    }


def with_stray_bit(bitmask: Tensor) -> Tensor:
    bitmask = bitmask.clone()
    bitmask[0, -1] |= 1 << 5  # column 77
    return bitmask


def with_element(scale: Tensor, element: float) -> Tensor:
    scale = scale.clone()
    scale[4, 0] = element
    return scale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda t: {"values": t["values"][:-1]}, "values has"),
        (lambda t: {"values": t["values"][:0]}, "values has 0 elements"),
        (lambda t: {"values": torch.cat([t["values"], t["values"]])}, "values has"),
        (lambda t: {"values": t["values"].int()}, "values is torch.int32"),
        (lambda t: {"values": t["values"][:, None]}, "values is"),
        (lambda t: {"values": t["values"].repeat_interleave(2)[::2]}, "values is not contiguous"),
        (lambda t: {"values": t["values"].half()}, "scale and group_size are for int8"),
        (lambda t: {"values": t["values"].half(), "scale": None}, None),
        (lambda t: {"bitmask": t["bitmask"][:-1]}, "scale is"),
        (lambda t: {"bitmask": t["bitmask"][:, :-1].contiguous()}, "bitmask is"),
        (lambda t: {"bitmask": t["bitmask"].flatten()}, "bitmask is"),
        (lambda t: {"bitmask": t["bitmask"].char()}, "bitmask is torch.int8"),
        (lambda t: {"bitmask": t["bitmask"].t().contiguous().t()}, "bitmask is not contiguous"),
        (lambda t: {"bitmask": t["bitmask"].to("meta")}, "bitmask is .* on meta"),
        (lambda t: {"bitmask": with_stray_bit(t["bitmask"])}, "bitmask has bits set past its 77"),
        (lambda t: {"bitmask": torch.zeros_like(t["bitmask"])}, "bitmask 0 bits"),
        (lambda _: {"in_features": 81}, "bitmask is"),
        (lambda _: {"in_features": 72}, "bitmask is"),
        (lambda _: {"in_features": -1}, "in_features must be"),
        (lambda _: {"in_features": "77"}, "in_features must be"),
        (lambda _: {"scale": None}, "scale is missing"),
        (lambda t: {"scale": t["scale"].half()}, "scale is torch.float16"),
        (lambda t: {"scale": t["scale"][:, 0]}, "scale is"),
        (lambda t: {"scale": t["scale"].expand(5, 2).contiguous()}, "scale is"),
        (lambda t: {"scale": t["scale"][:1].expand(5, 1)}, "scale is not contiguous"),
        (lambda t: {"scale": with_element(t["scale"], np.nan)}, "scale has an element"),
        (lambda t: {"scale": with_element(t["scale"], np.inf)}, "scale has an element"),
        (lambda t: {"scale": with_element(t["scale"], -0.0)}, "scale has an element"),
        (lambda t: {"scale": with_element(t["scale"], 0.0)}, None),
        (lambda _: {"group_size": 32}, "scale is"),
        (lambda _: {"group_size": 33}, "group_size must be"),
        (lambda _: parts(64), None),
    ],
)
def test_damaged_tensors_are_refused(changes, message):
    intact = parts()
    tensors = intact | changes(intact)
    if message is None:
        Packed.from_tensors(**tensors)
        return
    with pytest.raises(FormatError, match=message) as caught:
        Packed.from_tensors(**tensors)
    assert isinstance(caught.value, BesaError)
    assert "\n" not in str(caught.value)


@every_path
@given(row=st.integers(0, 4), byte=st.integers(0, 9), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(path, row, byte, bit):
    tensors = parts()
    tensors["bitmask"][row, byte] ^= 1 << bit
    with using(path), pytest.raises(FormatError, match="bitmask"):
        Packed.from_tensors(**tensors)


@pytest.mark.parametrize(
    "row_ptr",
    [
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(6, 1, dtype=torch.int64),
        torch.zeros(12, dtype=torch.int64)[::2],
        torch.zeros(6, dtype=torch.int64, device="meta"),
    ],
)
def test_the_constructor_checks_row_ptr(row_ptr):
    tensors = parts()
    with pytest.raises(FormatError, match="row_ptr is"):
        Packed(row_ptr=row_ptr, **tensors)


@every_path
def test_a_tensor_changed_behind_its_back(path):
    packed = pack(random_weight(5, 77))
    packed.bitmask[2, 0] ^= 1
    with using(path), pytest.raises(ValueError, match="disagree"):
        packed.unpack()


def test_scales_that_do_not_belong():
    integers, scale = quantize_int8(random_weight(4, 64))
    with pytest.raises(FormatError, match="scale is missing"):
        pack(integers)
    with pytest.raises(FormatError, match="for int8"):
        pack(integers.half(), scale)
    with pytest.raises(FormatError, match="for int8"):
        pack(integers.half(), group_size=32)
    with pytest.raises(FormatError, match=r"not torch.float32 \[4, 2\]"):
        pack(integers, scale, 32)
    with pytest.raises(FormatError, match="not finite"):
        pack(integers, scale * torch.inf)


# ---- the class ----------------------------------------------------------------------------------


def test_fields_in_their_order():
    names = [field.name for field in dataclasses.fields(Packed)]
    assert names == [
        "values",
        "bitmask",
        "row_ptr",
        "scale",
        "in_features",
        "group_size",
        "steps",
    ]


def test_frozen_and_apart_from_the_weight():
    weight = torch.nn.Parameter(random_weight(5, 77))
    before = weight.detach().clone()
    packed = pack(weight)
    with torch.no_grad():
        weight.fill_(3)
    dense = packed.unpack()
    assert torch.equal(dense, before)
    assert not any(t.requires_grad for t in (packed.values, dense))
    dense.zero_()
    assert torch.equal(packed.unpack(), before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.in_features = 78

    # A dense weight, too, is copied; and so is a scale.
    integers, scale = torch.ones(2, 8, dtype=torch.int8), ones(2, 1)
    packed = pack(integers, scale)
    integers.zero_()
    scale.zero_()
    assert torch.equal(packed.unpack(), torch.ones(2, 8))


def test_from_tensors_copies_nothing():
    tensors = parts()
    packed = Packed.from_tensors(**tensors)
    for name in ("values", "bitmask", "scale"):
        assert getattr(packed, name) is tensors[name]
    moved = packed.to("cpu")
    assert moved.values.data_ptr() == packed.values.data_ptr()
    assert (moved.in_features, moved.group_size) == (77, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_through_a_file(tmp_path, dtype):
    weight = random_weight(24, 100, dtype=dtype)
    packed = pack(weight)
    save_file({"values": packed.values, "bitmask": packed.bitmask}, tmp_path / "weight.safetensors")
    loaded = load_file(tmp_path / "weight.safetensors")
    back = Packed.from_tensors(loaded["values"], loaded["bitmask"], in_features=100)
    assert torch.equal(back.unpack(), weight)
    assert torch.equal(back.row_ptr, packed.row_ptr)


def test_nbytes_at_a_half():
    weight = torch.ones(64, 256, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    packed = pack(weight)
    assert packed.density == 0.5
    assert packed.nbytes == weight.nbytes * 9 // 16
    packed = pack(*quantize_int8(weight, 128), group_size=128)
    assert packed.nbytes == weight.nbytes * 5 // 16 + 64 * 2 * 4


def test_unpack_to_another_type():
    weight = random_weight(5, 77)
    packed = pack(weight)
    assert packed.unpack().dtype == torch.bfloat16
    assert torch.equal(packed.unpack(torch.float32), weight.float())
    integers = pack(*quantize_int8(weight))
    assert integers.unpack().dtype == torch.float32
    assert torch.equal(integers.unpack(torch.bfloat16), integers.unpack().bfloat16())
    with pytest.raises(ValueError, match="floating type"):
        packed.unpack(torch.int8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_dtype
def test_on_a_gpu(dtype):
    bits = patterns(dtype, (33, 517), 0.5, 0)
    weight, scale = tensor(bits, dtype), scale_for(dtype, 33)
    here = pack(weight, scale)
    there = pack(weight.cuda(), None if scale is None else scale.cuda())
    assert there.values.is_cuda
    for packed in (there.to("cpu"), here.to("cuda").to("cpu")):
        np.testing.assert_array_equal(bits_of(packed.values), bits_of(here.values))
        assert torch.equal(packed.bitmask, here.bitmask)
        assert torch.equal(packed.row_ptr, here.row_ptr)
    back = there.unpack_values()
    np.testing.assert_array_equal(bits_of(back.cpu()), bits_of(here.unpack_values()))
    Packed.from_tensors(there.values, there.bitmask, 517, there.scale)
    with pytest.raises(FormatError, match="on cuda"):
        Packed.from_tensors(there.values, here.bitmask, 517, there.scale)


# ---- int8 ---------------------------------------------------------------------------------------


def quantized_by_numpy(weight: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Group by group; float32 throughout, and numpy, too, rounds half to even."""
    rows, cols = weight.shape
    integers = np.zeros(weight.shape, np.int8)
    scale = np.ones((rows, -(-cols // group_size)), np.float32)
    for r in range(rows):
        for g, start in enumerate(range(0, cols, group_size)):
            group = weight[r, start : start + group_size]
            if group.any():
                scale[r, g] = np.abs(group).max() / np.float32(127)
                integers[r, start : start + group_size] = np.round(group / scale[r, g])
    return integers, scale


@given(
    rows=st.integers(0, 3),
    cols=st.integers(0, 300),
    group_size=st.sampled_from([None, 32, 64, 128]),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_quantize_equals_numpy(rows, cols, group_size, density, dtype):
    weight = random_weight(rows, cols, density, dtype)
    integers, scale = quantize_int8(weight, group_size)
    groups = 1 if group_size is None else -(-cols // group_size)
    assert (integers.dtype, integers.shape) == (torch.int8, (rows, cols))
    assert (scale.dtype, scale.shape) == (torch.float32, (rows, groups))
    if cols:
        expected = quantized_by_numpy(weight.float().numpy(), group_size or cols)
        np.testing.assert_array_equal(integers.numpy(), expected[0])
        np.testing.assert_array_equal(scale.numpy(), expected[1])

    packed = pack(integers, scale, group_size)
    assert packed.values.numel() == integers.count_nonzero()
    assert torch.equal(packed.unpack_values(), integers)
    wide = scale.repeat_interleave(group_size or max(1, cols), dim=1)[:, :cols]
    assert torch.equal(packed.unpack(), integers * wide)
    error = (packed.unpack() - weight.float()).abs()
    assert (error <= wide * 0.5001).all()


def test_quantize_rounds_half_to_even_and_small_to_zero():
    weight = torch.tensor([[127, 0.5, 1.5, -2.5, 0.49, -127, -0.5, 3.5]])
    integers, scale = quantize_int8(weight)
    assert integers.tolist() == [[127, 0, 2, -2, 0, -127, 0, 4]]
    assert scale.tolist() == [[1]]
    assert pack(integers, scale).values.tolist() == [127, 2, -2, -127, 4]


def test_quantize_groups_do_not_see_each_other():
    weight = torch.ones(1, 70)
    weight[0, 32:64] = 100
    weight[0, 64:] = 0
    integers, scale = quantize_int8(weight, 32)
    assert torch.allclose(scale, torch.tensor([[1 / 127, 100 / 127, 1]]))
    assert integers.tolist() == [[127] * 64 + [0] * 6]


def test_quantize_the_least_and_the_largest():
    # 100 denormals over 127 underflow to a scale of 1 denormal; 0.4 to none, so all is zero.
    tiny = torch.tensor([[1, 190], [1, 50]], dtype=torch.int32).view(torch.float32)
    integers, scale = quantize_int8(tiny)
    assert integers.tolist() == [[1, 127], [0, 0]]
    assert scale.view(torch.int32).tolist()[0] == [1]
    assert scale[1] == 1
    huge = torch.tensor([[3e38, -3e38, 1.0]])
    integers, scale = quantize_int8(huge)
    assert integers.tolist() == [[127, -127, 0]]
    assert scale.isfinite().all()


def test_quantize_leaves_its_argument_alone_and_takes_any_layout():
    weight = random_weight(64, 96, dtype=torch.float32)
    before = weight.clone()
    expected = quantize_int8(weight, 32)
    assert torch.equal(weight, before)
    assert all(map(torch.equal, quantize_int8(weight.t().contiguous().t(), 32), expected))


@pytest.mark.parametrize("element", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group_size", [None, 64])
def test_quantize_refuses_what_is_not_finite(element, group_size):
    weight = random_weight(3, 100)
    weight[2, 99] = element
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quantize_int8(weight, group_size)


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.ones(4), None, "matrix"),
        (torch.ones(4, 4).int(), None, "floating-point"),
        (torch.ones(4, 4), 16, "group_size"),
    ],
)
def test_quantize_names_wrong_arguments(weight, group_size, message):
    with pytest.raises(ValueError, match=message):
        quantize_int8(weight, group_size)
