"""`AnswerText`: what a client gets of tokens that arrive one by one, against cutting whole text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from besa.serve.api.text import AnswerText, Detokenizer, first_stop, stop_prefix_length


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """A byte is a token."""
    return AutoTokenizer.from_pretrained(tiny_model)


def collected(
    tokenizer: Any, steps: list[list[int]], stops: list[str], **more: Any
) -> tuple[list[str], AnswerText]:
    """What comes of these tokens, step by step and at the end."""
    text = AnswerText(tokenizer, [], stops, **more)
    parts = [text.extend(tokens) for tokens in steps]
    return [*parts, text.rest()], text


def by_hand(text: str, stops: list[str]) -> str:
    """Letter by letter, until a stop string is whole; cut where the first of them begins."""
    for length in range(1, len(text) + 1):
        found = [text[:length].find(stop) for stop in stops if stop in text[:length]]
        if found:
            return text[: min(found)]
    return text


def encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


# Few letters, so that stop strings come, come nearly, and overlap.
letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(letters, stop_lists, st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_as_cut_by_hand(tokenizer: Any, text: str, stops: list[str], sizes: list[int]):
    tokens, steps = encoded(tokenizer, text), []
    while tokens:  # a step may bring several tokens
        size = sizes[len(steps)]
        steps.append(tokens[:size])
        tokens = tokens[size:]
    parts, answer = collected(tokenizer, steps, stops)
    assert "".join(parts) == by_hand(text, stops)
    assert answer.stopped == any(stop in text for stop in stops)
    assert answer.tokens <= len(text)


@given(letters, stop_lists)
def test_nothing_is_kept_back_that_can_go(tokenizer: Any, text: str, stops: list[str]):
    """After each letter, all is out but the longest end that may begin a stop string."""
    answer, said = AnswerText(tokenizer, [], stops), ""
    for at, token in enumerate(encoded(tokenizer, text), start=1):
        said += answer.extend([token])
        if answer.stopped:
            return
        so_far = text[:at]
        ends = [
            length
            for stop in stops
            for length in range(min(at + 1, len(stop)))
            if so_far[at - length :] == stop[:length]
        ]
        assert said == so_far[: at - max(ends, default=0)]


@given(st.text(max_size=8))
def test_characters_of_several_tokens(tokenizer: Any, text: str):
    """They come whole, once their last byte is there."""
    parts, _ = collected(tokenizer, [[token] for token in encoded(tokenizer, text)], [])
    assert "".join(parts) == text
    # Only a text that has it shows the sign of no character.
    assert "\ufffd" in text or "\ufffd" not in "".join(parts)


@given(st.lists(st.integers(1, 256), max_size=12))
def test_bytes_that_are_no_characters(tokenizer: Any, tokens: list[int]):
    """What comes piece by piece is what the tokenizer makes of the whole."""
    parts, _ = collected(tokenizer, [[token] for token in tokens], [])
    assert "".join(parts) == tokenizer.decode(tokens)


def test_an_end_without_a_character_is_told(tokenizer: Any):
    half = encoded(tokenizer, "é")[:1]
    parts, _ = collected(tokenizer, [encoded(tokenizer, "a"), half], [])
    assert parts == ["a", "", "\ufffd"]


def test_many_bytes_that_are_no_characters_are_not_kept_back(tokenizer: Any):
    half = encoded(tokenizer, "é")[:1]
    detokenizer = Detokenizer(tokenizer, [], skip_special_tokens=True)
    assert "".join(detokenizer.step(half[0]) for _ in range(64)).count("\ufffd") > 32


def test_a_stop_string_of_several_bytes(tokenizer: Any):
    tokens = encoded(tokenizer, "aé→b")
    parts, answer = collected(tokenizer, [[token] for token in tokens], ["→"])
    assert "".join(parts) == "aé"
    assert answer.tokens == len("aé→".encode())


def test_a_token_that_ends_it(tokenizer: Any):
    """It counts, and has no text."""
    a, c = encoded(tokenizer, "ac")
    parts, answer = collected(tokenizer, [[a, 0, c]], [], ends={0}, skip_special_tokens=False)
    assert ("".join(parts), answer.tokens, answer.stopped) == ("a", 2, True)


def test_it_does_not_end_before_its_least_tokens(tokenizer: Any):
    tokens = encoded(tokenizer, "abcabc")
    parts, answer = collected(tokenizer, [tokens], ["c"], min_tokens=4)
    assert ("".join(parts), answer.tokens) == ("abcab", 6)


def test_special_tokens(tokenizer: Any):
    a, b = encoded(tokenizer, "ab")
    parts, _ = collected(tokenizer, [[a, 0, b]], [])
    assert "".join(parts) == "ab"
    parts, _ = collected(tokenizer, [[a, 0, b]], [], skip_special_tokens=False)
    assert "".join(parts) == "a<|endoftext|>b"


class Words:
    """A tokenizer that puts spaces between words, not before the first, as SentencePiece's do."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(f"w{token}" for token in tokens)


def test_the_first_word_is_spaced_as_in_the_whole():
    answer = AnswerText(Words(), prompt=[1, 2])
    assert [answer.extend([token]) for token in (3, 4)] == [" w3", " w4"]
    assert AnswerText(Words(), prompt=[]).extend([3]) == "w3"


def test_a_character_that_the_prompt_begins(tokenizer: Any):
    first, second = encoded(tokenizer, "é")
    answer = AnswerText(tokenizer, prompt=[first])
    assert answer.extend([second, *encoded(tokenizer, "t")]) == "ét"


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
