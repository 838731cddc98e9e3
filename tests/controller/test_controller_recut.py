"""Re-cuts: the old replicas serve until the new ones do, then everything moves in one turn; and how one goes wrong."""

import pytest
from controller_scene import World, heartbeat, kinds

from spotserve.core.cluster import DeviceId
from spotserve.core.messages import Activate, Deactivate, Drain, InstanceLaunched, Publish, SequenceAction, SequenceReport


def reports(instance: str, *contexts: int) -> tuple[SequenceReport, ...]:
    return tuple(SequenceReport(f"{instance}-{index}", tokens, tokens - 1, 50) for index, tokens in enumerate(contexts))


def test_old_replicas_serve_until_all_new_ones_are_ready_and_then_all_switch_in_one_turn() -> None:
    world = World()
    world.serve("i-1", "i-2", "i-3", "i-4")
    old = world.serving()
    world.hear(heartbeat("i-1", *reports("i-1", 300, 20)))
    world.hear(heartbeat("i-2", *reports("i-2", 250, 70)))
    commands = world.reshape(None, 2, 1)
    assert kinds(commands) == ["Activate"] * 4
    coming = world.coming()
    for machine, slot in coming[:-1]:
        assert world.become_ready(machine, slot) == []
    assert world.serving() == old
    commands = world.become_ready(*coming[-1])
    assert kinds(commands) == ["Publish"] + ["Drain"] * 4
    assert len(world.serving()) == 2 and not set(world.serving()) & set(old)
    drains = {command.replica_id: command for command in commands if isinstance(command, Drain)}
    assert set(drains) == set(old)
    orders = [order for drain in drains.values() for order in drain.orders]
    assert {order.action for order in orders} == {SequenceAction.MOVE}
    tokens = dict.fromkeys(world.serving(), 0)
    for order in orders:
        assert order.destination_replica_id is not None
        tokens[order.destination_replica_id] += {"i-1-0": 300, "i-1-1": 20, "i-2-0": 250, "i-2-1": 70}[order.request_id]
    assert set(tokens.values()) == {320}
    assert all(drain.fallback.action is SequenceAction.MOVE for drain in drains.values())


def test_what_drained_is_left_and_the_change_is_on_record() -> None:
    world = World(1, 1, 1)
    world.serve("i-1", "i-2")
    world.reshape(1, 1, 2)
    planned = sum(transfer.num_bytes for machine, slot in world.coming() for transfer in machine.slots[slot].transfers)
    while coming := world.coming():
        world.become_ready(*coming[0])
    (old,) = world.draining
    commands = world.become_empty(old)
    assert kinds(commands) == ["Publish", "Deactivate"]
    assert world.state.replicas.keys() == set(world.serving())
    change = world.state.changes[-1]
    assert (change.planned_bytes, change.moved_bytes) == (planned, planned)
    assert planned > 0 and change.switched_s is not None and change.finished_s is not None


def test_a_drain_that_is_never_answered_ends_all_the_same() -> None:
    world = World(1, 1, 1)
    world.serve("i-1", "i-2")
    world.reshape(1, 2, 1)
    while coming := world.coming():
        world.become_ready(*coming[0])
    assert [type(command) for command in world.wait(40.0) if not isinstance(command, Publish)] == [Deactivate]
    assert world.shapes() == [(2, 1)]


def test_devices_of_one_machine_serve_together() -> None:
    world = World(None, 2, 2)
    world.serve("i-1", "i-2", devices=2)
    assert world.shapes() == [(2, 2)]
    (replica,) = world.state.replicas.values()
    assert sorted(replica.devices.values()) == [DeviceId(f"i-{number}", index) for number in (1, 2) for index in (0, 1)]


def test_replicas_that_keep_their_devices_are_left_alone() -> None:
    world = World(None, 2, 1)
    world.serve("i-1", "i-2", "i-3", "i-4")
    first, second = world.serving()
    commands = world.lose("i-4")
    (lost,) = {first, second} - set(world.serving())
    assert {command.slot.replica_id for command in commands if isinstance(command, Deactivate)} == {lost}
    assert not any(isinstance(command, Activate) for command in commands), "one device is left over: idle"
    commands = world.serve("i-5")
    assert world.shapes() == [(2, 1), (2, 1)]


def test_too_few_devices_make_do_with_fewer_stages() -> None:
    world = World(None, 2, 1)
    world.serve("i-1", "i-2")
    world.lose("i-2")
    assert "a replica takes 2 devices, there is 1" in world.state.decisions[-1].reason
    world.answer_all()
    assert world.shapes() == [(1, 1)]
    world.serve("i-3")
    assert world.shapes() == [(2, 1)], "the wanted shape is back"


