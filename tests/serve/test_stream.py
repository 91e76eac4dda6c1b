"""`Stream`: what a client gets of tokens that arrive one by one, against cutting the whole text."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")  # transformers' server, whose streams these are, is not there

from transformers import AutoTokenizer
from transformers.cli.serving.utils import _GenerationCancelled, _StreamError

from besa.serve.stream import Stream, first_stop, stop_prefix_length


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """A byte is a token."""
    return AutoTokenizer.from_pretrained(tiny_model)


def collected(tokenizer: Any, steps: list[list[int]], stops: list[str]) -> tuple[list[str], Stream]:
    """What a stream of these tokens hands on, and the stream."""

    async def run() -> tuple[list[str], Stream]:
        stream = Stream(tokenizer, stops)
        for tokens in steps:
            stream.extend(tokens)
        stream.end()
        items = []
        while (item := await stream.queue.get()) is not None:
            items.append(item)
        return items, stream

    return asyncio.run(run())


def by_hand(text: str, stops: list[str]) -> str:
    """Letter by letter, until a stop string is whole; cut where the first of them begins."""
    for length in range(1, len(text) + 1):
        found = [text[:length].find(stop) for stop in stops if stop in text[:length]]
        if found:
            return text[: min(found)]
    return text


# Few letters, so that stop strings come, come nearly, and overlap.
letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(letters, stop_lists, st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_as_cut_by_hand(tokenizer: Any, text: str, stops: list[str], sizes: list[int]):
    tokens, steps = tokenizer.encode(text, add_special_tokens=False), []
    while tokens:  # a step may bring several tokens
        size = sizes[len(steps)]
        steps.append(tokens[:size])
        tokens = tokens[size:]
    items, stream = collected(tokenizer, steps, stops)
    expected = by_hand(text, stops)
    assert "".join(items) == stream.text == expected
    assert stream.stopped == any(stop in text for stop in stops)
    assert stream.total_tokens == len(stream.tokens) <= len(text)
    assert "" not in items


@given(letters, stop_lists)
def test_nothing_is_kept_back_that_can_go(tokenizer: Any, text: str, stops: list[str]):
    """After each letter, all is out but the longest end that may begin a stop string."""

    async def run() -> None:
        stream = Stream(tokenizer, stops)
        for at, token in enumerate(tokenizer.encode(text, add_special_tokens=False), start=1):
            stream.extend([token])
            if stream.stopped:
                return
            so_far = text[:at]
            ends = [
                length
                for stop in stops
                for length in range(min(at + 1, len(stop)))
                if so_far[at - length :] == stop[:length]
            ]
            assert stream.text == so_far[: at - max(ends, default=0)]

    asyncio.run(run())


@given(st.text(max_size=8))
def test_characters_of_several_tokens(tokenizer: Any, text: str):
    """They come whole, once their last byte is there."""
    tokens = tokenizer.encode(text, add_special_tokens=False)
    items, _ = collected(tokenizer, [[token] for token in tokens], [])
    assert "".join(items) == text


def test_a_stop_string_of_several_bytes(tokenizer: Any):
    tokens = tokenizer.encode("aé→b", add_special_tokens=False)
    items, stream = collected(tokenizer, [[token] for token in tokens], ["→"])
    assert "".join(items) == "aé"
    assert len(stream.tokens) == len("aé→".encode())


def test_as_generate_calls_it(tokenizer: Any):
    """First the prompt, which is no part of the answer; a stop string ends the generation."""

    async def run() -> None:
        stream = Stream(tokenizer, ["c"])
        tokens = {letter: tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abc"}
        stream.put(torch.tensor([[tokens["c"], tokens["c"]]]))
        stream.put(torch.tensor([tokens["a"]]))
        with pytest.raises(_GenerationCancelled):
            stream.put(torch.tensor([tokens["c"]]))
        assert (stream.text, stream.total_tokens) == ("a", 2)

    asyncio.run(run())


def test_cancelled(tokenizer: Any):
    async def run() -> None:
        stream, told = Stream(tokenizer, []), []
        stream.on_cancel = lambda: told.append(True)
        stream.put(torch.tensor([[5]]))
        stream.cancel()
        assert told == [True]
        with pytest.raises(_GenerationCancelled):
            stream.put(torch.tensor([6]))

    asyncio.run(run())


def test_an_error_ends_it(tokenizer: Any):
    """Its words fit between the quotes that transformers puts around them."""

    async def run() -> None:
        stream = Stream(tokenizer, [])
        stream.fail(ValueError('no "such"\nthing \\ here'))
        stream.end()
        item = await stream.queue.get()
        assert isinstance(item, _StreamError)
        assert item.msg == "no 'such' thing / here"
        assert stream.queue.empty()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "stops", "first", "open_end"),
    [
        ("", ["a"], None, 0),
        ("xa", ["a"], 1, 0),
        ("xab", ["b", "ab"], 1, 0),
        ("xa", ["ab"], None, 1),
        ("xaba", ["abac"], None, 3),
        ("aa", ["aab", "ab"], None, 2),
        ("ab", [], None, 0),
    ],
)
def test_where_stop_strings_are(text: str, stops: list[str], first: int | None, open_end: int):
    assert first_stop(text, stops) == first
    assert stop_prefix_length(text, stops) == open_end
