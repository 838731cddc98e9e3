"""How fast replicas are in the tests of planning: a roofline of four constants, and machines that have them."""

from dataclasses import dataclass

from spotserve.core.hardware import DeviceType, InstanceType, Link
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel


@dataclass(frozen=True, slots=True)
class RooflineSpeed:
    """Steps read all weights and the KV cache; prompts compute; stages and shards divide both, at a price for each."""

    max_batch: int
    kv_tokens: int
    weights_s: float
    """To read a stage's weights."""
    sequence_s: float
    """Per sequence and step."""
    context_s: float
    """Per token of context and step, over all stages."""
    prompt_token_s: float
    """Per token of a prompt, on one stage."""
    stages: int
    hop_s: float

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """All stages one after the other, each with a P-th of the sequences."""
        return (
            self.stages * (self.weights_s + self.hop_s + sequences / self.stages * self.sequence_s)
            + context_tokens * self.context_s
        )

    def prompt_s(self, tokens: float) -> float:
        """One stage."""
        return self.weights_s + tokens * self.prompt_token_s

    def first_token_s(self, tokens: float) -> float:
        """All stages."""
        return self.stages * (self.prompt_s(tokens) + self.hop_s)


def machine(name: str, *, num_devices: int = 4, speed: float = 1.0, memory_bytes: int = 16_000_000_000) -> InstanceType:
    """A machine of devices `speed` times as fast as the slowest."""
    device = DeviceType(
        name=name.split(".")[0],
        memory_bytes=memory_bytes,
        flops_per_s=25e12 * speed,
        memory_bytes_per_s=240e9 * speed,
        layer_overhead_s=50e-6,
    )
    return InstanceType(
        name=name,
        device=device,
        num_devices=num_devices,
        device_link=Link(2e-5, 5e9),
        network=Link(5e-5, 5e9),
        host_memory_bytes=192 << 30,
        host_link=Link(1e-5, 10e9),
    )


def roofline(model: ModelSpec, parallel: Parallel, kind: InstanceType) -> RooflineSpeed | str:
    """The speed of a replica, or why it does not fit into memory. Shards beyond one machine talk over the network."""
    stages, shards, device = parallel.pipeline, parallel.tensor, kind.device
    weights = model.weight_bytes / (stages * shards)
    room = 0.9 * device.memory_bytes - weights
    if room < 0:
        return f"weights take {weights / 1e9:.1f} GB of each device, it has {device.memory_bytes / 1e9:.1f} GB"
    link = kind.device_link if shards <= kind.num_devices else kind.network
    layers = model.num_layers / stages
    talk_s = 0.0 if shards == 1 else layers * 2 * link.latency_s * shards
    flops = model.layer_flops_per_token * layers / shards
    talked_s = 0.0 if shards == 1 else layers * 4 * model.hidden_size * model.value_bytes / link.bytes_per_s
    return RooflineSpeed(
        max_batch=parallel.max_batch,
        kv_tokens=int(room * stages * shards / model.kv_bytes_per_token),
        weights_s=weights / device.memory_bytes_per_s + talk_s + layers * device.layer_overhead_s,
        sequence_s=flops / device.flops_per_s,
        context_s=model.kv_bytes_per_token / shards / device.memory_bytes_per_s / stages,
        prompt_token_s=flops / device.flops_per_s + talked_s,
        stages=stages,
        hop_s=1e-4,
    )
