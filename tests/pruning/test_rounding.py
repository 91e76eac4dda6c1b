"""Weights on a grid: what rounding may do to one, and what `besa prune --quantize` leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from besa.errors import BesaError
from besa.formats import pack, quantize_int4, quantize_int8
from besa.model.prune_record import PruneRecord
from besa.model.record import read_record
from besa.pruning.grid import Grid
from besa.pruning.rounding import compensated, fit, rounded
from tests.helpers import EXPERTS, FAMILIES, run
from tests.pruning.conftest import MakeModel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRIDS = [Grid(bits, group) for bits in (8, 4) for group in (None, 32, 128)]


def sparse_weight(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    return weight * (torch.rand(rows, cols, generator=generator) > 0.5)


def groups_of(weight: Tensor, grid: Grid) -> list[Tensor]:
    return list(weight.split(grid.group_size or weight.shape[1], dim=1))


def assert_on_grid(weight: Tensor, grid: Grid) -> None:
    """Each group's weights are whole multiples of its largest over the levels."""
    for group in groups_of(weight.float(), grid):
        peak = group.abs().amax(1, keepdim=True)
        whole = group / torch.where(peak > 0, peak, 1.0) * grid.levels
        # bfloat16 keeps 8 bits of a value, and of the largest.
        torch.testing.assert_close(whole, whole.round(), rtol=2**-7, atol=1e-4)


