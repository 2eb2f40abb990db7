"""What Prometheus reads. Owns names, help texts and buckets; knows no session, no tenant and no route.

The names are the field's (vLLM's, without its prefix), so that dashboards and autoscalers move over by
prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mnemosyne.engine import counters, member

PREFIX = "mnemosyne:"
ENGINE = counters.NAMES | member.NAMES
FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
BETWEEN_TOKENS = (
    0.002,
    0.004,
    0.006,
    0.008,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.06,
    0.08,
    0.1,
    0.2,
    0.4,
    0.8,
    2,
    8,
)
WHOLE_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(4**i for i in range(14))

SERVICE: dict[str, tuple[str, dict[str, str], str]] = {
    "sessions_resident": ("session_active", {"tier": "device"}, "Sessions whose state the engine holds."),
    "sessions_known": ("session_known", {}, "Sessions that this server has open."),
    "documents_active": ("ingest_jobs", {"state": "absorbing"}, "Documents that are being read."),
    "turns_active": ("session_turns_running", {}, "Turns that run in sessions."),
    "tokens_absorbed_total": ("ingest_tokens_total", {}, "Document tokens absorbed."),
    "ingest_tokens_per_second": ("ingest_tokens_per_second", {}, "Measured speed of reading documents."),
    "snapshots_written_total": ("session_snapshots_total", {}, "Snapshots written."),
    "restores_total": ("session_restore_total", {"result": "restored"}, "Sessions brought back."),
    "restore_refused_total": ("session_restore_total", {"result": "refused"}, "Sessions brought back."),
    "tokens_replayed_total": ("session_replayed_tokens_total", {}, "Tokens read again for a restore."),
    "tokens_unsaved": ("unsaved_tokens", {}, "Tokens that a restore would read again from the log."),
    "lease_lost_total": ("session_lease_lost_total", {}, "Sessions that another server took over."),
}
"""The session service's number -> (name, labels, meaning)."""


class _Foreign(Collector):
    """Families that another part counts; the newest of each."""

    def __init__(self) -> None:
        self.families: dict[str, Metric] = {}

    def collect(self) -> Iterable[Metric]:
        return list(self.families.values())


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._foreign = _Foreign()
        self.registry.register(self._foreign)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens.", BETWEEN_TOKENS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "Arrival to last token.", WHOLE_REQUEST
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKENS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a request.", TOKENS
        )
        self.request_max_tokens = self._histogram(
            "request_params_max_tokens", "max_tokens of a request.", TOKENS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._success = Counter(
            f"{PREFIX}request_success",
            "Finished answers by why they ended.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.running = self._gauge("num_requests_running", "Completions that have their first token.")
        self.waiting = self._gauge("num_requests_waiting", "Completions that wait for their first token.")
        self.forks = self._counter("session_fork", "Forks made.")
        self.rewinds = self._counter("session_rewind", "Rewinds made.")
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model_name, reason)

    def finished(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def show(self, engines: Mapping[str, Mapping[str, float]], service: Mapping[str, float]) -> None:
        """Take over what the engine of each device (``EngineLike.device_stats``) and the session service
        count."""
        families: dict[str, Metric] = {}
        for device, numbers in engines.items():
            for name, value in numbers.items():
                meaning = ENGINE.get(name, "A number of the engine's own.")
                self._add(families, f"engine_{name}", meaning, {"device": device}, value)
        for name, (shown, labels, meaning) in SERVICE.items():
            if name in service:
                self._add(families, shown, meaning, labels, service[name])
        self._foreign.families = families

    def _add(
        self, families: dict[str, Metric], name: str, meaning: str, labels: dict[str, str], value: float
    ) -> None:
        kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
        family = families.setdefault(name, kind(PREFIX + name, meaning))
        shown_as = PREFIX + name if name.endswith("_total") else family.name
        family.add_sample(shown_as, {**labels, "model_name": self._model}, value)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(PREFIX + name, meaning, ["model_name"], buckets=buckets, registry=self.registry)
        return made.labels(self._model)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(PREFIX + name, meaning, ["model_name"], registry=self.registry).labels(self._model)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(PREFIX + name, meaning, ["model_name"], registry=self.registry).labels(self._model)
