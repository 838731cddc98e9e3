"""Arranging new replicas: nobody waits for what comes too late, and devices take layers in the order in which they are sent."""

from itertools import groupby

from controller_scene import MODEL, World
from planned_scene import hardware

from spotserve.controller.bringup import Arrangement, arrange
from spotserve.core.cluster import DeviceId, Notice
from spotserve.core.plan import Parallel, ReplicaPlan

PLANNED = ReplicaPlan(replica_id="r-9", parallel=Parallel(pipeline=2, tensor=1, max_batch=8), instance_type="small")
NEW = [DeviceId("i-3", 0), DeviceId("i-4", 0)]


def arranged(grace_s: float | None = None) -> tuple[World, Arrangement]:
    """Two machines that serve, both to be taken if there is a notice, and two that have nothing."""
    world = World(1, 2, 1)
    world.hardware = hardware()
    world.serve("i-1", "i-2", "i-3", "i-4")
    fleet = world.state._fleet
    assert {device for replica in fleet.replicas.values() for device in replica.devices.values()}.isdisjoint(NEW)
    if grace_s is not None:
        for instance_id in ("i-1", "i-2"):
            fleet.instances[instance_id].notice = Notice(instance_id=instance_id, deadline_s=world.now_s + grace_s)
    return world, arrange(fleet, [PLANNED], NEW, now_s=world.now_s)


def test_all_that_others_have_is_taken_from_them_in_the_order_of_the_schedule() -> None:
    _, arrangement = arranged()
    assert set(arrangement.placement.devices.values()) == set(NEW)
    assert arrangement.num_bytes == MODEL.weight_bytes
    starts = {}
    for each in arrangement.schedule.timed:
        layer = each.flow.destination, each.flow.what.partition(" of ")[0]
        starts[layer] = min(each.start_s, starts.get(layer, each.start_s))
    for device, transfers in arrangement.transfers.items():
        layers = [layer for layer, _ in groupby(transfer.layer for transfer in transfers)]
        assert len(layers) == len(set(layers)), "a layer's parts stay together"
        named = {-1: "embedding", MODEL.num_layers: "head"}
        times = [starts[device, named.get(layer, f"layer {layer}")] for layer in layers]
        assert times == sorted(times)


def test_what_would_come_after_the_deadline_is_left_to_files() -> None:
    _, arrangement = arranged(grace_s=1e-5)
    assert arrangement.schedule.timed == () and arrangement.schedule.late
    assert arrangement.num_bytes == 0 and not any(arrangement.transfers.values())


def test_some_of_it_comes_in_time() -> None:
    _, whole = arranged()
    grace_s = whole.schedule.makespan_s / 2
    world, arrangement = arranged(grace_s)
    assert 0 < arrangement.num_bytes < MODEL.weight_bytes
    assert arrangement.num_bytes + sum(flow.num_bytes for flow in arrangement.schedule.late) == MODEL.weight_bytes
    assert all(each.end_s <= world.now_s + grace_s + 1e-9 for each in arrangement.schedule.timed)


def test_arranging_changes_nothing() -> None:
    world, first = arranged()
    fleet = world.state._fleet
    names = set(fleet.replicas)
    again = arrange(fleet, [PLANNED], NEW, now_s=world.now_s)
    assert again.transfers == first.transfers and again.schedule == first.schedule
    assert set(fleet.replicas) == names
