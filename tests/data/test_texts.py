"""Sources of text: what each kind gives, and what each failure says."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from besa.data import builtin as corpus
from besa.data.texts import NAMES, documents_from, window_cap
from besa.errors import BesaError


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffGrüße\n\nzwei".encode())
    assert list(documents_from(str(path))) == ["Grüße\n\nzwei"]


def test_json_lines_are_documents_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "n": 1}\n\n{"text": ""}\n{"text": "two\\n"}\n')
    assert list(documents_from(str(path))) == ["one", "", "two\n"]


def test_json_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 5 + "not JSON\n")
    documents = documents_from(str(path))
    assert list(islice(documents, 5)) == ["one"] * 5
    with pytest.raises(BesaError, match="line 6: not JSON"):
        next(documents)


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["one", "two"]}), path)
    assert list(documents_from(str(path))) == ["one", "two"]
    parquet.write_table(pyarrow.table({"n": [1, 2]}), path)
    with pytest.raises(BesaError, match="no column `text`, only n"):
        documents_from(str(path))
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(BesaError, match="cannot be read as Parquet"):
        documents_from(str(path))


def test_builtin_is_the_corpus_at_the_asked_split() -> None:
    first = next(corpus.documents("calibration"))
    assert next(documents_from("builtin", "calibration")) == first
    assert next(documents_from("builtin:calibration", "test")) == first
    assert next(documents_from("builtin", "test")) == next(corpus.documents("test"))


def test_csv_rows_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('n,text\n1,"one, with a comma\nand a line"\n2,\n3,two\n')
    assert list(documents_from(str(path))) == ["one, with a comma\nand a line", "", "two"]
    assert list(documents_from(str(path), column="n")) == ["1", "2", "3"]
    long = "word " * 100_000
    path.write_text(f"text\n{long}\n")
    assert list(documents_from(str(path))) == [long]


ROWS = [{"body": "one", "text": "A"}, {"body": "two", "text": "B"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_column_can_be_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix == ".csv":
        path.write_text("body,text\none,A\ntwo,B\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(documents_from(str(path))) == ["A", "B"]
    assert list(documents_from(str(path), column="body")) == ["one", "two"]
    with pytest.raises(BesaError, match=r"no (field|column) `title`.*only body, text: .*--column"):
        list(documents_from(str(path), column="title"))


@pytest.mark.parametrize("source", ["builtin", "a.txt"])
def test_what_has_no_columns(source: str) -> None:
    with pytest.raises(BesaError, match="has no columns: leave --column out"):
        documents_from(source, column="body")


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_are_chats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"chats{suffix}"
    chats = (CHAT, [], CHAT[:1])
    rows = [{"id": "a", "messages": chat} for chat in chats]
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(documents_from(str(path))) == [CHAT, "", CHAT[:1]]


WRONG_FILES: dict[str, tuple[str, bytes | None]] = {
    "missing.txt": ("does not exist", None),
    "latin.txt": ("not UTF-8", "Grüße".encode("latin-1")),
    "latin.jsonl": ("not UTF-8", '{"text": "Grüße"}'.encode("latin-1")),
    "empty.txt": ("is empty", b""),
    "blank.txt": ("is empty", b" \n\n"),
    "empty.jsonl": ("is empty", b'{"text": ""}\n'),
    "field.jsonl": ("line 1: no field `text`", b'{"content": "x"}\n'),
    "number.jsonl": ("line 1: no field `text`", b'{"text": 3}\n'),
    "list.jsonl": ("line 2: no field `text`", b'{"text": ""}\n["x"]\n'),
    "notes.md": ("unknown suffix", b"text"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_file_is_one_line_that_names_it(name: str, tmp_path: Path) -> None:
    message, content = WRONG_FILES[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BesaError, match=message) as caught:
        list(documents_from(str(path)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directory_and_unknown_split_are_errors(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="is a directory"):
        documents_from(str(tmp_path))
    with pytest.raises(BesaError, match="builtin:dev: no split named 'dev'"):
        documents_from("builtin:dev")


@pytest.mark.parametrize("source", [*NAMES, "owner/name", "name"])
def test_hub_without_datasets_says_what_to_install(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BesaError, match=r"pip install 'besa\[eval\]'") as caught:
        documents_from(source)
    assert str(caught.value).startswith(source)


class Hub:
    """Stands in for `datasets`: one table of rows, and what was asked for."""

    def __init__(self, rows: list[dict[str, object]], error: Exception | None = None) -> None:
        self.rows, self.error = rows, error
        self.calls: list[tuple[object, ...]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Hub:
        module = SimpleNamespace(load_dataset=self.load, disable_progress_bars=lambda: None)
        monkeypatch.setitem(sys.modules, "datasets", module)
        return self

    def load(self, name: str, config: str | None, *, split: str, **options: object) -> object:
        self.calls.append((name, config, split, options.get("data_files")))
        self.streamed = options["streaming"]
        if self.error:
            raise self.error
        return self.rows


def test_wikitext2_keeps_its_empty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([{"text": ""}, {"text": " = A = \n"}, {"text": ""}]).install(monkeypatch)
    assert list(documents_from("wikitext2", "test")) == ["", " = A = \n", ""]
    list(documents_from("wikitext2", "calibration"))
    assert [call[:3] for call in hub.calls] == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    ]


def test_ptb_is_joined_by_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub([{"sentence": "a b"}, {"sentence": "c"}]).install(monkeypatch)
    assert list(documents_from("ptb", "test")) == ["a b c"]


def test_c4_is_its_first_1100_validation_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([{"text": str(index)} for index in range(1200)]).install(monkeypatch)
    assert list(documents_from("c4", "test")) == [" ".join(map(str, range(1100)))]
    assert window_cap("c4") == 256
    assert hub.calls[0][2:] == (
        "validation",
        {"validation": "en/c4-validation.00000-of-00008.json.gz"},
    )
    assert len(list(documents_from("c4", "calibration"))) == 1200
    assert hub.calls[1][2] == "train"


@pytest.mark.parametrize("source", ["fineweb", "redpajama"])
@pytest.mark.parametrize("split", ["calibration", "test"])
def test_what_is_large_is_streamed(
    source: str, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub([{"text": "a"}, {"text": "b"}]).install(monkeypatch)
    assert list(documents_from(source, split)) == ["a", "b"]
    assert hub.streamed
    assert hub.calls[0][2] == "train"
    assert window_cap(source) == 256


def test_any_id_with_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([{"text": "x"}]).install(monkeypatch)
    assert list(documents_from("owner/name:en", "calibration")) == ["x"]
    assert hub.calls == [("owner/name", "en", "train", None)]
    Hub([{"content": "x"}]).install(monkeypatch)
    with pytest.raises(BesaError, match="owner/name has no column `text` of strings: content"):
        documents_from("owner/name")


def test_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub([], ConnectionError("Couldn't reach the hub.\nTraceback…")).install(monkeypatch)
    with pytest.raises(BesaError, match=r"owner/name .*Couldn't reach the hub") as caught:
        documents_from("owner/name")
    assert "\n" not in str(caught.value)
