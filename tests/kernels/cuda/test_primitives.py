"""The GPU's instructions, emulated, against oracles in numpy and torch.

Where there is a GPU, its own (device.cuh) have to agree with the same oracles.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from besa.kernels.cuda import driver
from tests.kernels.cuda.emulation import Emulated
from tests.kernels.cuda.primitives import POISON, Gpu, primitives, random_words, run

HALVES = {"Bf16": torch.bfloat16, "Fp16": torch.float16}


@pytest.fixture(params=["emulated", "gpu"])
def machine(request: pytest.FixtureRequest) -> Emulated | Gpu:
    if request.param == "emulated":
        return primitives()
    reason = driver.unavailable(Gpu.device) if torch.cuda.is_available() else "no GPU"
    if reason is not None:
        pytest.skip(reason)
    return Gpu()


# ---------------------------------------------------------------- one thread


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, prmt without a mode, on a string of the eight bytes."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picks = [selector >> 4 * i & 15 for i in range(4)]
    signs = [0xFF if source[pick & 7] >= 0x80 else 0 for pick in picks]
    chosen = [
        sign if pick & 8 else source[pick & 7] for pick, sign in zip(picks, signs, strict=True)
    ]
    return int.from_bytes(bytes(chosen), "little")


def to_int(word: int) -> int:
    value = float(np.uint32(word).view(np.float32))
    if np.isnan(value):
        return 0
    return int(np.clip(np.rint(value), -(2**31), 2**31 - 1)) & 0xFFFFFFFF


def test_bits_and_bytes(machine):
    words = random_words(4096, 3)
    words[:16, 2] = torch.arange(16) * 0x1111  # every nibble everywhere
    words[16:48, 0] = torch.tensor([1 << i for i in range(32)]).int()
    words[48:56, 0] = torch.tensor(
        [0.5, 1.5, -2.5, 2.5e9, -3e9, float("nan"), float("inf"), 0.0]
    ).view(torch.int32)
    words[56:2056, 0] = (torch.randn(2000) * 1000).view(torch.int32)
    out = run(machine, "words", words, 16 * len(words), n=len(words)).view(-1, 16)
    for row, (a, b, c) in zip(out.tolist(), (words.long() & 0xFFFFFFFF).tolist(), strict=True):
        bits = f"{a:032b}"
        signed = [v - (v >> 31 << 32) for v in (a, b)]
        products = zip(a.to_bytes(4, "little"), b.to_bytes(4, "little"), strict=True)
        expected = [
            prmt(a, b, c),
            c + sum(x * y for x, y in products),
            a + (b << 16),
            prmt(a, b, c & 0x7777),
            (b << 32 | a) >> (c & 31),
            ((b << 32 | a) << (c & 31)) >> 32,
            int(bits[::-1], 2),
            bits.count("1"),
            32 - len(bits.lstrip("0")),
            0 if a == 0 else 32 - bits.rindex("1"),
            min(a, b),
            max(signed),
            to_int(a),
            a,  # the bits of a float, moved
        ]
        assert [v & 0xFFFFFFFF for v in row[:14]] == [v & 0xFFFFFFFF for v in expected]


def special_floats(dtype: torch.dtype) -> Tensor:
    """Every number of `dtype`, the middles between neighbours, and what is next to the middles."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    inf = torch.tensor(float("inf"))
    more = torch.tensor([65519.0, 65520.0, 65536.0, 3.4e38, 1e-45, 1e-40, 2.0**-25, 2.0**-24])
    floats = [every, middles, middles.nextafter(inf), middles.nextafter(-inf), more, -more]
    return torch.cat([*floats, random_words(20000).view(torch.float32)])


@pytest.mark.parametrize("name", HALVES)
def test_rounding_to_16_bits(machine, name):
    dtype = HALVES[name]
    floats = special_floats(dtype)
    floats = torch.cat([floats, floats[:1].expand(len(floats) % 2)])
    n = len(floats) // 2
    out = run(machine, f"halves<{name}>", floats, 3 * n, n=n).view(n, 3)
    rounded = floats.to(dtype).view(torch.int16)
    rounded = torch.where(floats.isnan(), 0x7FFF, rounded)  # PTX knows one NaN
    assert torch.equal(out[:, 0].contiguous().view(torch.int16), rounded)
    back = out[:, 1:].contiguous().view(torch.float32).flatten()
    assert torch.equal(back.isnan(), floats.isnan())
    same = back.view(torch.int32) == rounded.view(dtype).float().view(torch.int32)
    assert bool((same | floats.isnan()).all())


