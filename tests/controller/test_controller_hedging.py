"""The fleet's size in the controller's hands: when it asks the cloud, for what, when it returns machines, and that it settles."""

from collections import Counter

import pytest
from controller_scene import MODEL, PLACES, Machine, World, heartbeat, kinds
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from planned_scene import KV_TOKENS, hardware

from spotserve.config import ControllerSettings
from spotserve.controller.adoption import COMPLETE_WITHIN_S
from spotserve.controller.choosing import RECOVER_S
from spotserve.controller.hedging import policy_of
from spotserve.controller.leaving import REPLACED_DRAIN_S
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.rehearsal import Machine as Rehearsed
from spotserve.controller.rehearsal import rehearse
from spotserve.controller.state import SILENCE_S
from spotserve.core.cluster import InstanceState
from spotserve.core.messages import (
    TERMINATED,
    Command,
    Event,
    InstanceLaunched,
    InstanceLost,
    Launch,
    LaunchRefused,
    SequenceReport,
    Terminate,
    Tick,
)
from spotserve.planner.breaker import BreakerState
from spotserve.planner.fleet_view import HedgePolicy

POLICY = HedgePolicy()


def held(count: int = 3, **settings: object) -> World:
    """A controller that holds so many, and has had time to hear who is there."""
    world = World(instances=count, **{"max_spares": 0, **settings})  # type: ignore[arg-type]
    world.hear(Tick())
    world.now_s += COMPLETE_WITHIN_S
    world.hear(Tick())
    return world


def serving(count: int = 3, **settings: object) -> World:
    """The same, when everything that it asked for serves."""
    world = held(count, **settings)
    world.provide_all()
    return world


def asked(commands: list[Command]) -> Counter[str]:
    """Counts by zone; `!`: on demand."""
    found: Counter[str] = Counter()
    for each in commands:
        if isinstance(each, Launch):
            found[f"{each.zone}{'' if each.spot else '!'}"] += each.count
    return found


def alive(world: World) -> list[str]:
    return [each.instance_id for each in world.state.instances.values() if each.state is not InstanceState.GONE]


def num_asked(world: World) -> int:
    """What the controller waits for."""
    assert world.state.hedging is not None
    count: int = world.state.hedging.summary()["asked"]
    return count


def leap(world: World, seconds: float) -> list[Command]:
    """Time passes at once, and everybody has given a sign of life; what is commanded."""
    world.now_s += seconds
    for instance in world.state.instances.values():
        if instance.address is not None:
            world.hear(heartbeat(instance.instance_id))
    return world.hear(Tick())


# ---------------------------------------------------------------------- at the start


def test_an_empty_fleet_is_filled_over_all_zones_and_nothing_is_asked_twice() -> None:
    world = World(instances=3, max_spares=0)
    assert world.state.next_deadline_s is not None and world.state.next_deadline_s <= world.now_s
    assert world.hear(Tick()) == []
    assert world.state.next_deadline_s == world.now_s + COMPLETE_WITHIN_S
    world.now_s += COMPLETE_WITHIN_S
    assert asked(world.hear(Tick())) == {"a": 2, "b": 1}
    assert world.hear(Tick()) == leap(world, 10.0) == []
    world.provide_all()
    assert len(alive(world)) == len(world.serving()) == 3 and not world.asked
    assert world.hear(Tick()) == []


def test_without_a_number_to_hold_nothing_is_asked_for() -> None:
    world = World()
    world.serve("i-1", "i-2")
    assert asked(world.notice("i-1", 30.0) + world.lose("i-1") + leap(world, 100.0)) == {}
    assert world.state.hedging is None


def test_a_restarted_controller_asks_for_nothing_that_is_there() -> None:
    world = serving(3)
    there = alive(world)
    world.restart()
    world.hear(Tick())
    world.now_s += 0.1
    for instance in there[:2]:
        world.register(instance)
    world.hear(InstanceLaunched(instance_id=there[2], spot=True, zone="b", usd_per_hour=1.4))  # it starts, the cloud says
    world.now_s += COMPLETE_WITHIN_S - 0.1
    assert asked(world.hear(Tick())) == {}
    world.register(there[2])
    assert asked(leap(world, 10.0)) == {} and not world.asked


