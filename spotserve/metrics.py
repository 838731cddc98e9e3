"""Every metric of the system, in one table: name, unit (in the name), labels, meaning.

Counters end in `_total`, base units are in the name. Labels are bounded: nothing that a caller chooses becomes one.
"""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

DRAFTERS: Final = ("ngram", "suffix", "model", "staged")
"""What the label `drafter` can be, besides `other`."""

DRAFT_POSITIONS: Final = 16
"""Positions of a draft that have a counter of their own; what is accepted further down counts in the sums alone."""


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.output_tokens = self._counter("output_tokens_total", "Output tokens that reached this gateway, each position once")
        self.tokens_recomputed = self._counter(
            "tokens_recomputed_total", "Tokens computed again because an interruption lost their KV"
        )
        self.prefix_cached_tokens = self._counter("prefix_cached_tokens_total", "Tokens whose KV was found in a prefix cache")
        self.drafts = self._counter("spec_decode_num_drafts_total", "Drafts verified: one per sequence and step", ("drafter",))
        self.draft_tokens = self._counter(
            "spec_decode_num_draft_tokens_total", "Draft tokens that the target verified", ("drafter",)
        )
        self.accepted_tokens = self._counter(
            "spec_decode_num_accepted_tokens_total", "Draft tokens that the target accepted", ("drafter",)
        )
        self.accepted_tokens_per_position = self._counter(
            "spec_decode_num_accepted_tokens_per_pos_total",
            f"Draft tokens accepted at each position of a draft, 0 to {DRAFT_POSITIONS - 1}",
            ("drafter", "position"),
        )
        self.sequences_resumed = self._counter(
            "sequences_resumed_total", "Sequences resumed from tokens after their owner was lost"
        )
        self.sequences_moved = self._counter("sequences_moved_total", "Sequences whose KV was handed to another instance")
        self.kv_bytes_moved = self._counter("kv_moved_bytes_total", "Bytes of KV handed between instances")
        self.notices = self._counter("notices_total", "Preemption notices heard", ("source",))
        self.preemptions = self._counter("preemptions_total", "Instances lost", ("notice",))
        self.notice_to_published = Histogram(
            "spotserve_notice_to_published_seconds",
            "From hearing a notice to having sent the routing table without the instance",
            registry=self.registry,
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0),
        )
        self.time_to_first_token = Histogram(
            "spotserve_time_to_first_token_seconds",
            "From accepting a call to its first token",
            registry=self.registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self.sequence_seconds = Histogram(
            "spotserve_sequence_seconds",
            "From accepting a call to the last token of a sequence",
            registry=self.registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self.store_healthy = self._gauge(
            "store_healthy", "1 when every process reaches the progress store; 0: resuming is degraded"
        )
        self.instances = self._gauge("instances", "Instances by state", ("state",))
        self.replicas = self._gauge("replicas", "Replicas by state", ("state",))
        self.sequences = self._gauge("sequences", "Sequences by state", ("state",))
        self.kv_tokens_used = self._gauge("kv_tokens_used", "Tokens in the KV caches of all instances")
        self.plan_epoch = self._gauge("plan_epoch", "Epoch of the current plan")
        self._of_drafter: dict[str, _DraftCounters] = {}

    def _counter(self, name: str, meaning: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"spotserve_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"spotserve_{name}", meaning, labels, registry=self.registry)

    def count_draft(self, drafter: str, *, drafted: int, accepted: int) -> None:
        """Counts one verified draft of one sequence."""
        label = drafter if drafter in DRAFTERS else "other"
        counters = self._of_drafter.get(label)
        if counters is None:
            counters = self._of_drafter[label] = _DraftCounters(self, label)
        counters.count(drafted, accepted)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class _DraftCounters:
    """One drafter's counters, their labels looked up once: they are counted for every step of every sequence."""

    def __init__(self, metrics: Metrics, drafter: str) -> None:
        self._drafts = metrics.drafts.labels(drafter)
        self._draft_tokens = metrics.draft_tokens.labels(drafter)
        self._accepted_tokens = metrics.accepted_tokens.labels(drafter)
        self._accepted_at = [metrics.accepted_tokens_per_position.labels(drafter, str(at)) for at in range(DRAFT_POSITIONS)]

    def count(self, drafted: int, accepted: int) -> None:
        self._drafts.inc()
        self._draft_tokens.inc(drafted)
        self._accepted_tokens.inc(accepted)
        for counter in self._accepted_at[:accepted]:
            counter.inc()
