"""The load generator: somebody else's, well kept, in a process of its own.

Where vLLM is installed it is `vllm bench serve` (besa.bench.vllm_client), which records the gap
before every single token by a monotonic clock. Elsewhere it is guidellm
(besa.bench.guidellm_client, `pip install 'besa[bench]'`), which needs no engine, but tells of each
answer only its mean gap. Either answers the same question with the same figures of each request.

    with generator_for(None) as generator:
        load = Load("rate", 2)
        requests, duration = generator.measure(Target(url, "tiny"), prompts, load, 16, 0, 60)
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

from besa.bench import guidellm_client, vllm_client
from besa.bench.child import AnsweringChild
from besa.bench.figures import Request
from besa.bench.load import Load
from besa.errors import BesaError
from besa.processes.child import ChildError
from besa.processes.usage import cpu_seconds, family
from besa.serve.vllm.engine import vllm_version

# Each one's client, and what it is called; the better one first.
CLIENTS = {"vllm": (vllm_client, "vllm bench serve"), "guidellm": (guidellm_client, "guidellm")}


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        url: where it is, without a path.
        model: what it calls the model.
        key: what it has to be shown.
        ignores_eos: whether it can be asked to go on after the end of an answer.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    ignores_eos: bool = True


def generator_for(name: str | None) -> Generator:
    """The one of that name, or the best that is installed.

    Raises:
        BesaError: it is not installed.
    """
    if name not in (None, *CLIENTS):
        raise BesaError(f"--generator {name} is none of {', '.join(CLIENTS)}")
    there = [one for one in CLIENTS if importlib.util.find_spec(one) is not None]
    if name is not None and name not in there:
        raise BesaError(f"--generator {name} is not installed")
    if not there:
        raise BesaError("nothing here makes load: pip install 'besa[bench]', or install vLLM")
    return Generator(name or there[0])


class Generator:
    """A load generator in a process that stays; loaded again after it had to be ended.

    Attributes:
        name: what it is called.
        version: its version.
    """

    def __init__(self, which: str) -> None:
        self._client, self.name = CLIENTS[which]
        self.version = version("guidellm") if which == "guidellm" else vllm_version() or ""
        self._child: AnsweringChild | None = None
        # Whoever is killed does not clean up.
        self._folder = tempfile.TemporaryDirectory(prefix="besa-bench-", ignore_cleanup_errors=True)

    def __enter__(self) -> Generator:
        self._loaded()
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()
        self._folder.cleanup()

    def cpu(self) -> float:
        """Seconds that it has computed."""
        return 0.0 if self._child is None else cpu_seconds(family(self._child.popen.pid))

    def _loaded(self) -> AnsweringChild:
        if self._child is None:
            command = [sys.executable, "-P", "-m", self._client.__name__]
            environment = {**self._client.ENVIRONMENT, "TMPDIR": self._folder.name}
            self._child = AnsweringChild(command, environment)
            try:
                self._child.answer(limit=300)
            except ChildError as error:
                self._child = None
                raise BesaError(f"{self.name} does not start: {error}") from None
        return self._child

    def measure(
        self,
        target: Target,
        prompts: Sequence[str],
        load: Load,
        output_length: int,
        seed: int,
        limit: float,
    ) -> tuple[list[Request], float]:
        """Sends the prompts, greedily decoded, and waits for all answers.

        Returns:
            The requests, and the seconds from the first one's start to the last one's end.

        Raises:
            ChildError: not all answers came within `limit` seconds, or the generator failed.
        """
        question = {
            "url": target.url,
            "model": target.model,
            "key": target.key,
            "prompts": list(prompts),
            "output_length": output_length,
            "seed": seed,
            "ignore_eos": target.ignores_eos,
            "rate": load.value if load.kind == "rate" else None,
            "concurrency": int(load.value) if load.kind == "concurrency" else None,
        }
        child = self._loaded()
        try:
            found = child.ask(question, limit)
        except ChildError:
            child.kill()
            self._child = None
            raise
        requests = [Request(**{**one, "gaps": tuple(one["gaps"])}) for one in found["requests"]]
        return requests, found["seconds"]