def test_a_restarted_controller_asks_for_what_has_gone_meanwhile() -> None:
    world = serving(3)
    gone, *there = alive(world)
    world.machines[gone].is_gone = True
    world.restart()
    for instance in there:
        assert asked(world.register(instance)) == {}
    assert sum(asked(leap(world, COMPLETE_WITHIN_S)).values()) == 1


# ---------------------------------------------------------------------- machines go


def test_a_replacement_is_asked_for_at_the_notice_and_not_again_at_the_loss() -> None:
    world = serving(3)
    victim = alive(world)[0]
    commands = world.notice(victim, 30.0)
    assert sum(asked(commands).values()) == 1
    assert "wanted on spot" in next(each.reason for each in commands if isinstance(each, Launch))
    assert any("launch 1 spot in" in told for told in world.state.decisions[-1].commands)
    (new,) = world.provide_all()
    assert victim in alive(world) and new in alive(world) and len(world.serving()) == 3
    assert asked(world.lose(victim)) == {}
    assert len(alive(world)) == 3


def test_a_loss_without_a_word_is_replaced_at_once() -> None:
    world = serving(3)
    assert sum(asked(world.lose(alive(world)[0])).values()) == 1


def test_a_machine_that_hangs_is_ended_and_replaced_once() -> None:
    world = serving(2)
    silent, other = alive(world)
    world.now_s += SILENCE_S
    world.hear(heartbeat(other))
    commands = world.hear(Tick())
    assert [each for each in commands if isinstance(each, Terminate)] == [Terminate(instance_id=silent)]
    assert sum(asked(commands).values()) == 1


def test_what_the_operator_ends_is_replaced_and_teaches_nothing() -> None:
    world = serving(2)
    before = world.state.hedging
    assert before is not None
    hazards = [zone["last_instant_s"] for zone in before.summary()["zones"]]
    commands = world.hear(InstanceLost(instance_id=alive(world)[0], reason=TERMINATED))
    assert sum(asked(commands).values()) == 1
    assert [zone["last_instant_s"] for zone in before.summary()["zones"]] == hazards == [None, None]


# ---------------------------------------------------------------------- the cloud refuses, or is late


def test_a_refused_launch_goes_to_another_zone_and_then_on_demand() -> None:
    world = held(1)
    first = world.asked[0].zone
    (other,) = {"a", "b"} - {first}
    commands = world.refuse()
    assert asked(commands) == {other: 1}
    assert "no capacity" in world.state.decisions[-1].reason
    assert asked(world.refuse()) == {"b!": 1}
    world.provide_all()
    assert asked(leap(world, POLICY.retry_s - 60)) == {}
    assert sum(asked(leap(world, 60)).values()) == 1


def test_a_refusal_takes_back_what_was_asked_for_and_no_more() -> None:
    world = held(4)
    assert Counter(each.zone for each in world.asked) == {"a": 2, "b": 2}
    world.asked = [each for each in world.asked if each.zone != "a"]
    commands = world.hear(LaunchRefused(count=2, spot=True, zone="a", reason="no capacity"))
    assert asked(commands) == {"b": 2}
    assert asked(world.hear(LaunchRefused(count=2, spot=True, zone="a", reason="no capacity"))) == {}


def test_nothing_stands_in_where_the_user_does_not_want_that() -> None:
    world = held(1, fall_back=False)
    world.refuse()
    assert world.refuse() == []
    assert sum(asked(leap(world, POLICY.retry_s)).values()) == 1


def test_what_does_not_come_is_given_up_and_asked_for_elsewhere() -> None:
    world = held(1)
    late = world.asked.pop()
    commands = leap(world, POLICY.arrive_s)
    assert sum(asked(commands).values()) == 1 and asked(commands)[str(late.zone)] == 0
    assert kinds(commands) == ["Launch"], "there is nothing to return"
    assert num_asked(world) == 1


