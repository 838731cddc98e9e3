"""Shards of one stage as threads of one process: for checks and tests, where no second process is worth its start."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch

from spotserve.core.errors import PeerLost
from spotserve.engine.shards import Alone, Shards

Result = TypeVar("Result")
_PATIENCE_S = 60.0


class _Meeting:
    """Where the threads of one stage put their parts."""

    def __init__(self, tensor: int) -> None:
        self.barrier = Barrier(tensor)
        self.parts: list[torch.Tensor | None] = [None] * tensor
        self.threads = ThreadPoolExecutor(tensor, thread_name_prefix="shard")


class ThreadShards:
    """See `Shards`; every shard calls from a thread of its own."""

    def __init__(self, meeting: _Meeting, shard: int) -> None:
        self._meeting = meeting
        self.shard = shard
        self.tensor = len(meeting.parts)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """See `Shards`."""
        parts = self._exchange(partial)
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            parts = [left + right for left, right in pairs] + parts[len(parts) - len(parts) % 2 :]
        return parts[0]

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """See `Shards`."""
        return torch.cat(self._exchange(part), dim=-1)

    def _exchange(self, part: torch.Tensor) -> list[torch.Tensor]:
        meeting = self._meeting
        meeting.parts[self.shard] = part
        try:
            meeting.barrier.wait(_PATIENCE_S)
            parts = [part for part in meeting.parts if part is not None]
            meeting.barrier.wait(_PATIENCE_S)  # nobody may bring the next part before all have read these
        except BrokenBarrierError as error:
            raise PeerLost("another shard broke off") from error
        return parts

    def start(self, work: Callable[["ThreadShards"], Result]) -> "Future[Result]":
        """Lets the shard's thread work; if that fails, the others hear that it will not come again."""

        def run() -> Result:
            try:
                with torch.inference_mode():
                    return work(self)
            except BaseException:
                self._meeting.barrier.abort()
                raise

        return self._meeting.threads.submit(run)


def thread_shards(tensor: int) -> list[Shards]:
    """The shards of one stage."""
    if tensor == 1:
        return [Alone()]
    meeting = _Meeting(tensor)
    return [ThreadShards(meeting, shard) for shard in range(tensor)]


def run_shards(shards: Sequence[Shards], work: Callable[[Shards], Result]) -> list[Result]:
    """What each shard's `work` gives, all run at once; the first error of those that did not just lose the others."""
    if len(shards) == 1:
        return [work(shards[0])]
    futures = [shard.start(work) for shard in shards if isinstance(shard, ThreadShards)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((error for error in errors if not isinstance(error, PeerLost)), errors[0])
    return [future.result() for future in futures]
