"""BESA's learned rates, and its learned choice for N:M: gradients against dense autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from besa.model.blocks import Linear
from besa.pruning.allocate import CANDIDATES, RankedMatrix, RateLearner, RateMask, rank_buckets
from besa.pruning.batches import Group
from besa.pruning.config import Pattern
from besa.pruning.learn import Step, learn, learn_step
from besa.pruning.masked import WeightFactory
from besa.pruning.methods.besa import allocated_masks
from besa.pruning.nm import ChoiceLearner, ChoiceMask
from besa.pruning.patterns import counts_for, lowest_pruned, n_of_m


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(*shape: int, seed: int) -> Tensor:
    """Float32 integers so small that their sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float()


# ------------------------------------------------------------------------------- ranks


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 260), st.integers(1, 50), st.integers(0, 1000))
def test_buckets_are_numpy_ranks(rows: int, cols: int, values: int, seed: int):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, values, (rows, cols)).astype(np.float32)  # ties are the rule
    buckets = rank_buckets(torch.from_numpy(scores))
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
    assert buckets.dtype == torch.uint8
    assert np.array_equal(buckets, ranks * CANDIDATES // cols)


def test_buckets_have_equal_parts():
    buckets = rank_buckets(random(3, 50 * CANDIDATES))
    for row in buckets:
        assert row.bincount().tolist() == [50] * CANDIDATES


def test_ranks_of_chunks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    scores = random(37, 130)
    whole = rank_buckets(scores)
    monkeypatch.setattr("besa.pruning.patterns._CHUNK", 300)
    assert torch.equal(rank_buckets(scores), whole)


def test_the_hard_mask_at_a_candidate_rate_prunes_that_share_of_the_row():
    scores = random(4, 200).abs()
    buckets = rank_buckets(scores)
    for first in (0, 1, 50, 99):
        masked = RateMask(
            torch.ones(4, CANDIDATES), scores, buckets, torch.full((4,), first, dtype=torch.uint8)
        ).make()
        expected = lowest_pruned(scores, torch.full((4,), 2 * first))
        assert torch.equal(masked != 0, expected)


# ------------------------------------------------------------------- mask and its gradient


def test_forward_is_the_hard_mask():
    weight, buckets = random(5, 40), rank_buckets(random(5, 40, seed=1))
    first = torch.tensor([0, 13, 50, 99, 100], dtype=torch.uint8)
    masked = RateMask(torch.rand(5, CANDIDATES), weight, buckets, first).make()
    for i in range(5):
        for j in range(40):
            expected = weight[i, j] if buckets[i, j] >= first[i] else 0
            assert masked[i, j] == expected


def test_gradient_to_the_probabilities_is_the_dense_one():
    weight, upstream = integers(6, 300, seed=0), integers(6, 300, seed=1)
    buckets = rank_buckets(random(6, 300))
    keep = torch.rand(6, CANDIDATES, requires_grad=True)
    first = torch.randint(0, 100, (6,), dtype=torch.uint8)
    RateMask(keep, weight, buckets, first)().backward(upstream)

    dense = keep.detach().clone().requires_grad_()
    (dense.gather(1, buckets.long()) * weight).backward(upstream)
    assert keep.grad is not None
    assert dense.grad is not None
    assert torch.equal(keep.grad, dense.grad)


def masked_by_dense_autograd(theta: Tensor, weight: Tensor, buckets: Tensor) -> Tensor:
    """Straight through P_ij = sum over d <= b_ij of beta_d, spelt out for every weight."""
    beta = theta.softmax(1)
    rates = beta @ (torch.arange(CANDIDATES, dtype=theta.dtype) / CANDIDATES)
    upto = torch.arange(CANDIDATES) <= buckets.unsqueeze(2)  # [rows, cols, D]
    probability = (beta.unsqueeze(1) * upto).sum(2)
    hard = (buckets >= (rates * CANDIDATES).round().unsqueeze(1)).to(theta.dtype)
    return weight * (hard + (probability - probability.detach()))


@pytest.mark.parametrize("rows_of_theta", [7, 1])
def test_gradient_to_the_logits_is_that_of_dense_autograd(rows_of_theta: int):
    weight = random(7, 120, dtype=torch.float64)
    buckets = rank_buckets(random(7, 120, seed=1).abs())
    x = random(120, 9, seed=2, dtype=torch.float64)
    start = random(rows_of_theta, CANDIDATES, seed=3, dtype=torch.float64)

    def loss(masked: Tensor) -> Tensor:
        return ((masked @ x - weight @ x).tanh()).square().sum()

    theta = start.clone().requires_grad_()
    beta = theta.softmax(1)
    rates = beta @ (torch.arange(CANDIDATES, dtype=torch.float64) / CANDIDATES)
    first = (rates.detach() * CANDIDATES).round().to(torch.uint8).expand(7)
    keep = beta.cumsum(1).expand(7, -1)
    masked = RateMask(keep, weight, buckets, first)()
    loss(masked).backward()

    dense_theta = start.clone().requires_grad_()
    dense = masked_by_dense_autograd(dense_theta.expand(7, -1), weight, buckets)
    assert torch.equal(dense.detach(), masked.detach())
    loss(dense).backward()
    assert theta.grad is not None
    assert dense_theta.grad is not None
    # The segment sums are float32.
    largest = float(dense_theta.grad.abs().max())
    torch.testing.assert_close(theta.grad, dense_theta.grad, rtol=1e-5, atol=1e-6 * largest)
    assert largest > 1e-3


# ----------------------------------------------------------------------------- learning


class Uneven:
    """y = B tanh(A x), where half of A's rows live from few weights and half from all of theirs.

    At one rate for all rows the second half loses much; a good allocation prunes the first more.
    """

    def __init__(self) -> None:
        first = random(32, 60) * torch.tensor([1.0] * 6 + [0.02] * 54)
        first[16:] = random(16, 60, seed=1).sign() * (0.2 + 0.02 * random(16, 60, seed=2))
        second = random(24, 32, seed=3) * 0.3
        self.weights = [first, second]
        self.batches = [random(2, 16, 60, seed=10 + i) for i in range(6)]
        self.targets = [self.output(i, self.weights) for i in range(6)]
        hidden = [(x @ first.T).tanh() for x in self.batches]
        norms = [
            torch.cat([x.flatten(0, 1) for x in inputs]).norm(dim=0)
            for inputs in (self.batches, hidden)
        ]
        self.scores = [w.abs() * n for w, n in zip(self.weights, norms, strict=True)]
        self.linears = [
            Linear(str(i), f"{i}.weight", 1, *w.shape, transposed=False)
            for i, w in enumerate(self.weights)
        ]
        self.size = sum(w.numel() for w in self.weights)

    def forward(self, i: int, weights: Sequence[WeightFactory]) -> Tensor:
        return self.output(i, [factory() for factory in weights])

    def output(self, i: int, masked: Sequence[Tensor]) -> Tensor:
        return (self.batches[i] @ masked[0].T).tanh() @ masked[1].T

    def error(self, masks: Sequence[Tensor]) -> float:
        masked = [w * m for w, m in zip(self.weights, masks, strict=True)]
        wrong = sum((self.output(i, masked) - t).square().sum() for i, t in enumerate(self.targets))
        return float(wrong) / float(sum(t.square().sum() for t in self.targets))

    def learn(
        self, sparsity: float = 0.5, granularity: str = "row", epochs: int = 8, seed: int = 0
    ) -> list[tuple[float, float, list[Tensor]]]:
        """The error, the overall rate and all rates of each step."""
        matrices = [
            RankedMatrix(w, rank_buckets(s)) for w, s in zip(self.weights, self.scores, strict=True)
        ]
        learner = RateLearner(matrices, sparsity, granularity)
        steps: list[tuple[float, float, list[Tensor]]] = []

        def on_step(step: Step) -> None:
            steps.append((step.loss, step.rate, [rate.clone() for rate in learner.result()]))

        learned = learn(
            learner,
            self.forward,
            self.targets,
            epochs=epochs,
            generator=torch.Generator().manual_seed(seed),
            on_step=on_step,
        )
        assert all(torch.equal(a, b) for a, b in zip(learned.value, steps[-1][2], strict=True))
        means = np.mean(np.reshape([loss for loss, _, _ in steps], (epochs, -1)), axis=1)
        np.testing.assert_allclose(learned.losses, means, rtol=1e-5)
        return steps

    def masks(self, rates: Sequence[Tensor], sparsity: float) -> list[Tensor]:
        scored = {x.name: s.unsqueeze(0) for x, s in zip(self.linears, self.scores, strict=True)}
        masks = allocated_masks(self.linears, scored, rates, round(sparsity * self.size))
        return [masks[x.name][0] for x in self.linears]


@pytest.fixture(scope="module")
def uneven() -> Uneven:
    return Uneven()


def test_a_step_per_batch_and_epoch(uneven: Uneven):
    steps = uneven.learn(epochs=3)
    assert len(steps) == 3 * len(uneven.targets)
    for loss, overall, rates in steps:
        assert np.isfinite(loss)
        assert 0 < overall < 1
        assert [len(rate) for rate in rates] == [32, 24]
        assert all(((rate >= 0) & (rate < 1)).all() for rate in rates)
        shares = sum(
            float(r.mean()) * w.numel() for r, w in zip(rates, uneven.weights, strict=True)
        )
        assert overall == pytest.approx(shares / uneven.size, abs=1e-4)


@pytest.mark.parametrize("granularity", ["row", "layer"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_learning_starts_even_and_stays_near_the_target(
    uneven: Uneven, granularity: str, sparsity: float
):
    steps = uneven.learn(sparsity, granularity)
    first = torch.cat(steps[0][2])
    assert float(first.max() - first.min()) < 1e-4
    assert steps[-1][1] == pytest.approx(sparsity, abs=0.05)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_loss_goes_down_and_the_projected_masks_beat_wandas(uneven: Uneven, sparsity: float):
    steps = uneven.learn(sparsity, epochs=20)
    losses = [loss for loss, _, _ in steps]
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])

    rates = steps[-1][2]
    assert rates[0][:16].mean() > rates[0][16:].mean()  # few weights matter in the first half

    masks = uneven.masks(rates, sparsity)
    assert sum(int((~mask).sum()) for mask in masks) == round(sparsity * uneven.size)
    even = [torch.full_like(rate, sparsity) for rate in rates]
    assert uneven.error(masks) < uneven.error(uneven.masks(even, sparsity))


def test_a_rate_per_layer_is_one_for_all_rows(uneven: Uneven):
    _, _, rates = uneven.learn(granularity="layer", epochs=20)[-1]
    for rate in rates:
        assert float(rate.max()) == float(rate.min())
    assert float(rates[0][0]) != float(rates[1][0])
    masks = uneven.masks(rates, 0.5)
    assert sum(int((~mask).sum()) for mask in masks) == round(0.5 * uneven.size)
    for mask in masks:
        pruned = (~mask).sum(1)
        assert int(pruned.max() - pruned.min()) <= 1


def test_the_same_seed_learns_the_same_rates(uneven: Uneven):
    a, b, c = (uneven.learn(epochs=2, seed=seed) for seed in (5, 5, 6))
    assert [loss for loss, _, _ in a] == [loss for loss, _, _ in b]
    assert all(torch.equal(x, y) for x, y in zip(a[-1][2], b[-1][2], strict=True))
    assert [loss for loss, _, _ in a] != [loss for loss, _, _ in c]  # another order of batches


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_the_logits_of_all_matrices_move_together(uneven: Uneven, granularity: str):
    """A GPU takes longer to start such an operation than to do it."""
    matrices = [
        RankedMatrix(w, rank_buckets(s)) for w, s in zip(uneven.weights, uneven.scores, strict=True)
    ]
    learner = RateLearner(matrices, 0.5, granularity)
    with Counted() as counted:
        group = Group(len(uneven.targets[0]), range(1))
        learn_step(learner, uneven.forward, group, uneven.targets)
    counts = counted.counts
    assert counts["_softmax"] == counts["_softmax_backward_data"] == 1
    assert counts["cumsum"] == 2  # there and back
    assert counts["addcdiv_"] == 1


def test_learning_leaves_weights_targets_and_torchs_seed_alone(uneven: Uneven):
    before = [t.clone() for t in (*uneven.weights, *uneven.targets)]
    state = torch.get_rng_state()
    uneven.learn(epochs=1)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (*uneven.weights, *uneven.targets), strict=True)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert not any(t.requires_grad for t in (*uneven.weights, *uneven.targets))


