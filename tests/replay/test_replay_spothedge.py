"""SkyServe's policy: what it asks for, zone by zone, what stands in, and what becomes of requests and dollars."""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from spotserve.core.cluster import InstanceState, Notice, ReplicaState
from spotserve.core.errors import ConfigError
from spotserve.core.messages import (
    TERMINATED,
    Activate,
    Address,
    Command,
    Deactivate,
    Event,
    Heartbeat,
    InstanceLaunched,
    InstanceLost,
    Launch,
    LaunchRefused,
    NoticeReceived,
    Publish,
    Registered,
    SlotReady,
    Terminate,
    Tick,
)
from spotserve.core.plan import Parallel
from spotserve.planner.devices import instance_type
from spotserve.planner.models import named_model
from spotserve.planner.queueing import latency
from spotserve.planner.workload import Lengths, Workload
from spotserve.replay import timeline
from spotserve.replay.outcome import Replayed
from spotserve.replay.policies import POLICIES
from spotserve.replay.scenario import Delays, Prices, Scenario, show_nothing
from spotserve.replay.spothedge import (
    DRAIN_S,
    NUM_EXTRA,
    PROBE_S,
    TARGET_UTILISATION,
    TICK_S,
    ReplicaKind,
    SpotHedge,
    Zones,
    mean_workload,
    num_target,
    on_demand_wanted,
    replica_kind,
)
from spotserve.replay.timeline import Action, Arrive, GiveNotice, Take, Timeline

MODEL, MACHINE = named_model("llama-3-8b"), instance_type("g5.12xlarge")
PRICES = Prices(spot_usd_per_hour=2.0, on_demand_usd_per_hour=5.0)
SMALL = ReplicaKind(Parallel(tensor=4), 1, 1.0)
PAIR = ReplicaKind(Parallel(pipeline=2, tensor=4), 2, 1.0)


# --------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("num_zones", "told", "active"),
    [
        (3, "", "abc"),
        (3, "-a", "bc"),
        (3, "-a -a", "bc"),
        (3, "-a +a", "abc"),
        (3, "-a -b", "abc"),  # one would be left: all are active again
        (3, "-a -b -c", "ab"),
        (4, "-a -b", "cd"),
        (4, "-a -b +a -c", "ad"),
        (4, "-a -b -c", "abcd"),
        (2, "-a", "b"),  # else an empty zone would be asked for ever
        (2, "-a -b", "ab"),
        (1, "-a", "a"),
    ],
)
def test_zones_leave_and_enter_the_active_set(num_zones: int, told: str, active: str) -> None:
    zones = Zones("abcd"[:num_zones])
    for word in told.split():
        (zones.launched if word[0] == "+" else zones.preempted)(word[1])
    assert "".join(zones.active) == active


@drawn(st.integers(1, 6), st.lists(st.tuples(st.booleans(), st.integers(0, 5))))
def test_there_is_always_somewhere_to_ask(num_zones: int, told: list[tuple[bool, int]]) -> None:
    zones = Zones("abcdef"[:num_zones])
    for is_given, number in told:
        (zones.launched if is_given else zones.preempted)("abcdef"[number % num_zones])
        assert len(zones.active) >= min(2, max(1, num_zones - 1))


def test_active_zones_without_any_of_ours_come_first_and_then_all_in_turn() -> None:
    zones = Zones("abc")
    assert [zones.next({"b": 1}) for _ in range(3)] == ["a", "c", "a"]
    assert [zones.next({"a": 1, "b": 3, "c": 1}) for _ in range(4)] == ["b", "c", "a", "b"]
    zones.preempted("c")
    assert [zones.next({"a": 1, "b": 3}) for _ in range(3)] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("target", "ready", "wanted"), [(3, 0, 3), (3, 1, 3), (3, 2, 2), (3, 3, 1), (3, 4, 0), (3, 5, 0), (1, 1, 1)]
)
def test_machines_on_demand_stand_in_for_spot_ones_that_are_not_ready(target: int, ready: int, wanted: int) -> None:
    assert on_demand_wanted(target, ready) == wanted


# --------------------------------------------------------------------------- the mind alone


