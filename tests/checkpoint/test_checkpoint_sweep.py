"""Forgetting in SQLite: what is past its time, and what is too much."""

import asyncio
from pathlib import Path

import pytest

from spotserve.checkpoint.sqlite import SqliteStore
from spotserve.checkpoint.store import Commit
from spotserve.core.clock import ManualClock

pytestmark = pytest.mark.anyio


def open_at(path: Path, clock: ManualClock, *, max_bytes: int = 2**30) -> SqliteStore:
    return SqliteStore(path, time_to_live_s=100, max_bytes=max_bytes, timeout_s=20, clock=clock)


def commits(prefix: str, count: int, num_tokens: int = 1) -> list[Commit]:
    return [Commit(request_id=f"{prefix}-{index}", epoch=1, position=0, token_ids=range(num_tokens)) for index in range(count)]


async def test_sweeps_forget_everything_past_its_time_and_nothing_else(tmp_path: Path) -> None:
    clock = ManualClock(1000.0)
    store = open_at(tmp_path / "progress.db", clock)
    await store.commit(commits("old", 5000))
    await store.put_call("old", b"")
    clock.advance_to(1060.0)
    await store.commit(commits("young", 3000) + commits("old", 10))
    await store.put_call("young", b"")
    for step in range(6):
        clock.advance_to(1101.0 + 10 * step)
        await store.commit(commits("busy", 1))
    await store.load([])  # behind the last sweep
    with_nothing_expired = open_at(tmp_path / "progress.db", ManualClock(0.0))
    names = [commit.request_id for commit in commits("old", 5000) + commits("young", 3000) + commits("busy", 1)]
    kept = set(await with_nothing_expired.load(names))
    assert kept == {commit.request_id for commit in commits("young", 3000) + commits("old", 10) + commits("busy", 1)}
    assert await with_nothing_expired.get_call("old") is None
    assert await with_nothing_expired.get_call("young") == b""
    await store.close()
    await with_nothing_expired.close()


async def test_oldest_goes_first_beyond_the_bound(tmp_path: Path) -> None:
    clock = ManualClock(1000.0)
    store = open_at(tmp_path / "progress.db", clock, max_bytes=2**20)
    for generation in range(60):
        clock.advance_to(1000.0 + generation)
        await store.put_call(f"call-{generation}", bytes(100))
        await store.commit(commits(f"g{generation}", 64, num_tokens=250))
    await store.load([])  # behind the last sweep
    clock.advance_to(1070.0)
    await store.commit(commits("last", 1))
    await store.load([])
    kept = [bool(await store.load([f"g{generation}-63"])) for generation in range(60)]
    assert kept == sorted(kept) and kept[-1] and not kept[0], "the oldest go first, the youngest stay"
    assert await store.get_call("call-0") is None and await store.get_call("call-59") is not None
    assert sum(each.stat().st_size for each in tmp_path.glob("progress.db")) < 4 * 2**20
    await store.close()


async def test_sweeping_does_not_disturb_a_writer_in_another_store(tmp_path: Path) -> None:
    clock = ManualClock(1000.0)
    first, second = (open_at(tmp_path / "progress.db", clock, max_bytes=2**20) for _ in range(2))

    async def write(store: SqliteStore, name: str) -> None:
        for position in range(100):
            clock.advance_to(clock.now_s() + 0.4)
            await store.commit([Commit(request_id=name, epoch=1, position=position, token_ids=(position,))])

    await asyncio.gather(write(first, "a"), write(second, "b"))
    loaded = await first.load(["a", "b"])
    assert [loaded[name].token_ids for name in "ab"] == [tuple(range(100))] * 2
    await first.close()
    await second.close()
