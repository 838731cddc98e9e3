"""The controller's mind, event by event: what it commands, in which order, and that hearing twice is harmless."""

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from spotserve.config import ControllerSettings
from spotserve.controller.state import REVERT_AFTER_S, SILENCE_S, ControllerState
from spotserve.core.cluster import InstanceState, Notice, NoticeKind, ReplicaState
from spotserve.core.messages import (
    Activate,
    Address,
    Command,
    Drain,
    Event,
    Heartbeat,
    HeldSlot,
    InstanceLaunched,
    InstanceLost,
    NoticeReceived,
    Publish,
    Registered,
    ReplicaFailed,
    ReplicaReady,
    SequenceAction,
    SequenceReport,
    Terminate,
    Tick,
    Undrain,
)
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel, ReplicaPlan, Slot

MODEL = ModelSpec(
    name="tiny",
    num_layers=2,
    num_kv_heads=2,
    head_size=8,
    vocabulary_size=100,
    context_tokens=512,
    layer_bytes=1000,
    embedding_bytes=400,
    head_bytes=400,
    value_bytes=4,
)


class Mind:
    """A state with a clock, and shorthand for what happens to it."""

    def __init__(self, settings: ControllerSettings | None = None) -> None:
        self.state = ControllerState(settings or ControllerSettings(), max_batch=8)
        self.now_s = 1000.0

    def hear(self, event: Event) -> list[Command]:
        return self.state.handle(event, self.now_s)

    def join(self, instance: str) -> list[Command]:
        self.hear(InstanceLaunched(instance_id=instance, spot=True, zone="z", usd_per_hour=1.0))
        return self.hear(registered(instance))

    def serve(self, instance: str) -> list[Command]:
        """Joins and brings up what it is told to."""
        (activate,) = [command for command in self.join(instance) if isinstance(command, Activate)]
        return self.hear(
            ReplicaReady(instance_id=instance, replica_id=activate.replica.replica_id, plan_epoch=activate.plan_epoch, model=MODEL)
        )

    def serving(self) -> list[str]:
        return [route.instance_id for route in self.state.routing_table().replicas if route.state is ReplicaState.SERVING]


def registered(instance: str, **extra: object) -> Registered:
    address = Address("127.0.0.1", 1000 + int(instance.removeprefix("i-")))
    return Registered(instance_id=instance, address=address, pid=1, num_devices=1, spot=True, zone="z", **extra)  # type: ignore[arg-type]


def heartbeat(instance: str, *sequences: SequenceReport) -> Heartbeat:
    return Heartbeat(
        instance_id=instance,
        running=len(sequences),
        waiting=0,
        kv_tokens_used=0,
        kv_tokens_total=4096,
        step_s=0.01,
        prefill_tokens_per_s=1000.0,
        store_healthy=True,
        sequences=sequences,
    )


def notice(instance: str, deadline_s: float) -> NoticeReceived:
    return NoticeReceived(notice=Notice(instance_id=instance, deadline_s=deadline_s))


