"""What became of a replay, simulated or live: what every report is computed from.

Values; `Outcomes` and `Gaps` grow while a replay runs and have one owner until it ends. Memory: some hundred bytes per
request, whatever its length, and a bounded number of gap sizes. Times are seconds since the start of the replay.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, isnan, log, nan
from typing import overload

from spotserve.replay.record import FleetEvent

GAP_PRECISION = 0.005
"""Relative width of a bucket of gap sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One attempt of a client, and what came of it."""

    index: int
    """Counts the requests of a timeline from 0: the identity by which two replays are compared."""
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    """Wanted."""
    first_token_s: float | None
    """None: no token came."""
    end_s: float
    """Last token of a whole answer; or when it was given up, or the replay ended."""
    is_whole: bool
    """Whether the client has its whole answer; otherwise the request is lost."""
    tokens: int
    """Output tokens that the client has."""
    longest_gap_s: float = 0.0
    """Between two of its tokens."""
    longest_gap_end_s: float = 0.0
    """When that gap ended."""
    moved: int = 0
    """How often it went on elsewhere with its KV."""
    resumed: int = 0
    """How often it went on elsewhere from its tokens, whose KV was computed again."""
    restarted: int = 0
    """How often it began anew: tokens that it had were lost."""
    recomputed_tokens: int = 0
    """Tokens, of prompt and output, that were computed more than once for it because of a move, a loss or an eviction."""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None: none came."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float | None:
        """Time to the last token; None: the answer is not whole."""
        return self.end_s - self.arrival_s if self.is_whole else None

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (tokens - 1); None: not whole, or a single token."""
        if not self.is_whole or self.first_token_s is None or self.tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.tokens - 1)

    @property
    def was_interrupted(self) -> bool:
        """Whether it changed its replica on the way."""
        return self.moved + self.resumed + self.restarted > 0


_COUNTS = ("index", "prompt_tokens", "output_tokens", "tokens", "moved", "resumed", "restarted", "recomputed_tokens")
_TIMES = ("arrival_s", "first_token_s", "end_s", "longest_gap_s", "longest_gap_end_s")


class Outcomes(Sequence[Outcome]):
    """Outcomes in the order in which requests ended, kept as columns: half a million of them take some 60 MB."""

    def __init__(self, outcomes: Sequence[Outcome] = ()) -> None:
        self._counts = {name: array("q") for name in _COUNTS}
        self._times_s = {name: array("d") for name in _TIMES}
        self._whole = array("b")
        for outcome in outcomes:
            self.append(outcome)

    def append(self, outcome: Outcome) -> None:
        """One more has ended."""
        for name, counts in self._counts.items():
            counts.append(getattr(outcome, name))
        for name, times_s in self._times_s.items():
            value = getattr(outcome, name)
            times_s.append(nan if value is None else value)
        self._whole.append(outcome.is_whole)

    def column(self, name: str) -> Sequence[float]:
        """One field of every outcome, in their order; nan where it is None."""
        if name == "is_whole":
            return self._whole
        return self._counts[name] if name in self._counts else self._times_s[name]

    def __len__(self) -> int:
        return len(self._whole)

    @overload
    def __getitem__(self, place: int) -> Outcome: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Outcome]: ...

    def __getitem__(self, place: int | slice) -> Outcome | Sequence[Outcome]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        counts, times_s = self._counts, self._times_s
        first_s = times_s["first_token_s"][place]
        return Outcome(
            index=counts["index"][place],
            arrival_s=times_s["arrival_s"][place],
            prompt_tokens=counts["prompt_tokens"][place],
            output_tokens=counts["output_tokens"][place],
            first_token_s=None if isnan(first_s) else first_s,
            end_s=times_s["end_s"][place],
            is_whole=bool(self._whole[place]),
            tokens=counts["tokens"][place],
            longest_gap_s=times_s["longest_gap_s"][place],
            longest_gap_end_s=times_s["longest_gap_end_s"][place],
            moved=counts["moved"][place],
            resumed=counts["resumed"][place],
            restarted=counts["restarted"][place],
            recomputed_tokens=counts["recomputed_tokens"][place],
        )

    def __iter__(self) -> Iterator[Outcome]:
        return (self[number] for number in range(len(self)))


@dataclass(slots=True)
class Gaps:
    """Sizes of gaps between tokens, pooled over all requests; equal to `GAP_PRECISION`, so that their number does not matter."""

    counts: dict[int, int] = field(default_factory=dict)
    """By bucket: how many. Bucket b holds gaps of about exp(b * GAP_PRECISION) seconds."""
    zeros: int = 0

    def add(self, gap_s: float, count: int = 1) -> None:
        """So many gaps of this size."""
        if gap_s <= 0:
            self.zeros += count
            return
        bucket = round(log(gap_s) / GAP_PRECISION)
        self.counts[bucket] = self.counts.get(bucket, 0) + count

    @property
    def total(self) -> int:
        """All gaps."""
        return self.zeros + sum(self.counts.values())

    def percentile_s(self, percent: float) -> float | None:
        """Nearest rank, to within half of `GAP_PRECISION`; None: there are no gaps."""
        wanted, seen = percent / 100 * self.total, self.zeros
        if not self.total:
            return None
        if seen >= wanted and self.zeros:
            return 0.0
        size_s = 0.0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            size_s = exp(bucket * GAP_PRECISION)
            if seen >= wanted:
                break
        return size_s

    @property
    def mean_s(self) -> float | None:
        """Mean gap; None: there are none."""
        if not self.total:
            return None
        return sum(exp(bucket * GAP_PRECISION) * count for bucket, count in self.counts.items()) / self.total


@dataclass(frozen=True, slots=True)
class Lease:
    """One rented machine, for as long as it was paid for within the replay."""

    instance: str
    spot: bool
    from_s: float
    until_s: float
    usd_per_hour: float

    @property
    def hours(self) -> float:
        """For how long."""
        return max(0.0, self.until_s - self.from_s) / 3600

    def within(self, from_s: float, until_s: float) -> "Lease":
        """The part of it between two times, on a clock that begins with the first of them."""
        start_s = min(max(self.from_s, from_s), until_s)
        end_s = min(max(self.until_s, start_s), until_s)
        return Lease(self.instance, self.spot, start_s - from_s, end_s - from_s, self.usd_per_hour)

    @property
    def usd(self) -> float:
        """What it cost."""
        return self.hours * self.usd_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One policy on one timeline.

    `fleet_events` say what happened to the fleet, by time. Kinds and details that reports use:

        launched    spot: bool                          rented; paid for from then on
        registered                                      its worker takes commands
        notice      deadline_s: float
        lost        notice: bool                        taken by the cloud
        terminated                                      given back
        plan        shape: str, replicas: int, reason   what should run from now on
        serving     replicas: int, planned: int         how many replicas serve, whenever that changes
        settled     since_s: float                      all that the newest plan wants serves, for the first time since a change
                                                        at since_s
        moved, resumed, restarted   request: int        a running request goes on elsewhere
    """

    policy: str
    seed: int
    duration_s: float
    """Of the traces; requests that had arrived are served to their end."""
    ended_s: float
    """When the last request had ended."""
    outcomes: Outcomes
    gaps: Gaps
    fleet_events: tuple[FleetEvent, ...]
    leases: tuple[Lease, ...]
    on_demand_usd_per_hour: float
    """Of one machine of the kind that is used."""
    weights_moved_bytes: int = 0
    """Between machines, for replicas that were brought up."""
    weights_read_bytes: int = 0
    """From files."""
    kv_moved_bytes: int = 0
    """Between machines, for requests that moved."""