def test_projection_keeps_the_order_of_the_learned_rates(uneven: Uneven):
    rates = uneven.learn(epochs=4)[-1][2]
    counts = counts_for(rates[0], 60, 960)
    assert int(counts.sum()) == 960
    order = rates[0].argsort()
    assert (counts[order].diff() >= 0).all()


# ------------------------------------------------------------------------------ N:M


def test_choice_is_the_mask_and_its_gradient_that_of_a_soft_mask():
    weight, upstream = random(6, 32), random(6, 32, seed=1)
    mask = n_of_m(weight.abs(), 2, 4)
    importance = weight.abs().log().requires_grad_()
    masked = ChoiceMask(importance, weight, mask)()
    assert torch.equal(masked, weight * mask)
    masked.backward(upstream)

    dense = mask.double().requires_grad_()
    (weight.double() * dense).backward(upstream.double())
    assert importance.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(importance.grad.double(), dense.grad, rtol=1e-6, atol=1e-9)


Choices = list[tuple[float, list[Tensor]]]


def choose(uneven: Uneven, n: int, m: int, epochs: int = 8, seed: int = 0) -> Choices:
    learner = ChoiceLearner(uneven.weights, uneven.scores, Pattern(n, m))
    steps: Choices = []
    learned = learn(
        learner,
        uneven.forward,
        uneven.targets,
        epochs=epochs,
        generator=torch.Generator().manual_seed(seed),
        on_step=lambda step: steps.append((step.loss, learner.result())),
    )
    assert all(torch.equal(a, b) for a, b in zip(learned.value, steps[-1][1], strict=True))
    return steps


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_every_step_keeps_n_of_m_and_the_last_beats_wanda(uneven: Uneven, n: int, m: int):
    steps = choose(uneven, n, m)
    assert len(steps) == 8 * len(uneven.targets)
    for loss, masks in steps:
        assert np.isfinite(loss)
        for mask, weight in zip(masks, uneven.weights, strict=True):
            assert mask.shape == weight.shape
            assert (mask.reshape(-1, m).sum(1) == n).all()
    wanda = uneven.error([n_of_m(scores, n, m) for scores in uneven.scores])
    assert uneven.error(steps[-1][1]) < wanda
    losses = [loss for loss, _ in steps]
    assert np.mean(losses[-6:]) < np.mean(losses[:6])