def kinds(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def test_an_instance_that_joins_is_told_what_to_load_and_then_published() -> None:
    mind = Mind()
    commands = mind.join("i-1")
    assert kinds(commands) == ["Activate", "Publish"] or kinds(commands) == ["Activate"]
    assert mind.serving() == []
    activate = commands[0]
    assert isinstance(activate, Activate)
    ready = ReplicaReady(instance_id="i-1", replica_id=activate.replica.replica_id, plan_epoch=1, model=MODEL)
    (publish,) = mind.hear(ready)
    assert isinstance(publish, Publish)
    assert mind.serving() == ["i-1"]
    assert mind.hear(ready) == [], "heard twice"


def test_a_notice_takes_the_replica_out_of_the_table_before_anything_else() -> None:
    mind = Mind()
    mind.serve("i-1")
    mind.serve("i-2")
    mind.hear(heartbeat("i-1", SequenceReport("a", 100, 99, 1000), SequenceReport("b", 100, 99, 5)))
    mind.hear(heartbeat("i-2"))
    commands = mind.hear(notice("i-1", mind.now_s + 5.0))
    assert kinds(commands) == ["Publish", "Drain"]
    publish, drain = commands
    assert isinstance(publish, Publish)
    assert isinstance(drain, Drain)
    assert {route.instance_id: route.state for route in publish.table.replicas} == {
        "i-1": ReplicaState.DRAINING,
        "i-2": ReplicaState.SERVING,
    }
    assert {order.request_id: order.action for order in drain.orders} == {"a": SequenceAction.MOVE, "b": SequenceAction.FINISH}
    (move,) = [order for order in drain.orders if order.action is SequenceAction.MOVE]
    assert move.destination == Address("127.0.0.1", 1002)
    assert drain.fallback.action is SequenceAction.RESUME
    assert drain.fallback.destination_replica_id == move.destination_replica_id
    assert mind.hear(notice("i-1", mind.now_s + 5.0)) == [], "the same notice from another source"


def test_a_soft_signal_drains_nothing() -> None:
    mind = Mind()
    mind.serve("i-1")
    soft = Notice(instance_id="i-1", deadline_s=mind.now_s + 60, kind=NoticeKind.SOFT)
    assert mind.hear(NoticeReceived(notice=soft)) == []
    assert mind.serving() == ["i-1"]
    assert "soft" in mind.state.decisions[-1].reason


def test_a_loss_without_notice_is_published_and_heard_once() -> None:
    mind = Mind()
    mind.serve("i-1")
    mind.serve("i-2")
    lost = InstanceLost(instance_id="i-1", reason="preempted")
    assert kinds(mind.hear(lost)) == ["Publish"]
    assert mind.serving() == ["i-2"]
    assert mind.hear(lost) == []


def test_a_notice_that_does_not_come_true_is_taken_back() -> None:
    mind = Mind()
    mind.serve("i-1")
    mind.hear(notice("i-1", mind.now_s + 5.0))
    assert mind.serving() == []
    mind.now_s += 5.0 + REVERT_AFTER_S - 0.01
    mind.hear(heartbeat("i-1"))
    assert mind.hear(Tick()) == []
    mind.now_s += 0.02
    assert mind.state.next_deadline_s is not None
    assert mind.state.next_deadline_s <= mind.now_s
    commands = mind.hear(Tick())
    assert kinds(commands) == ["Undrain", "Publish"]
    assert isinstance(commands[0], Undrain)
    assert mind.serving() == ["i-1"]


def test_silence_ends_an_instance_and_asks_for_another() -> None:
    mind = Mind()
    mind.serve("i-1")
    mind.now_s += SILENCE_S - 0.1
    assert mind.hear(Tick()) == []
    mind.now_s += 0.2
    commands = mind.hear(Tick())
    assert kinds(commands) == ["Terminate", "Launch", "Publish"]
    assert isinstance(commands[0], Terminate)
    assert mind.serving() == []


def test_a_replica_that_fails_is_not_served() -> None:
    mind = Mind()
    (activate, *_) = mind.join("i-1")
    assert isinstance(activate, Activate)
    mind.hear(ReplicaFailed(instance_id="i-1", replica_id=activate.replica.replica_id, plan_epoch=1, reason="no such file"))
    assert mind.serving() == []
    assert "no such file" in mind.state.decisions[-1].reason


def test_a_new_controller_learns_the_fleet_from_what_workers_say() -> None:
    mind = Mind()
    replica = ReplicaPlan(replica_id="r-7", parallel=Parallel(max_batch=8))
    held = HeldSlot(0, Slot("r-7", 0, 0), 1, 1)
    mind.hear(registered("i-3", replicas=(replica,), held=(held,), model=MODEL))
    assert mind.serving() == ["i-3"]
    commands = mind.join("i-4")
    (activate,) = [command for command in commands if isinstance(command, Activate)]
    assert activate.instance_id == "i-4"
    assert int(activate.replica.replica_id.removeprefix("r-")) > 7, "an identity is never used twice"


def test_weights_that_are_there_decide_who_takes_a_slot() -> None:
    mind = Mind(ControllerSettings(data=1))
    mind.serve("i-1")
    mind.hear(InstanceLaunched(instance_id="i-2", spot=True, zone="z", usd_per_hour=1.0))
    mind.hear(registered("i-2"))
    held = HeldSlot(0, Slot("r-0", 0, 0), 1, 1)
    mind.hear(registered("i-3", held=(held,), model=MODEL))
    commands = mind.hear(InstanceLost(instance_id="i-1", reason="preempted"))
    (activate,) = [command for command in commands if isinstance(command, Activate)]
    assert activate.instance_id == "i-3", "i-2 would have to load everything"


def test_every_decision_says_why() -> None:
    mind = Mind()
    mind.serve("i-1")
    mind.hear(notice("i-1", mind.now_s + 3))
    mind.hear(InstanceLost(instance_id="i-1", reason="preempted"))
    assert [decision.number for decision in mind.state.decisions] == list(range(1, len(mind.state.decisions) + 1))
    assert all(decision.reason or decision.commands for decision in mind.state.decisions)
    assert "3.0 s" in mind.state.decisions[-2].reason


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: no illegal transition, and the table names only who can serve."""

    instances = Bundle("instances")

    def __init__(self) -> None:
        super().__init__()
        self.mind = Mind()
        self.count = 0
        self.activated: list[Activate] = []

    def hear(self, event: Event) -> None:
        self.activated += [command for command in self.mind.hear(event) if isinstance(command, Activate)]

    @rule(target=instances)
    def launch(self) -> str:
        self.count += 1
        self.hear(InstanceLaunched(instance_id=f"i-{self.count}", spot=True, zone="z", usd_per_hour=1.0))
        return f"i-{self.count}"

    @rule(instance=instances)
    def register(self, instance: str) -> None:
        self.hear(registered(instance))

    @rule(instance=instances, context=st.integers(1, 500))
    def beat(self, instance: str, context: int) -> None:
        self.hear(heartbeat(instance, SequenceReport("a", context, context - 1, 50)))

    @rule(pick=st.integers(0, 10))
    def become_ready(self, pick: int) -> None:
        if self.activated:
            one = self.activated[pick % len(self.activated)]
            self.hear(
                ReplicaReady(instance_id=one.instance_id, replica_id=one.replica.replica_id, plan_epoch=one.plan_epoch, model=MODEL)
            )

    @rule(instance=instances, grace_s=st.floats(0.1, 10))
    def warn(self, instance: str, grace_s: float) -> None:
        self.hear(notice(instance, self.mind.now_s + grace_s))

    @rule(instance=consumes(instances))
    def lose(self, instance: str) -> None:
        self.hear(InstanceLost(instance_id=instance, reason="preempted"))

    @rule(seconds=st.floats(0.1, 4))
    def pass_time(self, seconds: float) -> None:
        self.mind.now_s += seconds
        self.hear(Tick())

    @invariant()
    def the_table_names_only_living_instances(self) -> None:
        state = self.mind.state
        for route in state.routing_table().replicas:
            instance = state.instances[route.instance_id]
            assert instance.state is not InstanceState.GONE
            if route.state is ReplicaState.SERVING:
                assert instance.state is InstanceState.READY

    @invariant()
    def no_device_has_two_replicas(self) -> None:
        devices = [device for replica in self.mind.state.replicas.values() for device in replica.devices.values()]
        assert len(devices) == len(set(devices))

    @invariant()
    def every_ready_device_is_used(self) -> None:
        state = self.mind.state
        ready = {
            device for instance in state.instances.values() if instance.state is InstanceState.READY for device in instance.devices
        }
        used = {device for replica in state.replicas.values() for device in replica.devices.values()}
        assert ready <= used


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(max_examples=60, stateful_step_count=40, deadline=None)
