"""Figures of a server for Prometheus: vLLM's names and meanings behind `zeroinf_`, and those of streaming weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600)
"""Up to an hour: a token of a model that streams from disk takes seconds, and its queue longer."""


class Metrics:
    """Counts what is served. `read` gives what is known at the moment it is asked: name, help, and labelled values."""

    def __init__(self, read: Callable[[], Iterator[Metric]]) -> None:
        self.registry = CollectorRegistry()
        make: Any = {"namespace": "zeroinf", "registry": self.registry}
        self.success = Counter("request_success", "Completions, by how they ended.", ["finished_reason"], **make)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **make)
        self.generation_tokens = Counter("generation_tokens", "Generated tokens.", **make)
        self.first_token = Histogram("time_to_first_token_seconds", "Wait for a first token.", buckets=_SECONDS, **make)
        self.inter_token = Histogram(
            "inter_token_latency_seconds", "Time between tokens of a completion.", buckets=_SECONDS, **make
        )
        self.latency = Histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", buckets=_SECONDS, **make
        )
        self.registry.register(_Reader(read))
        self.tokens = 0
        """Generated ones."""

    def generated(self, tokens: int) -> None:
        self.tokens += tokens
        self.generation_tokens.inc(tokens)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return bytes(generate_latest(self.registry))

    def batch_done(self, prompt_tokens: int, tokens: int, finish_reason: str) -> None:
        """A request of a batch has ended."""
        self.prompt_tokens.inc(prompt_tokens)
        self.generated(tokens)
        self.success.labels(finished_reason=finish_reason).inc()

    def watch(self, prompt_tokens: int) -> Watch:
        """Follow a completion that begins now."""
        self.prompt_tokens.inc(prompt_tokens)
        return Watch(self)


class Watch:
    """The times of one completion."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began, self._last = metrics, time.monotonic(), 0.0

    def heard(self, tokens: int, finish_reason: str | None) -> None:
        """Count tokens that have come, and why the request has ended, if it has."""
        now, metrics = time.monotonic(), self._metrics
        if tokens:
            metrics.generated(tokens)
            if not self._last:
                metrics.first_token.observe(now - self._began)
            else:
                metrics.inter_token.observe((now - self._last) / tokens)
            self._last = now
        if finish_reason is not None:
            metrics.success.labels(finished_reason=finish_reason).inc()
            metrics.latency.observe(now - self._began)


class _Reader(Collector):
    def __init__(self, read: Callable[[], Iterator[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        return self._read()


def gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"zeroinf_{name}", text, value=value)


def counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"zeroinf_{name}", text, value=value)


def labelled(
    name: str, text: str, labels: list[str], values: dict[tuple[str, ...], float], *, counts: bool = False
) -> Metric:
    """A gauge, or a counter, with a value for each set of labels."""
    family = (CounterMetricFamily if counts else GaugeMetricFamily)(f"zeroinf_{name}", text, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family
