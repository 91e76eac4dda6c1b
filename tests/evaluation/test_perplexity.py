"""Perplexity against loops and numpy, and what a model that cannot be loaded says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import besa.evaluation.perplexity
from besa.errors import BesaError
from besa.evaluation.config import EvalConfig
from besa.evaluation.evaluate import evaluate, sparsity
from besa.evaluation.perplexity import Perplexity, paired, window_losses
from besa.model.files import model_directory
from besa.model.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_model(tiny_model, "float32", "cpu")


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(257, (5, 24), generator=torch.Generator().manual_seed(1))


def oracle(model: Any, windows: torch.Tensor) -> list[float]:
    """Token by token in float64: −log p of each token given those before it in its window."""
    losses = []
    for window in windows:
        total = 0.0
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(window[None, :position]).logits[0, -1]
            p = np.exp(logits.numpy().astype(np.float64))
            total -= math.log(p[window[position]] / p.sum())
        losses.append(total / (len(window) - 1))
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_window_losses_against_a_loop(model: Any, windows: torch.Tensor, batch_size: int) -> None:
    losses = window_losses(model, windows, batch_size)
    assert losses.dtype == torch.float64
    np.testing.assert_allclose(losses.numpy(), oracle(model, windows), rtol=1e-6)


def test_few_logits_at_a_time_change_nothing(
    model: Any, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = window_losses(model, windows)
    sizes = []
    cross_entropy = F.cross_entropy

    def spy(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(logits.numel())
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", spy)
    monkeypatch.setattr(besa.evaluation.perplexity, "_LOGITS_AT_A_TIME", 1000)
    torch.testing.assert_close(window_losses(model, windows, 2), expected, rtol=1e-6, atol=0)
    assert max(sizes) <= 1000 < 23 * 257


def test_progress_counts_windows(model: Any, windows: torch.Tensor) -> None:
    calls: list[tuple[int, int]] = []
    window_losses(model, windows, 2, lambda done, total: calls.append((done, total)))
    assert calls == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_uniform_model_has_the_vocabulary_as_perplexity(
    tiny_model: Path, windows: torch.Tensor
) -> None:
    model = load_model(tiny_model, "float32", "cpu")
    torch.nn.init.zeros_(model.lm_head.weight)
    result = Perplexity.of(window_losses(model, windows), 24)
    assert result.perplexity == pytest.approx(257, rel=1e-6)
    assert result.standard_error == pytest.approx(0, abs=1e-3)
    assert (result.tokens, result.windows, result.seqlen) == (5 * 23, 5, 24)


def test_standard_error_is_the_spread_of_resampled_perplexities() -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.4, size=400)
    result = Perplexity.of(torch.from_numpy(losses), 128)
    assert result.perplexity == pytest.approx(np.exp(losses.mean()))
    by_formula = np.exp(losses.mean()) * losses.std(ddof=1) / np.sqrt(400)
    assert result.standard_error == pytest.approx(by_formula)
    resampled = np.exp(rng.choice(losses, size=(4000, 400)).mean(axis=1))
    assert result.standard_error == pytest.approx(resampled.std(), rel=0.05)


def test_one_window_has_no_standard_error() -> None:
    result = Perplexity.of(torch.tensor([2.0], dtype=torch.float64), 8)
    assert result.perplexity == pytest.approx(math.exp(2))
    assert math.isnan(result.standard_error)


@pytest.mark.parametrize("loss", [1000.0, math.inf, math.nan])
def test_broken_model_has_no_finite_perplexity(loss: float) -> None:
    result = Perplexity.of(torch.tensor([loss, loss], dtype=torch.float64), 8)
    assert not math.isfinite(result.perplexity)


def test_paired_takes_the_windows_difficulty_out() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(3.0, 1.0, size=200)
    losses = reference + rng.normal(0.1, 0.01, size=200)
    mean, error = paired(torch.from_numpy(losses), torch.from_numpy(reference))
    assert mean == pytest.approx((losses - reference).mean())
    assert error == pytest.approx((losses - reference).std(ddof=1) / np.sqrt(200))
    assert mean == pytest.approx(0.1, abs=5 * error)
    assert paired(torch.from_numpy(reference), torch.from_numpy(losses))[0] == -mean


def test_sparsity_counts_the_blocks_matrices(tiny_model: Path) -> None:
    model = load_model(tiny_model, "float32", "cpu")
    assert sparsity(model) == 0
    torch.nn.init.zeros_(model.lm_head.weight)  # left out
    torch.nn.init.zeros_(model.model.norm.weight)  # no matrix
    for block in model.model.layers:
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    linears = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert sparsity(model) == pytest.approx(64 * 128 / linears)


def test_evaluate_is_the_windows_of_the_text(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 3)
    stream = torch.tensor(load_tokenizer(tiny_model)(text.read_text())["input_ids"])
    model = load_model(tiny_model, "float32", "cpu")
    expected = np.exp(np.mean(oracle(model, stream[: 4 * 64].view(4, 64))))
    (result,) = evaluate([str(tiny_model)], EvalConfig(texts=(str(text),), seqlen=64))
    assert result.perplexity.perplexity == pytest.approx(expected)
    assert (result.perplexity.windows, result.dtype, result.difference) == (4, "float32", None)
    (two,) = evaluate([str(tiny_model)], EvalConfig(texts=(str(text),), seqlen=64, limit=2))
    assert torch.equal(two.perplexity.losses, result.perplexity.losses[:2])
    (longest,) = evaluate([str(tiny_model)], EvalConfig(texts=(str(text),)))
    assert longest.perplexity.seqlen == 128


def copy_of(model: Path, target: Path) -> Path:
    target.mkdir()
    for path in model.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_missing_weights_are_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = copy_of(tiny_model, tmp_path / "gap")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BesaError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj\.weight"):
        load_model(directory, "auto", "cpu")


def test_unfinished_prune_is_named(tiny_model: Path, tmp_path: Path) -> None:
    partial = copy_of(tiny_model, tmp_path / "out.partial")
    for asked in (partial, tmp_path / "out"):
        with pytest.raises(BesaError, match="is not finished: run the command that began it again"):
            model_directory(asked)
    finished = copy_of(tiny_model, tmp_path / "out")
    assert model_directory(finished) == finished


def test_the_directory_one_stands_in(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model)
    assert model_directory(".") == Path()


def test_model_without_a_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    directory = copy_of(tiny_model, tmp_path / "mute")
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BesaError, match=r"has no tokenizer: copy tokenizer\.json") as caught:
        load_tokenizer(directory)
    assert "\n" not in str(caught.value)


def test_tokenizer_of_another_model(model: Any) -> None:
    with pytest.raises(BesaError, match="tokens beyond the model's 257"):
        window_losses(model, torch.tensor([[1, 257]]))


@pytest.mark.parametrize(
    "settings",
    [
        {"seqlen": 1},
        {"batch_size": 0},
        {"limit": 0},
        {"dtype": "int8"},
        {"texts": ()},
        {"num_fewshot": 2},
    ],
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(BesaError):
        EvalConfig(**settings)
