"""Updates at a fixed mask against the exact answer, row by row, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from besa.methods import UPDATES
from besa.pruning.updates import admm, load, obs, squared_error

NAMES = [name for name in UPDATES if name not in ("auto", "none", "learn")]  # the solved ones


def problem(rows: int = 12, cols: int = 24, tokens: int = 200, seed: int = 0) -> tuple[Tensor, ...]:
    """A weight, a mask of about half of it, and inputs whose columns are correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(cols) + 0.4 * torch.randn(cols, cols, generator=generator)
    sizes = torch.randn(cols, generator=generator).exp()
    x = torch.randn(tokens, cols, generator=generator) @ mixing * sizes
    weight = torch.randn(rows, cols, generator=generator)
    mask = torch.rand(rows, cols, generator=generator) > 0.5
    return weight, mask, x


def exact(weight: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """The least squares of each row over the columns that it keeps, by numpy."""
    found = np.zeros(weight.shape)
    inputs = x.double().numpy()
    for row, (own, kept) in enumerate(zip(weight.double().numpy(), mask.numpy(), strict=True)):
        found[row, kept] = np.linalg.lstsq(inputs[:, kept], inputs @ own, rcond=None)[0]
    return torch.from_numpy(found).float()


def error(weight: Tensor, other: Tensor, x: Tensor) -> Tensor:
    return (x.double() @ (weight - other).double().T).square().sum(0)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_weights_stay_zero_and_the_error_falls(name: str):
    weight, mask, x = problem()
    found = load(name)(weight, mask, x.T @ x)
    assert found.dtype == torch.float32
    assert (found[~mask] == 0).all()
    assert error(weight, found, x).sum() < 0.9 * error(weight, weight * mask, x).sum()


def test_admm_comes_to_the_exact_answer():
    weight, mask, x = problem()
    best = error(weight, exact(weight, mask, x), x).sum()
    few = error(weight, admm.update(weight, mask, x.T @ x), x).sum()
    many = error(weight, admm.update(weight, mask, x.T @ x, iterations=2000), x).sum()
    assert best <= many < 1.02 * best  # its damping is not part of the question
    assert many <= few < 1.5 * best


def test_admm_is_nearer_to_it_than_obs():
    weight, mask, x = problem(cols=64, seed=1)
    errors = [error(weight, load(name)(weight, mask, x.T @ x), x).sum() for name in ("admm", "obs")]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_admm_leaves_no_row_worse_off(seed: int, iterations: int):
    weight, mask, x = problem(tokens=8, seed=seed)  # fewer tokens than columns
    hessian = x.T @ x
    found = admm.update(weight, mask, hessian, iterations)
    before = squared_error(weight, weight * mask, hessian)
    assert (squared_error(weight, found, hessian) <= before).all()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_never_fire_and_rows_without_zeros_are_harmless(name: str):
    weight, mask, x = problem()
    x[:, 3] = 0
    mask[0], mask[1] = True, False
    found = load(name)(weight, mask, x.T @ x)
    assert found.isfinite().all()
    assert (found[1] == 0).all()
    assert error(weight, found, x)[0] < 1e-3 * error(weight, weight * 0, x)[0]


def test_obs_is_sparsegpt_with_its_mask_given():
    from besa.pruning.methods.sparsegpt import sparsegpt

    weight, _, x = problem(rows=8, cols=300, tokens=600)  # more than one block of columns
    pruned, mask = sparsegpt(weight, x.T @ x, zeros=weight.numel() // 2)
    assert torch.equal(obs.update(weight, mask, x.T @ x), pruned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_half_precision_are_updated_in_float32(name: str, dtype: torch.dtype):
    weight, mask, x = problem()
    half = weight.to(dtype)
    hessian = x.T @ x
    assert torch.equal(load(name)(half, mask, hessian), load(name)(half.float(), mask, hessian))
