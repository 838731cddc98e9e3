"""How long shards and stages take to tell each other things: alpha-beta models over the links of a machine type.

Invariant: slots are packed. The shards of a stage fill machines one after the other, and stages that fit a machine together are
on one; `migration` places them like this where it can. Does not know layers or models: only bytes.
"""

from math import ceil, inf, log2

from spotserve.core.hardware import InstanceType, Link
from spotserve.core.plan import Parallel


def all_reduce_s(num_bytes: float, tensor: int, hardware: InstanceType) -> float:
    """Sum of `num_bytes` over `tensor` shards, that all get.

    Bytes as in one ring over all shards: 2 (M - 1) / M of the message through every port, at the pace of the slowest. Latency
    within a machine: two messages whatever M, since it is that of launching (Vidur's A100 profile, 2, 4 and 8 shards: mean error
    11 %; with 2 log2(M) messages 16 %, with a ring's 2 (M - 1) 19 %). Between machines: 2 log2 of their number, as in NCCL's
    trees (Sanders et al., 2009); SpotServe's T4 profiles have about 0.4 ms for two machines and 0.7 ms for four.
    """
    if tensor == 1:
        return 0.0
    latency_s, slowest = 0.0, inf
    if hardware.num_devices > 1:
        latency_s += 2 * hardware.device_link.latency_s
        slowest = hardware.device_link.bytes_per_s
    if tensor > hardware.num_devices:
        latency_s += 2 * ceil(log2(ceil(tensor / hardware.num_devices))) * hardware.network.latency_s
        slowest = min(slowest, hardware.network.bytes_per_s)
    return latency_s + 2 * (tensor - 1) / tensor * num_bytes / slowest


def gather_s(num_bytes: float, tensor: int, hardware: InstanceType) -> float:
    """All parts of a message of `num_bytes` that is spread over `tensor` shards get to all: half of an `all_reduce_s`."""
    return all_reduce_s(num_bytes, tensor, hardware) / 2


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
