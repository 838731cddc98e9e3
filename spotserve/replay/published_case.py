"""What the policies of the SpotServe paper have to know of a model and its machines, where nobody has measured it for them.

The artifact plans with times of one layer by tensor degree and batch. Here they are those of the cost model, for the model and
machines of a scenario; what is enough to serve is the mean load and a margin.
"""

from math import ceil

from spotserve.core.cut import misfit
from spotserve.core.plan import Parallel
from spotserve.migration.spotserve_2024 import PublishedShape
from spotserve.planner.cost import ReplicaCost, replica_cost
from spotserve.planner.profiles import PROMPT_TOKENS, LayerTime, Profile
from spotserve.replay.scenario import PublishedCase, Scenario

MARGIN = 1.15
"""By which the throughput that is enough exceeds the mean load: 0.4 for 0.35 requests per second in the paper."""

MAX_BATCH = 4
MAX_DEVICES = 64


def published_case(scenario: Scenario) -> PublishedCase:
    """The scenario's own, or one from the cost model."""
    return scenario.published or _reckoned(scenario)


def _reckoned(scenario: Scenario) -> PublishedCase:
    model, machine = scenario.model, scenario.machine
    arrivals = scenario.timeline.arrivals
    rate_rps = len(arrivals) / max(1.0, scenario.timeline.duration_s)
    tensors = [2**power for power in range(4) if 2**power <= machine.num_devices and misfit(model, 1, 2**power) is None]
    times: dict[tuple[int, int], LayerTime] = {}
    batches = (1, 2, 4)
    smallest = None
    for tensor in tensors:
        stages = next((each for each in range(1, model.num_layers + 1) if _cost(scenario, each, tensor) is not None), None)
        if stages is None:
            continue
        cost = _cost(scenario, stages, tensor)
        assert cost is not None
        smallest = min(stages * tensor, smallest or stages * tensor)
        for batch in batches:
            prompt_s = cost.prompt_s(PROMPT_TOKENS) / max(cost.stage_layers) * batch
            token_s = cost.layer.seconds(batch, batch * PROMPT_TOKENS, batch * PROMPT_TOKENS)
            times[tensor, batch] = LayerTime(1000 * prompt_s, 1000 * token_s)
    assert smallest is not None, "a scenario's model fits its machines somehow"
    hop_ms = 1000 * machine.network.latency_s
    profile = Profile(
        name=f"{model.name} on {machine.name}",
        num_layers=model.num_layers,
        padded_layers=_divisible(model.num_layers),
        hidden_size=model.hidden_size,
        max_tensor=max(tensor for tensor, _ in times),
        fix_factor=1.0,
        init_hop_ms=hop_ms,
        incr_hop_ms=hop_ms,
        embed_ms=(0.0,) * len(batches),
        layer_ms=times,
    )
    longest = max((each.prompt_tokens + each.output_tokens for each in arrivals), default=PROMPT_TOKENS)
    shape = PublishedShape(profile.num_layers, profile.padded_layers, model.hidden_size, model.vocabulary_size, positions=longest)
    return PublishedCase(
        profile=profile,
        shape=shape,
        required_rps=MARGIN * rate_rps,
        min_devices=smallest,
        max_batch=MAX_BATCH,
        divide_prefill=False,
    )


def _cost(scenario: Scenario, pipeline: int, tensor: int) -> ReplicaCost | None:
    """None: it does not fit, or is too large."""
    if pipeline * tensor > MAX_DEVICES:
        return None
    parallel = Parallel(pipeline=pipeline, tensor=tensor, max_batch=MAX_BATCH)
    cost = replica_cost(scenario.model, parallel, scenario.machine)
    return None if isinstance(cost, str) else cost


def _divisible(layers: int) -> int:
    """Layers with empty ones, so that many numbers of stages divide them: a multiple of 12, as the artifact's are."""
    return 12 * ceil(layers / 12)