def test_what_starts_and_never_registers_is_returned() -> None:
    world = held(1)
    wish = world.asked.pop()
    world.hear(InstanceLaunched(instance_id="i-9", spot=True, zone=str(wish.zone), usd_per_hour=1.0))
    commands = leap(world, POLICY.arrive_s)
    assert Terminate(instance_id="i-9") in commands and sum(asked(commands).values()) == 1
    assert leap(world, REPLACED_DRAIN_S) == []


def test_a_machine_that_registers_before_the_cloud_tells_of_it_is_the_one_that_was_asked_for() -> None:
    world = held(1)
    wish = world.asked.pop()
    world.machines["i-1"] = Machine("i-1", 1, zone="z")
    assert wish.zone != "z", "the cloud may know better"
    world.register("i-1")
    assert num_asked(world) == 0
    world.launch("i-1")
    assert num_asked(world) == 0 and asked(leap(world, POLICY.arrive_s)) == {}


# ---------------------------------------------------------------------- too many


def test_stand_ins_are_emptied_and_then_given_back_when_spot_serves_again() -> None:
    world = held(1)
    world.refuse()
    world.refuse()
    (stand_in,) = world.provide_all()
    leap(world, POLICY.retry_s)
    (spot,) = world.provide_all()
    assert asked(leap(world, 1.0)) == {} and len(world.serving()) == 2
    world.hear(heartbeat(stand_in, SequenceReport("q", 10, 9, 5)))
    commands = leap(world, POLICY.return_s)
    assert "Drain" in kinds(commands) and "Terminate" not in kinds(commands)
    assert "goes back" in world.state.decisions[-1].reason
    ((replica_id, drain),) = world.draining.items()
    assert drain.instance_id == stand_in
    assert Terminate(instance_id=stand_in) in world.become_empty(replica_id)
    assert world.end_given_back() == stand_in
    assert alive(world) == [spot] and len(world.serving()) == 1
    assert leap(world, 100.0) == []


def test_a_machine_that_does_not_become_empty_is_given_back_when_its_time_is_up() -> None:
    world = held(1)
    world.refuse()
    world.refuse()
    (stand_in,) = world.provide_all()
    leap(world, POLICY.retry_s)
    world.provide_all()
    leap(world, 1.0)
    leap(world, POLICY.return_s)
    due_s = world.state.instances[stand_in].notice
    assert due_s is not None and due_s.deadline_s == world.now_s + REPLACED_DRAIN_S
    leap(world, REPLACED_DRAIN_S - 1.0)
    assert world.given_back == []
    leap(world, 1.0)
    assert world.given_back == [stand_in]
    assert leap(world, 100.0) == [], "neither taken back into service nor ended twice"
    assert world.given_back == [stand_in]


def test_a_replacement_for_a_notice_that_did_not_come_true_is_too_many_after_a_while() -> None:
    world = serving(2)
    world.notice(alive(world)[0], 5.0)
    world.provide_all()
    world.wait(7.0)
    assert len(alive(world)) == len(world.serving()) == 3
    leap(world, 1.0)
    leap(world, POLICY.scale_down_s)
    world.provide_all()
    assert len(alive(world)) == len(world.serving()) == 2
    assert leap(world, 10.0) == []


# ---------------------------------------------------------------------- how many


def test_the_floor_is_on_demand_where_that_is_cheapest() -> None:
    world = held(3, on_demand_floor=1)
    assert Counter(f"{each.zone}{'' if each.spot else '!'}" for each in world.asked) == {"b!": 1, "a": 1, "b": 1}


def test_spares_follow_what_the_zones_have_taught() -> None:
    world = serving(4, max_spares=4, shortage_share=0.02)
    hedging = world.state.hedging
    assert hedging is not None
    assert hedging.summary()["spares"] == 0
    for _ in range(6):
        for _ in range(120):  # each machine takes two minutes from being asked for to serving
            leap(world, 1.0)
        world.lose(alive(world)[-1])
        leap(world, 120.0)
        world.provide_all()
    leap(world, 1.0)
    told = hedging.summary()
    assert told["spares"] > 0 and told["spot"] + told["on_demand"] >= 4 + told["spares"]
    assert told["exposed_s"] > 60.0


