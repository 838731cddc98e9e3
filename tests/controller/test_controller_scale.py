"""Large fleets: what is not done at every event and every heartbeat, and what is said in few words."""

import pytest
from controller_scene import World, heartbeat, kinds
from planned_scene import PlannedWorld, hardware

from spotserve.controller.choosing import ANEW_WEIGHED, AT_ONCE_DEVICES, QUIET_S
from spotserve.controller.proposals import Proposer
from spotserve.controller.state import FEW_REPLICAS, ROOM_S
from spotserve.core.messages import SequenceReport
from spotserve.planner.planner import MANY_NAMES, listed


def full(instance: str):
    """A heartbeat of a machine that has no room, for the eight sequences that a replica runs."""
    return heartbeat(instance, *(SequenceReport(f"{instance}-{index}", 9, 8, 10_000) for index in range(8)))


def one_under_notice(num_instances: int) -> World:
    """Nobody has room, one machine goes, and another one is being brought up: the one that goes is not told yet."""
    world = World()
    names = [f"i-{number}" for number in range(1, num_instances + 1)]
    world.serve(*names)
    world.now_s += 1.0
    for name in names:
        world.hear(full(name))
    world.join("i-999")
    assert "Drain" not in kinds(world.notice("i-1", 60.0))
    return world


def test_in_a_small_fleet_room_is_used_at_once() -> None:
    world = one_under_notice(4)
    assert kinds(world.hear(heartbeat("i-2"))) == ["Drain"]


def test_in_a_large_fleet_room_is_looked_for_several_times_a_second() -> None:
    world = one_under_notice(FEW_REPLICAS + 1)
    world.now_s += ROOM_S / 2
    assert world.hear(heartbeat("i-2")) == []
    world.now_s += ROOM_S
    assert kinds(world.hear(heartbeat("i-3"))) == ["Drain"]


def test_a_large_fleet_that_serves_too_little_is_not_looked_at_as_a_whole_at_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    propose = Proposer.propose

    def counted(self, *args, most, **options):
        looks.append(most)
        return propose(self, *args, most=most, **options)

    world = PlannedWorld(hardware(devices=16), rate_rps=1e6)
    world.serve(*(f"i-{number}" for number in range(1, AT_ONCE_DEVICES // 16 + 3)))
    world.now_s += QUIET_S
    monkeypatch.setattr(Proposer, "propose", counted)
    world.lose("i-1")
    assert looks.count(ANEW_WEIGHED) == 1 and world.state.plan is not None
    world.serve("i-20")
    assert looks.count(ANEW_WEIGHED) == 1 and len(looks) > 1
    world.now_s += QUIET_S
    world.serve("i-21")
    assert looks.count(ANEW_WEIGHED) == 2


def test_many_replicas_are_told_in_few_words() -> None:
    names = [f"r-{number}" for number in range(MANY_NAMES + 1)]
    assert listed(names[:2]) == "r-0, r-1" and listed(names[:-1]).count(",") == MANY_NAMES - 1
    assert listed(names) == f"r-0 .. r-{MANY_NAMES} ({MANY_NAMES + 1} of them)"
