"""What besa asks of a load generator: one order, one answer, and how either is run.

Two programs can answer: `besa.bench.vllm_client`, the default, and `besa.bench.guidellm_client`,
for where vLLM is not installed. Both make the same requests at the same times.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from besa.bench.figures import Request


@dataclass(frozen=True)
class Order:
    """A load to be made: prompts, greedily decoded by a server.

    Attributes:
        url: where the server is, without a path.
        model: what it calls its model.
        key: its API key, if it wants one.
        prompts: a request each.
        output_length: tokens of an answer, at most.
        ignore_eos: whether the server is asked to go on after the end of an answer.
        concurrency: so many requests at a time; None for a rate.
        rate: so many requests a second on average, at random times; None for a concurrency.
        seed: of these times.
    """

    url: str
    model: str
    key: str | None = field(repr=False)
    prompts: tuple[str, ...]
    output_length: int
    ignore_eos: bool
    concurrency: int | None
    rate: float | None
    seed: int

    def arrivals(self) -> list[float]:
        """Seconds from the start to each request of a Poisson process with this rate.

        >>> order = Order("http://127.0.0.1", "m", None, ("a", "b"), 8, True, None, 2.0, seed=0)
        >>> [round(seconds, 2) for seconds in order.arrivals()]
        [0.93, 1.64]
        """
        assert self.rate is not None
        source, now, times = random.Random(self.seed), 0.0, []
        for _ in self.prompts:
            now += source.expovariate(self.rate)
            times.append(now)
        return times


@dataclass(frozen=True)
class Answered:
    """What came of an order: every request, and seconds from the first start to the last end."""

    requests: tuple[Request, ...]
    seconds: float


class LoadClient(Protocol):
    """A load generator.

    Attributes:
        name: what results call it.
        environment: what the environment of its process has, beyond besa's own.
    """

    name: ClassVar[str]
    environment: ClassVar[Mapping[str, str]]

    def version(self) -> str | None:
        """The version that is installed; None if it is not."""
        ...

    def load(self) -> Callable[[Order], Answered]:
        """Imports the generator, which takes seconds; gives the function that makes a load.

        Called once, in a process of its own.
        """
        ...
