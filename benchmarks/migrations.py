"""Migrations to measure with: random ones, and ones of given shapes, made of real placements, transfers and flows of KV."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import misfit
from spotserve.core.hardware import Link
from spotserve.core.messages import HeldSlot
from spotserve.core.model import ModelSpec, Portion
from spotserve.core.plan import Parallel, ReplicaPlan
from spotserve.migration.flows import Flow, InstanceLinks, Placed, kv_flows, weight_flows
from spotserve.migration.matching import place
from spotserve.migration.scores import Contents, scores_of
from spotserve.migration.sources import choose_sources

Shape = tuple[int, int, int]
"""D, P, M."""


@dataclass(frozen=True)
class Migration:
    """What runs, what should run, and the flows in between."""

    name: str
    flows: tuple[Flow, ...]
    links: dict[str, InstanceLinks]
    num_devices: int
    old_bytes_kept: int
    """Weights that new slots find where they are placed."""


def decoder(*, layers: int, hidden: int, heads: int, kv_heads: int, vocabulary: int, value_bytes: int = 2) -> ModelSpec:
    """A plain decoder: attention of four square matrices (two of them narrower with fewer KV heads), and 8 h^2 of MLP."""
    attention = 2 * hidden * hidden * value_bytes
    keys_and_values = 2 * hidden * (hidden // heads) * kv_heads * value_bytes
    mlp = 8 * hidden * hidden * value_bytes
    return ModelSpec(
        name=f"{layers}x{hidden}",
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=hidden // heads,
        vocabulary_size=vocabulary,
        context_tokens=4096,
        layer=(
            Portion(heads, attention),
            Portion(kv_heads, keys_and_values),
            Portion(4 * hidden, mlp),
            Portion(1, 4 * hidden * value_bytes),
        ),
        embedding=(Portion(1, vocabulary * hidden * value_bytes),),
        head=(Portion(1, 2 * hidden * value_bytes), Portion(vocabulary, vocabulary * hidden * value_bytes)),
        value_bytes=value_bytes,
        layer_flops_per_token=24 * hidden * hidden,
        head_flops_per_token=2 * hidden * vocabulary,
    )


def migration(
    name: str,
    model: ModelSpec,
    old: Shape,
    new: Shape,
    *,
    before: Sequence[str],
    after: Sequence[str],
    devices: int,
    links: InstanceLinks,
    contexts: Sequence[Sequence[int]] = (),
    nearly: float | None = None,
) -> Migration:
    """From `old` on the instances `before` to `new` on the instances `after`; what is only in `before` is dying.

    `contexts`: tokens of the sequences of each old replica; they go on in the new replicas, dealt out in turn.
    """
    there = [DeviceId(each, index) for each in before for index in range(devices)]
    free = [DeviceId(each, index) for each in after for index in range(devices)]
    olds, news = _replicas("o", old), _replicas("r", new)
    placed = place(scores_of(model, olds, there, {})).devices
    parallel = Parallel(pipeline=old[1], tensor=old[2])
    held = {device: (HeldSlot(device.index, slot, parallel),) for slot, device in placed.items()}
    heirs = {index: news[index % len(news)] for index in range(len(olds))}
    kv = {
        device: ((held[device][0], sum(contexts[int(slot.replica_id[1:])]) // len(news)),) if contexts else ()
        for slot, device in placed.items()
    }
    contents = {device: Contents(slots, kv[device]) for device, slots in held.items()}
    scores = scores_of(model, news, free, contents)
    chosen = place(scores).devices if nearly is None else place(scores, nearly=nearly).devices
    wanted = {device: (slot, Parallel(pipeline=new[1], tensor=new[2])) for slot, device in chosen.items()}
    dying = set(before) - set(after)
    flows = weight_flows(model, choose_sources(model, wanted, held, held, dying=dying))
    for index, tokens in enumerate(contexts):
        source = Placed(olds[index], {slot: placed[slot] for slot in olds[index].slots})
        heir = Placed(heirs[index], {slot: chosen[slot] for slot in heirs[index].slots})
        named = [(f"{index}-{number}", each) for number, each in enumerate(tokens)]
        flows += kv_flows(model, named, source, heir, dying=dying)
    row = {slot: place for place, slot in enumerate(scores.slots)}
    column = {device: place for place, device in enumerate(scores.devices)}
    kept = sum(int(scores.found_bytes[scores.kinds[row[slot]], column[device]]) for slot, device in chosen.items())
    return Migration(name, tuple(flows), dict.fromkeys(sorted({*before, *after}), links), len(free), kept)


def random_migration(random: Random, *, nearly: float | None = None) -> Migration:
    """A random model cut anew over 2 to 16 instances, of which some are lost and some are new; `nearly` as that of `place`."""
    heads = random.choice([8, 16, 32])
    model = decoder(
        layers=random.randint(8, 48),
        hidden=heads * random.choice([64, 128]),
        heads=heads,
        kv_heads=random.choice([heads, max(4, heads // 4)]),
        vocabulary=32_000,
    )
    devices = random.choice([1, 2, 4, 4, 8])
    count = random.randint(2, 16)
    lost, joined = random.randint(0, min(2, count - 1)), random.randint(0, 2)
    before = [f"i-{index:02}" for index in range(count)]
    after = [*before[lost:], *(f"j-{index:02}" for index in range(joined))]
    old, new = (_random_shape(random, model, len(there) * devices) for there in (before, after))
    links = InstanceLinks(Link(1e-4, random.choice([1.25e9, 5e9, 6.25e9])), Link(1e-5, 2e10))
    contexts = [[random.randint(64, 4096) for _ in range(random.randint(0, 8))] for _ in range(old[0])]
    return migration(
        f"{model.name} {old} -> {new}",
        model,
        old,
        new,
        before=before,
        after=after,
        devices=devices,
        links=links,
        contexts=contexts,
        nearly=nearly,
    )


def _random_shape(random: Random, model: ModelSpec, num_devices: int) -> Shape:
    fitting = [
        (pipeline, tensor)
        for pipeline in range(1, 9)
        for tensor in (1, 2, 4, 8)
        if pipeline * tensor <= num_devices and misfit(model, pipeline, tensor) is None
    ]
    pipeline, tensor = random.choice(fitting)
    return random.randint(max(1, num_devices // (pipeline * tensor) - 1), num_devices // (pipeline * tensor)), pipeline, tensor


def _replicas(prefix: str, shape: Shape) -> list[ReplicaPlan]:
    parallel = Parallel(pipeline=shape[1], tensor=shape[2])
    return [ReplicaPlan(replica_id=f"{prefix}{index}", parallel=parallel) for index in range(shape[0])]
