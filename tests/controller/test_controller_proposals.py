"""Proposals for scripted fleets: names are kept, no device is promised twice, idle devices and refused shapes."""

from collections import Counter

import pytest
from planned_scene import KV_TOKENS, WHOLE_BYTES, PlannedWorld, hardware

from spotserve.controller.offer import offer_of
from spotserve.controller.proposals import EngineTerms, Proposal, Proposer, Terms
from spotserve.core.plan import Parallel
from spotserve.planner.workload import Lengths, Objective, Workload

HALF = hardware(int(0.75 * WHOLE_BYTES))
"""Too small for the model: a replica takes two of them."""
ENGINE = EngineTerms(8, kv_tokens=KV_TOKENS, step_tokens=1)
LITTLE = Workload(rate_rps=0.001, prompt=Lengths.fixed(8), output=Lengths.fixed(8))


def terms(objective: Objective | None = None, *, use_idle: bool = True) -> Terms:
    return Terms(LITTLE, objective or Objective(), ENGINE, use_idle=use_idle)


def fleet_of(count: int) -> PlannedWorld:
    world = PlannedWorld(HALF)
    world.serve(*(f"i-{number}" for number in range(1, count + 1)))
    return world


def proposals(world: PlannedWorld, its: Terms, proposer: Proposer | None = None, *, grow: bool = False) -> list[Proposal]:
    """What could run on the whole fleet, or beside what runs."""
    fleet = world.state._fleet
    proposer = proposer or Proposer(fleet)
    kept = proposer.keepable(list(fleet.replicas.values()), its)
    running = [replica for replica, _ in kept]
    offer = offer_of(fleet, running if grow else ())
    fixed = [choice for _, choice in kept] if grow else []
    return proposer.propose(offer.free, running, its, fixed=fixed, most=4, next_replica_number=50)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_no_device_is_promised_twice(count: int) -> None:
    world = fleet_of(count)
    found = proposals(world, terms())
    assert found
    for each in found:
        assert sum(replica.parallel.num_slots for replica in each.replicas) <= count
        used = Counter(instance_id for footprint in each.footprints for instance_id in footprint.instance_ids)
        assert all(times == 1 for times in used.values()), "machines have one device here"
        assert len(each.footprints) == len(each.replicas)
        sizes = [len(footprint.instance_ids) for footprint in each.footprints]
        assert sizes == [replica.parallel.num_slots for replica in each.replicas]
        assert len({replica.replica_id for replica in each.replicas}) == len(each.replicas)


def test_the_like_of_what_runs_keeps_its_name_and_machines() -> None:
    world = fleet_of(5)
    running = {replica_id: replica.instance_ids for replica_id, replica in world.state.replicas.items()}
    for each in (*proposals(world, terms()), *proposals(world, terms(), grow=True)):
        for replica, footprint in zip(each.replicas, each.footprints, strict=True):
            if replica.replica_id in running:
                assert footprint.instance_ids == running[replica.replica_id]
            else:
                assert int(replica.replica_id.removeprefix("r-")) >= 50
    (grown, *_) = proposals(world, terms(), grow=True)
    assert running.keys() <= {replica.replica_id for replica in grown.replicas}


def test_idle_devices_get_something_to_do_where_that_is_wanted() -> None:
    world = fleet_of(6)
    limits = Objective(e2e_s=1000.0)
    everything, least = proposals(world, terms(limits))[0], proposals(world, terms(limits, use_idle=False))[0]
    assert sum(each.parallel.num_slots for each in everything.replicas) == 6
    assert sum(each.parallel.num_slots for each in least.replicas) == 2
    assert least.usd_per_hour == pytest.approx(2.0) and everything.usd_per_hour == pytest.approx(6.0)


def test_a_refused_shape_is_not_proposed_and_its_reason_is_told() -> None:
    world = fleet_of(2)
    proposer = Proposer(world.state._fleet)
    shapes = {(each.replicas[0].parallel.pipeline, each.replicas[0].parallel.tensor) for each in proposals(world, terms())}
    while found := proposals(world, terms(), proposer):
        parallel = found[0].replicas[0].parallel
        assert proposer.losers == (), "nothing is told of losers beside a plan"
        proposer.refuse(Parallel(pipeline=parallel.pipeline, tensor=parallel.tensor), "no such layer")
        shapes.discard((parallel.pipeline, parallel.tensor))
    assert not shapes
    assert any("could not be brought up: no such layer" in loser for loser in proposer.losers)


def test_an_offer_counts_what_is_there_to_stay_and_beside_what_is_kept() -> None:
    world = PlannedWorld(HALF)
    world.serve("i-1", "i-2", "i-3", "i-4")
    world.join("i-5", hardware=hardware(int(0.75 * WHOLE_BYTES), devices=2, name="pair"))
    world.answer_all()
    fleet = world.state._fleet
    whole = offer_of(fleet, ())
    assert {pool.instance_type.name: pool.num_devices for pool in whole.all} == {"small": 4, "pair": 2}
    assert whole.free == whole.all and whole.num_devices == 6
    kept = [replica for replica in fleet.replicas.values() if replica.plan.instance_type == "small"]
    rest = offer_of(fleet, kept)
    taken = sum(replica.plan.parallel.num_slots for replica in kept)
    assert rest.all == whole.all
    assert sum(pool.num_devices for pool in rest.free) == 6 - taken
    assert all(pool.num_devices > 0 for pool in rest.free)
    world.notice("i-5", 30.0)
    assert {pool.instance_type.name for pool in offer_of(fleet, ()).all} == {"small"}


def test_machines_of_one_kind_are_offered_at_their_mean_price() -> None:
    world = fleet_of(2)
    first, second = world.state.instances.values()
    first.usd_per_hour, second.usd_per_hour = 1.0, 3.0
    (pool,) = offer_of(world.state._fleet, ()).all
    assert pool.usd_per_hour == 2.0
