"""Two traces become one list of things to do, in order.

Pure: the same traces, scaling and seed give the same timeline, whoever carries it out. Times of a timeline are seconds since
its start. A capacity trace knows that an instance went, never whether somebody said so before: a seeded draw per removal
decides that, and the grace period is a parameter, in seconds of the replay (it is not scaled: a cloud's notice does not get
shorter because a trace is replayed faster).

At equal times fleet changes come before arrivals, and fleet changes keep the trace's order, a notice in the place of its
removal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from spotserve.core.errors import ConfigError
from spotserve.replay.draws import drawn_seed, share_drawn
from spotserve.replay.trace import CapacityTrace, RequestTrace


@dataclass(frozen=True, slots=True)
class Arrive:
    """A client sends a request."""

    at_s: float
    index: int
    """Counts the requests of a timeline from 0: the identity by which two runs are compared."""
    prompt_tokens: int
    output_tokens: int
    temperature: float
    seed: int
    prefix: tuple[int, ...] = ()
    """Blocks that its prompt begins with, by name: prompts with equal ones begin alike."""


@dataclass(frozen=True, slots=True)
class Launch:
    """An instance is rented."""

    at_s: float
    instance: str
    zone: str


@dataclass(frozen=True, slots=True)
class GiveNotice:
    """The cloud says that it will take an instance."""

    at_s: float
    instance: str
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Take:
    """The cloud takes an instance."""

    at_s: float
    instance: str
    noticed: bool
    """Whether a `GiveNotice` came before."""


CapacityAction: TypeAlias = Launch | GiveNotice | Take
Action: TypeAlias = CapacityAction | Arrive


@dataclass(frozen=True, slots=True)
class Scaling:
    """Which part of the traces is replayed, how fast, and what they leave open.

    Both clocks are cut at `start_s` (trace seconds) and run `time_scale` times faster than the trace. The request clock runs
    `rate_scale` times faster still: arrivals keep their pattern, and their rate is multiplied.
    """

    start_s: float = 0.0
    duration_s: float | None = None
    """Trace seconds to replay; None: until the longer trace ends."""
    time_scale: float = 1.0
    """Trace seconds per second of the replay: 60 replays an hour in a minute."""
    rate_scale: float = 1.0
    grace_s: float = 30.0
    """Seconds of the replay between notice and loss."""
    notice_share: float = 1.0
    """Share of removals that come with a notice."""
    sampled_share: float = 0.5
    """Share of requests without a temperature of their own that are sampled; the others are greedy."""
    sampled_temperature: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"time_scale": self.time_scale, "rate_scale": self.rate_scale}
        natural = {
            "start_s": self.start_s,
            "grace_s": self.grace_s,
            "duration_s": self.duration_s or 0.0,
            "sampled_temperature": self.sampled_temperature,
        }
        shares = {"notice_share": self.notice_share, "sampled_share": self.sampled_share}
        for name, value in positive.items():
            if not 0 < value < float("inf"):
                raise ConfigError(f"{name}={value!r}: expected a positive number")
        for name, value in natural.items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}={value!r}: expected a number that is not negative")
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value!r}: expected a share from 0 to 1")


@dataclass(frozen=True, slots=True)
class Timeline:
    """What happens, in order."""

    initial: Mapping[str, str]
    """Instances of the fleet at the start, in the trace's order, with their zones."""
    actions: tuple[Action, ...]
    duration_s: float
    clamped_rows: int = 0
    prefix_block_tokens: int = 0
    """Tokens of a block of a prefix; 0: the trace has none."""

    @property
    def arrivals(self) -> tuple[Arrive, ...]:
        """The requests alone."""
        return tuple(action for action in self.actions if isinstance(action, Arrive))

    @property
    def losses(self) -> tuple[Take, ...]:
        """The removals alone."""
        return tuple(action for action in self.actions if isinstance(action, Take))

    def undisturbed(self) -> "Timeline":
        """The same requests on a fleet that never changes."""
        return Timeline(self.initial, self.arrivals, self.duration_s, self.clamped_rows, self.prefix_block_tokens)


