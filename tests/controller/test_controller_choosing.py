"""Plans where the planner chooses: what is kept, what never idles, when changing pays, and what stands in the way."""

import pytest
from controller_scene import MODEL, World
from planned_scene import WHOLE_BYTES, PlannedWorld, hardware

from spotserve.controller.choosing import QUIET_S
from spotserve.controller.proposals import Proposer
from spotserve.core.cluster import NoticeKind
from spotserve.core.messages import InstanceLaunched, ModelRead

HALF = hardware(int(0.75 * WHOLE_BYTES))
"""Too small for the model: a replica takes two of them."""


def test_nothing_is_planned_before_the_model_is_known() -> None:
    world = PlannedWorld()
    machine = world.hardware
    world.hardware = None
    world.join("i-1")
    assert world.serving() == []
    assert "what the model is" in world.state.decisions[-1].reason
    world.hardware = machine
    world.hear(ModelRead(instance_id="i-1", model=MODEL))
    assert "what kind of machine" in world.state.decisions[-1].reason
    world.serve("i-2")
    assert world.shapes() == [(1, 1)]


def test_every_device_serves() -> None:
    world = PlannedWorld()
    world.serve("i-1", "i-2", "i-3")
    used = [device for replica in world.state.replicas.values() for device in replica.devices.values()]
    assert len(used) == len(set(used)) == 3


def test_a_model_that_is_too_large_for_a_device_is_cut() -> None:
    world = PlannedWorld(HALF)
    world.serve("i-1")
    assert world.serving() == []
    assert "there is room for" in world.state.decisions[-1].reason
    world.serve("i-2")
    ((pipeline, tensor),) = world.shapes()
    assert pipeline * tensor == 2
    world.serve("i-3", "i-4")
    used = [device for replica in world.state.replicas.values() for device in replica.devices.values()]
    assert len(set(used)) == 4


def test_replicas_that_keep_their_devices_are_left_alone_when_a_machine_goes() -> None:
    world = PlannedWorld(HALF)
    world.serve("i-1", "i-2", "i-3", "i-4", "i-5")
    before = {replica_id: dict(replica.devices) for replica_id, replica in world.state.replicas.items()}
    victim = world.state.replicas[world.serving()[-1]].instance_ids[-1]
    commands = world.lose(victim)
    untouched = {name for name, devices in before.items() if victim not in {each.instance_id for each in devices.values()}}
    assert untouched
    assert not [each for each in commands if getattr(getattr(each, "slot", None), "replica_id", None) in untouched]
    world.answer_all()
    assert len(world.serving()) >= len(untouched)


def test_the_reason_and_the_losers_are_told() -> None:
    world = PlannedWorld(HALF)
    world.serve("i-1", "i-2", "i-3", "i-4")
    chosen, *others = world.state.alternatives
    assert chosen.is_chosen and chosen.verdict
    assert all(each.verdict and not each.is_chosen for each in others)


def test_a_shape_that_cannot_be_brought_up_is_not_chosen_again() -> None:
    world = PlannedWorld(HALF)
    world.launch("i-1")
    world.launch("i-2")
    world.register("i-1")
    world.register("i-2")
    ((machine, slot), *_) = world.coming()
    failed = machine.slots[slot].replica.parallel
    world.fail(machine, slot, is_permanent=True)
    while coming := world.coming():
        world.become_ready(*coming[0])
    assert world.shapes()
    assert (failed.pipeline, failed.tensor) not in world.shapes()


def test_two_kinds_of_machines_serve_side_by_side() -> None:
    world = PlannedWorld(HALF)
    large = hardware(name="large", speed=3.0)
    world.join("i-1")
    world.join("i-2")
    world.join("i-3", hardware=large)
    world.answer_all()
    assert sorted(pipeline * tensor for pipeline, tensor in world.shapes()) == [1, 2]
    (alone,) = [each for each in world.state.replicas.values() if each.plan.parallel.num_slots == 1]
    assert alone.instance_ids == ("i-3",) and alone.plan.instance_type == "large"


def test_a_soft_signal_raises_the_risk_and_drains_nothing() -> None:
    world = PlannedWorld()
    world.serve("i-1", "i-2")
    before = world.state.hazards.instance_rate_per_hour("i-1", world.now_s)
    world.notice("i-1", 100.0, NoticeKind.SOFT)
    assert world.state.hazards.instance_rate_per_hour("i-1", world.now_s) > before
    assert not world.drains


def test_users_may_leave_it_to_the_planner_and_take_it_back() -> None:
    world = PlannedWorld()
    world.serve("i-1", "i-2")
    world.reshape(1, 2, 1)
    world.answer_all()
    assert world.shapes() == [(2, 1)]
    world.reshape(None, None, None)
    world.answer_all()
    assert len([device for replica in world.state.replicas.values() for device in replica.devices.values()]) == 2
    blind = World()
    blind.serve("i-1")
    assert blind.reshape(None, None, None) == []
    assert "what kind of machine" in blind.state.decisions[-1].reason


def test_a_quiet_fleet_is_looked_at_and_left_as_it_is() -> None:
    world = PlannedWorld()
    world.serve("i-1", "i-2", "i-3")
    epoch, decisions = world.state.plan, len(world.state.decisions)
    assert world.wait(60.0) == []
    assert world.state.plan is epoch
    assert len(world.state.decisions) == decisions


def test_a_change_that_is_under_way_is_finished_rather_than_taken_back() -> None:
    world = PlannedWorld(HALF)
    world.serve("i-1", "i-2", "i-3", "i-4")
    world.reshape(1, 4, 1)
    world.answer_all()
    world.reshape(None, None, None)  # several replicas are better, and come up beside the one that serves
    coming = {slot.replica_id for _, slot in world.coming()}
    assert coming
    world.join("i-5")
    assert coming <= {slot.replica_id for _, slot in world.coming()}
    world.answer_all()
    devices = [device for replica in world.state.replicas.values() for device in replica.devices.values()]
    assert len(devices) == len(set(devices))


def test_no_deadline_that_has_passed_is_asked_for_again() -> None:
    """A machine that is coming is waited for; when it has come, and nothing can be planned still, nothing is due for that."""
    world = PlannedWorld(hardware(int(0.3 * WHOLE_BYTES)))
    world.join("i-1")
    world.hear(InstanceLaunched(instance_id="i-2", spot=True, zone="a", usd_per_hour=1.0))
    assert world.state.next_deadline_s is not None
    world.register("i-2")
    world.wait(30.0)
    due_s = world.state.next_deadline_s
    assert due_s is None or due_s > world.now_s


def test_nothing_is_searched_while_machines_and_load_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    world = PlannedWorld(HALF)
    world.serve("i-1", "i-2", "i-3")
    world.wait(2 * QUIET_S)
    plan = world.state.plan
    searches: list[object] = []
    monkeypatch.setattr(Proposer, "propose", lambda *arguments, **named: searches.append(arguments) or [])
    world.wait(20 * QUIET_S)
    assert searches == []
    assert world.state.plan is plan


def test_a_fleet_that_is_gone_is_not_looked_at_all_the_time() -> None:
    world = PlannedWorld()
    world.serve("i-1")
    world.lose("i-1")
    world.wait(3 * QUIET_S)
    due_s = world.state.next_deadline_s
    assert due_s is None or due_s > world.now_s
