"""Sources to tokens: documents end in their token, chats are rendered, broken text is mended."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from besa.data.stream import separator_of, stream_of
from besa.errors import BesaError, BesaWarning
from tests.helpers import begin_texts

END = 0  # of the tiny model's tokenizer, and its beginning token, too
BEGIN = 5

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('user', 'assistant') %}{{ raise_exception('no') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{{ eos_token }}\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def json_lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def two(tmp_path: Path) -> str:
    return json_lines(tmp_path / "two.jsonl", {"text": "one"}, {"text": " \n"}, {"text": "two"})


def test_documents_end_in_the_end_token(tokenizer: Any, two: str) -> None:
    one, other = (tokenizer(text)["input_ids"] for text in ("one", "two"))
    assert stream_of(two, "test", tokenizer).tolist() == [*one, END, *other, END]
    joined = tokenizer("one\n\n \n\n\ntwo")["input_ids"]
    assert stream_of(two, "test", tokenizer, separator="blank-line").tolist() == joined


def test_documents_begin_as_windows_do(tokenizer: Any, two: str) -> None:
    """But the first, as the first window has the token already."""
    one, other = (tokenizer(text)["input_ids"] for text in ("one", "two"))
    expected = [*one, END, BEGIN, *other, END]
    assert stream_of(two, "test", tokenizer, bos=BEGIN).tolist() == expected


def test_the_tokenizer_begins_the_whole_once(tokenizer: Any, two: str) -> None:
    one, other = (tokenizer(text)["input_ids"] for text in ("one", "two"))
    stream = stream_of(two, "test", begin_texts(tokenizer))
    assert stream.tolist() == [END, *one, END, *other, END]


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 7, 100])
def test_a_limited_stream_is_a_prefix(tokenizer: Any, two: str, limit: int) -> None:
    whole = stream_of(two, "test", tokenizer)
    assert stream_of(two, "test", tokenizer, limit=limit).tolist() == whole[:limit].tolist()


def test_an_end_token_that_is_there_is_not_doubled(tokenizer: Any, tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"text": "one<|endoftext|>\n"}, {"text": "two"})
    assert stream_of(path, "test", tokenizer).tolist().count(END) == 2


@pytest.mark.parametrize(
    ("source", "split", "separator"),
    [
        ("a.txt", "test", "blank-line"),
        ("builtin", "calibration", "blank-line"),
        ("builtin:test", "test", "blank-line"),
        ("wikitext2", "calibration", "blank-line"),
        ("ptb", "test", "blank-line"),
        ("c4", "test", "blank-line"),  # the field joins it by spaces
        ("c4", "calibration", "eos"),
        ("fineweb", "test", "eos"),
        ("owner/name", "test", "eos"),
        ("a.jsonl", "test", "eos"),
        ("a.csv", "test", "eos"),
        ("a.parquet", "test", "eos"),
    ],
)
def test_which_sources_have_documents(
    tokenizer: Any, source: str, split: str, separator: str
) -> None:
    assert separator_of("auto", source, split, tokenizer) == separator
    assert separator_of("eos", source, split, tokenizer) == "eos"
    assert separator_of("blank-line", source, split, tokenizer) == "blank-line"


def test_a_tokenizer_without_an_end_token(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    assert separator_of("auto", "a.jsonl", "test", tokenizer) == "blank-line"
    with pytest.raises(BesaError, match="has no end-of-sequence token"):
        separator_of("eos", "a.jsonl", "test", tokenizer)


@pytest.mark.parametrize("separator", ["auto", "blank-line"])
@pytest.mark.parametrize("begins", [False, True])
def test_chats_go_through_the_template(
    tokenizer: Any, tmp_path: Path, separator: str, begins: bool
) -> None:
    """Whose tokens stand alone: none is doubled by the tokenizer's own or by the separator."""
    tokenizer.chat_template = TEMPLATE
    if begins:
        begin_texts(tokenizer)
    path = json_lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT[:1]})
    shown = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHAT, CHAT[:1])]
    text = ("\n\n" if separator == "blank-line" else "").join(shown)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert stream_of(path, "test", tokenizer, separator=separator).tolist() == expected


def test_chats_without_a_template(tokenizer: Any, tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(BesaError, match="holds chats, and the tokenizer has no chat template"):
        stream_of(path, "test", tokenizer)


def test_a_chat_that_the_template_refuses(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    path = json_lines(tmp_path / "a.jsonl", {"messages": [{"role": "tool", "content": "1"}]})
    with pytest.raises(BesaError, match="chat template does not take a chat of tool") as caught:
        stream_of(path, "test", tokenizer)
    assert "\n" not in str(caught.value)


BROKEN = {
    "lone.jsonl": b'{"text": "smile \\ud83d and \\ude00"}\n{"text": "\\ud83d\\ude00"}\n',
    "bytes.jsonl": b'{"text": "some caf\xe9 words, and \xff more of them"}\n',
    "bytes.csv": b"text\nsome caf\xe9 words and \xff more\n",
    "bytes.txt": b"some caf\xe9 words, and \xff more of them\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_replaced_and_counted(name: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.warns(BesaWarning, match=f"{name}: 2 broken characters were replaced by U.FFFD"):
        stream = stream_of(str(path), "test", tokenizer)
    assert tokenizer.decode(stream).count("\N{REPLACEMENT CHARACTER}") == 2


def test_broken_bytes_in_parquet(tokenizer: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array([b"caf\xe9 and \xff more"]).view(pyarrow.utf8())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.warns(BesaWarning, match="2 broken characters"):
        stream_of(str(tmp_path / "a.parquet"), "test", tokenizer)


def test_what_is_whole_brings_no_warning(tokenizer: Any, two: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream_of(two, "test", tokenizer)