@dataclass
class Cloud:
    """A cloud that gives what is asked for while it has it, and machines that do as they are told, one event after the other."""

    mind: SpotHedge
    spot: Counter[str]
    now_s: float = 0.0
    num_launched: int = 0
    alive: dict[str, tuple[bool, str]] = field(default_factory=dict)
    """By machine that has not gone: spot, zone."""
    commands: list[Command] = field(default_factory=list)

    def tell(self, *events: Event) -> list[Command]:
        """Lets it hear of something, and of what comes of that but for machines that start and weights that load."""
        inbox, told = list(events), []
        while inbox:
            commands = self.mind.handle(inbox.pop(0), self.now_s)
            told += commands
            for command in commands:
                inbox += self.obey(command)
        self.commands += told
        return told

    def obey(self, command: Command) -> list[Event]:
        if isinstance(command, Terminate):
            self.alive.pop(command.instance_id, None)
            return [InstanceLost(instance_id=command.instance_id, reason=TERMINATED)]
        if not isinstance(command, Launch):
            return []
        zone = command.zone or ""
        given = min(command.count, self.spot[zone]) if command.spot else command.count
        events: list[Event] = []
        for _ in range(given):
            name = f"{'s' if command.spot else 'd'}{self.num_launched}"
            self.num_launched += 1
            self.alive[name] = (command.spot, zone)
            events.append(InstanceLaunched(instance_id=name, spot=command.spot, zone=zone, usd_per_hour=1.0))
        if command.spot:
            self.spot[zone] -= given
        if given < command.count:
            events.append(LaunchRefused(count=command.count - given, spot=True, zone=command.zone, reason="none"))
        return events

    def start(self, *names: str) -> None:
        """Machines are up; all that are not when none is named."""
        instances = self.mind._fleet.instances
        for name in names or [each for each in self.alive if instances[each].state is InstanceState.PENDING]:
            if name not in self.alive:
                continue
            spot, zone = self.alive[name]
            ranks = tuple(Address(name, index + 1) for index in range(MACHINE.num_devices))
            self.tell(
                Registered(
                    instance_id=name,
                    address=Address(name, 0),
                    pid=1,
                    ranks=ranks,
                    spot=spot,
                    zone=zone,
                    model=MODEL,
                    hardware=MACHINE,
                )
            )

    def load(self, *, spot: bool | None = None) -> None:
        """What loads, is ready."""
        loading = [each for each in self.mind.replicas.values() if each.state is ReplicaState.LOADING]
        for replica in [each for each in loading if spot in (None, self.alive[each.instance_ids[0]][0])]:
            for slot, device in list(replica.devices.items()):
                self.tell(
                    SlotReady(
                        instance_id=device.instance_id,
                        device_index=device.index,
                        slot=slot,
                        plan_epoch=1,
                        model=MODEL,
                        pulled_bytes=0,
                        invariant="batch",
                    )
                )

    def take(self, name: str) -> list[Command]:
        del self.alive[name]
        return self.tell(InstanceLost(instance_id=name, reason="taken"))

    def wait(self, until_s: float, *, silent: str = "") -> None:
        """Machines say how they are, and time passes, as the simulation has it."""
        while (due_s := self.mind.next_deadline_s) is not None and due_s <= until_s:
            self.now_s = max(self.now_s, due_s)
            for name in [name for name in self.alive if name != silent]:
                assert self.mind.handle(beat(name), self.now_s) == []
            due_s = self.mind.next_deadline_s
            if due_s is not None and due_s <= self.now_s:
                self.tell(Tick())
        self.now_s = until_s

    @property
    def held(self) -> dict[str, int]:
        """Machines by market and zone."""
        return dict(Counter(f"spot {zone}" if spot else "on demand" for spot, zone in self.alive.values()))

    @property
    def serving(self) -> int:
        return sum(each.state is ReplicaState.SERVING for each in self.mind.replicas.values())


def beat(name: str) -> Heartbeat:
    return Heartbeat(
        instance_id=name,
        running=0,
        waiting=0,
        kv_tokens_used=0,
        kv_tokens_total=0,
        step_s=0.0,
        prefill_tokens_per_s=0.0,
        store_healthy=True,
        sequences=(),
    )


