"""The committer against a store that the test plays: what is written, when, and what each verdict leads to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from worker_scene import ScriptedStore, until

from spotserve.checkpoint.store import Commit, Verdict
from spotserve.core.request import FinishReason, TokenDelta
from spotserve.worker import commits
from spotserve.worker.commits import Committer

pytestmark = pytest.mark.anyio


class Desk:
    """A committer, its store, and what it was told of sequences."""

    def __init__(self, *, interval_s: float = 0.0) -> None:
        self.store = ScriptedStore()
        self.fenced: list[tuple[str, int]] = []
        self.known: dict[str, Commit] = {}
        self.committer = Committer(
            self.store,
            interval_s=interval_s,
            on_fenced=lambda request_id, epoch: self.fenced.append((request_id, epoch)),
            whole_progress=self.known.get,
        )

    def add(self, position: int, *token_ids: int, request_id: str = "s", epoch: int = 1, end: FinishReason | None = None) -> None:
        self.committer.add(
            TokenDelta(request_id=request_id, epoch=epoch, position=position, token_ids=token_ids, finish_reason=end)
        )

    async def idle(self) -> list[list[Commit]]:
        """Every batch, once all is written."""
        await until(lambda: self.committer.is_idle)
        return self.store.batches


def commit(position: int, *token_ids: int, request_id: str = "s", epoch: int = 1, end: FinishReason | None = None) -> Commit:
    return Commit(request_id=request_id, epoch=epoch, position=position, token_ids=token_ids, finish_reason=end)


@asynccontextmanager
async def desk() -> AsyncIterator[Desk]:
    made = Desk()
    running = asyncio.create_task(made.committer.run())
    yield made
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_one_step_made_is_one_round_trip() -> None:
    async with desk() as made:
        made.add(0, 1)
        made.add(0, 2, request_id="t")
        assert await made.idle() == [[commit(0, 1), commit(0, 2, request_id="t")]]


async def test_what_comes_while_a_commit_is_under_way_is_joined_and_goes_next() -> None:
    async with desk() as made:
        made.store.gate.clear()
        made.add(0, 1)
        await until(lambda: len(made.store.batches) == 1)
        for position in range(1, 5):
            made.add(position, position + 1)
            await asyncio.sleep(0)
        made.add(5, end=FinishReason.STOP)
        assert not made.committer.is_idle
        made.store.gate.set()
        assert await made.idle() == [[commit(0, 1)], [commit(1, 2, 3, 4, 5, end=FinishReason.STOP)]]
        assert made.store.most_at_once == 1


async def test_tokens_of_two_epochs_are_not_joined() -> None:
    async with desk() as made:
        made.add(0, 1, epoch=1)
        made.add(1, 2, epoch=2)
        assert await made.idle() == [[commit(1, 2, epoch=2)]]


async def test_a_gap_is_answered_with_the_whole_progress() -> None:
    async with desk() as made:
        made.store.verdicts["s"] = [Verdict.GAP]
        made.known["s"] = commit(0, 1, 2, 3, 4)
        made.add(2, 3)
        assert await made.idle() == [[commit(2, 3)], [commit(0, 1, 2, 3, 4)]]


async def test_what_comes_during_a_gap_is_part_of_the_whole() -> None:
    async with desk() as made:
        made.store.verdicts["s"] = [Verdict.GAP]
        made.store.gate.clear()
        made.add(2, 3)
        await until(lambda: len(made.store.batches) == 1)
        made.add(3, 4)
        made.known["s"] = commit(0, 1, 2, 3, 4)
        made.store.gate.set()
        await until(lambda: len(made.store.batches) == 2)
        made.add(4, 5)
        assert await made.idle() == [[commit(2, 3)], [commit(0, 1, 2, 3, 4)], [commit(4, 5)]]


async def test_a_gap_of_a_sequence_that_is_gone_is_nothing() -> None:
    async with desk() as made:
        made.store.verdicts["s"] = [Verdict.GAP]
        made.add(2, 3)
        assert await made.idle() == [[commit(2, 3)]]


async def test_a_newer_owner_elsewhere_is_told_with_the_epoch_that_was_refused() -> None:
    async with desk() as made:
        made.store.verdicts["s"] = [Verdict.FENCED]
        made.add(0, 1, epoch=7)
        made.add(0, 1, request_id="t")
        await made.idle()
        assert made.fenced == [("s", 7)]


async def test_a_store_that_goes_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "RETRY_S", 0.0)
    async with desk() as made:
        assert made.committer.healthy
        made.store.down = True
        made.add(0, 1)
        await until(lambda: not made.committer.healthy)
        made.store.down = False
        made.store.verdicts["s"] = [Verdict.GAP]
        made.known["s"] = commit(0, 1, 2)
        made.add(1, 2)
        await until(lambda: made.committer.healthy)
        assert (await made.idle())[-1] == [commit(0, 1, 2)]


def test_what_steps_make_within_the_interval_goes_in_one_round_trip() -> None:
    async def scenario() -> None:
        desk = Desk(interval_s=0.2)
        running = asyncio.create_task(desk.committer.run())
        desk.add(0, 1)
        await until(lambda: len(desk.store.batches) == 1)
        for position in range(1, 6):
            desk.add(position, position)
            await asyncio.sleep(0)
        assert len(desk.store.batches) == 1
        await until(lambda: len(desk.store.batches) == 2)
        assert desk.store.batches[1] == [commit(1, 1, 2, 3, 4, 5)]
        running.cancel()

    asyncio.run(scenario())
