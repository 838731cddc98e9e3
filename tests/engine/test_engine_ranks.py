"""Groups of ranks over real links: what they add up, what they do when one of them is lost, and who is let in."""

import threading
import time

import pytest
import torch
from rank_scene import PATIENCE_S, SECRET, joined, places, seats, together

from spotserve.core.errors import PeerLost, WireError
from spotserve.engine.attention import KvCache
from spotserve.engine.ranks.group import CHUNK_BYTES, Group, GroupPlan, LinkedShards, Place, tree_sum
from spotserve.engine.ranks.leader import LinkedRanks
from spotserve.engine.ranks.memory import HeldKv, RankMemory
from spotserve.engine.ranks.messages import DropKv, JoinPeer, Leave
from spotserve.engine.ranks.pulse import watch
from spotserve.engine.ranks.server import MAX_EARLY_LINKS, RankServer
from spotserve.link import dial


@pytest.mark.parametrize("tensor", [2, 3, 4])
def test_shards_add_up_in_the_order_of_the_tree_to_the_same_bits(tensor: int) -> None:
    parts = [torch.randn(8, 33, generator=torch.Generator().manual_seed(shard)) for shard in range(tensor)]
    with seats(tensor) as made, joined(made, 1, tensor) as groups:
        shards = [LinkedShards(group) for group in groups]
        sums = together([lambda shard=shard, part=part: shard.sum(part) for shard, part in zip(shards, parts, strict=True)])
        gathered = together([lambda shard=shard, part=part: shard.gather(part) for shard, part in zip(shards, parts, strict=True)])
    expected = tree_sum(parts)
    assert all(torch.equal(total, expected) for total in sums)
    assert all(torch.equal(whole, torch.cat(parts, dim=-1)) for whole in gathered)


def test_a_tree_sum_can_be_begun_by_neighbours() -> None:
    parts = [torch.randn(100, generator=torch.Generator().manual_seed(shard)) for shard in range(8)]
    begun = [parts[index] + parts[index + 1] for index in range(0, 8, 2)]
    assert torch.equal(tree_sum(parts), tree_sum(begun))
    assert torch.equal(tree_sum(parts), tree_sum([tree_sum(parts[:4]), tree_sum(parts[4:])]))


