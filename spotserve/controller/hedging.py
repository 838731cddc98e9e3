"""The fleet's size: machines are rented and returned so that what is wanted is there.

`planner.hedge` says how many there should be, of which kind and where. This is the memory around it: what was asked of the cloud
and has not come yet, which zones refused, how long machines take from being asked for to serving, and how early the cloud warns.

Invariants: nothing is asked for twice, since what was asked for counts as held until the cloud says that it starts, that it
refuses, or until it has kept us waiting for too long. Nothing is asked for before the workers of an earlier controller have had
time to say that they are there.

Knows neither plans nor commands to workers. No await, no clock, no I/O.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from spotserve.config import ControllerSettings
from spotserve.controller.adoption import COMPLETE_WITHIN_S
from spotserve.controller.choosing import RECOVER_S, Chooser
from spotserve.controller.fleet import Fleet
from spotserve.controller.records import Instance
from spotserve.controller.sizing import Sizing
from spotserve.core.cluster import InstanceState, ReplicaState
from spotserve.core.messages import Launch, LaunchRefused
from spotserve.planner.breaker import Breaker
from spotserve.planner.fleet_view import HedgeMemory, HedgePolicy, Held, TerminationWish, Wish, Zone
from spotserve.planner.hedge import hedge

KEPT = 16
"""Start-ups and warnings that are remembered."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where machines can be rented, and for how much."""

    name: str
    spot_usd_per_hour: float
    on_demand_usd_per_hour: float


@dataclass(frozen=True, slots=True)
class Resizing:
    """What is to be done about the fleet's size in one turn."""

    launches: tuple[Launch, ...] = ()
    returns: tuple[TerminationWish, ...] = ()
    """Of instances that the fleet knows."""
    reason: str = ""


