"""How long shards and stages take to tell each other things: alpha-beta models over the links of a machine type.

Invariant: slots are packed. The shards of a stage fill machines one after the other, and stages that fit a machine together are
on one; `migration` places them like this where it can. Does not know layers or models: only bytes.
"""

from math import ceil, log2

from spotserve.core.hardware import InstanceType, Link
from spotserve.core.plan import Parallel


def all_reduce_s(num_bytes: float, tensor: int, hardware: InstanceType) -> float:
    """Sum of `num_bytes` over `tensor` shards, that all get: first within machines, then between them.

    Bytes as in a ring, 2 (n - 1) / n of the message through every port. Latency: within a machine two messages whatever n, since
    it is that of launching (Vidur's A100 profile, 2, 4 and 8 shards: mean error 11 %; with 2 log2(n) messages 16 %, with a
    ring's 2 (n - 1) 19 %); between machines 2 log2(n), those of NCCL's trees (Sanders et al., 2009).
    """
    local = min(tensor, hardware.num_devices)
    seconds = 0.0
    if local > 1:
        seconds += 2 * hardware.device_link.latency_s + _ring_bytes(num_bytes, local) / hardware.device_link.bytes_per_s
    if tensor > local:
        machines = ceil(tensor / hardware.num_devices)
        latency_s = 2 * ceil(log2(machines)) * hardware.network.latency_s
        seconds += latency_s + _ring_bytes(num_bytes, machines) / hardware.network.bytes_per_s
    return seconds


def gather_s(num_bytes: float, tensor: int, hardware: InstanceType) -> float:
    """All parts of a message of `num_bytes` that is spread over `tensor` shards get to all: half of an `all_reduce_s`."""
    return all_reduce_s(num_bytes, tensor, hardware) / 2


def _ring_bytes(num_bytes: float, members: int) -> float:
    return 2 * (members - 1) / members * num_bytes


def hops(parallel: Parallel, hardware: InstanceType) -> tuple[Link, ...]:
    """The link from each stage to the next, and from the last one back to the first: P of them, none when P = 1."""
    if parallel.pipeline == 1:
        return ()
    together = max(1, hardware.num_devices // parallel.tensor)
    machines = [stage // together for stage in range(parallel.pipeline)]
    following = [*machines[1:], machines[0]]
    alone = parallel.tensor > hardware.num_devices
    return tuple(
        hardware.network if alone or here != there else hardware.device_link
        for here, there in zip(machines, following, strict=True)
    )
