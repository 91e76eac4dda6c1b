"""Wanda, magnitude and SparseGPT against loops written from their papers, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from besa.errors import BesaError
from besa.model.blocks import Linear
from besa.pruning.budget import Budget
from besa.pruning.config import Pattern
from besa.pruning.methods.besa import allocated_masks
from besa.pruning.methods.magnitude import magnitude_masks
from besa.pruning.methods.sparsegpt import inverse_factor, sparsegpt, sparsegpt_weights
from besa.pruning.methods.wanda import wanda_masks
from besa.pruning.patterns import lowest_pruned_overall
from besa.pruning.scores import Hessians, InputNorms, magnitude, wanda

CPU = torch.device("cpu")
DENSE = Pattern()
PATTERNS = ["unstructured", "2:4", "4:8", "1:4"]
DAMPING = 0.01


def linear(name: str, groups: int, rows: int, cols: int) -> Linear:
    return Linear(name, f"{name}.weight", groups, rows, cols, transposed=False)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, cols: int, seed: int = 1) -> Tensor:
    """Inputs whose columns are correlated and of very different size, as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(cols) + 0.3 * torch.randn(cols, cols, generator=generator)
    sizes = torch.randn(cols, generator=generator).exp()
    return torch.randn(tokens, cols, generator=generator) @ mixing * sizes


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x


# ------------------------------------------------------------------------- input statistics


def test_norms_are_those_of_all_tokens_together():
    layer = linear("q", 1, 4, 6)
    x = random(50, 6)
    norms = InputNorms([layer], CPU)
    for part in x.split(7):
        norms.add(layer, 0, part)
    expected = np.linalg.norm(x.numpy().astype(np.float64), axis=0)
    np.testing.assert_allclose(norms.of(layer)[0], expected, rtol=1e-6)
    assert norms.unseen(layer) == []


def test_hessian_is_that_of_all_tokens_together():
    layer = linear("q", 2, 4, 6)
    x = random(50, 6).double()
    hessians = Hessians([layer], CPU)
    for part in x.split(7):
        hessians.add(layer, 1, part.float())
    np.testing.assert_allclose(hessians.of(layer)[1], x.T @ x, rtol=1e-5, atol=1e-5)
    assert not hessians.of(layer)[0].any()


def test_groups_are_kept_apart_and_an_unseen_one_counts_magnitudes_only():
    layer = linear("experts", 3, 4, 6)
    norms = InputNorms([layer], CPU)
    norms.add(layer, 0, random(5, 6))
    norms.add(layer, 2, random(9, 6, seed=1))
    norms.add(layer, 1, torch.empty(0, 6))  # an expert that is called with no token
    assert norms.unseen(layer) == [1]
    weight = random(3, 4, 6, seed=2)
    scored = wanda(weight, norms.of(layer))
    assert torch.equal(scored[1], magnitude(weight)[1])
    np.testing.assert_allclose(
        scored[2], weight[2].abs() * random(9, 6, seed=1).norm(dim=0), rtol=1e-6
    )


def test_bfloat16_is_scored_in_float32():
    weight, norms = random(1, 8, 8).bfloat16(), random(1, 8, seed=1).abs()
    assert torch.equal(wanda(weight, norms), weight.float().abs() * norms.unsqueeze(1))
    assert magnitude(weight).dtype == torch.float32


# ------------------------------------------------------------------- Wanda and magnitude


def wanda_by_loops(weight: np.ndarray, x: np.ndarray, count: int, pattern: Pattern) -> np.ndarray:
    """arXiv 2306.11695: s_ij = |W_ij| ||X_j||_2, compared within the row (or M neighbours)."""
    weight, x = weight.astype(np.float64), x.astype(np.float64)
    mask = np.ones(weight.shape, dtype=bool)
    for i, row in enumerate(weight):
        scores = [abs(w) * np.sqrt(sum(t * t for t in x[:, j])) for j, w in enumerate(row)]
        length = pattern.m or len(row)
        prune = pattern.m - pattern.n if pattern.m else count
        for start in range(0, len(row), length):
            nearby = range(start, start + length)
            for j in sorted(nearby, key=lambda j: scores[j])[:prune]:
                mask[i, j] = False
    return mask


