"""The text that a run is calibrated on, as token windows.

>>> config = PruneConfig(out="pruned", samples=4, seqlen=32)
>>> calibration_samples(Checkpoint.open("path/to/model"), config).shape
torch.Size([4, 32])
"""

from __future__ import annotations

from torch import Tensor

from besa.data.beginning import bos_token
from besa.data.texts import documents_from
from besa.data.windows import calibration_windows, token_stream
from besa.errors import BesaError
from besa.model.checkpoint import Checkpoint
from besa.model.loading import load_tokenizer, max_positions
from besa.pruning.config import PruneConfig

# Tokens in a sample where neither the user nor the model says how many.
_SEQLEN = 2048

# Windows that each sample is drawn from: a text longer than that is not read to its end.
_WINDOWS_PER_SAMPLE = 16


def calibration_samples(checkpoint: Checkpoint, config: PruneConfig) -> Tensor:
    """Token ids int64 [samples, seqlen].

    Raises:
        BesaError: the model takes fewer tokens at once, the text has too few, or the tokenizer has
            no token to begin windows with.
    """
    most = max_positions(checkpoint.directory) or _SEQLEN
    seqlen = config.seqlen or min(_SEQLEN, most)
    if seqlen > most:
        raise BesaError(f"{checkpoint.directory} takes {most} tokens at once: lower --seqlen")
    tokenizer = load_tokenizer(checkpoint.directory)
    bos = bos_token(config.bos, tokenizer)
    documents = documents_from(config.calibration, "calibration")
    limit = _WINDOWS_PER_SAMPLE * config.samples * seqlen
    stream = token_stream(tokenizer, documents, limit=limit, special=bos is None)
    return calibration_windows(stream, config.samples, seqlen, config.seed, bos)