def test_exposure_is_what_start_ups_and_warnings_have_been() -> None:
    world = held(1)
    hedging = world.state.hedging
    assert hedging is not None and hedging.exposed_s == RECOVER_S
    world.now_s += 39.0
    world.provide_all()
    leap(world, 1.0)
    assert hedging.exposed_s == pytest.approx(40.0)
    world.notice(alive(world)[0], 30.0)
    assert hedging.exposed_s == pytest.approx(10.0)
    world.now_s += 59.0
    world.provide_all()
    leap(world, 1.0)
    assert hedging.exposed_s == pytest.approx(20.0)  # (40 + 60) / 2 - 30


def test_a_spare_that_waited_was_not_slow() -> None:
    world = held(2, planning="shape", data=1)
    hedging = world.state.hedging
    assert hedging is not None
    world.now_s += 39.0
    world.provide_all()
    leap(world, 1.0)
    (replica,) = world.serving()
    for _ in range(10):
        leap(world, 100.0)
    serving_id = world.state.replicas[replica].instance_ids[0]
    world.lose(serving_id)
    world.answer_all()
    leap(world, 1.0)
    assert len(world.serving()) == 1
    assert hedging.exposed_s == pytest.approx(40.0, abs=2.0)


def test_the_summary_names_what_is_wanted_and_every_zone() -> None:
    world = World(instances=2)
    assert world.state.hedging is not None
    told = world.state.hedging.summary()
    assert (told["wanted"], told["spot"], told["on_demand"], told["asked"]) == (2, None, None, 0)
    leap(world, 0.0)
    leap(world, COMPLETE_WITHIN_S)
    told = world.state.hedging.summary()
    assert (told["spot"], told["spares"], told["on_demand"], told["asked"]) == (2, 0, 0, 2)
    assert [zone["zone"] for zone in told["zones"]] == [place.name for place in PLACES]
    assert {zone["breaker"] for zone in told["zones"]} == {BreakerState.CLOSED.value}
    assert all(zone["losses_per_instance_hour"] > 0 for zone in told["zones"])


def test_every_setting_of_the_size_reaches_the_policy() -> None:
    given = {
        "max_instances": 9,
        "on_demand_floor": 2,
        "fall_back": False,
        "max_spares": 1,
        "shortage_share": 0.2,
        "return_s": 5.0,
        "scale_down_s": 6.0,
    }
    policy = policy_of(ControllerSettings.model_validate(given))
    assert {name: getattr(policy, name) for name in given} == given
    assert policy_of(ControllerSettings()) == HedgePolicy()


def test_a_rehearsal_has_the_machines_that_it_is_given() -> None:
    settings = ControllerSettings(planning="auto", instances=5)
    machines = [Rehearsed(f"i-{number}", hardware(), spot=True, zone="a", usd_per_hour=1.0) for number in (1, 2)]
    rehearsal = rehearse(MODEL, machines, settings, engine=EngineTerms(8, kv_tokens=KV_TOKENS, step_tokens=1), lose=["i-1"])
    assert rehearsal.state.hedging is None and list(rehearsal.state.instances) == ["i-1", "i-2"]


# ---------------------------------------------------------------------- any order


class CappedWorld(World):
    """Whenever something is asked for, the maximum is kept. That a notice does not come true may make it too many later."""

    def hear(self, event: Event) -> list[Command]:
        commands = super().hear(event)
        states = [each.state for each in self.state.instances.values()]
        counting = states.count(InstanceState.PENDING) + states.count(InstanceState.READY)
        assert not asked(commands) or counting + len(self.asked) <= self.settings.max_instances
        return commands


