"""Text to windows: nothing lost, nothing twice, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import besa.demo
from besa.data.windows import calibration_windows, evaluation_windows, token_stream
from besa.errors import BesaError


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def test_stream_is_the_joined_text(tokenizer: Any) -> None:
    stream = token_stream(tokenizer, ["Hello", "", "Grüße"])
    assert stream.dtype == torch.int64
    assert tokenizer.decode(stream) == "Hello\n\n\n\nGrüße"
    assert len(stream) == len("Hello\n\n\n\nGrüße".encode())


@pytest.mark.parametrize("limit", [1, 100, 3000, 10**6])
@pytest.mark.parametrize("length", [3, 500, 20_000])
def test_limited_stream_is_a_prefix(limit: int, length: int) -> None:
    from transformers import AutoTokenizer

    # The shipped tokenizer merges: where a text is cut matters.
    tokenizer = AutoTokenizer.from_pretrained(Path(besa.demo.__file__).parent / "model")
    text = "".join(f"def f{index}():\n    return {index} ** 2\n" for index in range(2000))
    documents = [text[start : start + length] for start in range(0, len(text), length)]
    whole = token_stream(tokenizer, documents)
    assert torch.equal(token_stream(tokenizer, documents, limit), whole[:limit])


def test_limit_reaches_its_tokens_where_a_token_is_many_characters() -> None:
    def words(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    stream = token_stream(words, ["a" * 50, "b" * 40] * 5000, limit=1000)
    assert stream.tolist() == [50, 40] * 500


def test_limited_stream_does_not_read_on(tokenizer: Any) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "some words " * 10

    assert len(token_stream(tokenizer, endless(), 1000)) == 1000
    assert read * 110 < 20_000


def test_evaluation_windows_drop_the_rest() -> None:
    assert evaluation_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(BesaError, match="3 tokens, fewer than one window of 4"):
        evaluation_windows(torch.arange(3), 4)


@pytest.mark.parametrize("samples", [1, 7, 24, 25])
def test_calibration_windows_do_not_overlap(samples: int) -> None:
    stream = torch.arange(25 * 16 + 9)
    for seed in range(20):
        windows = calibration_windows(stream, samples, 16, seed)
        assert windows.shape == (samples, 16)
        # Of a stream that counts up, a window is consecutive and a token is seen once.
        assert torch.equal(windows - windows[:, :1], torch.arange(16).expand(samples, 16))
        assert len(windows.unique()) == windows.numel()


def test_calibration_windows_follow_the_seed() -> None:
    stream = torch.arange(1000)
    drawn = [calibration_windows(stream, 8, 16, seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    offsets = {int(calibration_windows(stream, 8, 16, seed)[0, 0]) % 16 for seed in range(100)}
    assert len(offsets) == 16
    assert int(calibration_windows(stream, 8, 16, 0).max()) < 1000


def test_too_short_says_how_many_there_are() -> None:
    with pytest.raises(BesaError, match="has 3 windows of 16 tokens, not 4: lower"):
        calibration_windows(torch.arange(63), 4, 16, 0)
