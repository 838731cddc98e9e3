"""What deciding needs to know of machines: how fast their devices compute, what they hold, and how fast bytes get about.

Rates are those that are *reached*, not those of a data sheet: what calibration measures, or a data sheet's times an efficiency.
"""

import msgspec


class Link(msgspec.Struct, frozen=True, array_like=True):
    """A way for bytes: a message of n bytes takes `latency_s + n / bytes_per_s` (the alpha-beta model)."""

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        assert self.latency_s >= 0 and self.bytes_per_s > 0

    def seconds(self, num_bytes: float) -> float:
        """Time of one message."""
        return self.latency_s + num_bytes / self.bytes_per_s


class DeviceType(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of accelerator, or the share of a processor that one rank has."""

    name: str
    """`T4`, `A100-80GB`, `cpu`."""
    memory_bytes: int
    """All of it; how much of it weights and KV may take is the planner's rule."""
    flops_per_s: float
    """Operations that matrix products reach."""
    memory_bytes_per_s: float
    """Bytes that streaming weights and KV reaches."""
    layer_overhead_s: float
    """What a decoder layer takes in every step, however little it computes."""

    def __post_init__(self) -> None:
        assert min(self.memory_bytes, self.flops_per_s, self.memory_bytes_per_s) > 0 and self.layer_overhead_s >= 0


class InstanceType(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of machine. Machines of one type are alike."""

    name: str
    """`g4dn.12xlarge`, `local`."""
    device: DeviceType
    num_devices: int
    device_link: Link
    """Between two devices of one machine; bytes per second of each direction."""
    network: Link
    """Between two machines; bytes per second of each direction."""
    host_memory_bytes: int
    """Memory of the machine itself; weights that are offloaded wait there."""
    host_link: Link
    """From the machine's memory to one device."""

    def __post_init__(self) -> None:
        assert self.num_devices >= 1 and self.host_memory_bytes >= 0
