"""What kind of machine an instance of the local cloud is: a share of this one.

Speeds are starting values, seen on two cores of a server processor; a worker that is planned with measures its own.
"""

import os

from spotserve.config import LocalCloudSettings
from spotserve.core.hardware import DeviceType, InstanceType, Link

LOOPBACK = Link(latency_s=40e-6, bytes_per_s=1e9)
"""Between ranks: a sum of 16 KiB over two shards takes 42 us, and long messages about a second per gigabyte
(`benchmarks/rank_links.py`)."""

HAND_OVER = Link(latency_s=5e-3, bytes_per_s=200e6)
"""Between workers: half of what one loopback stream of small frames gives."""


def local_instance_type(settings: LocalCloudSettings) -> InstanceType:
    """An instance of the local cloud, before anything has been measured."""
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory_bytes = settings.device_memory_bytes or total_bytes // (settings.instances * settings.devices)
    return InstanceType(
        name="local",
        device=DeviceType(
            name="cpu", memory_bytes=memory_bytes, flops_per_s=80e9, memory_bytes_per_s=10e9, layer_overhead_s=300e-6
        ),
        num_devices=settings.devices,
        device_link=LOOPBACK,
        network=HAND_OVER,
        host_memory_bytes=total_bytes,
        host_link=Link(latency_s=0.0, bytes_per_s=5e9),
    )
