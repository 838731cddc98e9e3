"""What every store promises, held against SQLite and a real Redis."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from spotserve.checkpoint.store import Commit, CommitOutcome, Progress, Store, Verdict
from spotserve.core.errors import StoreError
from spotserve.core.request import FinishReason

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(opener) -> AsyncIterator[Store]:
    store = opener()
    yield store
    await store.close()


@pytest.fixture
def name() -> str:
    """A request that no other test knows."""
    return f"request-{uuid.uuid4()}"


def commit(name: str, epoch: int, position: int, token_ids=(), finish: FinishReason | None = None) -> Commit:
    return Commit(request_id=name, epoch=epoch, position=position, token_ids=token_ids, finish_reason=finish)


async def test_progress_grows_and_is_loaded(store: Store, name: str) -> None:
    assert await store.commit([commit(name, 1, 0, (5, 0, 2**32 - 1))]) == [CommitOutcome(name, Verdict.OK, 3, 1)]
    assert await store.commit([commit(name, 1, 3, (7,))]) == [CommitOutcome(name, Verdict.OK, 4, 1)]
    assert await store.load([name, name + "-unknown"]) == {name: Progress(1, (5, 0, 2**32 - 1, 7), None)}


async def test_overlap_is_dropped(store: Store, name: str) -> None:
    await store.commit([commit(name, 1, 0, (1, 2, 3))])
    assert await store.commit([commit(name, 1, 1, (2, 3, 4, 5))]) == [CommitOutcome(name, Verdict.OK, 5, 1)]
    assert await store.commit([commit(name, 1, 0, (1, 2))]) == [CommitOutcome(name, Verdict.OK, 5, 1)]
    assert (await store.load([name]))[name].token_ids == (1, 2, 3, 4, 5)


async def test_gap_is_refused_and_says_where_the_store_ends(store: Store, name: str) -> None:
    assert await store.commit([commit(name, 4, 2, (3,))]) == [CommitOutcome(name, Verdict.GAP, 0, 0)]
    assert await store.load([name]) == {}
    await store.commit([commit(name, 4, 0, (1,))])
    assert await store.commit([commit(name, 9, 2, (3,), FinishReason.STOP)]) == [CommitOutcome(name, Verdict.GAP, 1, 4)]
    assert await store.load([name]) == {name: Progress(4, (1,), None)}


async def test_late_owner_is_fenced(store: Store, name: str) -> None:
    await store.commit([commit(name, 65536, 0, (1, 2))])
    await store.commit([commit(name, 65537, 2)])
    refused = await store.commit([commit(name, 65536, 2, (3,), FinishReason.LENGTH)])
    assert refused == [CommitOutcome(name, Verdict.FENCED, 2, 65537)]
    assert await store.load([name]) == {name: Progress(65537, (1, 2), None)}


async def test_epochs_of_53_bits_are_told_apart(store: Store, name: str) -> None:
    epoch = 2**53 - 1
    await store.commit([commit(name, epoch, 0, (1,))])
    assert (await store.commit([commit(name, epoch - 1, 1, (2,))]))[0].verdict is Verdict.FENCED
    assert (await store.load([name]))[name].epoch == epoch


async def test_end_is_kept_once_it_is_known(store: Store, name: str) -> None:
    for index, reason in enumerate(FinishReason):
        await store.commit([commit(f"{name}-{index}", 1, 0, (1,), reason)])
        await store.commit([commit(f"{name}-{index}", 2, 0, (1,))])
        assert (await store.load([f"{name}-{index}"])) == {f"{name}-{index}": Progress(2, (1,), reason)}


async def test_commits_of_one_batch_follow_each_other(store: Store, name: str) -> None:
    other = name + "-other"
    outcomes = await store.commit(
        [
            commit(name, 1, 0, (1, 2)),
            commit(other, 7, 1, (1,)),
            commit(name, 2, 2, (3,)),
            commit(name, 1, 3, (4,)),
            commit(name, 2, 5, (6,)),
            commit(other, 7, 0, (9,), FinishReason.STOP),
            commit(name, 2, 1, (2, 3, 4)),
        ]
    )
    assert [(o.verdict.name, o.length_tokens, o.epoch) for o in outcomes] == [
        ("OK", 2, 1),
        ("GAP", 0, 0),
        ("OK", 3, 2),
        ("FENCED", 3, 2),
        ("GAP", 3, 2),
        ("OK", 1, 7),
        ("OK", 4, 2),
    ]
    assert await store.load([name, other]) == {
        name: Progress(2, (1, 2, 3, 4), None),
        other: Progress(7, (9,), FinishReason.STOP),
    }


async def test_empty_batch_and_empty_question(store: Store) -> None:
    assert await store.commit([]) == []
    assert await store.load([]) == {}


async def test_large_batch(store: Store, name: str) -> None:
    names = [f"{name}-{index}" for index in range(1500)]
    outcomes = await store.commit([commit(each, 1, 0, range(index % 7)) for index, each in enumerate(names)])
    assert [outcome.length_tokens for outcome in outcomes] == [index % 7 for index in range(1500)]
    loaded = await store.load(names)
    assert [loaded[each].token_ids for each in names] == [tuple(range(index % 7)) for index in range(1500)]


async def test_names_may_be_any_text(store: Store, name: str) -> None:
    odd = [f'{name} "quoted" \\ {{brace}}', f"{name}-ü-日本-\N{GRINNING FACE}", f"{name}';--"]
    await store.commit([commit(each, 1, 0, (index,)) for index, each in enumerate(odd)])
    assert {each: progress.token_ids for each, progress in (await store.load(odd)).items()} == {
        each: (index,) for index, each in enumerate(odd)
    }


async def test_call_records(store: Store, name: str) -> None:
    record = bytes(range(256)) * 40
    assert await store.get_call(name) is None
    await store.put_call(name, b"first")
    await store.put_call(name, record)
    assert await store.get_call(name) == record
    await store.commit([commit(f"{name}-0", 1, 0, (1,)), commit(f"{name}-1", 1, 0, (1,)), commit(name, 1, 0, (1,))])
    await store.delete_call(name, [f"{name}-0", f"{name}-1"])
    assert await store.get_call(name) is None
    assert set(await store.load([f"{name}-0", f"{name}-1", name])) == {name}
    await store.delete_call(name, [])


async def test_another_process_sees_what_was_acknowledged(opener, store: Store, name: str) -> None:
    other = opener()
    await store.commit([commit(name, 1, 0, (1, 2))])
    await store.put_call(name, b"record")
    assert (await other.load([name]))[name].token_ids == (1, 2)
    assert await other.get_call(name) == b"record"
    await other.commit([commit(name, 2, 2, (3,))])
    assert (await store.commit([commit(name, 1, 2, (3,))]))[0].verdict is Verdict.FENCED
    await other.close()


async def test_many_owners_at_once_leave_one_sequence(opener, name: str) -> None:
    stores = [opener() for _ in range(5)]

    async def own(store: Store, epoch: int) -> None:
        for end in range(1, 20):
            await store.commit([commit(name, epoch, 0, range(end))])

    await asyncio.gather(*(own(store, epoch) for epoch, store in enumerate(stores, start=1)))
    assert await stores[0].load([name]) == {name: Progress(5, tuple(range(19)), None)}
    for store in stores:
        await store.close()


async def test_what_is_past_its_time_is_gone(opener, name: str) -> None:
    store = opener(time_to_live_s=0.3)
    await store.put_call(name, b"record")
    await store.commit([commit(name, 3, 0, (1, 2, 3))])
    give_up_s = time.monotonic() + 20
    while (await store.load([name])) or await store.get_call(name):
        assert time.monotonic() < give_up_s, "progress does not expire"
        await asyncio.sleep(0.05)
    assert await store.commit([commit(name, 1, 3, (4,))]) == [CommitOutcome(name, Verdict.GAP, 0, 0)]
    assert await store.commit([commit(name, 1, 0, (9,))]) == [CommitOutcome(name, Verdict.OK, 1, 1)]
    await store.close()


async def test_every_commit_renews_the_time(opener, name: str) -> None:
    store = opener(time_to_live_s=2.0)
    end_s = time.monotonic() + 3.0
    for position in itertools.count():
        assert (await store.commit([commit(name, 1, position, (position,))]))[0].verdict is Verdict.OK
        if time.monotonic() > end_s:
            break
        await asyncio.sleep(0.1)
    assert len((await store.load([name]))[name].token_ids) == position + 1
    await store.close()


async def test_ping_and_close(opener) -> None:
    store = opener()
    await store.ping()
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="closed"):
        await store.ping()
    with pytest.raises(StoreError, match="closed"):
        await store.commit([commit("r", 1, 0, (1,))])
