"""What a model's endpoints share: which requests it takes, and what its engine is asked for.

>>> defaults_of(Path("path/to/sparse"))  # of sampling, from generation_config.json
{}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from besa.serve.api.backend import Backend, GenerationRequest
from besa.serve.api.chat import Chat
from besa.serve.api.errors import ApiError, ascii_only
from besa.serve.api.fields import shortened, unsupported_by
from besa.serve.api.metrics import Metrics
from besa.serve.api.requests import Request
from besa.serve.api.text import AnswerText

# Fields that only say how chance goes: with temperature 0 they ask for nothing.
_OF_CHANCE = ("seed", "min_p")
# What a model's generation_config.json may say, as for vLLM.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def defaults_of(directory: Path) -> dict[str, float]:
    """How the model's makers would have it sampled, where a request does not say it."""
    path = directory / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: found[name] for name in _DEFAULTS if found.get(name) is not None}


class Service:
    """What both endpoints answer with.

    Args:
        name: what clients call the model.
        defaults: of sampling, see `defaults_of`.
    """

    def __init__(
        self,
        backend: Backend,
        chat: Chat,
        name: str,
        defaults: Mapping[str, float],
        metrics: Metrics,
    ) -> None:
        self.backend, self.chat, self.name = backend, chat, name
        self.defaults, self.metrics = defaults, metrics
        self.tokenizer = chat.tokenizer

    def check(self, request: Request) -> None:
        """Raises an ApiError for what the engine cannot answer."""
        if self.backend.failed is not None:
            raise ApiError(503, f"the engine has failed: {self.backend.failed}")
        if request.model is not None and request.model != self.name:
            raise no_model(request.model, self.name)
        asked = request
        if self.sampling(request)["temperature"] == 0:
            asked = request.model_copy(update=dict.fromkeys(_OF_CHANCE))
        if (found := unsupported_by(self.backend.name, asked)) is not None:
            field, value = found
            raise ApiError(
                400,
                f"{field}={shortened(value)} is not supported by this server with --engine "
                f"{self.backend.name}: leave it out",
                field,
                "unsupported_parameter",
            )
        if any(not 0 <= token < self.backend.vocabulary for token in request.logit_bias):
            raise ApiError(400, "logit_bias must have tokens of the model", "logit_bias")

    def sampling(self, request: Request) -> dict[str, Any]:
        """What a request says of sampling, else the model's makers, else OpenAI's reference."""
        asked = {name: getattr(request, name) for name in _DEFAULTS}
        given = {name: value for name, value in asked.items() if value is not None}
        found = {"temperature": 1.0, **self.defaults, **given}
        found["top_k"] = min(max(found.get("top_k", 0), 0), self.backend.vocabulary)
        return found

    def generation(
        self, request: Request, prompt: list[int], most: int | None
    ) -> GenerationRequest:
        """What the engine is asked for.

        Args:
            most: new tokens, of which as many come as fit; None for all of them.

        Raises:
            ApiError: the prompt does not fit.
        """
        longest = self.backend.longest
        if not prompt:
            raise ApiError(400, "the prompt is empty", "prompt")
        if any(not 0 <= token < self.backend.vocabulary for token in prompt):
            raise ApiError(400, "prompt must have tokens of the model", "prompt")
        if len(prompt) >= longest:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, and {longest} are there for it and its "
                "answer",
                "prompt",
                "context_length_exceeded",
            )
        least = request.min_tokens or 0
        if most is not None and least > most:
            raise ApiError(400, f"min_tokens is {least}, and {most} may come", "min_tokens")
        room = longest - len(prompt)
        most = room if most is None else min(most, room)
        least = most if request.ignore_eos else min(least, most)
        return GenerationRequest(
            prompt,
            most,
            least,
            **self.sampling(request),
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=request.logit_bias,
            seed=request.seed,
        )

    def text(self, request: Request, generation: GenerationRequest, parsed: bool) -> AnswerText:
        """What turns tokens into text; a parser reads special tokens, too."""
        return AnswerText(
            self.tokenizer,
            generation.prompt,
            request.stop,
            self.backend.ends if generation.min_tokens < generation.max_tokens else (),
            generation.min_tokens,
            skip_special_tokens=request.skip_special_tokens is not False and not parsed,
        )


def no_model(asked: str, served: str) -> ApiError:
    """Another model than the one that is served."""
    message = f"there is no model {ascii_only(asked)}, only {served}"
    return ApiError(404, message, "model", "model_not_found")