@pytest.mark.parametrize("name", PATTERNS)
def test_wanda_is_its_formula(name: str):
    layer, pattern = linear("q", 1, 12, 16), Pattern.parse(name)
    rate = 0.625 if pattern.sparsity is None else pattern.sparsity
    weight, x = random(1, 12, 16), inputs(40, 16)
    norms = InputNorms([layer], CPU)
    norms.add(layer, 0, x)
    scored = {"q": wanda(weight, norms.of(layer))}
    budget = Budget(round(rate * layer.size), rate, pattern)
    masks = wanda_masks([layer], scored, budget)
    expected = wanda_by_loops(weight[0].numpy(), x.numpy(), round(rate * 16), pattern)
    assert np.array_equal(masks["q"][0], expected)


@pytest.mark.parametrize("name", PATTERNS)
def test_magnitude_is_its_formula(name: str):
    layer, pattern = linear("q", 2, 6, 16), Pattern.parse(name)
    rate = 0.4 if pattern.sparsity is None else pattern.sparsity
    weight = random(2, 6, 16)
    budget = Budget(round(rate * layer.size), rate, pattern)
    masks = magnitude_masks([layer], {"q": weight}, budget)
    if pattern.m:
        expected = [wanda_by_loops(w.numpy(), np.ones((1, 16)), 0, pattern) for w in weight]
    else:
        shares = budget.shares([layer])["q"]
        expected = [
            (w.abs() > w.abs().flatten().sort().values[share - 1]).numpy()
            for w, share in zip(weight, shares, strict=True)
        ]
    assert np.array_equal(masks["q"], np.stack(expected))


def test_columns_that_never_fire_go_first_in_wanda():
    layer = linear("q", 1, 8, 16)
    x = inputs(40, 16)
    x[:, 3] = 0
    norms = InputNorms([layer], CPU)
    norms.add(layer, 0, x)
    scored = {"q": wanda(random(1, 8, 16) + 5, norms.of(layer))}
    masks = wanda_masks([layer], scored, Budget(8, 1 / 16))
    assert not masks["q"][0, :, 3].any()
    assert int((~masks["q"]).sum()) == 8


# ------------------------------------------------------------------------ exact numbers

SHAPES = [linear("a", 1, 8, 24), linear("experts", 3, 5, 16), linear("c", 1, 7, 40)]


def filled(linears: Sequence[Linear]) -> tuple[dict[str, Tensor], InputNorms, Hessians]:
    weights = {x.name: random(x.groups, x.rows, x.cols, seed=i) for i, x in enumerate(linears)}
    norms, hessians = InputNorms(linears, CPU), Hessians(linears, CPU)
    for x in linears:
        for group in range(x.groups):
            tokens = inputs(30, x.cols, seed=group)
            norms.add(x, group, tokens)
            hessians.add(x, group, tokens)
    return weights, norms, hessians


