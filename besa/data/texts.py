"""Where text comes from, for calibration and evaluation alike.

A source is a local file (`.txt`, one document; `.jsonl`, a document in the field `text` of each
line; `.parquet`, a document in the column `text` of each row), the built-in corpus (`builtin`, or
`builtin:SPLIT` for one split of it), or a data set of the Hugging Face hub: `wikitext2`, `ptb`,
`c4`, `fineweb`, `redpajama`, or any id (`OWNER/NAME` or `OWNER/NAME:CONFIG`) with a column `text`.

>>> next(documents_from("builtin", "test"))
'...'

Joined by a blank line, the documents are the text of the field's protocol (that of GPTQ,
SparseGPT, Wanda and BESA):

- wikitext2: all lines of `wikitext-2-raw-v1`, the empty ones too, joined by a blank line;
- ptb: the sentences joined by a space, hence one document;
- c4: the first 1100 documents of the first validation shard joined by a space, hence one
  document, of which 256 windows count (`window_cap`). Calibration reads the first train shard;
- fineweb, redpajama: the documents of a sample, ten billion tokens of the one and one of the other,
  in their order, as far as they are needed; 256 windows count.

Data sets that have no `calibration` split give their `train` split instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from besa.data import builtin as corpus
from besa.errors import BesaError, one_line

SUFFIXES = (".txt", ".jsonl", ".parquet")
NAMES = ("wikitext2", "ptb", "c4", "fineweb", "redpajama")

# Too large to be fetched as a whole.
_STREAMED = ("fineweb", "redpajama")

_C4_SHARDS = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_KINDS = f"a {', '.join(SUFFIXES)} file, builtin[:SPLIT] or one of {', '.join(NAMES)}"


def documents_from(source: str, split: str = "test") -> Iterator[str]:
    """The documents of a source, in its own order, read as they are asked for.

    Args:
        source: a file or a name, see the module's description.
        split: `calibration`, `validation` or `test`; a file has no splits and is read whole.

    Raises:
        BesaError: nothing is there, it cannot be read, or it holds no text. What is wrong with
            the beginning is raised at once, what is wrong further on when it is reached.
    """
    documents = iter(_open(source, split))
    head = []
    for document in documents:
        head.append(document)
        if document.strip():
            return chain(head, documents)
    raise BesaError(f"{source} is empty: give a text with words in it")


def window_cap(source: str) -> int | None:
    """How many windows the field's protocol takes from a source at most; None for all."""
    return 256 if source in ("c4", *_STREAMED) else None


def _open(source: str, split: str) -> Iterable[str]:
    name, _, own_split = source.partition(":")
    if name == "builtin":
        try:
            return corpus.documents(own_split or split)
        except ValueError as error:
            raise BesaError(f"{source}: {error}") from None
    if source in NAMES:
        return _named(source, {"calibration": "train"}.get(split, split))
    path = Path(source).expanduser()
    if path.is_dir():
        raise BesaError(f"{source} is a directory: name one of its {', '.join(SUFFIXES)} files")
    if path.exists():
        readers = dict(zip(SUFFIXES, (_plain, _json_lines, _parquet), strict=True))
        if path.suffix not in readers:
            raise BesaError(f"{source} has an unknown suffix: besa reads {', '.join(SUFFIXES)}")
        return readers[path.suffix](path)
    if path.suffix in SUFFIXES or not _HUB_ID.fullmatch(source):
        raise BesaError(f"{source} does not exist: give {_KINDS}, or the id of a data set")
    return _hub(source, {"calibration": "train"}.get(split, split), name, own_split or None)


def _plain(path: Path) -> Iterator[str]:
    with _reading(path) as file:
        yield file.read()


def _json_lines(path: Path) -> Iterator[str]:
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise BesaError(f"{path}, line {number}: not JSON, one object a line") from None
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise BesaError(f"{path}, line {number}: no field `text` that holds a string")
            yield text


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    """Opens a UTF-8 file (a byte-order mark is dropped) and turns its failures into one line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        raise BesaError(f"{path} is not UTF-8: convert it first") from None
    except OSError as error:
        raise BesaError(f"{path} cannot be read: {error.strerror}") from None


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise BesaError(f"{path}: Parquet needs pyarrow: pip install 'besa[eval]'") from None
    with one_line(f"{path} cannot be read as Parquet"):
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if "text" not in columns:
            raise BesaError(f"{path} has no column `text`, only {', '.join(columns)}")
        for batch in file.iter_batches(columns=["text"]):
            for text in batch.column("text").to_pylist():
                if text is not None and not isinstance(text, str):
                    raise BesaError(f"{path}: the column `text` does not hold strings")
                yield text or ""


def _named(source: str, split: str) -> Iterable[str]:
    if source == "wikitext2":
        return _hub(source, split, "Salesforce/wikitext", "wikitext-2-raw-v1")
    if source == "ptb":
        # The data set's own files are a script, which `datasets` no longer runs; the hub's
        # conversion holds the same rows.
        files = {split: f"penn_treebank/{split}/*.parquet"}
        sentences = _hub(
            source,
            split,
            "ptb-text-only/ptb_text_only",
            column="sentence",
            data_files=files,
            revision="refs/convert/parquet",
        )
        return _joined(sentences)
    if source == "fineweb":
        return _hub(source, "train", "HuggingFaceFW/fineweb", "sample-10BT")
    if source == "redpajama":  # a script, too
        return _hub(
            source,
            "train",
            "togethercomputer/RedPajama-Data-1T-Sample",
            data_files={"train": "*/*train/*.parquet"},
            revision="refs/convert/parquet",
        )
    split = "train" if split == "train" else "validation"  # the field's test is its validation
    rows = _hub(source, split, "allenai/c4", data_files={split: _C4_SHARDS[split]})
    return rows if split == "train" else _joined(islice(rows, 1100))


def _joined(documents: Iterable[str]) -> Iterator[str]:
    yield " ".join(documents)


def _hub(
    source: str,
    split: str,
    dataset: str,
    config: str | None = None,
    column: str = "text",
    **options: Any,
) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        unknown = "" if source in NAMES else f"is not {_KINDS}; a data set "
        raise BesaError(
            f"{source} {unknown}comes from the Hugging Face hub: pip install 'besa[eval]', "
            "or give a local file"
        ) from None
    datasets.disable_progress_bars()
    # Of a named set the cache serves a second call offline; an unknown one may be of any size,
    # so it is streamed.
    options["streaming"] = source not in NAMES or source in _STREAMED
    # `datasets` raises whatever its layers raise: no such set, config or split; no network.
    with one_line(f"{source} ({split} split) could not be had from the hub; use a local file"):
        for row in datasets.load_dataset(dataset, config, split=split, **options):
            if not isinstance(row.get(column), str):
                raise BesaError(f"{source} has no column `{column}` of strings: {', '.join(row)}")
            yield row[column]