# ---------------------------------------------------------------- a warp


def test_warps(machine):
    values = random_words(64)
    values[32:] = values[32:] & ~1  # no lane of the second warp votes
    values[5] = 7
    out = run(machine, "warps", values, 12 * 64, threads=64).view(2, 32, 12)
    for warp in range(2):
        v, got = values.view(2, 32)[warp], out[warp].T
        lane = torch.arange(32)
        first, last = lane // 8 * 8, lane // 8 * 8 + 7
        sources = {
            1: 5 * lane % 32,
            2: first + (lane + 3) % 8,
            3: torch.where(lane >= 3, lane - 3, lane),
            4: torch.where(lane - 3 >= first, lane - 3, lane),
            5: torch.where(lane + 3 < 32, lane + 3, lane),
            6: torch.where(lane + 3 <= last, lane + 3, lane),
            7: lane ^ 5,
            8: torch.where((lane ^ 12) <= last, lane ^ 12, lane),
        }
        assert torch.equal(got[0], v.long().cumsum(0).int())
        for row, source in sources.items():
            assert torch.equal(got[row], v[source]), row
        votes = (v & 1).long() << lane
        assert set(got[9].tolist()) == {int(votes.sum().int())}
        assert set(got[10].tolist()) == {int(warp == 0)}
        pairs = lane % 4 < 2
        assert torch.equal(got[11], torch.where(pairs, votes[pairs].sum().int(), 0))


def fragments(
    a: Tensor, b: Tensor, c: Tensor, metadata: Tensor | None = None, selector: int = 0
) -> Tensor:
    """A [16, k], B [k', 8], C [16, 8] as 13 words a lane, by the figures of the PTX ISA.

    `metadata` [16, 2, 16 bits] are the indices of a row's columns 0 to 15 and 16 to 31.
    """
    each = 4 // a.element_size()  # numbers in a register
    lanes = torch.full((32, 13), 0x5A5A5A5A, dtype=torch.int32)
    for lane in range(32):
        group, in_group = lane >> 2, lane % 4
        # Figures of A: registers go down eight rows, then on to the right half.
        at = [
            (row, slice(left, left + each))
            for left in (each * in_group, each * in_group + 4 * each)
            for row in (group, group + 8)
        ]
        words = [a[row, columns].clone().view(torch.int32) for row, columns in at]
        tops = range(each * in_group, len(b), 4 * each)
        words += [b[top : top + each, group].clone().view(torch.int32) for top in tops]
        lanes[lane, : 4 + len(tops)] = torch.cat(words)
        if metadata is not None and in_group // 2 == selector:
            low, high = metadata[group, in_group % 2], metadata[group + 8, in_group % 2]
            lanes[lane, 8] = torch.tensor(int(low) | int(high) << 16).int()
        places = [(row, 2 * in_group + i) for row in (group, group + 8) for i in range(2)]
        lanes[lane, 9:] = torch.stack([c[place] for place in places]).view(torch.int32)
    return lanes


def tolerance(machine: Emulated | Gpu) -> dict[str, float]:
    # A tensor core cuts the addends of a sum off where the largest one's last bits are.
    error = 1e-6 if isinstance(machine, Emulated) else 1e-4
    return {"rtol": error, "atol": error}


def gather(lanes: Tensor) -> Tensor:
    """C [16, 8] of four words a lane."""
    c = torch.empty(16, 8, dtype=lanes.dtype)
    for lane in range(32):
        for i in range(4):
            c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] = lanes[lane, i]
    return c


