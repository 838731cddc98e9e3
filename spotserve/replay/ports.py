"""The network of a simulated fleet: who sends to whom, one thing at a time.

Bytes between machines take the sending side of one machine's port and the receiving side of another's; bytes inside a machine take
the same of two devices' links. Every side carries one flow at a time at full speed, as `migration.flows` has it, in the order in
which flows were asked for. Machines are alike. Owner of the ports; knows no weights, no KV.
"""

from collections import defaultdict

from spotserve.core.cluster import DeviceId
from spotserve.core.hardware import InstanceType
from spotserve.migration.flows import Port, ports_between


class Ports:
    """When each side of each port is free."""

    def __init__(self, machine: InstanceType, *, at_once: bool = False) -> None:
        """`at_once`: nothing takes time."""
        self._machine = machine
        self._at_once = at_once
        self._free_s: defaultdict[Port, float] = defaultdict(float)

    def earliest_s(self, source: DeviceId, destination: DeviceId, now_s: float) -> float:
        """When a flow could begin."""
        out, into = ports_between(source, destination)
        return max(now_s, self._free_s[out], self._free_s[into])

    def send(self, source: DeviceId, destination: DeviceId, num_bytes: float, now_s: float) -> float:
        """Takes both sides for one flow, from when both are free; when it ends."""
        if self._at_once:
            return now_s
        out, into = ports_between(source, destination)
        link = self._machine.device_link if source.instance_id == destination.instance_id else self._machine.network
        end_s = max(now_s, self._free_s[out], self._free_s[into]) + link.seconds(num_bytes)
        self._free_s[out] = self._free_s[into] = end_s
        return end_s

    def forget(self, instance_id: str) -> None:
        """A machine is gone."""
        for port in [port for port in self._free_s if port[1] == instance_id]:
            del self._free_s[port]
