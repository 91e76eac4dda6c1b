"""The samples of a text that a model is pruned or trained on.

>>> from besa.model.checkpoint import Checkpoint
>>> class Settings:
...     sample_count, seqlen, bos, seed, column, separator = 4, 32, "auto", 0, None, "auto"
>>> draw_samples(Checkpoint.open("path/to/model"), "builtin", Settings).shape
torch.Size([4, 32])
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from torch import Tensor

from besa.data.beginning import bos_token
from besa.data.stream import stream_of
from besa.data.windows import calibration_windows, check_known
from besa.errors import BesaError
from besa.model.checkpoint import Checkpoint
from besa.model.loading import load_tokenizer, positions_of
from besa.model.skeleton import known_tokens

# Tokens in a sample where neither the user nor the model says how many.
_SEQLEN = 2048

# Windows that each sample is drawn from: a text longer than that is not read to its end.
WINDOWS_PER_SAMPLE = 16


class Drawing(Protocol):
    """What of a command's settings says which samples are drawn.

    Attributes:
        sample_count: how many.
        seqlen: tokens in each; None: 2048, or as many as the model takes at once.
        bos: see `besa.data.beginning`.
        column: of the text's rows; None for the usual ones.
        separator: what stands between its documents, see `besa.data.stream`.
        seed: draws them.
    """

    @property
    def sample_count(self) -> int: ...
    @property
    def seqlen(self) -> int | None: ...
    @property
    def bos(self) -> str: ...
    @property
    def column(self) -> str | None: ...
    @property
    def separator(self) -> str: ...
    @property
    def seed(self) -> int: ...


def draw_samples(checkpoint: Checkpoint, text: str, settings: Drawing, spare: int = 0) -> Tensor:
    """Token ids int64 [samples, seqlen]; the same settings give the same ones.

    Args:
        checkpoint: of the model, whose tokenizer cuts the text.
        text: a source of `besa.data.texts`, of which the calibration split is read.
        settings: which of its windows.
        spare: for each sample so many windows more, after the samples, if the text has them.

    Raises:
        BesaError: the model takes fewer tokens at once, the text has too few, or the tokenizer has
            no token to begin windows with, or tokens that the model does not know.
    """
    samples, seqlen = settings.sample_count, sample_length(checkpoint, settings.seqlen)
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.trust_remote_code)
    token = bos_token(settings.bos, tokenizer)
    limit = WINDOWS_PER_SAMPLE * samples * seqlen
    stream = stream_of(
        text,
        "calibration",
        tokenizer,
        column=settings.column,
        separator=settings.separator,
        bos=token,
        limit=limit,
    )
    windows = calibration_windows(stream, samples, seqlen, settings.seed, token, spare * samples)
    check_known(windows, known_tokens(checkpoint.model))
    return windows


def sample_length(checkpoint: Checkpoint, asked: int | None) -> int:
    """Tokens in a sample: as asked, else 2048 or as many as the model takes at once.

    Raises:
        BesaError: the model takes fewer than were asked for.
    """
    most = positions_of(checkpoint.config) or _SEQLEN
    seqlen = asked or min(_SEQLEN, most)
    if seqlen > most:
        raise BesaError(f"{checkpoint.directory} takes {most} tokens at once: lower --seqlen")
    return seqlen


def samples_digest(samples: Tensor) -> str:
    """The SHA-256 of samples, by which a run that goes on knows its text again."""
    return hashlib.sha256(samples.numpy().tobytes()).hexdigest()
