"""The simulated network: one flow at a time on each side of each port."""

from collections import defaultdict
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.cluster import DeviceId
from spotserve.migration.flows import Port, ports_between
from spotserve.planner.devices import instance_type
from spotserve.replay.ports import Ports

MACHINE = instance_type("g5.12xlarge")
DEVICES = [DeviceId(instance, index) for instance in ("a", "b", "c") for index in range(2)]
SENDS = st.lists(st.tuples(st.permutations(DEVICES), st.integers(0, 10**9), st.floats(0, 3)), max_size=30)


@given(SENDS)
def test_no_side_carries_two_flows_at_once_and_each_takes_its_time(sends: list[tuple[list[DeviceId], int, float]]) -> None:
    ports, now_s = Ports(MACHINE), 0.0
    carried: dict[Port, list[tuple[float, float]]] = defaultdict(list)
    for (source, destination, *_), num_bytes, later_s in sends:
        now_s += later_s
        start_s = ports.earliest_s(source, destination, now_s)
        end_s = ports.send(source, destination, num_bytes, now_s)
        link = MACHINE.device_link if source.instance_id == destination.instance_id else MACHINE.network
        assert start_s >= now_s and abs(end_s - start_s - link.seconds(num_bytes)) < 1e-9 * max(1.0, end_s)
        for port in ports_between(source, destination):
            carried[port].append((start_s, end_s))
    for flows in carried.values():
        assert all(before[1] <= after[0] for before, after in pairwise(flows))


def test_inside_a_machine_devices_have_links_and_outside_machines_share_theirs() -> None:
    ports = Ports(MACHINE)
    a0, a1, b0, c0 = DEVICES[0], DEVICES[1], DEVICES[2], DEVICES[4]
    busy_s = ports.send(a0, b0, 10**9, 0.0)
    assert ports.earliest_s(a1, c0, 0.0) == busy_s, "the network of a machine is one"
    assert ports.earliest_s(c0, a1, 0.0) == 0.0, "each side for itself"
    assert ports.earliest_s(a0, a1, 0.0) == 0.0


def test_what_was_on_its_way_to_a_lost_machine_holds_nobody_up() -> None:
    ports = Ports(MACHINE)
    a0, b0 = DEVICES[0], DEVICES[2]
    busy_s = ports.send(a0, b0, 10**9, 0.0)
    ports.forget("b")
    assert ports.earliest_s(DEVICES[4], b0, 0.0) == 0.0
    assert ports.earliest_s(a0, b0, 0.0) == busy_s


def test_where_moving_takes_no_time_nothing_waits() -> None:
    ports = Ports(MACHINE, at_once=True)
    assert ports.send(DEVICES[0], DEVICES[2], 10**12, 5.0) == 5.0 == ports.earliest_s(DEVICES[0], DEVICES[2], 5.0)
