"""Every metric of the system, in one table: name, unit (in the name), labels, meaning.

Counters end in `_total`, base units are in the name. Labels are bounded: nothing that a caller chooses becomes one.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.output_tokens = self._counter("output_tokens_total", "Output tokens that reached this gateway, each position once")
        self.tokens_recomputed = self._counter(
            "tokens_recomputed_total", "Tokens computed again because an interruption lost their KV"
        )
        self.prefix_cached_tokens = self._counter("prefix_cached_tokens_total", "Tokens whose KV was found in a prefix cache")
        self.draft_tokens = self._counter("draft_tokens_total", "Draft tokens that the target verified")
        self.accepted_tokens = self._counter("accepted_draft_tokens_total", "Draft tokens that the target accepted")
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

    def _counter(self, name: str, meaning: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"spotserve_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"spotserve_{name}", meaning, labels, registry=self.registry)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
