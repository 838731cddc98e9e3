"""A controller that leaves shapes to the planner, among scripted machines of a small and slow kind."""

from controller_scene import MODEL, World

from spotserve.config import ControllerSettings
from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.plan import Parallel
from spotserve.planner.memory import USABLE_SHARE, activation_bytes

KV_TOKENS = 64
WHOLE_BYTES = MODEL.weight_bytes + KV_TOKENS * MODEL.kv_bytes_per_token + activation_bytes(MODEL, Parallel(max_batch=8), 1)
"""What a device needs that holds the whole model."""


def hardware(memory_bytes: int = 4 * WHOLE_BYTES, *, devices: int = 1, name: str = "small", speed: float = 1.0) -> InstanceType:
    """A machine on which a layer of the scene's model takes about a millisecond."""
    return InstanceType(
        name=name,
        device=DeviceType(
            name=f"{name}-device",
            memory_bytes=int(memory_bytes / USABLE_SHARE),
            flops_per_s=1e9 * speed,
            memory_bytes_per_s=2e6 * speed,
            layer_overhead_s=1e-4,
        ),
        num_devices=devices,
        device_link=Link(1e-6, 1e9),
        network=Link(1e-5, 1e8),
        host_memory_bytes=10**9,
        host_link=Link(0.0, 1e9),
    )


class PlannedWorld(World):
    """Machines say what they are; what should run on them is the planner's."""

    def __init__(self, default: InstanceType | None = None, **settings: object) -> None:
        super().__init__()
        self.settings = ControllerSettings.model_validate({"planning": "auto", **settings})
        self.kv_tokens = KV_TOKENS
        self.hardware = default or hardware()
        self.begin()