def test_partial_sums_larger_than_every_buffer_pass() -> None:
    part = torch.ones(16 * CHUNK_BYTES // 4)
    with seats(2) as made, joined(made, 1, 2) as groups:
        sums = together([lambda group=group: LinkedShards(group).sum(part) for group in groups])
    assert all(torch.equal(total, 2 * part) for total in sums)


def test_when_one_rank_is_lost_all_who_wait_wake() -> None:
    with seats(4) as made, joined(made, 2, 2) as groups:
        waiting = [lambda group=group: LinkedShards(group).sum(torch.ones(4)) for group in groups[:1]]
        waiting.append(lambda: groups[2].order_link.receive())

        def lose() -> None:
            time.sleep(0.05)
            groups[1].break_off("its process was killed")

        def expect_loss(work) -> None:
            with pytest.raises(PeerLost):
                work()

        together([lose, lambda: expect_loss(waiting[0])])
        assert groups[0].broken
        together([lambda: expect_loss(waiting[1])])  # the leader broke its links when it noticed


def test_a_rank_that_hangs_is_given_up_by_its_silence() -> None:
    with seats(2) as made, joined(made, 2, 1) as groups:
        watch(groups[0], silence_s=0.3)  # the other one gives no sign of life
        with pytest.raises(PeerLost):
            groups[0].orders[1, 0].receive()
        assert "no sign of life" in str(groups[0].broken)


def test_ranks_that_give_signs_of_life_are_not_given_up() -> None:
    with seats(2) as made, joined(made, 2, 1) as groups:
        for group in groups:
            watch(group, silence_s=0.5)
        time.sleep(1.2)
        assert [group.broken for group in groups] == [None, None]


def test_a_group_that_stays_incomplete_is_given_up_at_its_deadline() -> None:
    with seats(2) as made:
        addresses = {(0, 0): made[0].server.address, (1, 0): made[1].server.address}
        group = Group(GroupPlan("r-1@1", pipeline=2, tensor=1, place=(1, 0), leads=False, addresses=addresses))
        made[1].server.expect(group)
        with pytest.raises(PeerLost, match="did not join in time"):
            group.join(secret=SECRET, deadline_s=time.monotonic() + 0.2)


def test_a_faster_member_finds_its_way_to_a_group_that_is_not_known_yet() -> None:
    with seats(2) as made:
        link = dial(made[1].server.address, secret=SECRET, inbound=None, timeout_s=PATIENCE_S)
        link.send(JoinPeer("r-1@1", 0, 0))
        time.sleep(0.1)
        addresses = {(0, 0): made[0].server.address, (1, 0): made[1].server.address}
        group = Group(GroupPlan("r-1@1", pipeline=2, tensor=1, place=(1, 0), leads=True, addresses=addresses))
        made[1].server.expect(group)
        assert (0, 0) in group.peers
        group.break_off("the test is over")
        link.close()


def test_nobody_joins_without_the_secret() -> None:
    with seats(1) as made, pytest.raises((WireError, PeerLost)):
        dial(made[0].server.address, secret="a guess", inbound=None, timeout_s=PATIENCE_S)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_nobody_has_joined_before_all_are_ready(late: int) -> None:
    """A rank that still loads is linked already, by its device's server: it must neither be counted on nor be given up for
    dead, however long the silence."""
    silence_s = 0.2
    ready = threading.Event()
    joined_early: list[Place] = []
    with seats(3) as made:
        addresses = {place: seat.server.address for place, seat in zip(places(3, 1), made, strict=True)}
        groups = [
            Group(GroupPlan("r-1@1", pipeline=3, tensor=1, place=place, leads=place == (0, 0), addresses=addresses))
            for place in places(3, 1)
        ]
        for group, seat in zip(groups, made, strict=True):
            seat.server.expect(group)

        def come(index: int) -> None:
            if index == late:
                time.sleep(5 * silence_s)
                ready.set()
            groups[index].join(secret=SECRET, deadline_s=time.monotonic() + PATIENCE_S)
            if not ready.is_set():
                joined_early.append(places(3, 1)[index])
            watch(groups[index], silence_s=silence_s)

        together([lambda index=index: come(index) for index in range(3)])
        time.sleep(3 * silence_s)
        assert joined_early == []
        assert [group.broken for group in groups] == [None, None, None]
        for group in groups:
            group.break_off("the test is over")


def test_a_leader_without_a_slot_joins_all_and_is_joined() -> None:
    with seats(2) as made:
        addresses = {place: seat.server.address for place, seat in zip(places(2, 1), made, strict=True)}
        members = [Group(GroupPlan("r-1@1", 2, 1, place, leads=False, addresses=addresses)) for place in places(2, 1)]
        leader = Group(GroupPlan("r-1@1", 2, 1, None, leads=True, addresses=addresses))
        for group, seat in zip(members, made, strict=True):
            seat.server.expect(group)
        deadline_s = time.monotonic() + PATIENCE_S
        together([lambda group=group: group.join(secret=SECRET, deadline_s=deadline_s) for group in (*members, leader)])
        ranks = LinkedRanks(None, leader)
        assert ranks.num_stages == 2
        ranks.drop_kv("s")
        ranks.close()
        for group in members:
            assert group.order_link is not None
            assert group.order_link.receive()[0] == DropKv("s")
            assert group.order_link.receive()[0] == Leave()
            with pytest.raises(PeerLost):
                group.order_link.receive()
            group.break_off("the replica has ended")


def test_a_replica_ends_also_when_its_ranks_are_gone_already() -> None:
    with seats(2) as made, joined(made, 2, 1) as groups:
        groups[1].break_off("its process was killed")
        ranks = LinkedRanks(None, groups[0])
        for _ in range(3):
            ranks.close()
        assert groups[0].broken


def test_links_of_groups_that_never_come_are_few_and_the_oldest_go_first() -> None:
    with seats(1) as made:
        server = made[0].server
        links = []
        for number in range(MAX_EARLY_LINKS + 3):
            link = dial(server.address, secret=SECRET, inbound=None, timeout_s=PATIENCE_S)
            link.send(JoinPeer(f"r-{number // 2}@1", 0, number % 2))
            links.append(link)
            await_early(server, min(number + 1, MAX_EARLY_LINKS))
        for link in links[:2]:
            with pytest.raises(PeerLost):
                link.read(1)
        links[-1].set_timeout(0.05)
        with pytest.raises(PeerLost, match="timed out"):
            links[-1].read(1)
        server.close()
        with pytest.raises(PeerLost):
            links[-2].read(1)
        for link in links:
            link.close()


def await_early(server: RankServer, at_least: int) -> None:
    """Until so many links wait, or one fewer: groups go as a whole."""
    deadline_s = time.monotonic() + PATIENCE_S
    while sum(map(len, server._early.values())) < at_least - 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert sum(map(len, server._early.values())) <= MAX_EARLY_LINKS


def test_a_server_that_is_closed_lets_nobody_in() -> None:
    with seats(1) as made:
        made[0].server.close()
        with pytest.raises(PeerLost, match="cannot reach"):
            dial(made[0].server.address, secret=SECRET, inbound=None, timeout_s=PATIENCE_S)


def test_an_older_owner_on_the_same_device_cannot_drop_what_a_newer_one_holds() -> None:
    def cache_of(number: float) -> KvCache:
        made = KvCache(
            range(1), num_kv_heads=1, head_size=2, num_blocks=2, block_tokens=2, dtype=torch.float32, device=torch.device("cpu")
        )
        made.layer(0).fill_(number)
        return made

    older, newer, memory = cache_of(1.0), cache_of(2.0), RankMemory()
    memory.hold_kv("s", HeldKv(older, [2, 3], range(1)))
    memory.hold_kv("s", HeldKv(newer, [2, 3], range(1)))
    memory.drop_kv("s", older)
    assert memory.read_kv("s", 0, range(1)).unique().tolist() == [2.0]
    memory.drop_kv("s", newer)
    assert memory._kv == {}
