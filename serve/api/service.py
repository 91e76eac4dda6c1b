"""What a model's endpoints share: which requests it takes, and what its engine is asked for.

>>> defaults_of(Path("path/to/sparse"))  # of sampling, from generation_config.json
{}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from besa.model.json_files import read_object
from besa.serve.api.backend import Backend, GenerationRequest
from besa.serve.api.chat import Chat
from besa.serve.api.errors import ApiError, ascii_only
from besa.serve.api.grammar import Grammar, GrammarError, Grammars
from besa.serve.api.metrics import Metrics
from besa.serve.api.requests import Request
from besa.serve.api.text import AnswerText

# What a model's generation_config.json may say, as for vLLM.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def defaults_of(directory: Path) -> dict[str, float]:
    """How the model's makers would have it sampled, where a request does not say it."""
    path = directory / "generation_config.json"
    found = read_object(path) if path.exists() else {}
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
        self.grammars = Grammars(chat.tokenizer, backend.vocabulary, backend.ends)

    def check(self, request: Request) -> None:
        """Raises an ApiError for what the engine cannot answer."""
        if self.backend.failed is not None:
            raise ApiError(503, f"the engine has failed: {self.backend.failed}")
        if request.model is not None and request.model != self.name:
            raise no_model(request.model, self.name)
        for field, tokens in (
            ("logit_bias", request.logit_bias),
            ("stop_token_ids", request.stop_token_ids or ()),
        ):
            if any(token >= self.backend.vocabulary for token in tokens):
                raise ApiError(400, f"{field} must have tokens of the model", field)

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
        return GenerationRequest(
            prompt,
            most,
            min(least, most),
            bool(request.ignore_eos),
            frozenset(request.stop_token_ids or ()),
            **self.sampling(request),
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=request.logit_bias,
            seed=request.seed,
            grammar=self._grammar(request),
            logprobs=request.told_logprobs,
        )

    def _grammar(self, request: Request) -> Grammar | None:
        if (found := request.structure) is None:
            return None
        field, (kind, text) = found
        if request.min_tokens or request.ignore_eos:
            message = f"{field} says when the answer ends: leave out min_tokens and ignore_eos"
            raise ApiError(400, message, field)
        try:
            return self.grammars.compiled(kind, text)
        except GrammarError as error:
            message = f"{field} cannot be kept: {ascii_only(str(error))}"
            raise ApiError(400, message, field) from None

    def text(self, request: Request, generation: GenerationRequest, parsed: bool) -> AnswerText:
        """What turns tokens into text; a parser reads special tokens, too."""
        return AnswerText(
            self.tokenizer,
            generation.prompt,
            request.stop,
            self.backend.ends | generation.stop_token_ids,
            generation.min_tokens,
            skip_special_tokens=request.skip_special_tokens is not False and not parsed,
        )


def no_model(asked: str, served: str) -> ApiError:
    """Another model than the one that is served."""
    message = f"there is no model {ascii_only(asked)}, only {served}"
    return ApiError(404, message, "model", "model_not_found")