class AnyOrderHeld(RuleBasedStateMachine):
    """A cloud that gives, refuses, warns, takes, and changes its mind; slots that come up; controllers that restart."""

    @initialize(count=st.integers(1, 4), floor=st.integers(0, 2), spares=st.integers(0, 2), fall_back=st.booleans())
    def start(self, count: int, floor: int, spares: int, fall_back: bool) -> None:
        self.floor = floor
        self.waited_s = 0.0
        self.world = CappedWorld(
            instances=count,
            on_demand_floor=floor,
            max_spares=spares,
            max_instances=count + floor + 1,
            fall_back=fall_back,
            return_s=20.0,
            scale_down_s=40.0,
        )

    def there(self) -> list[str]:
        """Machines that the cloud has not ended."""
        return [name for name, machine in self.world.machines.items() if not machine.is_gone]

    @precondition(lambda self: self.world.asked)
    @rule()
    def deliver(self) -> None:
        self.world.deliver()

    @precondition(lambda self: self.world.asked)
    @rule()
    def refuse(self) -> None:
        self.world.refuse()

    @precondition(lambda self: self.world.given_back)
    @rule()
    def end(self) -> None:
        self.world.end_given_back()

    @precondition(lambda self: self.world.coming() or self.world.draining)
    @rule()
    def answer(self) -> None:
        coming, draining = self.world.coming(), self.world.draining
        self.world.become_ready(*coming[0]) if coming else self.world.become_empty(next(iter(draining)))

    @precondition(lambda self: self.there())
    @rule(pick=st.integers(0, 99), grace_s=st.floats(0.1, 10))
    def warn(self, pick: int, grace_s: float) -> None:
        self.world.notice(self.there()[pick % len(self.there())], grace_s)

    @precondition(lambda self: self.there())
    @rule(pick=st.integers(0, 99))
    def lose(self, pick: int) -> None:
        self.world.lose(self.there()[pick % len(self.there())])

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0, 31.0, 250.0]))
    def pass_time(self, seconds: float) -> None:
        self.waited_s += seconds
        while self.world.asked and self.waited_s > 150.0:
            self.world.deliver()  # in time: what the cloud gives after we have given it up is one too many for a while
        leap(self.world, seconds)
        self.waited_s *= bool(self.world.asked)

    @rule()
    def restart(self) -> None:
        """What the earlier controller had asked for comes, or what it returned goes, before the new one is there."""
        world = self.world
        world.asked.clear()
        for name in world.given_back:
            world.machines[name].is_gone = True
        world.given_back.clear()
        world.restart()
        leap(world, 0.0)
        for instance in self.there():
            world.register(instance)

    @invariant()
    def nothing_is_asked_twice(self) -> None:
        if hasattr(self, "world"):
            leap(self.world, 0.0)
            assert self.world.hear(Tick()) == []

    def teardown(self) -> None:
        """The cloud gives all that it is asked for: in the end what is held is what should be, and nothing happens any more."""
        if not hasattr(self, "world"):
            return
        world = self.world
        hedging = world.state.hedging
        assert hedging is not None
        spot: list[int] = []
        while len(spot) < 50 or len(set(spot[-4:])) > 1:  # hazards fade: once fewer are needed, the others stay for a little
            leap(world, 100.0)
            world.provide_all()
            spot.append(hedging.summary()["spot"])
        told = hedging.summary()
        there = [each for each in world.state.instances.values() if each.state is not InstanceState.GONE]
        assert {each.state for each in there} == {InstanceState.READY}
        on_demand = sum(not each.spot for each in there)
        assert (len(there) - on_demand, on_demand) == (told["spot"], max(self.floor, told["on_demand"]))
        assert told["on_demand"] == self.floor
        assert len(there) == max(self.floor, told["wanted"]) + told["spares"]
        assert sorted(alive(world)) == sorted(self.there())
        assert leap(world, 10.0) == []


TestAnyOrderHeld = AnyOrderHeld.TestCase
TestAnyOrderHeld.settings = hypothesis_settings(max_examples=25, stateful_step_count=25, deadline=None, report_multiple_bugs=False)