def pruned(masks: dict[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt", "besa"])
@pytest.mark.parametrize("rate", [0.01, 1 / 3, 0.5, 0.777, 0.999])
def test_exactly_the_zeros_that_were_asked_for(method: str, rate: float):
    weights, norms, hessians = filled(SHAPES)
    scored = {x.name: wanda(weights[x.name], norms.of(x)) for x in SHAPES}
    total = sum(x.size for x in SHAPES)
    for zeros in {round(rate * total), round(rate * total) + 1, 0, total}:
        budget = Budget(zeros, rate)
        if method == "wanda":
            masks = wanda_masks(SHAPES, scored, budget)
        elif method == "magnitude":
            masks = magnitude_masks(SHAPES, weights, budget)
        elif method == "sparsegpt":
            result = sparsegpt_weights(SHAPES, weights, hessians, budget)
            masks, updated = result.masks, result.weights
            assert updated is not None
            assert all(torch.equal(updated[n] == 0, ~masks[n]) for n in masks)
        else:
            rates = [random(x.groups * x.rows).sigmoid() for x in SHAPES]
            masks = allocated_masks(SHAPES, scored, rates, zeros)
        assert pruned(masks) == zeros
        assert all(
            masks[x.name].shape == (x.groups, x.rows, x.cols) and masks[x.name].dtype == torch.bool
            for x in SHAPES
        )


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("name", ["2:4", "4:8", "1:4", "7:8", "1:2"])
def test_every_group_of_m_keeps_n(method: str, name: str):
    pattern = Pattern.parse(name)
    weights, norms, hessians = filled([x for x in SHAPES if x.cols % pattern.m == 0])
    linears = [x for x in SHAPES if x.name in weights]
    rate = pattern.sparsity
    assert rate is not None
    budget = Budget(round(rate * sum(x.size for x in linears)), rate, pattern)
    if method == "wanda":
        scored = {x.name: wanda(weights[x.name], norms.of(x)) for x in linears}
        masks = wanda_masks(linears, scored, budget)
    elif method == "magnitude":
        masks = magnitude_masks(linears, weights, budget)
    else:
        masks = sparsegpt_weights(linears, weights, hessians, budget).masks
    for mask in masks.values():
        assert (mask.reshape(-1, pattern.m).sum(1) == pattern.n).all()


def test_shares_follow_the_sizes():
    shares = Budget(500, 500 / sum(x.size for x in SHAPES)).shares(SHAPES)
    assert sum(map(sum, shares.values())) == 500
    for x in SHAPES:
        for share in shares[x.name]:
            assert abs(share - 500 * x.rows * x.cols / sum(y.size for y in SHAPES)) <= 1


def test_a_block_without_linears_is_left_alone():
    assert wanda_masks([], {}, Budget(0, 0.5)) == {}
    assert magnitude_masks([], {}, Budget(0, 0.5)) == {}


def test_allocated_masks_follow_the_rates_and_the_scores():
    layer = linear("q", 2, 3, 20)
    scored = {"q": random(2, 3, 20).abs()}
    rates = torch.tensor([0.1, 0.3, 0.5, 0.5, 0.7, 0.9])
    masks = allocated_masks([layer], scored, [rates], zeros=60)["q"]
    assert (~masks).sum(2).flatten().tolist() == [2, 6, 10, 10, 14, 18]
    for mask, score in zip(masks.reshape(6, 20), scored["q"].reshape(6, 20), strict=True):
        assert score[mask].min() > score[~mask].max()


# --------------------------------------------------------------------------- SparseGPT


def damped(hessian: Tensor) -> np.ndarray:
    h = hessian.double().numpy().copy()
    return h + DAMPING * np.diag(h).mean() * np.eye(len(h))


def remaining_inverses(hessian: Tensor) -> list[np.ndarray]:
    """The inverse Hessian over the columns from j on, for every j, each inverted anew."""
    h = damped(hessian)
    return [np.linalg.inv(h[j:, j:]) for j in range(len(h))]


def obs_column_by_column(weight: Tensor, hessian: Tensor, mask: Tensor) -> np.ndarray:
    """The optimal brain surgeon: each column, once visited, is fixed; the rest makes up for it."""
    w, m = weight.double().numpy().copy(), mask.numpy()
    for j, inverse in enumerate(remaining_inverses(hessian)):
        error = np.where(m[:, j], 0.0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= np.outer(error, inverse[0])
    return np.where(m, w, 0.0)


def sparsegpt_by_loops(
    weight: Tensor, hessian: Tensor, zeros: int, pattern: Pattern, blocksize: int
) -> np.ndarray:
    """The mask of arXiv 2301.00774's Algorithm 1, from weights that were updated one by one."""
    w = weight.double().numpy().copy()
    rows, cols = w.shape
    inverses = remaining_inverses(hessian)
    own = np.array([inverse[0, 0] for inverse in inverses])
    mask = np.ones(w.shape, dtype=bool)
    length = pattern.m or blocksize
    for j, inverse in enumerate(inverses):
        if j % length == 0:
            ahead = range(j, min(j + length, cols))
            scores = {(i, k): w[i, k] ** 2 / own[k] for i in range(rows) for k in ahead}
            if pattern.m:
                for i in range(rows):
                    for k in sorted(ahead, key=lambda k: scores[i, k])[: pattern.m - pattern.n]:
                        mask[i, k] = False
            else:
                share = zeros * (ahead[-1] + 1) // cols - int((~mask).sum())
                for i, k in sorted(scores, key=lambda place: scores[place])[:share]:
                    mask[i, k] = False
        error = np.where(mask[:, j], 0.0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= np.outer(error, inverse[0])
    return mask


def reconstruction_error(x: Tensor, weight: Tensor, approximation: Tensor) -> float:
    return float(((weight - approximation).double() @ x.double().T).square().sum())


def test_factor_is_the_cholesky_factor_of_the_inverse():
    hessian = hessian_of(inputs(200, 24))
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    np.testing.assert_allclose(
        factor.T @ factor, np.linalg.inv(damped(hessian)), rtol=1e-3, atol=1e-6
    )
    # Its rows are those of the inverses over the columns that remain.
    for j, inverse in enumerate(remaining_inverses(hessian)):
        np.testing.assert_allclose(
            factor[j, j:], inverse[0] / np.sqrt(inverse[0, 0]), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("blocksize", [1, 7, 8, 32, 128])
def test_sparsegpt_is_column_by_column_surgery(name: str, blocksize: int):
    pattern = Pattern.parse(name)
    weight, hessian = random(10, 40), hessian_of(inputs(300, 40))
    zeros = round(0.55 * weight.numel())
    updated, mask = sparsegpt(weight, hessian, zeros, pattern, blocksize)
    scale = float(weight.abs().max())
    np.testing.assert_allclose(
        updated, obs_column_by_column(weight, hessian, mask), rtol=1e-3, atol=1e-4 * scale
    )
    expected = sparsegpt_by_loops(weight, hessian, zeros, pattern, blocksize)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("blocksize", [8, 16])
def test_first_blocks_mask_is_the_given_weights(blocksize: int):
    weight, hessian = random(6, 32), hessian_of(inputs(100, 32))
    _, mask = sparsegpt(weight, hessian, zeros=96, blocksize=blocksize)
    own = [inverse[0, 0] for inverse in remaining_inverses(hessian)]
    scores = weight.double().square() / torch.tensor(own)
    expected = lowest_pruned_overall(scores[:, :blocksize].contiguous(), 96 * blocksize // 32)
    assert torch.equal(mask[:, :blocksize], expected)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_reconstructs_better_than_wanda_and_than_its_own_mask_alone(name: str, seed: int):
    pattern, layer = Pattern.parse(name), linear("q", 1, 24, 64)
    rate = 0.5 if pattern.sparsity is None else pattern.sparsity
    x, weight = inputs(500, 64, seed=seed), random(24, 64, seed=seed + 10)
    zeros = round(rate * weight.numel())
    updated, mask = sparsegpt(weight, hessian_of(x), zeros, pattern, blocksize=16)
    norms = InputNorms([layer], CPU)
    norms.add(layer, 0, x)
    scored = {"q": wanda(weight.unsqueeze(0), norms.of(layer))}
    by_wanda = weight * wanda_masks([layer], scored, Budget(zeros, rate, pattern))["q"][0]
    own = reconstruction_error(x, weight, updated)
    assert own < reconstruction_error(x, weight, weight * mask)
    assert own < reconstruction_error(x, weight, by_wanda)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_columns_that_never_fire_go_first_at_any_scale(scale: float):
    x = inputs(100, 32) * scale
    x[:, [2, 17]] = 0
    weight = random(8, 32)
    weight[:, [2, 17]] *= 10
    updated, mask = sparsegpt(weight, hessian_of(x), zeros=64, blocksize=16)
    assert not mask[:, [2, 17]].any()
    assert int((updated == 0).sum()) == 64
    # Where there is more to keep than is alive, a dead column's weights stay as they are.
    updated, mask = sparsegpt(weight, hessian_of(x), zeros=4, blocksize=16)
    assert int((updated == 0).sum()) == int((~mask).sum()) == 4
    assert torch.equal(updated[:, [2, 17]][mask[:, [2, 17]]], weight[:, [2, 17]][mask[:, [2, 17]]])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["unstructured", "2:4"])
def test_the_inputs_unit_does_not_matter(scale: float, name: str):
    x = inputs(100, 32)
    x[:, 5] = 0
    weight, pattern = random(8, 32), Pattern.parse(name)
    updated, mask = sparsegpt(weight, hessian_of(x), 128, pattern)
    other, other_mask = sparsegpt(weight, hessian_of(x) * scale, 128, pattern)
    assert torch.equal(mask, other_mask)
    torch.testing.assert_close(updated, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 31])
@pytest.mark.parametrize("cols", [32, 130])
def test_rank_deficient_hessians_are_damped(tokens: int, cols: int):
    x, weight = inputs(tokens, cols), random(16, cols)
    updated, mask = sparsegpt(weight, hessian_of(x), zeros=weight.numel() // 2)
    assert updated.isfinite().all()
    assert int((~mask).sum()) == weight.numel() // 2
    error = reconstruction_error(x, weight, updated)
    assert error <= reconstruction_error(x, weight, weight * mask)


def test_equal_columns_are_damped():
    x = random(50, 1).expand(-1, 64).contiguous() * 1e3
    updated, mask = sparsegpt(random(8, 64), hessian_of(x), zeros=256)
    assert updated.isfinite().all()
    assert int((~mask).sum()) == 256


@pytest.mark.parametrize("name", ["2:256", "2:257", "96:192", "3:5"])
def test_groups_need_not_fit_the_blocks(name: str):
    pattern = Pattern.parse(name)
    weight = random(4, 2 * pattern.m)
    hessian = hessian_of(inputs(300, 2 * pattern.m))
    updated, mask = sparsegpt(weight, hessian, 0, pattern)
    assert (mask.reshape(-1, pattern.m).sum(1) == pattern.n).all()
    assert torch.equal(updated == 0, ~mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 20), st.data())
def test_sparsegpt_counts_for_any_shape(rows: int, cols: int, blocksize: int, data: st.DataObject):
    zeros = data.draw(st.integers(0, rows * cols))
    hessian = hessian_of(inputs(50, cols))
    updated, mask = sparsegpt(random(rows, cols), hessian, zeros, DENSE, blocksize)
    assert int((~mask).sum()) == zeros
    assert torch.equal(updated == 0, ~mask)


def test_the_given_weight_is_not_changed():
    weight, hessian = random(8, 32), hessian_of(inputs(100, 32))
    hessian[3] = hessian[:, 3] = 0
    before = weight.clone(), hessian.clone()
    sparsegpt(weight, hessian, zeros=128)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_an_expert_without_tokens_is_pruned_by_magnitude_and_not_updated():
    layer = linear("experts", 3, 6, 16)
    weights = {"experts": random(3, 6, 16)}
    hessians = Hessians([layer], CPU)
    for group in (0, 2):
        hessians.add(layer, group, inputs(40, 16, seed=group))
    budget = Budget(layer.size // 2, 0.5)
    result = sparsegpt_weights([layer], weights, hessians, budget)
    by_magnitude = magnitude_masks([layer], weights, budget)["experts"]
    masks, updated = result.masks, result.weights
    mask = masks["experts"]
    assert updated is not None
    assert torch.equal(mask[1], by_magnitude[1])
    assert torch.equal(updated["experts"][1][mask[1]], weights["experts"][1][mask[1]])
    assert not torch.equal(updated["experts"][0][mask[0]], weights["experts"][0][mask[0]])
    assert pruned(masks) == budget.zeros


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_statistics_that_overflow_are_an_error_and_no_endless_loop(value: float):
    layer = linear("mlp.down_proj", 1, 4, 8)
    hessians = Hessians([layer], CPU)
    hessians.of(layer)[0] = hessian_of(inputs(20, 8))
    hessians.of(layer)[0, 2, 2] = value
    with pytest.raises(BesaError, match=r"mlp\.down_proj"):
        sparsegpt_weights([layer], {layer.name: random(1, 4, 8)}, hessians, Budget(16, 0.5))
