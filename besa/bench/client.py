"""A client of an OpenAI-compatible server, as far as besa itself asks it something.

>>> client = Client(Target("http://127.0.0.1:9", "tiny"), timeout=60)
>>> client.models()
Traceback (most recent call last):
besa.bench.client.NoAnswerError: ...

The load is made by others (besa.bench.generator).
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: where it is, without a path.
        model: what it calls the model.
        key: its API key, if it wants one.
        ignores_eos: whether it can be asked to go on after the end of an answer.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    ignores_eos: bool = True


class BrokenError(Exception):
    """What is wrong with a contender, in a line."""


class NoAnswerError(BrokenError):
    """It cannot be reached, or took too long: perhaps its process has ended."""


class StatusError(BrokenError):
    """It answered with an HTTP status that is an error.

    Attributes:
        status: 400 and above.
    """

    def __init__(self, path: str, status: int) -> None:
        super().__init__(f"answers {path} with status {status}")
        self.status = status


class Client:
    """Asks one server.

    Args:
        timeout: seconds for an answer.

    Every method raises a BrokenError if there is no answer, or none that can be understood.
    """

    def __init__(self, target: Target, timeout: float) -> None:
        self.target, self.timeout = target, timeout

    def models(self) -> list[str]:
        """The names of the models that it serves, at least one."""
        listed = self._request("/v1/models")
        try:
            names = [str(one["id"]) for one in listed["data"]]
        except (KeyError, TypeError):
            names = []
        if not names:
            raise BrokenError("its /v1/models lists no model")
        return names

    def complete(self, prompt: str, length: int) -> str:
        """The greedy answer to a prompt, of so many tokens at most."""
        found = self._complete(prompt, length, temperature=0)
        try:
            return str(found["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise BrokenError("its answer to a completion has no text") from None

    def ignores_eos(self) -> bool:
        """Whether it accepts `ignore_eos`, which is vLLM's own."""
        try:
            self._complete("The", 2, ignore_eos=True)
        except StatusError as error:
            if error.status >= 500:
                raise
            return False
        return True

    def _complete(self, prompt: str, length: int, **options: object) -> Any:
        body = {"model": self.target.model, "prompt": prompt, "max_tokens": length, **options}
        return self._request("/v1/completions", body)

    def _request(self, path: str, body: dict[str, object] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.target.key:
            headers["Authorization"] = f"Bearer {self.target.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.target.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise StatusError(path, error.code) from None
        except (OSError, http.client.HTTPException) as error:
            # urllib puts what happened while it connected into an error of its own.
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(cause, TimeoutError):
                raise NoAnswerError(f"no answer within {self.timeout:g} s") from None
            raise NoAnswerError(f"cannot be reached: {cause}") from None
        except ValueError:
            raise BrokenError(f"answers {path} with what is no JSON") from None
