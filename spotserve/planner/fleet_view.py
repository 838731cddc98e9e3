"""What hedging looks at and what comes out: instances that are held, zones that can be asked, and what is wished for.

Values only. All instances are of one type; a fleet of several types is hedged type by type.
"""

from dataclasses import dataclass

from spotserve.core.errors import ConfigError
from spotserve.planner.breaker import Breaker, BreakerRule
from spotserve.planner.risk import Sizes, mean_size


@dataclass(frozen=True, slots=True)
class HedgePolicy:
    """How many instances to hold, and of which kind."""

    on_demand_floor: int = 0
    """On-demand instances that are always held."""
    max_instances: int = 64
    """Held at most. One under notice does not count: it is as good as gone, and its replacement cannot wait for it."""
    fall_back: bool = True
    """On-demand instances when spot ones are not to be had."""
    shortage_share: float = 0.05
    """Share of the time in which losses may leave less than is wanted, while replacements start: spares are held for the rest."""
    max_spares: int = 4
    """Spares at most."""
    arrive_s: float = 300.0
    """An instance that has not registered so long after it was asked for is given up."""
    retry_s: float = 300.0
    """A zone that refused, or let us wait in vain, is not asked again for so long."""
    return_s: float = 300.0
    """On-demand instances are kept for so long after spot instances made them needless."""
    scale_down_s: float = 1200.0
    """Spot instances are kept for so long after they became too many (SkyServe's delay)."""
    breaker_per_hour: float = 3.0
    """Losses of an instance per hour above which a zone is not asked: five times what the public AWS traces have on average."""
    breaker_s: float = 1800.0
    """For so long."""
    trial_s: float = 600.0
    """An instance that lived for so long proves the zone good again."""

    def __post_init__(self) -> None:
        times = (self.arrive_s, self.retry_s, self.return_s, self.scale_down_s, self.breaker_s, self.trial_s)
        if min(self.on_demand_floor, self.max_spares, *times) < 0 or not 0 < self.shortage_share < 1 or self.breaker_per_hour <= 0:
            raise ConfigError(f"{self}: expected counts and times that are not negative, a share between 0 and 1, a positive rate")
        if self.max_instances < max(1, self.on_demand_floor):
            raise ConfigError(f"max_instances={self.max_instances}: expected at least 1 and on_demand_floor={self.on_demand_floor}")

    @property
    def breaker(self) -> BreakerRule:
        """When zones are not asked."""
        return BreakerRule(self.breaker_per_hour, self.breaker_s, self.trial_s)


@dataclass(frozen=True, slots=True)
class Held:
    """An instance that was asked for and is not gone."""

    instance_id: str
    zone: str
    is_spot: bool
    asked_s: float
    ready_s: float | None = None
    """Since when its worker takes commands; None: not yet."""
    is_leaving: bool = False
    """Under notice: it does not count."""
    is_serving: bool = False
    """A replica runs on it."""
    is_only_asked: bool = False
    """The cloud has said nothing of it yet: it cannot be called off, only given up, or returned when it is there."""


@dataclass(frozen=True, slots=True)
class Zone:
    """A place that can be asked."""

    name: str
    spot_usd_per_hour: float
    on_demand_usd_per_hour: float
    instants_per_hour: float
    """Loss instants per spot instance."""
    sizes: Sizes
    """Of those."""
    last_loss_s: float | None = None
    """When a spot instance was last taken there, by notice or without; None: never."""
    spot_refused_s: float | None = None
    """When the cloud last refused a spot instance there; None: never."""
    on_demand_refused_s: float | None = None
    """The same for on-demand ones."""

    @property
    def losses_per_hour(self) -> float:
        """Of a spot instance."""
        return self.instants_per_hour * mean_size(self.sizes, max(size for size, _ in self.sizes))


@dataclass(frozen=True, slots=True)
class Surplus:
    """Instances beyond what is needed: since when there have been `count` at least."""

    count: int
    since_s: float


@dataclass(frozen=True, slots=True)
class HedgeMemory:
    """What hedging must remember from one time to the next. The wish holds the next one."""

    breakers: tuple[tuple[str, Breaker], ...] = ()
    """By zone."""
    in_vain: tuple[tuple[str, bool, float], ...] = ()
    """(zone, whether spot, when): instances that were given up."""
    spot_surplus: Surplus | None = None
    on_demand_surplus: Surplus | None = None


@dataclass(frozen=True, slots=True)
class LaunchWish:
    """Rent instances."""

    count: int
    is_spot: bool
    zone: str
    reason: str


@dataclass(frozen=True, slots=True)
class TerminationWish:
    """Return an instance."""

    instance_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wish:
    """What to rent and to return, and what to remember."""

    launches: tuple[LaunchWish, ...]
    terminations: tuple[TerminationWish, ...]
    memory: HedgeMemory
    num_spot: int
    """Spot instances that should be held, spares included."""
    num_spares: int
    num_on_demand: int
    """On-demand instances that should be held."""
    wake_s: float | None
    """When time alone may change the wish; None: never."""
    reason: str
