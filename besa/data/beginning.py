"""The token that a model's texts begin with, as `<bos>`: who puts it before each window.

A model that never saw a text without its beginning token may read any other badly: Gemma 3 270M has
perplexity 61 on WikiText-2 with `<bos>` before each window of 512 tokens and 165 without. The
field's protocol has at most one, before the whole text.

>>> from transformers import AutoTokenizer
>>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")
>>> bos_token("never", tokenizer) is None
True
"""

from __future__ import annotations

from typing import Any

from besa.errors import BesaError

# auto: as the tokenizer by itself does it. What else a command asks for stands in its settings.
CHOICES = ("auto", "always", "never")


def bos_token(choice: str, tokenizer: Any) -> int | None:
    """The token to put before each window; None to cut the windows from one text as it comes.

    Args:
        choice: one of `CHOICES`.
        tokenizer: of transformers.

    Raises:
        BesaError: always, of a tokenizer that knows no such token.
    """
    token: int | None = tokenizer.bos_token_id
    if choice == "always" and token is None:
        raise BesaError("the tokenizer has no beginning-of-sequence token: leave --bos always out")
    if choice == "never" or token is None:
        return None
    if choice == "always":
        return token
    begun = tokenizer("a")["input_ids"]
    return token if begun and begun[0] == token else None


def begin_texts(tokenizer: Any) -> None:
    """Has a tokenizer put its beginning token before each text, if it does not do so by itself."""
    if bos_token("auto", tokenizer) is not None:
        return
    from tokenizers import processors  # here, as `besa --help` reads this module's choices

    bos, backend = tokenizer.bos_token, tokenizer.backend_tokenizer
    beginning = processors.TemplateProcessing(
        single=[bos, "$A"],
        pair=[bos, "$A", "$B"],
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
    own = backend.post_processor
    backend.post_processor = beginning if own is None else processors.Sequence([own, beginning])
