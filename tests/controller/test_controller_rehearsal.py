"""A rehearsal is the production state among machines that obey: it ends where a world of scripted machines ends."""

import pytest
from controller_scene import MODEL, World
from planned_scene import KV_TOKENS, WHOLE_BYTES, PlannedWorld, hardware

from spotserve.config import ControllerSettings
from spotserve.controller.proposals import EngineTerms
from spotserve.controller.rehearsal import Machine, Rehearsal, Standing, rehearse
from spotserve.core.cluster import DeviceId, ReplicaState
from spotserve.core.plan import Slot

HALF = hardware(int(0.75 * WHOLE_BYTES), devices=2)
"""Two devices, which take the model together."""
TERMS = EngineTerms(8, kv_tokens=KV_TOKENS, step_tokens=1)
SETTINGS = ControllerSettings(planning="auto")


def machines(count: int) -> list[Machine]:
    return [Machine(f"i-{number}", HALF, 1.0, zone="z") for number in range(1, count + 1)]


def played(count: int, **how: object) -> Rehearsal:
    return rehearse(MODEL, machines(count), SETTINGS, engine=TERMS, **how)  # type: ignore[arg-type]


def where(source: Rehearsal | World) -> dict[str, dict[Slot, DeviceId]]:
    """What serves, and on which devices."""
    return {
        replica_id: dict(replica.devices)
        for replica_id, replica in source.state.replicas.items()
        if replica.state is ReplicaState.SERVING
    }


def world(count: int) -> PlannedWorld:
    """The same machines, launched together, as the controller's own tests have them."""
    made = PlannedWorld(HALF)
    for number in range(1, count + 1):
        made.launch(f"i-{number}")
    for number in range(1, count + 1):
        made.register(f"i-{number}")
    made.answer_all()
    return made


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_fleet_comes_to_rest_where_a_world_does(count: int) -> None:
    rehearsal, lived = played(count), world(count)
    assert where(rehearsal) == where(lived) != {}
    assert {each.replica_id for each in rehearsal.state.plan.replicas} == where(rehearsal).keys()


@pytest.mark.parametrize("lose", [["i-1"], ["i-3"], ["i-1", "i-2"]])
def test_a_loss_ends_where_it_does_in_a_world(lose: list[str]) -> None:
    rehearsal, lived = played(4, lose=lose), world(4)
    for instance in lose:
        lived.lose(instance)
    lived.answer_all()
    assert where(rehearsal) == where(lived)
    assert not {device.instance_id for each in where(rehearsal).values() for device in each.values()} & set(lose)


def test_what_serves_already_is_adopted_with_its_name() -> None:
    settled = played(3)
    standing = [Standing(settled.state.replicas[replica_id].plan, devices) for replica_id, devices in where(settled).items()]
    again = played(3, standing=standing)
    assert where(again) == where(settled)
    assert again.activations == [] and again.phases == []


def test_every_transfer_that_is_told_is_one_that_was_commanded() -> None:
    """Replicas lose a machine while another, empty one is there: what moves is what devices are told to take."""
    small = hardware(int(0.75 * WHOLE_BYTES), devices=1)
    fleet = [Machine(f"i-{number}", small, 1.0, zone="z") for number in range(1, 6)]
    rehearsal = rehearse(MODEL, fleet, SETTINGS, engine=TERMS, lose=["i-1"])
    told = sum(sent.flow.num_bytes for phase in rehearsal.phases for sent in phase.schedule.timed)
    commanded = sum(transfer.num_bytes for activate in rehearsal.activations for transfer in activate.transfers)
    assert told == commanded > 0
    for phase in rehearsal.phases:
        assert phase.lower_bound_bytes <= told and phase.from_files_bytes == {}


def test_machines_lost_at_once_give_nothing() -> None:
    """The first loss is planned for with weights of the second machine; they are not counted as sent."""
    small = hardware(int(0.75 * WHOLE_BYTES), devices=1)
    fleet = [Machine(f"i-{number}", small, 1.0, zone="z") for number in range(1, 8)]
    for lose in (["i-1", "i-3"], ["i-1", "i-2", "i-3"], ["i-2", "i-4", "i-5"]):
        rehearsal = rehearse(MODEL, fleet, SETTINGS, engine=TERMS, lose=lose)
        sources = {sent.flow.source.instance_id for phase in rehearsal.phases for sent in phase.schedule.timed}
        assert not sources & set(lose)


def test_phases_follow_each_other() -> None:
    small = hardware(int(0.75 * WHOLE_BYTES), devices=1)
    fleet = [Machine(f"i-{number}", small, 1.0, zone="z") for number in range(1, 8)]
    rehearsal = rehearse(MODEL, fleet, SETTINGS, engine=TERMS, lose=["i-1", "i-4"], grace_s=30.0)
    end_s = rehearsal.began_s
    for phase in rehearsal.phases:
        assert phase.start_s == pytest.approx(end_s)
        end_s = phase.start_s + phase.schedule.makespan_s


def test_the_same_rehearsal_twice() -> None:
    first, second = played(4, lose=["i-2"], grace_s=5.0), played(4, lose=["i-2"], grace_s=5.0)
    assert first.activations == second.activations and first.phases == second.phases