def cloud(kind: ReplicaKind = SMALL, wanted: int = 2, *, at: str = "abc", up: bool = True, **given: object) -> Cloud:
    """With plenty of spot machines; all that it asked for at first serve, unless `up` is off."""
    made = Cloud(SpotHedge(kind, wanted, at, **given), Counter(dict.fromkeys(at, 100)))  # type: ignore[arg-type]
    made.tell(Tick())
    if up:
        made.start()
        made.load()
        made.wait(DRAIN_S)
        made.commands.clear()
    return made


def test_it_begins_with_a_spare_on_spot_and_as_many_as_are_needed_on_demand() -> None:
    begun = cloud(up=False)
    assert begun.held == {"spot a": 1, "spot b": 1, "spot c": 1, "on demand": 2}
    assert [event.kind for event in begun.mind.events] == ["launched"] * 5
    assert begun.tell(Tick()) == [], "what was asked for is not asked for again"
    assert len(begun.mind.plan.replicas) == 2, "the plan is what the load needs"


def test_what_stands_in_takes_nothing_new_once_spot_is_ready_and_then_ends() -> None:
    begun = cloud(up=False)
    begun.start()
    begun.load(spot=False)
    assert begun.serving == 2
    begun.load()
    table = [command.table for command in begun.commands if isinstance(command, Publish)][-1]
    assert [route.state for route in table.replicas].count(ReplicaState.DRAINING) == 2 and begun.serving == 3
    begun.wait(DRAIN_S - 1.0)
    assert begun.held["on demand"] == 2
    begun.wait(DRAIN_S)
    assert begun.held == {"spot a": 1, "spot b": 1, "spot c": 1} and len(begun.mind.replicas) == 3
    assert [event.kind for event in begun.mind.events][-2:] == ["terminated"] * 2


def test_what_does_not_serve_yet_is_given_back_at_once() -> None:
    begun = cloud(up=False)
    begun.start("s0", "s1", "s2", "d3")
    begun.load(spot=True)
    assert begun.held == {"spot a": 1, "spot b": 1, "spot c": 1}, "one loads, one starts: neither has anything to finish"
    assert len(begun.mind.replicas) == 3


def test_a_loss_is_replaced_elsewhere_and_stood_in_for() -> None:
    up = cloud()
    commands = up.take("s0")
    asked = [(each.spot, each.zone, each.count) for each in commands if isinstance(each, Launch)]
    assert asked == [(True, "b", 1), (False, None, 1)]
    assert up.serving == 2 and all(
        up.mind.replicas[each.replica_id].state is ReplicaState.SERVING for each in up.mind.plan.replicas
    )
    up.start()
    up.load()
    up.wait(up.now_s + DRAIN_S)
    assert up.held == {"spot b": 2, "spot c": 1}


def test_a_zone_without_machines_is_left_and_asked_again_in_turn() -> None:
    up = cloud()
    up.spot.clear()
    up.take("s0")
    assert up.held == {"spot b": 1, "spot c": 1, "on demand": 1}
    refused_s = up.now_s
    up.commands.clear()
    up.wait(refused_s + 10 * TICK_S + 1.0)
    spot = [command for command in up.commands if isinstance(command, Launch)]
    assert all(command.spot for command in spot), "nothing more on demand"
    assert {command.zone for command in spot} == {"a", "b", "c"} and 9 <= len(spot) <= 10, "one a tick"
    up.spot["a"] = 1
    up.wait(up.now_s + 4 * TICK_S)
    assert up.held == {"spot a": 1, "spot b": 1, "spot c": 1, "on demand": 1}


def test_two_zones_of_which_one_is_empty_do_not_stall() -> None:
    up = Cloud(SpotHedge(SMALL, 3, "ab"), Counter({"b": 10}))
    up.tell(Tick())
    up.wait(TICK_S)
    assert up.held == {"spot b": 4, "on demand": 3}


def test_notices_are_not_heard() -> None:
    up = cloud()
    assert up.tell(NoticeReceived(notice=Notice(instance_id="s0", deadline_s=up.now_s + 30.0))) == []


