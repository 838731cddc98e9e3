"""What a replay saw: one record per request, one per fleet event, one for the run.

Values only. Everything that a report says is computed from these, so a run can be judged again from its folder. Times are
seconds since the Unix epoch, on the clock that the system under test uses too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from spotserve.replay.timeline import Arrive

COMPLETE = frozenset({"stop", "length"})
"""Finish reasons of an answer that is whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request, as its client saw it."""

    arrival: Arrive
    scheduled_s: float
    """When the timeline wanted it sent."""
    sent_s: float
    """When it was sent."""
    ended_s: float
    """When its answer was whole, or given up."""
    request_id: str = ""
    """The id that the system gave it; empty: it never answered."""
    prompt_tokens: int = 0
    """Tokens of its prompt, as the system counted them; 0: it did not say."""
    token_ids: tuple[int, ...] = ()
    gaps: tuple[float, ...] = ()
    """By how much each token led the runner-up; empty when the system did not say."""
    event_times_s: tuple[float, ...] = ()
    """When each event with tokens came."""
    event_tokens: tuple[int, ...] = ()
    """How many new tokens each of these brought."""
    finish_reason: str | None = None
    error: str | None = None
    """What went wrong; None: nothing."""
    reattached: int = 0
    """How often the connection dropped and the stream was taken up again."""
    duplicate_tokens: int = 0
    """Tokens at positions that had come before."""
    contradicted_tokens: int = 0
    """Those of them that differed from what had come before: the one thing that must never happen."""

    @property
    def complete(self) -> bool:
        """Whether the client has its whole answer."""
        return self.finish_reason in COMPLETE and self.error is None

    @property
    def schedule_delay_s(self) -> float:
        """How late the client was; large values mean that the load was not what the trace says."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from sending; None: no token came."""
        return self.event_times_s[0] - self.sent_s if self.event_times_s else None

    @property
    def e2e_s(self) -> float | None:
        """Time to the last token, from sending; None: the answer is not whole."""
        return self.event_times_s[-1] - self.sent_s if self.complete and self.event_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (E2E - TTFT) / (n - 1); None: not whole, or a single token."""
        count = len(self.token_ids)
        return (self.event_times_s[-1] - self.event_times_s[0]) / (count - 1) if self.complete and count > 1 else None

    @property
    def silences(self) -> list[tuple[float, float]]:
        """From each event with tokens to the next: (start, end)."""
        return list(pairwise(self.event_times_s))


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """Something that the system reported about its fleet."""

    time_s: float
    kind: str
    """`launched`, `registered`, `ready`, `notice`, `lost`, `moved`, `undrained`; kinds to come are kept as they are."""
    instance: str | None
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deed:
    """One capacity action of the timeline and what came of it."""

    time_s: float
    action: str
    trace_instance: str
    instance: str | None
    """The cluster's instance that stood for the trace's; None: none did."""
    problem: str | None = None
    """Why it was not carried out; None: it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One pass over a timeline."""

    label: str
    started_s: float
    ended_s: float
    initial_instances: tuple[str, ...]
    requests: tuple[RequestRecord, ...]
    fleet_events: tuple[FleetEvent, ...] = ()
    deeds: tuple[Deed, ...] = ()
    tokens_recomputed: int | None = None
    """Growth of `spotserve_tokens_recomputed_total`; None: the system does not export it."""

    @property
    def duration_s(self) -> float:
        """Length of the pass."""
        return self.ended_s - self.started_s
