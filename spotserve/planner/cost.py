"""The time and memory of one replica on hardware that is known by a few constants: the model that the planner searches with.

A stage is its layers, the last one also the head; each is a smoothed roofline of the work of one shard (`shards`, `roofline`) plus
what shards tell each other (`collectives`). Stages together follow `pipeline`; what fits follows `memory`. Within the 6 to 8 % by
which three constants describe a GPU, see `benchmarks/cost_model.py`.

Invariant: more of anything in a step never takes less time. Does not know requests, queues, prices or what runs now.
"""

from dataclasses import dataclass
from functools import lru_cache

from spotserve.core.cut import layers_of, misfit
from spotserve.core.hardware import InstanceType, Link
from spotserve.core.model import ModelSpec
from spotserve.core.plan import Parallel
from spotserve.planner.chunks import num_pairs
from spotserve.planner.collectives import hops
from spotserve.planner.memory import STEP_TOKENS, kv_tokens, stage_weight_bytes
from spotserve.planner.pipeline import cycle_s, through_s
from spotserve.planner.prefill import num_slices
from spotserve.planner.roofline import StepCost
from spotserve.planner.shards import head_cost, layer_cost


@dataclass(frozen=True, slots=True)
class ReplicaCost:
    """One replica; a `speed.ReplicaSpeed`. Made by `replica_cost`."""

    max_batch: int
    """Sequences that it runs at once: as planned, and no more than the KV cache has tokens."""
    kv_tokens: int
    """Tokens that its KV cache holds, as many as its fullest device."""
    weight_bytes: int
    """Weights on the device that has most of them."""
    stage_layers: tuple[int, ...]
    layer: StepCost
    head: StepCost
    hops: tuple[Link, ...]
    """From each stage to the next, and from the last to the first; none with one stage."""
    state_bytes: int
    """Of one token, from stage to stage."""

    def stage_s(self, stage: int, *, tokens: float, pairs: float, kv_tokens: float, outputs: float = 0.0) -> float:
        """Step time of one stage.

        Args:
            stage: which one.
            tokens: new ones, of all sequences.
            pairs: of a new token and one that it attends to, itself included.
            kv_tokens: older tokens whose KV is read.
            outputs: tokens whose logits are wanted; the last stage computes them.
        """
        seconds = self.stage_layers[stage] * self.layer.seconds(tokens, pairs, kv_tokens)
        if outputs > 0 and stage == len(self.stage_layers) - 1:
            seconds += self.head.seconds(outputs)
        return seconds

    def token_s(self, sequences: float, context_tokens: float) -> float:
        """See `ReplicaSpeed.token_s`: sequences go round in as many groups as there are stages, as the scheduler sends them."""
        sequences = max(1.0, sequences)
        groups = min(float(len(self.stage_layers)), sequences)
        tokens, context = sequences / groups, context_tokens / groups
        stations_s = self._stations_s(tokens, context + tokens, context)
        stations_s[-1] += self.head.seconds(tokens)
        if self.hops:
            stations_s.append(self.hops[-1].latency_s)  # tokens are few bytes on their way back
        return cycle_s(stations_s, groups)

    def prompt_s(self, tokens: float) -> float:
        """See `ReplicaSpeed.prompt_s`: all slices of the prompt, on the stage that they keep longest."""
        slices, stations_s, last_s = self._slices(tokens)
        stations_s[-1] += last_s / slices
        return slices * max(stations_s)

    def first_token_s(self, tokens: float) -> float:
        """See `ReplicaSpeed.first_token_s`: slices of the prompt follow each other through the stages."""
        slices, stations_s, last_s = self._slices(tokens)
        back_s = self.hops[-1].latency_s if self.hops else 0.0
        return through_s(stations_s, slices) + last_s + back_s

    def _slices(self, tokens: float) -> tuple[int, list[float], float]:
        """A prompt: how many slices it is cut into, the time of one at every station, and of the head at the end.

        Slices take equal time each; the older tokens whose KV they read count at their mean.
        """
        tokens = max(1.0, tokens)
        slices = num_slices(self.layer, tokens, len(self.stage_layers))
        older = tokens * (slices - 1) / slices / 2
        stations_s = self._stations_s(tokens / slices, num_pairs(tokens, 0) / slices, older)
        return slices, stations_s, self.head.seconds(1.0)

    def _stations_s(self, tokens: float, pairs: float, kv_tokens: float) -> list[float]:
        """A step at every stage, and at every link from one to the next, without the head."""
        layer_s = self.layer.seconds(tokens, pairs, kv_tokens)
        stations_s = [self.stage_layers[0] * layer_s]
        for link, layers in zip(self.hops[:-1], self.stage_layers[1:], strict=True):
            stations_s += [link.seconds(tokens * self.state_bytes), layers * layer_s]
        return stations_s


@lru_cache(maxsize=65_536)
def replica_cost(model: ModelSpec, parallel: Parallel, hardware: InstanceType, step_tokens: int = STEP_TOKENS) -> ReplicaCost | str:
    """The cost of a replica of shape `parallel` on machines of one type; or why there can be none.

    Stages are cut as `parallel` says, or else as `core.cut` divides them. `step_tokens` is the largest step, whose activations
    must fit.
    """
    problem = misfit(model, parallel.pipeline, parallel.tensor)
    if problem is not None:
        return problem
    room = kv_tokens(model, parallel, hardware.device, step_tokens)
    if isinstance(room, str):
        return room
    return ReplicaCost(
        max_batch=min(parallel.max_batch, room),
        kv_tokens=room,
        weight_bytes=max(stage_weight_bytes(model, parallel, stage) for stage in range(parallel.pipeline)),
        stage_layers=tuple(len(layers) for layers in layers_of(model, parallel)),
        layer=layer_cost(model, parallel.tensor, hardware),
        head=head_cost(model, parallel.tensor, hardware),
        hops=hops(parallel, hardware),
        state_bytes=model.hidden_size * model.value_bytes,
    )
