"""What a server has done, for Prometheus: `GET /metrics`.

>>> metrics = Metrics("tiny")
>>> answer = metrics.answer()
>>> answer.began(prompt_tokens=5); answer.got(1); answer.got(2); answer.ended()
>>> [line for line in metrics.text().decode().splitlines() if "generation_tokens_total{" in line]
['besa_generation_tokens_total{model_name="tiny"} 3.0']
"""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """The measures of one server, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self._registry = registry = CollectorRegistry()
        self.labels, names = {"model_name": model}, ("model_name",)
        self.requests = Counter(
            "besa_requests",
            "Requests that were answered, by path and status",
            ("model_name", "path", "status"),
            registry=registry,
        )

        def counter(name: str, says: str) -> Counter:
            return Counter(f"besa_{name}", says, names, registry=registry).labels(model)

        def gauge(name: str, says: str) -> Gauge:
            return Gauge(f"besa_{name}", says, names, registry=registry).labels(model)

        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"besa_{name}", says, names, buckets=buckets, registry=registry
            ).labels(model)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.new_tokens = counter("generation_tokens", "Tokens that were generated")
        self.waiting = gauge("answers_waiting", "Answers that wait for their first token")
        self.running = gauge("answers_running", "Answers that have begun and not ended")
        self.first = histogram(
            "time_to_first_token_seconds", "From the request to its first token", _SECONDS
        )
        self.between = histogram(
            "time_between_tokens_seconds", "From a token to the next", _STEP_SECONDS
        )

    def answered(self, path: str, status: int) -> None:
        """Counts a request."""
        self.requests.labels(path=path, status=status, **self.labels).inc()

    def answer(self) -> AnswerMetrics:
        """The measures of one answer."""
        return AnswerMetrics(self)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)


class AnswerMetrics:
    """One answer: it waits, begins, and ends, in whatever way."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = 0.0
        self._state: Gauge | None = None

    def began(self, prompt_tokens: int) -> None:
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._last = time.perf_counter()
        self._enter(self._metrics.waiting)

    def got(self, tokens: int) -> None:
        """So many tokens came at once."""
        now = time.perf_counter()
        if self._state is self._metrics.waiting:
            self._metrics.first.observe(now - self._last)
            self._enter(self._metrics.running)
        else:
            self._metrics.between.observe((now - self._last) / max(tokens, 1))
        self._last = now
        self._metrics.new_tokens.inc(tokens)

    def ended(self) -> None:
        self._enter(None)

    def _enter(self, state: Gauge | None) -> None:
        if self._state is not None:
            self._state.dec()
        if state is not None:
            state.inc()
        self._state = state