def merge(capacity: CapacityTrace | None, requests: RequestTrace | None, scaling: Scaling) -> Timeline:
    """The timeline of both traces; without a capacity trace the fleet is left as it is."""
    window_s = _window_s(capacity, requests, scaling)
    initial, changes = _capacity_actions(capacity, scaling, window_s) if capacity else ({}, [])
    arrivals = _arrivals(requests, scaling, window_s) if requests else []
    actions: list[Action] = sorted([*changes, *arrivals], key=lambda action: action.at_s)  # stable: ties stay in this order
    clamped, block_tokens = (requests.clamped_rows, requests.prefix_block_tokens) if requests else (0, 0)
    return Timeline(initial, tuple(actions), window_s, clamped, block_tokens)


def _window_s(capacity: CapacityTrace | None, requests: RequestTrace | None, scaling: Scaling) -> float:
    """Length of the replay in its own seconds."""
    if scaling.duration_s is not None:
        return scaling.duration_s / scaling.time_scale
    if capacity and capacity.is_ended and capacity.end_s is not None:
        return max(0.0, capacity.end_s - scaling.start_s) / scaling.time_scale
    ends_s = [0.0]
    if capacity and capacity.events:
        end_s = capacity.events[-1].time_s if capacity.end_s is None else capacity.end_s
        ends_s.append((end_s - scaling.start_s) / scaling.time_scale)
    if requests and requests.requests:
        ends_s.append((requests.requests[-1].arrival_s - scaling.start_s) / scaling.time_scale / scaling.rate_scale)
    return max(ends_s)


def _capacity_actions(trace: CapacityTrace, scaling: Scaling, window_s: float) -> tuple[dict[str, str], list[CapacityAction]]:
    """The fleet at the start, and its changes. An instance that comes back under its old name counts as a new one (`name#2`)."""
    initial: dict[str, str] = {}
    changes: list[CapacityAction] = []
    present: dict[str, tuple[str, float]] = {}  # the trace's name -> (this life's name, its start)
    lives: dict[str, int] = {}
    for event in trace.events:
        at_s = (event.time_s - scaling.start_s) / scaling.time_scale
        if event.change == "add":
            lives[event.instance] = lives.get(event.instance, 0) + 1
            life = event.instance if lives[event.instance] == 1 else f"{event.instance}#{lives[event.instance]}"
            present[event.instance] = (life, at_s)
            if at_s <= 0:
                initial[life] = event.zone
            elif at_s <= window_s:
                changes.append(Launch(at_s, life, event.zone))
            continue
        life, since_s = present.pop(event.instance)
        if at_s <= 0:
            del initial[life]
        else:
            changes += _removal(life, since_s=max(0.0, since_s), at_s=at_s, scaling=scaling, window_s=window_s)
    return initial, changes


def _removal(life: str, *, since_s: float, at_s: float, scaling: Scaling, window_s: float) -> list[CapacityAction]:
    """The notice, if there is one, and the loss. An instance younger than the grace period is given a shorter one."""
    if at_s > window_s:
        return []
    noticed = scaling.grace_s > 0 and share_drawn(scaling.seed, "notice", life) < scaling.notice_share
    if not noticed:
        return [Take(at_s, life, noticed=False)]
    return [GiveNotice(max(since_s, at_s - scaling.grace_s), life, at_s), Take(at_s, life, noticed=True)]


def _arrivals(trace: RequestTrace, scaling: Scaling, window_s: float) -> list[Arrive]:
    arrivals: list[Arrive] = []
    for row, request in enumerate(trace.requests):
        at_s = (request.arrival_s - scaling.start_s) / scaling.time_scale / scaling.rate_scale
        if not 0 <= at_s <= window_s:
            continue
        sampled = share_drawn(scaling.seed, "sampled", row) < scaling.sampled_share
        temperature = scaling.sampled_temperature if sampled else 0.0
        arrivals.append(
            Arrive(
                at_s,
                len(arrivals),
                request.prompt_tokens,
                request.output_tokens,
                temperature if request.temperature is None else request.temperature,
                drawn_seed(scaling.seed, "seed", row) >> 32 if request.seed is None else request.seed,
                request.prefix,
            )
        )
    return arrivals