def test_machines_that_are_coming_are_waited_for_a_while_at_the_start() -> None:
    world = World(1, 2, 1)
    world.launch("i-1")
    world.launch("i-2")
    assert world.register("i-1") == []
    assert kinds(world.register("i-2")) == ["Activate", "Activate"]
    world.answer_all()
    assert world.shapes() == [(2, 1)]
    lonely = World(1, 2, 1)
    lonely.launch("i-1")
    lonely.launch("i-2")
    lonely.register("i-1")
    assert "Activate" in kinds(lonely.wait(11.0))


def test_machines_that_are_launched_one_after_another_are_taken_together() -> None:
    world = World(1, 2, 1)
    world.hear(InstanceLaunched(instance_id="i-1", spot=True, zone="z", usd_per_hour=1.0))
    assert world.register("i-1") == []
    assert world.state.next_deadline_s is not None and world.state.next_deadline_s <= world.now_s + 0.5
    world.hear(InstanceLaunched(instance_id="i-2", spot=True, zone="z", usd_per_hour=1.0))
    assert kinds(world.register("i-2")) == ["Activate", "Activate"]
    world.answer_all()
    assert world.shapes() == [(2, 1)]


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1, 5, 1), "4 layers"),
        ((1, 1, 3), "4 units"),
        ((2, 2, 1), "2,2,1 takes 4 devices, there are 2"),
        ((None, 2, 2), "auto,2,2 takes 4 devices at least"),
    ],
)
def test_an_impossible_shape_is_refused(shape: tuple[int | None, int, int], says: str) -> None:
    world = World(1, 1, 1)
    world.serve("i-1", "i-2")
    assert world.reshape(*shape) == []
    assert says in world.state.decisions[-1].reason
    assert (world.state.wanted.data, world.state.wanted.pipeline, world.state.wanted.tensor) == (1, 1, 1)


def test_a_shape_that_cannot_be_brought_up_is_given_up_for_the_one_that_serves() -> None:
    world = World(1, 1, 1)
    world.serve("i-1", "i-2")
    old = world.serving()
    world.reshape(1, 2, 1)
    world.fail(*world.coming()[0], is_permanent=True)
    world.answer_all()
    assert world.serving() == old and world.shapes() == [(1, 1)]
    assert world.state.wanted.pipeline == 1
    assert any("no such file; back to the shape that serves" in decision.reason for decision in world.state.decisions)


def test_a_machine_with_notice_is_replaced_on_the_others_before_it_goes() -> None:
    world = World(1, 2, 1)
    world.serve("i-1", "i-2", "i-3")
    (replica,) = world.state.replicas.values()
    dying = replica.devices[replica.plan.slots[1]].instance_id
    leader = replica.leader_id
    assert leader is not None
    world.hear(heartbeat(leader, *reports(leader, 100)))
    commands = world.notice(dying, 30.0)
    assert kinds(commands) == ["Publish", "Activate", "Activate"], "what runs goes on"
    coming = world.coming()
    world.become_ready(*coming[0])
    publish, drain = world.become_ready(*coming[1])
    assert isinstance(publish, Publish) and isinstance(drain, Drain)
    assert drain.instance_id == leader and drain.replica_id == replica.replica_id
    assert [order.action for order in drain.orders] == [SequenceAction.FINISH]
    assert kinds(world.become_empty(replica.replica_id)) == ["Publish", "Deactivate", "Deactivate"]


def test_no_device_gets_a_third_slot_while_one_drains() -> None:
    world = World(1, 1, 1)
    world.serve("i-1", "i-2")
    world.reshape(1, 2, 1)
    while coming := world.coming():
        world.become_ready(*coming[0])
    assert world.reshape(1, 1, 2) == []
    assert "waiting for the devices of replicas that drain" in world.state.decisions[-1].reason
    (old,) = world.draining
    assert kinds(world.become_empty(old)) == ["Publish", "Deactivate", "Activate", "Activate"]


def test_what_one_turn_begins_and_gives_up_again_is_never_begun() -> None:
    world = World(1, 1, 2)
    world.serve("i-1", "i-2")
    for instance in ("i-1", "i-2"):
        world.notice(instance, 5.0)
    commands = world.wait(8.0)  # both notices turn out to be false in the same turn
    assert "Activate" not in kinds(commands)
    assert world.coming() == []
    assert world.shapes() == [(1, 2)]