def test_a_silent_machine_is_lost_when_it_is_looked_at() -> None:
    up = cloud()
    up.wait(up.now_s + PROBE_S + 1.0, silent="s1")
    assert [event.instance for event in up.mind.events if event.kind == "lost"] == ["s1"]
    assert any(command == Terminate(instance_id="s1") for command in up.commands)


def test_without_falling_back_only_spot_is_asked_for() -> None:
    assert cloud(up=False, falls_back=False).held == {"spot a": 1, "spot b": 1, "spot c": 1}


@pytest.mark.parametrize(("most", "spot", "on_demand"), [(1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 3, 1), (5, 3, 2), (9, 3, 2)])
def test_spot_has_the_first_claim_on_what_may_be_rented(most: int, spot: int, on_demand: int) -> None:
    begun = cloud(up=False, most_machines=most)
    assert sum(is_spot for is_spot, _ in begun.alive.values()) == spot and begun.held.get("on demand", 0) == on_demand


def test_a_replica_of_several_machines_reads_all_of_its_weights_on_machines_of_one_market() -> None:
    begun = cloud(PAIR, 1, at="ab", up=False)
    assert begun.held == {"spot a": 2, "spot b": 2, "on demand": 2}
    begun.start("s0")
    assert not begun.mind.replicas
    begun.start("d4", "s1")
    (replica,) = begun.mind.replicas.values()
    assert replica.instance_ids == ("s0", "s1")
    activations = [command for command in begun.commands if isinstance(command, Activate)]
    assert len(activations) == 8 and not any(command.transfers for command in activations)
    assert {(each.instance_id, each.device_index) for each in activations} == {(name, n) for name in ("s0", "s1") for n in range(4)}


def test_what_is_left_of_a_replica_is_used_again() -> None:
    up = cloud(PAIR, 1, at="ab")
    commands = up.take("s0")
    left = [command for command in commands if isinstance(command, Deactivate)]
    assert len(left) == 4 and {command.instance_id for command in left} == {"s1"}
    assert [(each.spot, each.count) for each in commands if isinstance(each, Launch)] == [(True, 1), (False, 2)]
    up.start()
    assert {each.instance_ids[0] for each in up.mind.replicas.values()} == {"s1", "s2", "d7"}
    up.load()
    up.wait(up.now_s + DRAIN_S)
    assert len(up.alive) == 4 and up.serving == 2


