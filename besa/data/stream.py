"""The tokens of a source of text: chats rendered, what is broken replaced, documents kept apart.

>>> from pathlib import Path
>>> from transformers import AutoTokenizer
>>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")
>>> _ = Path("two.jsonl").write_text('{"text": "one"}\\n{"text": "two"}\\n')
>>> tokenizer.decode(stream_of("two.jsonl", "test", tokenizer))
'one<|endoftext|>two<|endoftext|>'
>>> tokenizer.decode(stream_of("two.jsonl", "test", tokenizer, separator="blank-line"))
'one\\n\\ntwo'

A model learns from documents that each end in its end-of-sequence token, and that is how documents
stand in a stream, if their source has any: rows of a file or of a data set. The lines of wikitext2
and the sentences of ptb are one text each, as the field has them, and so is a text file.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from besa.data.rows import Document
from besa.data.texts import documents_from, has_documents
from besa.data.windows import token_stream
from besa.errors import BesaError, BesaWarning

_BROKEN = re.compile("[\ud800-\udfff]")


def separator_of(choice: str, source: str, split: str, tokenizer: Any) -> str:
    """What stands between the documents of a source: "eos" or "blank-line".

    Raises:
        BesaError: eos, of a tokenizer that knows no such token.
    """
    known = tokenizer.eos_token_id is not None
    if choice == "eos" and not known:
        raise BesaError("the tokenizer has no end-of-sequence token: leave --separator eos out")
    if choice == "auto":
        return "eos" if known and has_documents(source, split) else "blank-line"
    return choice


def stream_of(
    source: str,
    split: str,
    tokenizer: Any,
    *,
    column: str | None = None,
    separator: str = "auto",
    bos: int | None = None,
    limit: int | None = None,
) -> Tensor:
    """The tokens of a source, int64 [n].

    Args:
        source, split, column: see `besa.data.texts`.
        tokenizer: of transformers.
        separator: one of `besa.data.texts.SEPARATORS`.
        bos: the token that each window is going to begin with; each document but the first does,
            too. None: the tokenizer may put tokens of its own around the whole.
        limit: no more than this many tokens are wanted.

    Raises:
        BesaError: the source cannot be read, or the tokenizer cannot render its chats.
    """
    texts = _Texts(documents_from(source, split, column), tokenizer, source)
    if separator_of(separator, source, split, tokenizer) == "eos":
        stream = _kept_apart(texts, tokenizer, bos, limit)
    else:
        stream = token_stream(tokenizer, texts, limit, special=bos is None and not texts.chats)
    if texts.broken:
        warnings.warn(
            f"{source}: {texts.broken:,} broken characters were replaced by U+FFFD",
            BesaWarning,
            stacklevel=2,
        )
    return stream


@dataclass
class _Texts:
    """The documents as texts that a tokenizer can read.

    Attributes:
        broken: characters that were replaced so far: bytes that are no UTF-8, and halves of pairs.
        chats: whether the last one, and before all the first one, is a chat, whose template puts
            special tokens itself.
    """

    documents: Iterator[Document]
    tokenizer: Any
    source: str
    broken: int = field(init=False, default=0)
    chats: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        first = next(self.documents)  # there is one
        self.chats = not isinstance(first, str)
        self.documents = chain([first], self.documents)

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            self.chats = not isinstance(document, str)
            text = document if isinstance(document, str) else self._rendered(document)
            text, count = _BROKEN.subn("\N{REPLACEMENT CHARACTER}", text)
            self.broken += count
            yield text

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        if not self.tokenizer.chat_template:
            raise BesaError(
                f"{self.source} holds chats, and the tokenizer has no chat template: name a column "
                "with texts by --column, or put the model's chat_template.jinja beside it"
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # noqa: BLE001 - a template may do anything
            roles = ", ".join(str(message["role"]) for message in messages[:4])
            raise BesaError(
                f"{self.source}: the tokenizer's chat template does not take a chat of {roles}"
                f"{', …' if len(messages) > 4 else ''}"
            ) from None


def _kept_apart(texts: _Texts, tokenizer: Any, bos: int | None, limit: int | None) -> Tensor:
    """Each document with an end token after it, and from the second on with `bos` before it."""
    end = tokenizer.eos_token_id
    parts: list[Tensor] = []
    length = 0
    for text in texts:
        if not text.strip():
            continue
        left = None if limit is None else limit - length
        special = bos is None and not parts and not texts.chats
        tokens = token_stream(tokenizer, [text], left, special)
        if not len(tokens):
            continue
        if int(tokens[0]) == bos:
            tokens = tokens[1:]
        ends = tokens[-1:].tolist() == [end] or text.rstrip().endswith(tokenizer.eos_token)
        before = [] if bos is None or not parts else [bos]
        after = [] if ends else [end]
        parts.append(torch.cat([torch.tensor(before), tokens, torch.tensor(after)]).long())
        length += len(parts[-1])
        if limit is not None and length >= limit:
            break
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])[:limit]
