"""Kinds of machines follow what their steps and moves take."""

import msgspec
import pytest
from controller_scene import MODEL, heartbeat
from planned_scene import PlannedWorld

from spotserve.core.messages import Calibrated, Heartbeat, SequenceMoved, SequenceReport
from spotserve.planner.cost import replica_cost


def beat(world: PlannedWorld, instance: str, step_s: float) -> Heartbeat:
    told = heartbeat(instance, SequenceReport("a", 100, 100, 50), kv_tokens_used=100)
    return msgspec.structs.replace(told, step_s=step_s)


def expected_s(world: PlannedWorld) -> float:
    cost = replica_cost(MODEL, next(iter(world.state.replicas.values())).plan.parallel, world.state.hardware["small"], 1)
    assert not isinstance(cost, str)
    return cost.token_s(1, 100)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_steps_that_take_longer_or_shorter_are_followed(factor: float) -> None:
    world = PlannedWorld()
    world.serve("i-1")
    promised_s = expected_s(world)
    for _ in range(60):
        world.now_s += 1.0
        world.hear(beat(world, "i-1", factor * promised_s))
    assert expected_s(world) == pytest.approx(factor * promised_s, rel=0.15)


def test_one_odd_step_changes_little_and_idle_machines_nothing() -> None:
    world = PlannedWorld()
    world.serve("i-1")
    promised_s = expected_s(world)
    world.hear(beat(world, "i-1", 0.0))
    world.hear(heartbeat("i-1"))
    assert expected_s(world) == promised_s
    for _ in range(30):
        world.now_s += 1.0
        world.hear(beat(world, "i-1", promised_s))
    world.now_s += 1.0
    world.hear(beat(world, "i-1", 100 * promised_s))
    assert expected_s(world) == pytest.approx(promised_s, rel=0.5)


def test_a_new_measurement_stands_until_steps_say_otherwise() -> None:
    world = PlannedWorld()
    world.serve("i-1")
    assert world.hardware is not None
    faster = msgspec.structs.replace(
        world.hardware, device=msgspec.structs.replace(world.hardware.device, memory_bytes_per_s=9e6, layer_overhead_s=1e-5)
    )
    world.hear(Calibrated(instance_id="i-1", hardware=faster))
    assert world.state.hardware["small"] == faster


def test_moves_teach_the_network() -> None:
    world = PlannedWorld()
    world.serve("i-1", "i-2")
    for number in range(16):
        kv_bytes = 10_000 * (number + 1)
        world.hear(
            SequenceMoved(
                instance_id="i-1",
                request_id=f"{number}",
                destination_replica_id="r-2",
                kv_bytes=kv_bytes,
                seconds=0.01 + kv_bytes / 1e6,
            )
        )
    network = world.state.hardware["small"].network
    assert network.seconds(80_000) == pytest.approx(0.09, rel=0.1)
