"""The controller's mind, event by event: what it commands, in which order, and that hearing twice is harmless."""

from controller_scene import World, heartbeat, kinds

from spotserve.controller.notices import REVERT_AFTER_S
from spotserve.controller.state import SILENCE_S
from spotserve.core.cluster import NoticeKind, ReplicaState
from spotserve.core.messages import (
    Activate,
    Address,
    Command,
    Drain,
    HeldSlot,
    InstanceLost,
    Launch,
    Publish,
    Registered,
    SequenceAction,
    SequenceReport,
    SlotReady,
    Terminate,
    Tick,
    Undrain,
)
from spotserve.core.plan import Parallel, Slot


def only(commands: list[Command], kind: type) -> Command:
    (found,) = [command for command in commands if isinstance(command, kind)]
    return found


def serving_instances(world: World) -> list[str]:
    return [route.instance_id for route in world.state.routing_table().replicas if route.state is ReplicaState.SERVING]


def test_an_instance_that_joins_is_told_what_to_load_and_then_published() -> None:
    world = World()
    activate = only(world.join("i-1"), Activate)
    assert isinstance(activate, Activate)
    assert world.serving() == []
    assert kinds(world.answer_all()) == ["Publish"]
    assert serving_instances(world) == ["i-1"]
    ready = SlotReady(
        instance_id="i-1",
        device_index=0,
        slot=activate.slot,
        plan_epoch=1,
        model=world.state.model,  # type: ignore[arg-type]
        pulled_bytes=0,
        invariant="batch",
    )
    assert world.hear(ready) == [], "heard twice"


def test_a_notice_takes_the_replica_out_of_the_table_before_anything_else() -> None:
    world = World()
    world.serve("i-1", "i-2")
    world.hear(heartbeat("i-1", SequenceReport("a", 100, 99, 1000), SequenceReport("b", 100, 99, 5)))
    world.hear(heartbeat("i-2"))
    publish, drain = world.notice("i-1", 5.0)
    assert isinstance(publish, Publish) and isinstance(drain, Drain)
    assert {route.instance_id: route.state for route in publish.table.replicas} == {
        "i-1": ReplicaState.DRAINING,
        "i-2": ReplicaState.SERVING,
    }
    assert {order.request_id: order.action for order in drain.orders} == {"a": SequenceAction.MOVE, "b": SequenceAction.FINISH}
    (move,) = [order for order in drain.orders if order.action is SequenceAction.MOVE]
    assert move.destination == Address("127.0.0.1", 1002)
    assert drain.fallback.action is SequenceAction.RESUME
    assert drain.fallback.destination_replica_id == move.destination_replica_id
    assert world.notice("i-1", 5.0) == [], "the same notice from another source"


def test_a_soft_signal_drains_nothing() -> None:
    world = World()
    world.serve("i-1")
    assert world.notice("i-1", 60.0, NoticeKind.SOFT) == []
    assert serving_instances(world) == ["i-1"]
    assert "soft" in world.state.decisions[-1].reason


def test_a_loss_without_notice_is_published_and_heard_once() -> None:
    world = World()
    world.serve("i-1", "i-2")
    assert kinds(world.lose("i-1")) == ["Publish"]
    assert serving_instances(world) == ["i-2"]
    assert world.lose("i-1") == []


def test_the_only_replica_goes_on_with_what_it_has_until_others_serve() -> None:
    world = World()
    world.serve("i-1")
    world.hear(heartbeat("i-1", SequenceReport("a", 100, 99, 10_000)))
    assert kinds(world.notice("i-1", 20.0)) == ["Publish"], "nobody has room: nothing is told to leave"
    assert world.serving() == []
    world.join("i-2")
    publish, drain = world.become_ready(*world.coming()[0])
    assert isinstance(publish, Publish) and isinstance(drain, Drain)
    assert [order.action for order in drain.orders] == [SequenceAction.MOVE]