class Hedging:
    """Owner of what is asked of the cloud."""

    def __init__(self, fleet: Fleet, chooser: Chooser, places: Sequence[Place], settings: ControllerSettings) -> None:
        assert settings.instances is not None and places
        self._sizing = Sizing(chooser, least=max(1, settings.on_demand_floor), most=settings.max_instances - settings.max_spares)
        self._fleet = fleet
        self._hazards = chooser.hazards
        self._places = places
        self._instances = settings.instances
        self._wanted = 0 if self._instances == "auto" else self._instances
        self._policy = policy_of(settings)
        self._memory = HedgeMemory()
        self._wish: Wish | None = None
        self._act_s: float | None = None
        """When the fleet is known; None: nothing has happened yet."""
        self._turn_s = 0.0
        self._asks: dict[str, Held] = {}
        """By a name of our own: what the cloud has been asked for and has said nothing of yet."""
        self._num_asked = 0
        self._asked_s: dict[str, float] = {}
        """By instance: when it was asked for, while it has not served."""
        self._refused_s: dict[tuple[str, bool], float] = {}
        self._starts_s: deque[float] = deque(maxlen=KEPT)
        self._graces_s: deque[float] = deque(maxlen=KEPT)
        self._instance_type = ""

    # ------------------------------------------------------------------ what happened

    def note_new(self, instance: Instance) -> None:
        """An instance that nobody has heard of before: it is what was asked for longest ago, in its zone if anything was."""
        alike = [name for name, ask in self._asks.items() if ask.is_spot is instance.spot]
        here = [name for name in alike if self._asks[name].zone == instance.zone]
        for name in (here or alike)[:1]:
            self._asked_s[instance.instance_id] = self._asks.pop(name).asked_s

    def note_refused(self, event: LaunchRefused, now_s: float) -> None:
        """The cloud does not give what was asked for."""
        if event.zone is None:
            return
        self._refused_s[event.zone, event.spot] = now_s
        asked = [name for name, ask in self._asks.items() if (ask.zone, ask.is_spot) == (event.zone, event.spot)]
        for name in asked[: event.count]:
            del self._asks[name]

    def note_warning(self, grace_s: float) -> None:
        """The cloud takes a spot instance, and says so this much before; 0: without a word."""
        self._graces_s.append(max(0.0, grace_s))

    # ------------------------------------------------------------------ what follows

    @property
    def due_s(self) -> float | None:
        """When time alone changes something; None: never."""
        if self._wish is None:
            return self._act_s or 0.0
        return self._wish.wake_s

    def turn(self, now_s: float) -> Resizing:
        """What to rent and to return now. Asking again at once is harmless: nothing is left to do."""
        self._act_s = now_s + COMPLETE_WITHIN_S if self._act_s is None else self._act_s
        self._turn_s = now_s
        if now_s < self._act_s:
            return Resizing()
        self._measure_starts()
        self._wanted = self._sizing.wanted(now_s) if self._instances == "auto" else self._instances
        wish = hedge(
            self._wanted,
            self._held(),
            self._zones(now_s),
            self._memory,
            self._policy,
            exposed_s=self.exposed_s,
            now_s=now_s,
        )
        self._wish, self._memory = wish, wish.memory
        for each in wish.terminations:
            self._asks.pop(each.instance_id, None)
        for launch in wish.launches:
            for _ in range(launch.count):
                self._num_asked += 1
                name = f"asked-{self._num_asked}"
                self._asks[name] = Held(name, launch.zone, launch.is_spot, now_s, is_only_asked=True)
        returns = tuple(each for each in wish.terminations if each.instance_id in self._fleet.instances)
        launches = tuple(Launch(count=each.count, spot=each.is_spot, zone=each.zone, reason=each.reason) for each in wish.launches)
        told = [f"{each.instance_id} goes back: {each.reason}" for each in returns]
        return Resizing(launches, returns, "; ".join([wish.reason, *told]) if launches or told else "")

    @property
    def exposed_s(self) -> float:
        """From a loss until its replacement serves, as it has been lately; at first, as long as in SpotServe."""
        start_s = mean(self._starts_s) if self._starts_s else RECOVER_S
        return max(0.0, start_s - (mean(self._graces_s) if self._graces_s else 0.0))

    def summary(self) -> dict[str, Any]:
        """What should be held and what is believed of each zone, as plain values."""
        wish, breakers = self._wish, dict(self._memory.breakers)
        rows = {row["zone"]: row for row in self._hazards.summary(self._turn_s) if row["instance_type"] == self._instance_type}
        return {
            "wanted": self._wanted,
            "spot": wish.num_spot if wish is not None else None,
            "spares": wish.num_spares if wish is not None else None,
            "on_demand": wish.num_on_demand if wish is not None else None,
            "asked": len(self._asks),
            "exposed_s": self.exposed_s,
            "zones": [
                {
                    "zone": zone.name,
                    "breaker": breakers.get(zone.name, Breaker()).state.value,
                    "losses_per_instance_hour": zone.losses_per_hour,
                    "instance_hours": rows[zone.name]["instance_hours"] if zone.name in rows else 0.0,
                    "last_instant_s": zone.last_loss_s,
                }
                for zone in self._zones(self._turn_s)
            ],
        }

    # ------------------------------------------------------------------ inner

    def _held(self) -> list[Held]:
        """What is there, and what was asked for."""
        serving = {instance_id for replica in self._fleet.replicas.values() for instance_id in replica.instance_ids}
        there = [
            Held(
                each.instance_id,
                each.zone,
                each.spot,
                self._asked_s.get(each.instance_id, each.launched_s),
                each.ready_s,
                is_leaving=each.state is InstanceState.DRAINING,
                is_serving=each.instance_id in serving,
            )
            for each in self._fleet.alive()
        ]
        return [*there, *self._asks.values()]

    def _zones(self, now_s: float) -> list[Zone]:
        """What is known of every place, for the kind of machine that most of ours are."""
        kinds = Counter(each.instance_type for each in self._fleet.alive() if each.ready_s is not None)
        if kinds:
            self._instance_type = min(kinds, key=lambda kind: (-kinds[kind], kind))
        kind, hazards = self._instance_type, self._hazards
        return [
            Zone(
                place.name,
                place.spot_usd_per_hour,
                place.on_demand_usd_per_hour,
                hazards.instants_per_hour(kind, place.name, now_s),
                hazards.group_sizes(kind, place.name, now_s),
                hazards.last_instant_s(kind, place.name),
                self._refused_s.get((place.name, True)),
                self._refused_s.get((place.name, False)),
            )
            for place in self._places
        ]

    def _measure_starts(self) -> None:
        """How long machines that serve by now took: from being asked for to taking commands, and from being wanted by a plan to
        serving. A spare that waited in between was not slow."""
        for replica in self._fleet.in_state(ReplicaState.SERVING):
            for instance_id in replica.instance_ids:
                asked_s, ready_s = self._asked_s.pop(instance_id, None), self._fleet.instances[instance_id].ready_s
                if asked_s is not None and ready_s is not None:
                    self._starts_s.append(ready_s - asked_s + replica.serving_since_s - max(ready_s, replica.begun_s))


def policy_of(settings: ControllerSettings) -> HedgePolicy:
    """What the user has set; the rest is the planner's."""
    return HedgePolicy(
        on_demand_floor=settings.on_demand_floor,
        max_instances=settings.max_instances,
        fall_back=settings.fall_back,
        shortage_share=settings.shortage_share,
        max_spares=settings.max_spares,
        return_s=settings.return_s,
        scale_down_s=settings.scale_down_s,
    )
