"""Policy `spotserve-2024`: the rule that SpotServe published, as its artifact computes it. A baseline, not what this project does.

Miao et al., ASPLOS'24, section 3.2 and algorithm 1; where the paper leaves it open, `scheduler/parallel/solver.py` of the artifact
(github.com/Hsword/SpotServe, branch artifact, 832b29f) decides. Of all shapes whose throughput is enough, the one with the
shortest execution time; if none is, the one with the most throughput. With L layers, P stages, M shards, B sequences and
f = ceil(L / P):

    prompt = init[M][B / M1] * f * (P + M1 - 1) / M1 + hop * (P - 1) / M1       M1, M2: micro-batches of prompts, of tokens
    token  = incr[M][B / M2] * f * (P + M2 - 1)      + hop * (P - 1) / M2
    latency = fix * (prompt + token * output + 2 * embed[B])                    throughput = D * B / latency

This is the formula behind the paper's table 1. `init` is measured for the micro-batch already, so that dividing by M1 once more
looks like a mistake: `divide_prefill=False` divides nothing by M1. The rule knows neither queues nor prices; every replica is
alike, and what D * P * M leaves over is idle.

Pure: same arguments, same choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from spotserve.core.errors import ConfigError
from spotserve.planner.profiles import Profile


@dataclass(frozen=True, slots=True)
class PublishedChoice:
    """A configuration, and what the formula promises of it."""

    data: int
    pipeline: int
    tensor: int
    batch: int
    """B of the formula. What the artifact then runs takes batches of up to `max_batch` all the same."""
    latency_s: float
    """Of a batch that waits for nothing."""
    throughput_rps: float


def choose(
    profile: Profile,
    *,
    num_instances: int,
    devices_per_instance: int,
    required_rps: float,
    min_devices: int,
    max_tensor: int | None = None,
    max_batch: int = 4,
    output_tokens: int = 128,
    divide_prefill: bool = True,
) -> PublishedChoice | None:
    """What the artifact would run on so many instances; None: nothing fits.

    Args:
        profile: of the model on these machines.
        num_instances: how many there are.
        devices_per_instance: devices of each.
        required_rps: throughput that is enough, requests per second.
        min_devices: P * M of the smallest replica that has the memory (the artifact's `min_world_size`).
        max_tensor: the largest M; None: as the profile says.
        max_batch: the largest B; a power of two.
        output_tokens: of every request.
        divide_prefill: whether prompts are divided by M1, as published.

    Raises:
        ConfigError: the profile has no times of such an M or B.
    """
    largest = profile.max_tensor if max_tensor is None else max_tensor
    _check(profile, largest, max_batch)
    num_devices = num_instances * devices_per_instance
    enough: PublishedChoice | None = None
    most: PublishedChoice | None = None
    if num_devices < min_devices:
        return None
    for shape in _shapes(profile, num_devices=num_devices, min_devices=min_devices, max_tensor=largest, max_batch=max_batch):
        choice = _evaluate(profile, *shape, num_devices=num_devices, output_tokens=output_tokens, divide_prefill=divide_prefill)
        if choice.throughput_rps >= required_rps and (enough is None or choice.latency_s < enough.latency_s):
            enough = choice
        if most is None or choice.throughput_rps > most.throughput_rps:
            most = choice
    return enough or most


def latency_ms(
    profile: Profile,
    *,
    pipeline: int,
    tensor: int,
    batch: int = 1,
    prompt_parts: int = 1,
    token_parts: int = 1,
    output_tokens: int = 128,
    divide_prefill: bool = True,
) -> float:
    """The published execution time of a batch, in milliseconds; every number of parts divides `batch`."""
    layers = -(-profile.num_layers // pipeline)
    init = profile.layer_ms[tensor, batch // prompt_parts].init
    incr = profile.layer_ms[tensor, batch // token_parts].incr
    divisor = prompt_parts if divide_prefill else 1
    prompt = init * layers * (pipeline + prompt_parts - 1) / divisor + profile.init_hop_ms / divisor * (pipeline - 1)
    token = incr * layers * (pipeline + token_parts - 1) + profile.incr_hop_ms / token_parts * (pipeline - 1)
    embedding = profile.embed_ms[batch.bit_length() - 1]
    return (prompt + token * output_tokens + 2 * embedding) * profile.fix_factor


def _check(profile: Profile, max_tensor: int, max_batch: int) -> None:
    if max_tensor < 1 or 2 ** (max_tensor.bit_length() - 1) not in profile.tensors:
        raise ConfigError(f"max_tensor {max_tensor}: profile {profile.name} has tensor degrees {_list(profile.tensors)}")
    if max_batch not in profile.batches:
        raise ConfigError(f"max_batch {max_batch}: profile {profile.name} has batches {_list(profile.batches)}")


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def _shapes(
    profile: Profile, *, num_devices: int, min_devices: int, max_tensor: int, max_batch: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """Every (P, M, B, M1, M2), in the order of the artifact: of two equally good ones the first is taken."""
    batches = [batch for batch in profile.batches if batch <= max_batch]
    for tensor in (2**power for power in range(min(max_tensor, num_devices).bit_length())):
        stages = range(-(-min_devices // tensor), num_devices // tensor + 1)
        for batch in batches:
            parts = [each for each in batches if each <= batch]
            for prompt_parts in parts:
                for token_parts in parts:
                    for pipeline in stages:
                        if profile.padded_layers % pipeline == 0:
                            yield pipeline, tensor, batch, prompt_parts, token_parts


def _evaluate(
    profile: Profile,
    pipeline: int,
    tensor: int,
    batch: int,
    prompt_parts: int,
    token_parts: int,
    *,
    num_devices: int,
    output_tokens: int,
    divide_prefill: bool,
) -> PublishedChoice:
    data = num_devices // (pipeline * tensor)
    milliseconds = latency_ms(
        profile,
        pipeline=pipeline,
        tensor=tensor,
        batch=batch,
        prompt_parts=prompt_parts,
        token_parts=token_parts,
        output_tokens=output_tokens,
        divide_prefill=divide_prefill,
    )
    return PublishedChoice(data, pipeline, tensor, batch, milliseconds / 1000, data * batch / milliseconds * 1000)
