"""The load generator: somebody else's, well kept, in a process of its own.

Where vLLM is installed it is `vllm bench serve` (besa.bench.vllm_client): it records the gap before
every single token by a monotonic clock, and stays loaded between measurements. Elsewhere it is
guidellm (besa.bench.guidellm_client, `pip install 'besa[bench]'`), which needs no engine, but is
started for every measurement and tells of each answer only its mean gap.

    with generator_for(None) as generator:
        load = Load("rate", 2)
        requests, duration = generator.measure(Target(url, "tiny"), prompts, load, 16, 0, 60)
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from besa.bench.child import Child, ChildError
from besa.bench.figures import Request
from besa.bench.load import Load
from besa.bench.processes import cpu_seconds, family
from besa.errors import BesaError

GENERATORS = ("vllm", "guidellm")


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


class Generator(Protocol):
    """What makes the load."""

    name: str
    version: str

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
            The requests in order, and the seconds from the first one's start to the last one's end.

        Raises:
            ChildError: not all answers came within `limit` seconds, or the generator failed.
        """

    def cpu(self) -> float:
        """Seconds that a process of its own which still runs has computed."""

    def __enter__(self) -> Generator: ...

    def __exit__(self, *_: object) -> None: ...


def generator_for(name: str | None) -> Generator:
    """The one of that name, or the best that is installed.

    Raises:
        BesaError: it is not installed.
    """
    if name not in (None, *GENERATORS):
        raise BesaError(f"--generator {name} is none of {', '.join(GENERATORS)}")
    there = [one for one in GENERATORS if importlib.util.find_spec(one) is not None]
    if name is not None and name not in there:
        raise BesaError(f"--generator {name} is not installed")
    if not there:
        raise BesaError("nothing here makes load: pip install 'besa[bench]', or install vLLM")
    if (name or there[0]) == "vllm":
        return _Vllm()
    from besa.bench.guidellm_client import GuideLLM

    return GuideLLM()


class _Vllm:
    """`vllm bench serve`, loaded when it is first needed, and again after it had to be ended."""

    name = "vllm bench serve"

    def __init__(self) -> None:
        from besa.serve.command import vllm_version

        self.version = vllm_version() or ""
        self._child: Child | None = None

    def __enter__(self) -> _Vllm:
        self._loaded()
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.end()

    def cpu(self) -> float:
        return 0.0 if self._child is None else cpu_seconds(family(self._child.process.pid))

    def _loaded(self) -> Child:
        if self._child is None:
            silent = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
            command = [sys.executable, "-P", "-m", "besa.bench.vllm_client"]
            self._child = Child(command, silent)
            try:
                self._child.answer(limit=300)
            except ChildError as error:
                self._child = None
                raise BesaError(f"`vllm bench serve` does not start: {error}") from None
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
            child.end()
            self._child = None
            raise
        return from_vllm(found, output_length)


def from_vllm(
    found: dict[str, list],  # type: ignore[type-arg]
    output_length: int,
) -> tuple[list[Request], float]:
    """Requests from the lists of `--save-detailed`, and how long all of them took."""
    requests, ends = [], []
    for index, error in enumerate(found["errors"]):
        gaps = tuple(found["itls"][index])
        ttft, latency = found["ttfts"][index], found["latencies"][index]
        failed = _last_line(error)
        if not failed and not ttft:
            failed = "no answer, and no reason"
        # Where a server does not count its tokens, the pieces of its answer are, as long as there
        # are no more than tokens were asked for: an end may be a piece of its own.
        counted = found["output_lens"][index]
        tokens = counted if counted > 1 else min(len(gaps) + 1, output_length)
        requests.append(
            Request(
                error=failed,
                ttft=ttft,
                gaps=gaps,
                latency=latency,
                input_tokens=found["input_lens"][index],
                output_tokens=0 if failed else tokens,
                text=found["generated_texts"][index],
            )
        )
        ends.append(found["start_times"][index] + latency)
    return requests, max(ends) - min(found["start_times"])


def _last_line(error: str) -> str:
    """A reason, or the last line of a traceback: the one that says what it was."""
    lines = [line for line in error.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
