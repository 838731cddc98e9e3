"""Whatever happens to the fleet in whatever order: nothing illegal is commanded, and in the end runs what should."""

from controller_scene import MODEL, World, heartbeat
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from planned_scene import WHOLE_BYTES, PlannedWorld, hardware

from spotserve.core.cluster import InstanceState, ReplicaState
from spotserve.core.messages import SequenceReport
from spotserve.planner.planner import fitting_shape

SHAPES = st.tuples(st.sampled_from([None, 1, 2, 3]), st.integers(1, 3), st.sampled_from([1, 2, 4]))


class AnyOrder(RuleBasedStateMachine):
    """Machines come and go, notices come true or not, slots get ready or fail, users want other shapes, controllers restart.

    What each command must be like is checked where the machines obey it, in `World`.
    """

    @initialize(shape=SHAPES)
    def start(self, shape: tuple[int | None, int, int]) -> None:
        self.world = World(*shape)
        self.count = 0

    def there(self) -> list[str]:
        return [instance_id for instance_id, machine in self.world.machines.items() if not machine.is_gone]

    @precondition(lambda self: len(self.there()) < 6)
    @rule(devices=st.integers(1, 3))
    def join(self, devices: int) -> None:
        self.count += 1
        self.world.join(f"i-{self.count}", devices)

    @rule()
    def launch_only(self) -> None:
        self.count += 1
        self.world.launch(f"i-{self.count}")
        self.world.lose(f"i-{self.count}") if self.count % 2 else None

    @precondition(lambda self: self.there())
    @rule(pick=st.integers(0, 99), contexts=st.lists(st.integers(1, 500), max_size=9))
    def beat(self, pick: int, contexts: list[int]) -> None:
        instance = self.there()[pick % len(self.there())]
        reports = [SequenceReport(f"{instance}-{index}", tokens, tokens - 1, 50) for index, tokens in enumerate(contexts)]
        self.world.hear(heartbeat(instance, *reports, kv_tokens_used=sum(contexts)))

    @precondition(lambda self: self.world.coming())
    @rule(pick=st.integers(0, 99), count=st.integers(1, 4))
    def become_ready(self, pick: int, count: int) -> None:
        for _ in range(count):
            if coming := self.world.coming():
                self.world.become_ready(*coming[pick % len(coming)])

    @precondition(lambda self: any(machine.slots for machine in self.world.machines.values() if not machine.is_gone))
    @rule(pick=st.integers(0, 99))
    def break_off(self, pick: int) -> None:
        slots = [
            (machine, slot) for machine in self.world.machines.values() if not machine.is_gone for slot in sorted(machine.slots)
        ]
        self.world.fail(*slots[pick % len(slots)])

    @precondition(lambda self: self.world.draining)
    @rule(pick=st.integers(0, 99))
    def become_empty(self, pick: int) -> None:
        draining = sorted(self.world.draining)
        self.world.become_empty(draining[pick % len(draining)])

    @rule(shape=SHAPES)
    def reshape(self, shape: tuple[int | None, int, int]) -> None:
        self.world.reshape(*shape)

    @precondition(lambda self: self.there())
    @rule(pick=st.integers(0, 99), grace_s=st.floats(0.1, 10))
    def warn(self, pick: int, grace_s: float) -> None:
        self.world.notice(self.there()[pick % len(self.there())], grace_s)

    @precondition(lambda self: self.there())
    @rule(pick=st.integers(0, 99))
    def lose(self, pick: int) -> None:
        self.world.lose(self.there()[pick % len(self.there())])

    @precondition(lambda self: self.there())
    @rule()
    def restart(self) -> None:
        world = self.world
        world.restart()
        for instance in self.there():
            world.launch(instance)
        for instance in self.there():
            world.register(instance)

    @rule(seconds=st.floats(0.1, 4))
    def pass_time(self, seconds: float) -> None:
        self.world.wait(seconds)

    @invariant()
    def the_table_names_only_who_can_serve(self) -> None:
        state = self.world.state
        for route in state.routing_table().replicas:
            replica = state.replicas[route.replica_id]
            states = [state.instances[instance_id].state for instance_id in replica.instance_ids]
            assert InstanceState.GONE not in states
            if route.state is ReplicaState.SERVING:
                assert replica.is_complete and set(states) == {InstanceState.READY}
                assert replica.leader_id == route.instance_id

    @invariant()
    def a_device_has_one_slot_that_serves_and_one_that_comes_up(self) -> None:
        replicas = self.world.state.replicas.values()
        for state in (ReplicaState.SERVING, ReplicaState.LOADING):
            devices = [
                device
                for replica in replicas
                if replica.state is state and replica.complete_by_s is None
                for device in replica.devices.values()
            ]
            assert len(devices) == len(set(devices))

    def teardown(self) -> None:
        """Nothing more happens, everything is answered: what runs is what a plan from nothing would be."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for _ in range(3):
            world.answer_all()
            world.wait(35.0)
        world.answer_all()
        state = world.state
        assert {replica.state for replica in state.replicas.values()} <= {ReplicaState.SERVING}
        num_devices = sum(len(instance.devices) for instance in state.instances.values() if instance.state is InstanceState.READY)
        pipeline, tensor, _ = fitting_shape(state.wanted, num_devices, state.model)
        fitting = num_devices // (pipeline * tensor)
        wanted = fitting if state.wanted.data is None else min(fitting, state.wanted.data)
        assert world.shapes() == [(pipeline, tensor)] * wanted
        assert all(change.finished_s is not None for change in state.changes)
        assert state.model in (MODEL, None)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(max_examples=40, stateful_step_count=30, deadline=None, report_multiple_bugs=False)


class AnyOrderPlanned(AnyOrder):
    """The same where the planner chooses, on machines of which the model takes two."""

    @initialize(shape=SHAPES)
    def start(self, shape: tuple[int | None, int, int]) -> None:
        self.world = PlannedWorld(hardware(int(0.75 * WHOLE_BYTES)))
        self.count = 0

    @rule(shape=st.one_of(st.none(), SHAPES))
    def reshape(self, shape: tuple[int | None, int, int] | None) -> None:
        self.world.reshape(*(shape or (None, None, None)))

    def teardown(self) -> None:
        """Nothing more happens, everything is answered: what can serve does, and no device has two slots."""
        if not hasattr(self, "world"):
            return
        world = self.world
        world.reshape(None, None, None)
        for _ in range(3):
            world.answer_all()
            world.wait(35.0)
        world.answer_all()
        state = world.state
        assert {replica.state for replica in state.replicas.values()} <= {ReplicaState.SERVING}
        devices = [device for replica in state.replicas.values() for device in replica.devices.values()]
        assert len(devices) == len(set(devices))
        ready = sum(len(instance.devices) for instance in state.instances.values() if instance.state is InstanceState.READY)
        if ready >= 2:  # with fewer, what a user has forced on one goes on: there is nothing better
            assert state.replicas and all(replica.plan.parallel.num_slots >= 2 for replica in state.replicas.values())
        assert all(change.finished_s is not None for change in state.changes)


TestAnyOrderPlanned = AnyOrderPlanned.TestCase
TestAnyOrderPlanned.settings = hypothesis_settings(
    max_examples=30, stateful_step_count=25, deadline=None, report_multiple_bugs=False
)
