"""A decoder graph, fed token by token, and its logits compared with transformers'.

>>> from besa.export.onnx.runtime import open_session
>>> decoder = Decoder(open_session("path/to/onnx/model.onnx"), head_size=16)
>>> decoder(np.array([[5, 7, 30]])).shape
(1, 3, 257)
>>> decoder(np.array([[8]])).shape         # after a fourth token; the others are in the cache
(1, 1, 257)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from besa.model.export_record import LogitsCheck

# A prompt, and tokens one by one after it.
PROMPT, STEPS = 12, 4

# The error is that of the worst stretch of so many tokens, so that a part that goes wrong far into
# a text does not vanish among those before it.
_STRETCH = 64

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """A session, and its cache of one sequence of tokens.

    The cache is whatever the graph takes as `past…` and gives back as `present…`: keys and values,
    and the states of convolutions.

    Args:
        session: of ONNX Runtime, on a graph with logits and a cache.
        head_size: the last dimension of a key or value; the graph may leave it open.
    """

    def __init__(self, session: Any, head_size: int) -> None:
        self.session, self.head_size = session, head_size
        self.inputs = {one.name: one for one in session.get_inputs()}
        self.outputs = [one.name for one in session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        self.length = 0
        self.cache = {}
        for name, one in self.inputs.items():
            if name.startswith("past"):
                inner = [size if isinstance(size, int) else 0 for size in one.shape[1:-1]]
                last = one.shape[-1] if isinstance(one.shape[-1], int) else self.head_size
                self.cache[name] = np.zeros((1, *inner, last), _TYPES[one.type])

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """Logits of the next tokens.

        Args:
            tokens: int64 [1, n].

        Returns:
            float32 [1, n, vocabulary].
        """
        before, self.length = self.length, self.length + tokens.shape[1]
        feeds: dict[str, Any] = {"input_ids": tokens, **self.cache}
        if "attention_mask" in self.inputs:
            feeds["attention_mask"] = np.ones((1, self.length), np.int64)
        if "position_ids" in self.inputs:
            feeds["position_ids"] = np.arange(before, self.length)[None]
        given = dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        for name in self.cache:
            present = name.replace("past_key_values", "present").replace("past.", "present.")
            self.cache[name] = given[present]
        return np.asarray(given["logits"], np.float32)


@dataclass(frozen=True)
class Reference:
    """What transformers makes of random tokens.

    Attributes:
        tokens: int64 [1, n].
        logits: float32 [1, n, vocabulary].
        dtype: in which they were computed.
    """

    tokens: np.ndarray
    logits: Tensor
    dtype: str

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, count: int, seed: int = 0) -> Reference:
        """The logits of a loaded model for `count` tokens."""
        vocabulary = model.config.get_text_config().vocab_size
        source = np.random.default_rng(seed)
        tokens = source.integers(min(3, vocabulary - 1), vocabulary, (1, count))
        logits = model(torch.from_numpy(tokens), use_cache=False).logits.float()
        return cls(tokens, logits, str(model.dtype).removeprefix("torch."))

    def check(self, decoder: Decoder) -> LogitsCheck:
        """How far a graph's logits are from these: of a prompt at once, then token after token."""
        count = self.tokens.shape[1]
        decoder.reset()
        parts = [decoder(self.tokens[:, : count - STEPS])]
        parts += [decoder(self.tokens[:, at : at + 1]) for at in range(count - STEPS, count)]
        stretches = zip(
            torch.from_numpy(np.concatenate(parts, 1)).split(_STRETCH, 1),
            self.logits.split(_STRETCH, 1),
            strict=True,
        )
        errors, same = [], 0
        for ours, theirs in stretches:
            errors.append(float((ours - theirs).norm() / theirs.norm()))
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        return LogitsCheck(
            error=max(errors), agreement=same / count, tokens=count, dtype=self.dtype
        )


def compare(decoder: Decoder, model: Any, seed: int = 0) -> LogitsCheck:
    """How far a graph's logits are from a transformers model's, over few random tokens."""
    return Reference.of(model, PROMPT + STEPS, seed).check(decoder)