def test_the_same_seed_makes_the_same_choice(uneven: Uneven):
    a, b = choose(uneven, 2, 4, epochs=2), choose(uneven, 2, 4, epochs=2)
    assert [loss for loss, _ in a] == [loss for loss, _ in b]
    assert all(torch.equal(x, y) for x, y in zip(a[-1][1], b[-1][1], strict=True))


def test_choosing_leaves_scores_and_weights_alone(uneven: Uneven):
    given = (*uneven.scores, *uneven.weights, *uneven.targets)
    before = [tensor.clone() for tensor in given]
    choose(uneven, 2, 4, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    assert not any(tensor.requires_grad for tensor in given)


def test_scores_of_nought_and_linears_out_of_use(uneven: Uneven):
    """An input that never fires, and an expert that no token of the batch reaches."""
    scores = [score.clone() for score in uneven.scores]
    scores[0][:, :8] = 0
    unused = random(4, 8)
    learned = learn(
        ChoiceLearner([*uneven.weights, unused], [*scores, unused.abs()], Pattern(2, 4)),
        lambda i, weights: uneven.forward(i, weights[:2]),
        uneven.targets,
        generator=torch.Generator().manual_seed(0),
    )
    masks = learned.value
    assert np.isfinite(learned.losses).all()
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masks)
    assert torch.equal(masks[2], n_of_m(unused.abs(), 2, 4))