@given(
    grid=st.sampled_from(GRIDS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    cols=st.integers(1, 200),
    seed=st.integers(0, 1000),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_what_is_rounded_is_its_own_rounding(
    grid: Grid, dtype: torch.dtype, rows: int, cols: int, seed: int, size: float
):
    weight = size * sparse_weight(rows, cols, seed)
    importance = torch.rand(cols, generator=torch.Generator().manual_seed(seed))
    once = rounded(weight, importance, grid, dtype)
    assert_on_grid(once, grid)
    assert torch.equal(once.to(dtype).float(), once)
    assert (once[weight == 0] == 0).all()
    again = rounded(once, torch.rand(cols), grid, dtype)
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_clip_is_taken_where_it_lowers_the_error(grid: Grid):
    weight, importance = sparse_weight(8, 160, seed=1), torch.rand(160)
    found = rounded(weight, importance, grid, torch.float32)
    plain = []
    for group in groups_of(weight, grid):
        step = group.abs().amax(1, keepdim=True) / grid.levels
        plain.append((group / step).round() * step)
    errors = [((x - weight).square() * importance).sum() for x in (found, torch.cat(plain, 1))]
    assert errors[0] <= errors[1] * (1 + 1e-6)
    if grid.bits == 4:
        assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compensation_keeps_the_mask_and_lowers_the_outputs_error(grid: Grid, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 160, generator=generator) @ torch.randn(160, 160, generator=generator)
    weight, hessian = sparse_weight(8, 160, seed=2), x.T @ x
    mask = weight != 0
    found = compensated(weight, mask, hessian, grid, dtype)
    assert_on_grid(found, grid)
    assert (found[~mask] == 0).all()
    nearest = rounded(weight, hessian.diagonal(), grid, dtype)
    errors = [((x @ (w - weight).T).square().sum()) for w in (found, nearest)]
    assert errors[0] < 0.9 * errors[1]


def test_compensation_is_that_of_gptq():
    """Column by column, against the inverse of what is left of the Hessian."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 12, generator=generator).double()
    weight = torch.randn(3, 12, generator=generator)
    hessian = x.T @ x
    grid, everything = Grid(4), torch.ones(3, 12, dtype=torch.bool)
    found = compensated(weight, everything, hessian.float(), grid, torch.float32)

    steps = fit(weight, hessian.diagonal().float(), grid, torch.float32)
    expected = weight.double().clone()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    for j in range(12):
        inverse = torch.linalg.inv(damped[j:, j:])
        value = steps.round(expected[:, j : j + 1].float(), slice(j, j + 1)).double()[:, 0]
        error = (expected[:, j] - value) / inverse[0, 0]
        expected[:, j:] -= error[:, None] * inverse[0]
        expected[:, j] = value
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_groups_of_zeros_stay_zeros():
    weight = torch.zeros(4, 64)
    weight[0, :32] = 1.0
    for grid in (Grid(4, 32), Grid(8)):
        found = compensated(weight, weight != 0, torch.eye(64), grid, torch.bfloat16)
        assert torch.equal(found, weight)


@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bits_are_packed_as_they_are(group: int | None, dtype: torch.dtype):
    weight = rounded(sparse_weight(16, 160, seed=3), torch.ones(160), Grid(4, group), dtype)
    numbers, scale, steps = quantize_int4(weight.to(dtype), group)
    found = pack(numbers, scale, group, steps).unpack(dtype).float()
    # A product that is rounded once more: to the last bit in 16 bits, nearly in 32.
    torch.testing.assert_close(found, weight, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bits_are_kept_by_eight(group: int | None, dtype: torch.dtype):
    """By one scale a row: what its largest weight becomes is 7 times 18."""
    weight = rounded(sparse_weight(16, 160, seed=3), torch.ones(160), Grid(4, group), dtype)
    numbers, scale, steps = quantize_int4(weight.to(dtype), group)
    four = pack(numbers, scale, group, steps)
    eight = pack(*quantize_int8(weight.to(dtype), peak=126))
    assert torch.equal(eight.unpack_values(), four.unpack_values())
    torch.testing.assert_close(eight.unpack(), four.unpack())


@pytest.mark.parametrize("text", ["int5", "int8:33", "4", "int4:", "int4:128:2", "fp8"])
def test_grids_that_cannot_be(text: str):
    with pytest.raises(BesaError, match="give int8 or int4"):
        Grid.parse(text)


# --------------------------------------------------------------------- the whole pipeline


def pruning_record(directory: Path) -> PruneRecord:
    record = read_record(directory)
    assert isinstance(record, PruneRecord)
    return record


def linears_of(directory: Path) -> dict[str, Tensor]:
    """The matrices of a model's blocks, as its files have them."""
    found: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found.update({n: w for n, w in load_file(path).items() if "layers" in n and w.ndim == 2})
    return found


def pruned(model: Path, calibration: Path, directory: Path, *more: object) -> PruneRecord:
    process = run(
        "prune", model, "--out", directory / "pruned", "--calibration", calibration,
        "--samples", 16, "--seqlen", 32, "--device", "cpu", *more, cwd=directory,
    )  # fmt: skip
    assert process.returncode == 0, process.errors
    return pruning_record(directory / "pruned")


@pytest.mark.parametrize("grid", ["int8", "int4:32"])
def test_export_packs_the_very_values(
    tiny_model: Path, calibration: Path, tmp_path: Path, grid: str
):
    record = pruned(tiny_model, calibration, tmp_path, "--quantize", grid)
    assert record.settings["quantize"] == grid
    stored = linears_of(tmp_path / "pruned")
    zeros = {x.name: x.zeros for x in record.blocks[0].linears}
    for name, weight in stored.items():
        assert_on_grid(weight, Grid.parse(grid))
        if ".0." in name:
            own = name.removeprefix("model.layers.0.").removesuffix(".weight")
            assert zeros[own] == int((weight == 0).sum())
    for block in record.blocks:
        rounding = block.rounding
        assert rounding is not None
        assert block.zeros - rounding.added_zeros == block.weights // 2
        assert rounding.groups >= rounding.clipped + rounding.zero_groups
    added = sum(block.rounding.added_zeros for block in record.blocks if block.rounding)
    assert f"rounded to {grid}: {added:,} of these weights became zero" in record.notes[0]

    process = run("export", "pruned", "--out", "packed", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    with safe_open(next((tmp_path / "packed").glob("*2-of*")), "pt") as file:
        values = [name for name in file.keys() if name.endswith("weight_values")]  # noqa: SIM118
        expected = torch.int8 if grid == "int8" else torch.uint8
        assert {file.get_tensor(name).dtype for name in values} == {expected}
    process = run("export", "packed", "--out", "dense", "--format", "dense", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    for name, weight in linears_of(tmp_path / "dense").items():
        torch.testing.assert_close(weight, stored[name], rtol=1e-6, atol=0)

    process = run("export", "pruned", "--out", "floats", "--quantize", "none", cwd=tmp_path)
    assert process.returncode == 0, process.errors
    process = run("export", "floats", "--out", "same", "--format", "dense", cwd=tmp_path)
    for name, weight in linears_of(tmp_path / "same").items():
        assert torch.equal(weight, stored[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str, family_model: MakeModel, calibration: Path, tmp_path: Path):
    record = pruned(family_model(family), calibration, tmp_path, "--quantize", "int4:32")
    for block in record.blocks:
        assert block.rounding is not None
        assert 0 <= block.rounding.added_zeros < 0.5 * block.weights
        assert block.update is not None
        alone, *_ = block.update.tried
        best = min(each.error for each in block.update.tried if each.error is not None)
        assert alone.error is not None
        assert best <= alone.error
    if family not in EXPERTS:
        assert any(block.update and block.update.chosen != "none" for block in record.blocks)


@pytest.mark.parametrize("more", [["--update", "none"], ["--pattern", "2:4"]], ids=str)
def test_any_mask_and_no_update(
    tiny_model: Path, calibration: Path, tmp_path: Path, more: list[str]
):
    pruned(tiny_model, calibration, tmp_path, "--quantize", "int8:32", "--method", "wanda", *more)
    for weight in linears_of(tmp_path / "pruned").values():
        assert_on_grid(weight, Grid(8, 32))
        if "--pattern" in more:
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all()


def test_a_rounded_model_is_not_trained(tiny_model: Path, calibration: Path, tmp_path: Path):
    pruned(tiny_model, calibration, tmp_path, "--quantize", "int4", "--method", "magnitude")
    process = run("recover", "pruned", "--teacher", tiny_model, "--out", "out", cwd=tmp_path)
    assert process.returncode == 2
    assert "is rounded to int4" in process.errors
