"""Flows against sets of single units, and whole random migrations against the bound of their busiest port."""

from random import Random
from statistics import mean

from hypothesis import given, settings
from hypothesis import strategies as st
from migration_scene import MODEL, fitting_shapes, has, size_of
from model_specs import small_spec

from spotserve.core.cluster import DeviceId
from spotserve.core.cut import stage_cuts, units_held
from spotserve.core.hardware import Link
from spotserve.core.messages import HeldSlot
from spotserve.core.plan import Parallel, ReplicaPlan, Slot
from spotserve.migration.flows import Flow, InstanceLinks, Placed, kv_flows, weight_flows
from spotserve.migration.matching import place
from spotserve.migration.schedule import schedule
from spotserve.migration.scores import Contents, scores_of
from spotserve.migration.sources import choose_sources

shapes = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4]))


def kv_units(pipeline: int, tensor: int, slot: Slot) -> set[tuple[int, int]]:
    return {
        (layer, head)
        for layer in stage_cuts(MODEL, pipeline)[slot.stage]
        for head in units_held(MODEL.num_kv_heads, tensor, slot.shard)
    }


@settings(max_examples=60)
@given(shapes, shapes, st.data(), st.sets(st.sampled_from(["i-0", "i-1", "i-2"])))
def test_kv_that_is_not_there_comes_once_from_who_has_it(old, new, data, dying) -> None:
    there = [DeviceId(f"i-{index % 3}", index // 3) for index in range(24)]
    replicas = [ReplicaPlan(replica_id=name, parallel=Parallel(pipeline=p, tensor=m)) for name, (p, m) in (("o", old), ("n", new))]
    before, after = (Placed(each, dict(zip(each.slots, data.draw(st.permutations(there)), strict=False))) for each in replicas)
    made = kv_flows(MODEL, [("a", 7), ("b", 30), ("empty", 0)], before, after, dying=dying)
    per_unit = 2 * MODEL.head_size * MODEL.value_bytes
    for slot in replicas[1].slots:
        device = after.devices[slot]
        missing = kv_units(*new, slot)
        here = [each for each, where in before.devices.items() if where == device]
        missing -= set().union(*(kv_units(*old, each) for each in here))
        for request_id, tokens in (("a", 7), ("b", 30)):
            mine = [each for each in made if each.request_id == request_id and each.what.endswith(f" n/{slot.stage}/{slot.shard}")]
            assert sum(each.num_bytes for each in mine) == len(missing) * per_unit * tokens
            for each in mine:
                (giver,) = (its for its, where in before.devices.items() if where == each.source)
                assert each.destination == device and each.source != device
                assert each.num_bytes <= len(missing & kv_units(*old, giver)) * per_unit * tokens
                assert each.rank == (0, -tokens) and each.is_last_copy == (each.source.instance_id in dying)
    assert not any(each.request_id == "empty" for each in made)


@settings(max_examples=40)
@given(st.dictionaries(st.integers(0, 5), fitting_shapes, min_size=1, max_size=3), st.lists(fitting_shapes, max_size=4))
def test_weights_come_after_kv_and_front_stages_first(wanted, fleet) -> None:
    held = {
        DeviceId("i", index): [HeldSlot(index, Slot("o", *shape[2:]), Parallel(pipeline=shape[0], tensor=shape[1]))]
        for index, shape in enumerate(fleet)
    }
    slots = {
        DeviceId("n", index): (Slot(f"r-{index}", *shape[2:]), Parallel(pipeline=shape[0], tensor=shape[1]))
        for index, shape in wanted.items()
    }
    made = weight_flows(MODEL, choose_sources(MODEL, slots, held, held))
    there = set().union(*(has(*shape) for shape in fleet))
    assert sum(each.num_bytes for each in made) == sum(size_of(has(*shape) & there) for shape in wanted.values())
    for each in made:
        slot, _ = slots[each.destination]
        assert each.rank == (1, slot.stage) and each.rank > (0, 0) and not each.request_id
        assert each.what.endswith(f" of {slot.replica_id}/{slot.stage}/{slot.shard}")


# --------------------------------------------------------------------------- whole migrations

WHOLE = small_spec(num_layers=12, num_kv_heads=8, num_heads=8)


def random_migration(random: Random) -> tuple[list[Flow], list[str]]:
    """A replica shape to another one, some instances lost and some new: placed, sourced, and with the KV of sequences."""
    count, each = random.randint(2, 8), random.choice([1, 2, 4])
    before = [f"i-{index}" for index in range(count)]
    after = [*before[random.randint(0, 1) :], *(["j-0"] if random.random() < 0.5 else [])]
    placed = []
    contents: dict[DeviceId, Contents] = {}
    for name, there in (("o", before), ("n", after)):
        devices = [DeviceId(instance, index) for instance in there for index in range(each)]
        pipeline, tensor = random.choice([(p, m) for p in range(1, 7) for m in (1, 2, 4, 8) if p * m <= len(devices)])
        parallel = Parallel(pipeline=pipeline, tensor=tensor)
        plans = [ReplicaPlan(replica_id=f"{name}{d}", parallel=parallel) for d in range(len(devices) // (pipeline * tensor))]
        where = place(scores_of(WHOLE, plans, devices, contents)).devices
        contents = {device: Contents((HeldSlot(device.index, slot, parallel),)) for slot, device in where.items()}
        placed.append([Placed(plan, {slot: where[slot] for slot in plan.slots}) for plan in plans])
    olds, news = placed
    held = {device: [HeldSlot(device.index, slot, old.plan.parallel)] for old in olds for slot, device in old.devices.items()}
    wanted = {device: (slot, new.plan.parallel) for new in news for slot, device in new.devices.items()}
    dying = set(before) - set(after)
    flows = weight_flows(WHOLE, choose_sources(WHOLE, wanted, held, held, dying=dying))
    for index, old in enumerate(olds):
        sequences = [(f"{index}-{number}", random.randint(1, 300)) for number in range(random.randint(0, 4))]
        flows += kv_flows(WHOLE, sequences, old, news[index % len(news)], dying=dying)
    return flows, sorted({*before, *after})


def test_random_migrations_end_within_five_percent_of_the_bound_on_average() -> None:
    """A thousand larger ones: benchmarks/migration_schedule.py."""
    random, over = Random(7), []
    for _ in range(50):
        flows, instances = random_migration(random)
        links = {each: InstanceLinks(Link(1e-6, 1e6), Link(1e-7, 1e7)) for each in instances}
        made = schedule(flows, links=links, now_s=0.0)
        assert len(made.timed) == len(flows)
        if flows:
            over.append(made.makespan_s / made.lower_bound_s - 1)
    assert len(over) > 40 and min(over) >= -1e-9 and mean(over) <= 0.05
