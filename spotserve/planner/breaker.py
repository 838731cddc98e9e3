"""Which zones may be asked for spot instances: a circuit breaker on the interruption rate of each (Nygard, Release It!, 2007).

    CLOSED     -> OPEN       a new loss there, and the rate is above the limit
    OPEN       -> HALF_OPEN  time is over
    HALF_OPEN  -> OPEN       a new loss there
    HALF_OPEN  -> CLOSED     an instance has lasted there

SkyServe (EuroSys'25) moves a zone to a list of preempting ones at its first preemption, and back when a launch succeeds. Here one
loss in a zone that is calm otherwise changes nothing, and a successful launch proves nothing: living there does.

Pure; every loss is judged once, so that a rate that falls slowly does not open a breaker again by itself.
"""

from dataclasses import dataclass
from enum import Enum
from math import inf


class BreakerState(Enum):
    """Whether a zone may be asked."""

    CLOSED = "closed"
    """As often as is needed."""
    OPEN = "open"
    """Not at all."""
    HALF_OPEN = "half_open"
    """For one instance, to see."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """Of one zone. Changes only when something changes."""

    state: BreakerState = BreakerState.CLOSED
    until_s: float = -inf
    """When OPEN ends, or ended."""
    judged_s: float = -inf
    """The latest loss that has had its effect."""


@dataclass(frozen=True, slots=True)
class BreakerRule:
    """When breakers change."""

    losses_per_hour: float
    """Of an instance; above it a zone is not asked."""
    open_s: float
    """For so long."""
    trial_s: float
    """An instance that lived so long since then proves the zone good."""


def renew(
    breaker: Breaker,
    rule: BreakerRule,
    *,
    losses_per_hour: float,
    last_loss_s: float | None,
    lived_since_s: float | None,
    now_s: float,
) -> Breaker:
    """The breaker as of now; itself when nothing changed.

    Args:
        breaker: as it was.
        rule: when it changes.
        losses_per_hour: of an instance in this zone, as believed now.
        last_loss_s: when something was last taken there; None: never.
        lived_since_s: since when the oldest of our spot instances there has been ready; None: there is none.
        now_s: now.
    """
    latest_s = -inf if last_loss_s is None else last_loss_s
    is_new_loss = latest_s > breaker.judged_s
    if breaker.state is BreakerState.OPEN:
        return (
            breaker
            if now_s < breaker.until_s
            else Breaker(BreakerState.HALF_OPEN, breaker.until_s, max(latest_s, breaker.judged_s))
        )
    if is_new_loss and (breaker.state is BreakerState.HALF_OPEN or losses_per_hour > rule.losses_per_hour):
        return Breaker(BreakerState.OPEN, now_s + rule.open_s, latest_s)
    lived_s = -inf if lived_since_s is None else now_s - max(lived_since_s, breaker.until_s)
    if breaker.state is BreakerState.HALF_OPEN and lived_s >= rule.trial_s:
        return Breaker(BreakerState.CLOSED, breaker.until_s, breaker.judged_s)
    return breaker
