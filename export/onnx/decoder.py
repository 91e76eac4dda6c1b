"""A decoder graph, fed token by token, and its logits compared with transformers'.

>>> from besa.export.onnx.runtime import open_session
>>> decoder = Decoder(open_session("path/to/onnx/model.onnx"), head_size=16)
>>> decoder(np.array([[5, 7, 30]])).shape
(1, 3, 257)
>>> decoder(np.array([[8]])).shape         # after a fourth token; the others are in the cache
(1, 1, 257)
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from besa.model.export_record import LogitsCheck

# A prompt, and tokens one by one after it.
PROMPT, STEPS = 12, 4

_CACHE = re.compile(r"past_key_values\.(\d+)\.(key|value)$")
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Decoder:
    """A session, and its cache of keys and values of one sequence of tokens.

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
            if _CACHE.match(name):
                shape = (1, one.shape[1], 0, self.head_size)
                self.cache[name] = np.zeros(shape, _TYPES[one.type])

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
            self.cache[name] = given[name.replace("past_key_values", "present")]
        return np.asarray(given["logits"], np.float32)


@torch.no_grad()
def compare(decoder: Decoder, model: Any, seed: int = 0) -> LogitsCheck:
    """How far a graph's logits are from a transformers model's, over random tokens.

    The graph is given a prompt at once, then token after token.
    """
    vocabulary = model.config.get_text_config().vocab_size
    source = np.random.default_rng(seed)
    tokens = source.integers(min(3, vocabulary - 1), vocabulary, (1, PROMPT + STEPS))
    decoder.reset()
    parts = [decoder(tokens[:, :PROMPT])]
    parts += [decoder(tokens[:, at : at + 1]) for at in range(PROMPT, PROMPT + STEPS)]
    ours = torch.from_numpy(np.concatenate(parts, 1))
    theirs = model(torch.from_numpy(tokens)).logits.float()
    return LogitsCheck(
        error=float((ours - theirs).norm() / theirs.norm()),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        tokens=PROMPT + STEPS,
        dtype=str(model.dtype).removeprefix("torch."),
    )
