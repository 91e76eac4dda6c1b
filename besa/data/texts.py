"""Where text comes from, for calibration and evaluation alike.

A source is a local file (`.txt`, one document; `.jsonl`, `.csv`, `.parquet`, a document in the
column `text` of each row, or else a chat in its column `messages`), the built-in corpus (`builtin`,
or `builtin:SPLIT` for one split of it), or a data set of the Hugging Face hub: `wikitext2`, `ptb`,
`c4`, `fineweb`, `redpajama`, or any id (`OWNER/NAME` or `OWNER/NAME:CONFIG`) with such a column.
Another column can be named.

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

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from besa.data import builtin as corpus
from besa.data.rows import (
    COLUMNS,
    Document,
    column_of,
    csv_rows,
    document_of,
    json_rows,
    parquet_rows,
    plain_text,
)
from besa.errors import BesaError, one_line

# What reads the rows of a file, by its suffix; a text file has no rows.
_ROWS: dict[str, Callable[[Path, str | None], Iterator[Document]]] = {
    ".jsonl": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
SUFFIXES = (".txt", *_ROWS)
NAMES = ("wikitext2", "ptb", "c4", "fineweb", "redpajama")

# What may stand between documents, see `besa.data.stream`; auto: eos, if the source has documents
# and the tokenizer such a token.
SEPARATORS = ("auto", "eos", "blank-line")

# Too large to be fetched as a whole.
_STREAMED = ("fineweb", "redpajama")

_C4_SHARDS = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_KINDS = f"a {', '.join(SUFFIXES)} file, builtin[:SPLIT] or one of {', '.join(NAMES)}"


def documents_from(
    source: str, split: str = "test", column: str | None = None
) -> Iterator[Document]:
    """The documents of a source, in its own order, read as they are asked for.

    Args:
        source: a file or a name, see the module's description.
        split: `calibration`, `validation` or `test`; a file has no splits and is read whole.
        column: of its rows; None for `text`, or `messages` where there is no such column.

    Raises:
        BesaError: nothing is there, it cannot be read, or it holds no text. What is wrong with
            the beginning is raised at once, what is wrong further on when it is reached.
    """
    documents = iter(_open(source, split, column))
    head = []
    for document in documents:
        head.append(document)
        if not isinstance(document, str) or document.strip():
            return chain(head, documents)
    raise BesaError(f"{source} is empty: give a text with words in it")


def has_columns(source: str) -> bool:
    """Whether a column of a source can be named: a text file and the built-in corpus have none."""
    return source.partition(":")[0] != "builtin" and Path(source).suffix != ".txt"


def has_documents(source: str, split: str) -> bool:
    """Whether a source's rows are documents of their own, not parts of one text.

    Those of the built-in corpus count as one text: every figure on it was measured so.
    """
    if source in ("wikitext2", "ptb"):
        return False
    if source == "c4":
        return split == "calibration"
    return has_columns(source)


def window_cap(source: str) -> int | None:
    """How many windows the field's protocol takes from a source at most; None for all."""
    return 256 if source in ("c4", *_STREAMED) else None


def _open(source: str, split: str, column: str | None) -> Iterable[Document]:
    name, _, own_split = source.partition(":")
    if column is not None and not has_columns(source):
        raise BesaError(f"{source} has no columns: leave --column out")
    if name == "builtin":
        try:
            return corpus.documents(own_split or split)
        except ValueError as error:
            raise BesaError(f"{source}: {error}") from None
    if source in NAMES:
        return _named(source, {"calibration": "train"}.get(split, split), column)
    path = Path(source).expanduser()
    if path.is_dir():
        raise BesaError(f"{source} is a directory: name one of its {', '.join(SUFFIXES)} files")
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise BesaError(f"{source} has an unknown suffix: besa reads {', '.join(SUFFIXES)}")
        rows = _ROWS.get(path.suffix)
        return plain_text(path) if rows is None else rows(path, column)
    if path.suffix in SUFFIXES or not _HUB_ID.fullmatch(source):
        raise BesaError(f"{source} does not exist: give {_KINDS}, or the id of a data set")
    split = {"calibration": "train"}.get(split, split)
    return _hub(source, split, name, own_split or None, column)


def _named(source: str, split: str, column: str | None) -> Iterable[Document]:
    if source == "wikitext2":
        return _hub(source, split, "Salesforce/wikitext", "wikitext-2-raw-v1", column)
    if source == "ptb":
        # The data set's own files are a script, which `datasets` no longer runs; the hub's
        # conversion holds the same rows.
        files = {split: f"penn_treebank/{split}/*.parquet"}
        sentences = _hub(
            source,
            split,
            "ptb-text-only/ptb_text_only",
            column=column or "sentence",
            data_files=files,
            revision="refs/convert/parquet",
        )
        return _joined(sentences)
    if source == "fineweb":
        return _hub(source, "train", "HuggingFaceFW/fineweb", "sample-10BT", column)
    if source == "redpajama":  # a script, too
        return _hub(
            source,
            "train",
            "togethercomputer/RedPajama-Data-1T-Sample",
            column=column,
            data_files={"train": "*/*train/*.parquet"},
            revision="refs/convert/parquet",
        )
    split = "train" if split == "train" else "validation"  # the field's test is its validation
    files = {split: _C4_SHARDS[split]}
    rows = _hub(source, split, "allenai/c4", column=column, data_files=files)
    return rows if split == "train" else _joined(islice(rows, 1100))


def _joined(documents: Iterable[Document]) -> Iterator[str]:
    yield " ".join(document for document in documents if isinstance(document, str))


def _hub(
    source: str,
    split: str,
    dataset: str,
    config: str | None = None,
    column: str | None = None,
    **options: Any,
) -> Iterator[Document]:
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
            name = column_of(row, column)
            found = None if name is None else document_of(row[name])
            if found is None:
                wanted = column or COLUMNS[0]
                raise BesaError(
                    f"{source} has no column `{wanted}` of strings: {', '.join(row)}; name another "
                    "by --column"
                )
            yield found
