"""The token that windows begin with: by the tokenizer's habit, always or never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from besa.data.beginning import begin_texts as learn_to_begin
from besa.data.beginning import bos_token
from besa.data.windows import calibration_windows, evaluation_windows, token_stream
from besa.errors import BesaError
from tests.helpers import begin_texts

BOS = 0  # of the tiny model's tokenizer


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    """It knows a beginning token, and puts none before a text by itself."""
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def beginning(tokenizer: Any) -> Any:
    """It puts one before a text, as Gemma's does."""
    return begin_texts(tokenizer)


@pytest.mark.parametrize(("choice", "token"), [("auto", None), ("always", BOS), ("never", None)])
def test_a_tokenizer_without_the_habit(tokenizer: Any, choice: str, token: int | None) -> None:
    assert bos_token(choice, tokenizer) == token


@pytest.mark.parametrize(("choice", "token"), [("auto", BOS), ("always", BOS), ("never", None)])
def test_a_tokenizer_that_begins_texts(beginning: Any, choice: str, token: int | None) -> None:
    assert bos_token(choice, beginning) == token


def test_a_tokenizer_without_such_a_token(tokenizer: Any) -> None:
    tokenizer.bos_token = None
    assert bos_token("auto", tokenizer) is bos_token("never", tokenizer) is None
    with pytest.raises(BesaError, match="has no beginning-of-sequence token"):
        bos_token("always", tokenizer)


def test_a_tokenizer_learns_to_begin_texts(tokenizer: Any) -> None:
    plain = tokenizer("some text")["input_ids"]
    for _ in range(2):  # once is enough
        learn_to_begin(tokenizer)
        assert tokenizer("some text")["input_ids"] == [BOS, *plain]
    assert tokenizer("some text", add_special_tokens=False)["input_ids"] == plain
    assert tokenizer.encode("some", "text")[0] == BOS


def test_each_window_begins_with_it_and_no_text_is_lost(beginning: Any) -> None:
    text = "some words of a text " * 20
    plain = token_stream(beginning, [text])
    assert plain[0] == BOS
    stream = token_stream(beginning, [text], special=False)
    assert torch.equal(stream, plain[1:])
    windows = evaluation_windows(stream, 16, BOS)
    assert windows.shape == (len(stream) // 15, 16)
    assert (windows[:, 0] == BOS).all()
    assert torch.equal(windows[:, 1:].flatten(), stream[: len(windows) * 15])


@pytest.mark.parametrize("samples", [1, 7, 25])
def test_calibration_windows_do_not_overlap(samples: int) -> None:
    stream = torch.arange(1, 25 * 15 + 9)
    for seed in range(20):
        windows = calibration_windows(stream, samples, 16, seed, bos=BOS)
        assert windows.shape == (samples, 16)
        assert (windows[:, 0] == BOS).all()
        rest = windows[:, 1:]
        assert torch.equal(rest - rest[:, :1], torch.arange(15).expand(samples, 15))
        assert len(rest.unique()) == rest.numel()


@pytest.mark.parametrize("seqlen", [1, 400])
def test_text_that_is_too_short_is_refused(seqlen: int) -> None:
    stream = torch.arange(300)
    with pytest.raises(BesaError, match="fewer than one window"):
        evaluation_windows(stream, seqlen, BOS)


def test_a_sample_of_nothing_but_its_beginning_is_refused() -> None:
    with pytest.raises(BesaError, match="has 0 windows of 1 tokens, not 1"):
        calibration_windows(torch.arange(300), 1, 1, seed=0, bos=BOS)
