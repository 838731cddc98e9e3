"""Commits progress to the store, off the critical path: one round trip at a time, for the whole batch.

While a commit is under way, and for `interval_s` after one began, what later steps make is gathered and goes with the next:
a slow engine commits once per step, a fast one does not spend its processor on round trips. A store that is out of reach costs
nothing but the ability to resume from it: commits are dropped, and when it is back, the first commit of each sequence is
answered with a gap and its whole progress is sent.
"""

import asyncio
import logging
from collections.abc import Callable

from spotserve.checkpoint.store import Commit, ProgressStore, Verdict
from spotserve.core.errors import StoreError
from spotserve.core.request import TokenDelta

RETRY_S = 1.0
"""Pause after the store was out of reach."""

log = logging.getLogger(__name__)


class Committer:
    """Gathers deltas and writes them behind the step loop's back.

    `on_fenced(request_id, epoch)` hears that a newer owner exists. `whole_progress(request_id)` gives everything that is
    known of a sequence of this worker, None when it is not here any more.
    """

    def __init__(
        self,
        store: ProgressStore,
        *,
        interval_s: float,
        on_fenced: Callable[[str, int], None],
        whole_progress: Callable[[str], Commit | None],
    ) -> None:
        self._store = store
        self._interval_s = interval_s
        self._on_fenced = on_fenced
        self._whole_progress = whole_progress
        self._pending: dict[str, Commit] = {}
        self._wake = asyncio.Event()
        self._in_flight = False
        self.healthy = True

    @property
    def is_idle(self) -> bool:
        """True when everything gathered has been written (or dropped)."""
        return not self._pending and not self._in_flight

    def add(self, delta: TokenDelta) -> None:
        """Gathers one delta; deltas of one sequence and epoch are joined."""
        position, token_ids = delta.position, delta.token_ids
        earlier = self._pending.get(delta.request_id)
        if earlier is not None and earlier.epoch == delta.epoch and earlier.position + len(earlier.token_ids) == position:
            position, token_ids = earlier.position, (*earlier.token_ids, *token_ids)
        self._pending[delta.request_id] = Commit(
            request_id=delta.request_id,
            epoch=delta.epoch,
            position=position,
            token_ids=token_ids,
            finish_reason=delta.finish_reason,
        )
        self._wake.set()

    async def run(self) -> None:
        """Writes for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            next_s = loop.time() + self._interval_s
            batch, self._pending = list(self._pending.values()), {}
            self._in_flight = True
            try:
                await self._write(batch)
                self._note_health(None)
            except StoreError as error:
                self._note_health(error)
                await asyncio.sleep(RETRY_S)
            finally:
                self._in_flight = False
            await asyncio.sleep(max(0.0, next_s - loop.time()))

    async def _write(self, batch: list[Commit]) -> None:
        for outcome, commit in zip(await self._store.commit(batch), batch, strict=True):
            if outcome.verdict is Verdict.FENCED:
                self._on_fenced(commit.request_id, commit.epoch)
            elif outcome.verdict is Verdict.GAP and (whole := self._whole_progress(commit.request_id)) is not None:
                self._pending[commit.request_id] = whole
                self._wake.set()

    def _note_health(self, error: StoreError | None) -> None:
        if self.healthy and error is not None:
            log.warning("progress store lost, resuming is degraded until it is back: %s", error)
        elif not self.healthy and error is None:
            log.warning("progress store is back")
        self.healthy = error is None