def test_the_only_replica_lets_go_just_before_its_deadline() -> None:
    world = World()
    world.serve("i-1")
    world.hear(heartbeat("i-1", SequenceReport("a", 100, 99, 10_000)))
    world.notice("i-1", 20.0)
    assert world.wait(17.0) == []
    drain = only(world.wait(1.0), Drain)
    assert isinstance(drain, Drain)
    assert [order.action for order in drain.orders] == [SequenceAction.RESUME]


def test_a_notice_that_does_not_come_true_is_taken_back() -> None:
    world = World()
    world.serve("i-1", "i-2")
    world.notice("i-1", 5.0)
    assert serving_instances(world) == ["i-2"]
    world.now_s += 5.0 + REVERT_AFTER_S - 0.01
    world.hear(heartbeat("i-1"))
    world.hear(heartbeat("i-2"))
    assert world.hear(Tick()) == []
    world.now_s += 0.02
    assert world.state.next_deadline_s is not None
    assert world.state.next_deadline_s <= world.now_s
    undrain, publish = world.hear(Tick())
    assert isinstance(undrain, Undrain) and isinstance(publish, Publish)
    assert serving_instances(world) == ["i-1", "i-2"]


def test_silence_ends_an_instance_and_asks_for_another() -> None:
    world = World()
    world.serve("i-1")
    world.now_s += SILENCE_S - 0.1
    assert world.hear(Tick()) == []
    world.now_s += 0.2
    publish, terminate, launch = world.hear(Tick())
    assert isinstance(publish, Publish) and isinstance(terminate, Terminate) and isinstance(launch, Launch)
    assert world.serving() == []


def test_a_replica_that_cannot_be_served_is_not_tried_again() -> None:
    world = World()
    world.join("i-1")
    assert world.fail(*world.coming()[0], is_permanent=True) == []
    assert world.serving() == []
    assert "no such file" in world.state.decisions[-1].reason
    assert [event.detail["reason"] for event in world.state.events if event.kind == "failed"] == ["no such file"]
    assert world.wait(60.0) == []


def test_a_replica_that_breaks_is_tried_again_at_once_and_then_ever_more_slowly() -> None:
    world = World(pipeline=2)
    world.serve("i-1", "i-2")
    machine = world.machines["i-1"]
    commands = world.fail(machine, next(iter(machine.up)))
    assert sorted(kinds(commands)) == ["Activate", "Activate", "Deactivate", "Publish"]
    tries = []
    for _ in range(6):
        world.fail(*world.coming()[0])
        started_s = world.now_s
        while not world.coming():
            assert world.state.next_deadline_s is not None
            world.now_s = max(world.now_s, min(world.state.next_deadline_s, world.now_s + 1.0))
            for instance in ("i-1", "i-2"):
                world.hear(heartbeat(instance))
            world.hear(Tick())
        tries.append(world.now_s - started_s)
    assert tries == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    world.answer_all()
    assert world.shapes() == [(2, 1)]


def test_weights_that_are_there_decide_who_takes_a_slot() -> None:
    world = World(data=1)
    world.serve("i-1", "i-2")
    address = Address("127.0.0.1", 1003)
    held = HeldSlot(0, Slot("r-0", 0, 0), Parallel())
    third = Registered(
        instance_id="i-3",
        address=address,
        pid=1,
        ranks=(address,),
        spot=True,
        zone="z",
        held=(held,),
        model=world.state.model,
    )
    world.state.handle(third, world.now_s)
    commands = world.state.handle(InstanceLost(instance_id="i-1", reason="preempted"), world.now_s)
    activate = only(commands, Activate)
    assert isinstance(activate, Activate)
    assert activate.instance_id == "i-3", "i-2 would have to load everything"
    assert activate.transfers == ()


def test_every_decision_says_why() -> None:
    world = World()
    world.serve("i-1")
    world.notice("i-1", 3.0)
    world.lose("i-1")
    decisions = world.state.decisions
    assert [decision.number for decision in decisions] == list(range(1, len(decisions) + 1))
    assert all(decision.reason or decision.commands for decision in decisions)
    assert "3.0 s" in decisions[-2].reason
    assert decisions[-2].cause == "NoticeReceived i-1"
