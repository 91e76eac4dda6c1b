"""Text to windows of tokens.

>>> from transformers import AutoTokenizer
>>> from besa.data.texts import documents_from
>>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")
>>> stream = token_stream(tokenizer, documents_from("builtin", "calibration"), limit=100_000)
>>> calibration_windows(stream, samples=128, seqlen=512, seed=0).shape
torch.Size([128, 512])

As in the field's protocol the documents are one text, tokenized in one go (so that a beginning
token comes once, if the tokenizer adds one) and cut into windows of `seqlen` tokens. Or each window
has a beginning token of its own as the first of them (`besa.data.beginning`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from besa.errors import BesaError

SEPARATOR = "\n\n"

# A first guess at how much text the wanted tokens need; English has about 4.5.
_CHARACTERS_A_TOKEN = 8
# Where a text is cut, its last tokens may not be those of the whole text.
_MARGIN = 64


def token_stream(
    tokenizer: Any, documents: Iterable[str], limit: int | None = None, special: bool = True
) -> Tensor:
    """The tokens of all documents, joined by a blank line.

    Args:
        tokenizer: a transformers tokenizer.
        documents: read in order.
        limit: no more than this many tokens are wanted: only as many documents as those need
            (and up to twice that) are read and tokenized, however long the text is.
        special: whether the tokenizer may put tokens of its own before the text and after it.

    Returns:
        int64 [n].
    """
    if limit is None:
        return _encode(tokenizer, SEPARATOR.join(documents), special)
    documents = iter(documents)
    text = ""
    budget = _CHARACTERS_A_TOKEN * (limit + _MARGIN)
    while True:
        pieces = [text] if text else []
        length = len(text)
        for document in documents if length <= budget else ():
            pieces.append(document)
            length += len(SEPARATOR) + len(document)
            if length > budget:
                break
        text = SEPARATOR.join(pieces)
        stream = _encode(tokenizer, text[:budget], special)
        if len(stream) >= limit + _MARGIN or len(text) <= budget:
            return stream[:limit]
        budget *= 2


def calibration_windows(
    stream: Tensor,
    samples: int,
    seqlen: int,
    seed: int,
    bos: int | None = None,
    spare: int = 0,
) -> Tensor:
    """A random choice of windows that do not overlap.

    The stream is cut into windows from a random beginning (of those that leave enough of them)
    and `samples` of the windows are drawn, in random order. The same seed gives the same windows.

    Args:
        stream: int64 [n].
        bos: a token to begin each window with, its first of `seqlen`.
        spare: how many windows more to draw, if there are as many. They follow the samples.

    Returns:
        int64 [samples, seqlen], or up to [samples + spare, seqlen].

    Raises:
        BesaError: the stream is too short.
    """
    taken, available = _cut(stream, seqlen, bos)
    if available < samples:
        raise BesaError(
            f"the calibration text has {available} windows of {seqlen} tokens, not {samples}: "
            "lower the samples or the sequence length, or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    offsets = min(taken, len(stream) - samples * taken + 1)
    offset = int(torch.randint(offsets, (), generator=generator))
    windows = evaluation_windows(stream[offset:], seqlen, bos)
    return windows[torch.randperm(len(windows), generator=generator)[: samples + spare]]


def evaluation_windows(stream: Tensor, seqlen: int, bos: int | None = None) -> Tensor:
    """All windows from the beginning on; what is left over at the end is dropped.

    Args:
        stream: int64 [n].
        bos: a token to begin each window with, its first of `seqlen`.

    Returns:
        int64 [n // seqlen, seqlen]; with `bos` [n // (seqlen - 1), seqlen].

    Raises:
        BesaError: the stream is shorter than one window.
    """
    taken, count = _cut(stream, seqlen, bos)
    if count == 0:
        raise BesaError(
            f"the text has {len(stream)} tokens, fewer than one window of {seqlen}: "
            "lower --seqlen or give more text"
        )
    windows = stream[: count * taken].view(count, taken)
    return windows if bos is None else functional.pad(windows, (1, 0), value=bos)


def check_known(windows: Tensor, tokens: int | None) -> None:
    """Raises a BesaError if windows hold a token that a model of so many tokens has no row for.

    None is a model that does not tell.
    """
    if tokens is not None and int(windows.max()) >= tokens:
        raise BesaError(
            f"the tokenizer gives tokens beyond the model's {tokens}: it is another's, so copy the "
            "model's own tokenizer beside it"
        )


def _cut(stream: Tensor, seqlen: int, bos: int | None) -> tuple[int, int]:
    """How many tokens of the stream a window takes, and how many windows it has."""
    taken = seqlen - (bos is not None)
    return taken, len(stream) // taken if taken else 0


def _encode(tokenizer: Any, text: str, special: bool) -> Tensor:
    # verbose=False: a text longer than the model's context is what we want, not a mistake.
    options = {} if special else {"add_special_tokens": False}
    ids = tokenizer(text, truncation=False, verbose=False, **options)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