@settings(max_examples=60, deadline=None)
@drawn(st.data(), st.sampled_from([SMALL, PAIR]), st.integers(1, 3), st.integers(1, 4), st.integers(2, 12), st.booleans())
def test_whatever_happens_counts_are_kept(
    data: st.DataObject, kind: ReplicaKind, wanted: int, num_zones: int, most: int, falls_back: bool
) -> None:
    """Never more than may be rented, never two replicas on a device, and when the cloud has enough again, all is as at first."""
    at, size = "abcd"[:num_zones], kind.num_machines
    target = min(wanted, most // size)
    mind = SpotHedge(kind, wanted, at, most_machines=most, falls_back=falls_back)
    fleet = Cloud(mind, Counter({zone: data.draw(st.integers(0, 3)) for zone in at}))
    fleet.tell(Tick())
    for _ in range(data.draw(st.integers(0, 25))):
        spot = [name for name, (is_spot, _) in fleet.alive.items() if is_spot]
        step = data.draw(st.sampled_from(["start", "load", "take", "give", "wait"]))
        if step == "take" and spot:
            fleet.take(data.draw(st.sampled_from(spot)))
        elif step == "start":
            fleet.start()
        elif step == "load":
            fleet.load()
        elif step == "give":
            fleet.spot[data.draw(st.sampled_from(at))] += 1
        else:
            fleet.wait(fleet.now_s + data.draw(st.sampled_from([1.0, 31.0, 130.0])))
        assert len(fleet.alive) <= most
        devices = [device for each in mind.replicas.values() for device in each.devices.values()]
        assert len(devices) == len(set(devices)) and {each.instance_id for each in devices} <= fleet.alive.keys()
        assert len(mind.plan.replicas) == target
        assert falls_back or "on demand" not in fleet.held
    fleet.spot.update(dict.fromkeys(at, 100))
    for _ in range(4):
        fleet.wait(fleet.now_s + 4 * TICK_S)
        fleet.start()
        fleet.load()
    fleet.wait(fleet.now_s + DRAIN_S)
    assert sum(is_spot for is_spot, _ in fleet.alive.values()) == min(target + NUM_EXTRA, most // size) * size
    assert "on demand" not in fleet.held
    seqs = [event.seq for event in mind.events]
    assert seqs == sorted(set(seqs))


# --------------------------------------------------------------------------- what a replica is, and how many

LOAD = Workload(1.0, Lengths.fixed(200), Lengths.fixed(400))


def scenario(
    fleet: list[Action], *, count: int = 60, gap_s: float = 1.0, output: int = 400, zones: str = "abc", **given: object
) -> Scenario:
    """Requests at equal distances; there are two machines in each zone, `a0`, `a1`, `b0`, .. ."""
    arrivals: list[Action] = [Arrive(0.1 + index * gap_s, index, 200, output, 0.0, index) for index in range(count)]
    actions = sorted([*fleet, *arrivals], key=lambda action: action.at_s)
    initial = {f"{zone}{number}": zone for zone in zones for number in range(2)}
    whole = Timeline(initial, tuple(actions), count * gap_s + 30.0)
    values: dict[str, object] = {"max_batch": 32, "delays": Delays(start_up_s=20.0), **given}
    return Scenario(timeline=whole, model=MODEL, machine=MACHINE, prices=PRICES, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "machines"), [("llama-3-8b", 1), ("llama-3-70b", 2)])
def test_a_replica_is_the_quickest_shape_on_as_few_machines_as_hold_it(model: str, machines: int) -> None:
    kind = replica_kind(replace(scenario([]), model=named_model(model)), LOAD)
    assert kind.num_machines == machines
    assert (machines - 1) * 4 < kind.parallel.num_slots <= machines * 4 and kind.parallel.tensor == 4


def test_a_model_that_fits_nowhere_is_an_error() -> None:
    given = replace(scenario([]), model=named_model("llama-3-70b"), most_machines=1)
    with pytest.raises(ConfigError, match="fits no replica of up to 1 machines"):
        replica_kind(given, LOAD)


@dataclass(frozen=True)
class Fake:
    """A replica whose steps all take as long."""

    step_s: float = 0.01
    max_batch: int = 4
    kv_tokens: int = 10_000

    def token_s(self, sequences: float, context_tokens: float) -> float:
        return self.step_s

    def prompt_s(self, tokens: float) -> float:
        return self.step_s

    first_token_s = prompt_s


@pytest.mark.parametrize("rate_rps", [0.001, 0.3, 1.0, 4.0])
def test_there_are_so_many_that_none_is_busier_than_it_should_be(rate_rps: float) -> None:
    load, fake = replace(LOAD, rate_rps=rate_rps), Fake()
    kind = replica_kind(scenario([], max_batch=4, speed_of=lambda parallel, machine: fake), load)
    number = num_target(kind, load)
    assert latency([fake] * number, load).utilisation <= TARGET_UTILISATION + 1e-9
    assert number == 1 or latency([fake] * (number - 1), load).utilisation > TARGET_UTILISATION


def test_the_load_is_that_of_the_whole_trace() -> None:
    load = mean_workload(scenario([], count=60, gap_s=2.0).timeline)
    assert load.rate_rps == pytest.approx(60 / 150) and load.prompt.mean == 200 and load.output.mean == 400
    assert mean_workload(Timeline({}, (), 10.0)).rate_rps > 0


# --------------------------------------------------------------------------- the whole simulation


def play(given: Scenario) -> Replayed:
    return POLICIES["spothedge"].play(given, show_nothing)


def all_taken(at_s: float, zones: str) -> list[Action]:
    """All that one can have in these zones is announced and taken."""
    names = [f"{zone}{number}" for zone in zones for number in range(2)]
    told: list[Action] = [GiveNotice(at_s - 30.0, name, at_s) for name in names]
    return [*told, *(Take(at_s, name, noticed=True) for name in names)]


def test_requests_of_a_lost_replica_begin_anew_and_none_is_lost() -> None:
    """One replica is enough, and there is a spare: one in each of zones a and b, and both are taken."""
    played = play(scenario(all_taken(40.0, "ab"), gap_s=0.5, count=120))
    assert sorted(each.index for each in played.outcomes) == list(range(120))
    assert all(each.is_whole and each.tokens == 400 for each in played.outcomes)
    anew = [each for each in played.outcomes if each.restarted]
    assert anew and all(each.recomputed_tokens > 0 for each in anew)
    assert not any(each.moved or each.resumed for each in played.outcomes), "a notice changes nothing"
    kinds = Counter(event.kind for event in played.fleet_events)
    assert kinds["lost"] == 2 and not kinds["notice"]
    assert played.weights_moved_bytes == played.kv_moved_bytes == 0 and played.weights_read_bytes > 0


def test_dollars_are_those_of_spot_and_of_what_stood_in() -> None:
    """Two spot machines whenever they can be had; one on demand from the loss of both until both serve again, and it is empty."""
    back: list[Action] = [timeline.Launch(200.0, name, "a") for name in ("a8", "a9")]
    played = play(scenario([*all_taken(100.0, "a"), *back], count=400, zones="a"))
    spot = [lease for lease in played.leases if lease.spot]
    (stood_in,) = [lease for lease in played.leases if not lease.spot and lease.from_s > 0]
    asked_s = min(lease.from_s for lease in spot if lease.from_s > 0)
    assert len(spot) == 4 and 200.0 <= asked_s <= 200.0 + TICK_S
    assert sum(lease.usd for lease in spot) == pytest.approx(2.0 * 2 * (100 + 430 - asked_s) / 3600)
    assert stood_in.from_s == pytest.approx(100.0) and asked_s + 20.0 < stood_in.until_s - DRAIN_S < asked_s + 100.0
    assert stood_in.usd == pytest.approx(5.0 * (stood_in.until_s - 100.0) / 3600)


def test_what_stands_in_for_a_machine_that_comes_as_soon_is_of_no_use() -> None:
    """Both take as long to start: it goes before it serves (see `planner.hedge` for what this project does instead)."""
    played = play(scenario(all_taken(200.0, "a"), count=400))
    assert sum(lease.hours for lease in played.leases if lease.spot) == pytest.approx(2 * 430 / 3600)
    (stood_in,) = [lease for lease in played.leases if not lease.spot and lease.from_s > 0]
    assert stood_in.from_s == pytest.approx(200.0) and 20.0 < stood_in.until_s - stood_in.from_s < DRAIN_S


def test_without_spot_machines_all_is_on_demand_or_nothing_is() -> None:
    bare = scenario([], zones="")
    fallen = play(bare)
    assert all(each.is_whole for each in fallen.outcomes) and not any(lease.spot for lease in fallen.leases)
    stuck = play(replace(bare, falls_back=False))
    assert not stuck.leases and len(stuck.outcomes) == 60 and not any(each.is_whole for each in stuck.outcomes)


def test_it_pays_for_what_it_rents_whatever_the_scenario_says() -> None:
    one, other = (play(scenario([], rents=rents)) for rents in (False, True))
    assert one.leases == other.leases and len([lease for lease in one.leases if lease.spot]) == 2


def test_a_loss_that_nobody_announced_is_heard_of_by_probing() -> None:
    played = play(scenario([Take(40.0, "a0", noticed=False)], gap_s=0.5, count=120))
    (lost,) = [event for event in played.fleet_events if event.kind == "lost"]
    assert 40.0 < lost.time_s <= 40.0 + PROBE_S + 1e-6
    assert all(each.is_whole for each in played.outcomes)


def test_equal_scenarios_give_equal_results() -> None:
    fleet = [*all_taken(40.0, "ab"), timeline.Launch(60.0, "b7", "b"), Take(70.0, "c0", noticed=False)]
    first, again = (play(scenario(fleet, gap_s=0.5, count=120)) for _ in range(2))
    assert list(first.outcomes) == list(again.outcomes) and first.leases == again.leases
    assert repr(first.fleet_events) == repr(again.fleet_events)
