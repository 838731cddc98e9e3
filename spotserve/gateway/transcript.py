"""What one sequence has said so far, and who owns it: the gateway's memory of a request.

Only what extends the transcript is taken from a delta; readers see each position once and in order, however often it came.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

from spotserve.core.cluster import REQUEST_TRANSITIONS, RequestState, advance
from spotserve.core.epoch import after_dispatch
from spotserve.core.request import FinishReason, Request, TokenDelta


class Transcript:
    """Progress and state of one sequence."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.state = RequestState.QUEUED
        self.owner: str | None = None
        """Replica that owns it; None while nobody does."""
        self.epoch = 0
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.interruption: str | None = None
        """Why it lost its last owner; None while it has one, or never had any."""
        self._deltas: list[TokenDelta] = []
        self._grown = asyncio.Event()

    @property
    def request_id(self) -> str:
        """Whose."""
        return self.request.request_id

    @property
    def is_finished(self) -> bool:
        """Nothing more will come."""
        return self.state is RequestState.FINISHED

    @property
    def is_waiting(self) -> bool:
        """It needs an owner."""
        return self.state in (RequestState.QUEUED, RequestState.SUSPENDED)

    # ------------------------------------------------------------------ ownership

    def dispatched_to(self, replica_id: str) -> None:
        """A replica is given the sequence, under the next epoch."""
        self.state = advance(REQUEST_TRANSITIONS, self.state, RequestState.RUNNING)
        self.owner, self.epoch, self.interruption = replica_id, after_dispatch(self.epoch), None

    def owned_by(self, replica_id: str, epoch: int) -> None:
        """A replica says that it owns the sequence under `epoch` (after a hand-over, or found again)."""
        if self.is_waiting:
            self.state = advance(REQUEST_TRANSITIONS, self.state, RequestState.RUNNING)
        self.owner, self.epoch, self.interruption = replica_id, epoch, None

    def suspend(self, reason: str) -> None:
        """Its owner is gone or has let go."""
        self.interruption = reason
        if self.state is RequestState.RUNNING:
            self.state = advance(REQUEST_TRANSITIONS, self.state, RequestState.SUSPENDED)
        self.owner = None

    def suspend_unseen(self, epoch: int) -> None:
        """It ran before this gateway existed, last known under `epoch`."""
        self.dispatched_to("")
        self.suspend("its gateway was lost")
        self.epoch = epoch

    # ------------------------------------------------------------------ progress

    def extend(self, delta: TokenDelta) -> TokenDelta | None:
        """Takes over what is new; returns it, None when nothing is. What was drafted for a step counts only when all tokens of
        the step are new: no accepted token is counted twice, whoever computed it again."""
        known = len(self.token_ids) - delta.position
        if self.is_finished or known < 0 or (known >= len(delta.token_ids) and delta.finish_reason is None):
            return None
        is_whole = known == 0
        new = TokenDelta(
            request_id=delta.request_id,
            epoch=delta.epoch,
            position=len(self.token_ids),
            token_ids=delta.token_ids[known:],
            logprobs=delta.logprobs[known:] if delta.logprobs is not None else None,
            gaps=delta.gaps[known:] if delta.gaps is not None else None,
            finish_reason=delta.finish_reason,
            error=delta.error,
            draft_tokens=delta.draft_tokens if is_whole else 0,
            accepted_tokens=delta.accepted_tokens if is_whole else 0,
            drafter=delta.drafter if is_whole else "",
        )
        self._append(new)
        return new

    def extend_from_store(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> None:
        """Takes over what the store knows beyond this. The store keeps bare tokens: when log-probabilities or gaps were asked
        for, they are worth less than computing the tokens again, so only their absence is not taken over."""
        if self.request.sampling.logprobs is not None or self.request.sampling.gaps:
            return
        self.extend(
            TokenDelta(
                request_id=self.request_id, epoch=self.epoch, position=0, token_ids=tuple(token_ids), finish_reason=finish_reason
            )
        )

    def finish_early(self, reason: FinishReason) -> None:
        """Ends it from this side."""
        self._append(
            TokenDelta(
                request_id=self.request_id, epoch=self.epoch, position=len(self.token_ids), token_ids=(), finish_reason=reason
            )
        )

    async def read(self) -> AsyncIterator[TokenDelta]:
        """Every delta from the first; waits for more until the sequence is finished."""
        index = 0
        while True:
            while index < len(self._deltas):
                delta = self._deltas[index]
                index += 1
                yield delta
                if delta.finish_reason is not None:
                    return
            grown = self._grown
            await grown.wait()

    def _append(self, delta: TokenDelta) -> None:
        self.token_ids.extend(delta.token_ids)
        self._deltas.append(delta)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.state = advance(REQUEST_TRANSITIONS, self.state, RequestState.FINISHED)
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()