@pytest.mark.parametrize("name", HALVES)
def test_products(machine, name):
    torch.manual_seed(0)
    a, b = (torch.randn(*shape).to(HALVES[name]) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8)
    lanes = fragments(a, b, c)
    out = run(machine, f"products<{name}>", lanes, 128, mode=-1).view(torch.float32)
    expected = a.double() @ b.double() + c.double()
    assert torch.allclose(gather(out.view(32, 4)).double(), expected, **tolerance(machine))


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("name", HALVES)
def test_sparse_products(machine, name, selector):
    torch.manual_seed(selector)
    dense = torch.randn(16, 32).to(HALVES[name])
    keep = torch.rand(16, 8, 4).argsort(2)[:, :, :2].sort(2).values  # columns of each four
    kept = dense.view(16, 8, 4).gather(2, keep)
    pruned = torch.zeros_like(dense).view(16, 8, 4).scatter_(2, keep, kept).view(16, 32)
    nibbles = keep[:, :, 0] | keep[:, :, 1] << 2
    metadata = (nibbles.view(16, 2, 4) << torch.tensor([0, 4, 8, 12])).sum(2)
    b, c = torch.randn(32, 8).to(dense.dtype), torch.randn(16, 8)
    lanes = fragments(kept.reshape(16, 16), b, c, metadata, selector)
    out = run(machine, f"products<{name}>", lanes, 128, mode=selector).view(torch.float32)
    expected = pruned.double() @ b.double() + c.double()
    assert torch.allclose(gather(out.view(32, 4)).double(), expected, **tolerance(machine))


def test_products_of_int8_wrap_around(machine):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        for shape in ((16, 32), (32, 8))
    )
    c = torch.full((16, 8), 2**31 - 1, dtype=torch.int32)
    c[8:] = random_words(8, 8)
    out = run(machine, "products_int8", fragments(a, b, c), 128)
    assert torch.equal(gather(out.view(32, 4)), (a.long() @ b.long() + c.long()).int())


def test_nan_spreads_along_its_row(machine):
    a, b, c = torch.ones(16, 16).bfloat16(), torch.ones(16, 8).bfloat16(), torch.zeros(16, 8)
    a[3, 5] = float("nan")
    out = run(machine, "products<Bf16>", fragments(a, b, c), 128, mode=-1).view(torch.float32)
    expected = torch.full((16, 8), 16.0)
    expected[3] = float("nan")
    torch.testing.assert_close(gather(out.view(32, 4)), expected, equal_nan=True, rtol=0, atol=0)


# ---------------------------------------------------------------- a block


def test_copies_arrive_at_the_wait_that_guarantees_them(machine):
    values = random_words(64, 3, 4)
    out = run(machine, "copies", values, 9 * 64, threads=64, shared=48 * 64).view(64, 3, 3)
    for waits, arrived in enumerate([1, 2, 3]):
        word = (0, 3, 1)[waits]
        assert torch.equal(out[:, waits, :arrived], values[:, :arrived, word])
        if isinstance(machine, Emulated):
            assert bool((out[:, waits, arrived:] == POISON).all())


def test_atomics(machine):
    values = random_words(150)
    start = torch.tensor([0, 0, -1, 0, 0, -(2**31), 0, 0], dtype=torch.int32)
    out = run(machine, "atomics", values, start, n=150, blocks=3, threads=64)
    unsigned = values.long() & 0xFFFFFFFF
    assert int(out[0]) == int(unsigned.sum().int())
    assert int(out[1]) & 0xFFFFFFFF == int(unsigned.max())
    assert int(out[2]) & 0xFFFFFFFF == int(unsigned.min())
    assert int(out[3]) == int(np.bitwise_or.reduce(values.numpy()))
    assert float(out[4:5].view(torch.float32)) == float((unsigned % 8).sum())
    assert int(out[5]) == int(values.max())
    assert int(out[6:].view(torch.int64)) == int(unsigned.sum())


@pytest.mark.parametrize("threads", [256, 96, 33])
def test_barriers(machine, threads):
    out = run(
        machine, "neighbours", random_words(1), 4 * threads, n=40, blocks=4,
        threads=threads, shared=4 * threads,
    )  # fmt: skip
    expected = (torch.arange(threads) + 32) % threads + 39
    assert torch.equal(out.view(4, threads), expected.int().expand(4, threads))
