"""The sequences that a worker owns: who wants them, under which epoch, and everything they have said so far.

Progress is kept whole, from position 0, so that any gateway that attaches and any worker that takes over can be given all of
it. Finished sequences stay for a while for a gateway that comes back.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from spotserve.core.request import FinishReason, Request, TokenDelta, TokenLogprob
from spotserve.engine.results import SequenceOutput


@dataclass(slots=True)
class OwnedSequence:
    """One sequence of this worker."""

    request: Request
    epoch: int
    gateway_id: str
    replica_id: str
    """Which of the worker's replicas computes it."""
    token_ids: list[int]
    start_position: int = 0
    """Position of the first token for which log-probabilities and gaps are known here."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    """What went wrong when `finish_reason` is FAILED."""
    finished_s: float = 0.0

    @property
    def progress(self) -> TokenDelta:
        """All that is known here: from position 0, or from where log-probabilities or gaps begin when they were asked for."""
        sampling = self.request.sampling
        begins = self.start_position if sampling.logprobs is not None or sampling.gaps else 0
        return TokenDelta(
            request_id=self.request.request_id,
            epoch=self.epoch,
            position=begins,
            token_ids=tuple(self.token_ids[begins:]),
            logprobs=tuple(self.logprobs) if sampling.logprobs is not None else None,
            gaps=tuple(self.gaps) if sampling.gaps else None,
            finish_reason=self.finish_reason,
            error=self.error,
        )

    @property
    def whole_progress(self) -> tuple[TokenDelta, ...]:
        """Everything from position 0: bare token ids up to where `progress` begins, then `progress`."""
        progress = self.progress
        if progress.position == 0:
            return (progress,)
        earlier = tuple(self.token_ids[: progress.position])
        return (TokenDelta(request_id=self.request.request_id, epoch=self.epoch, position=0, token_ids=earlier), progress)

    def extend(self, output: SequenceOutput) -> TokenDelta | None:
        """Takes over what is new in `output`; returns it under this owner's epoch, None when nothing is new. What was drafted
        goes with it only when all of it is new: each accepted token is told of once."""
        known = len(self.token_ids) - output.position
        if self.finish_reason is not None or known < 0 or (known >= len(output.token_ids) and output.finish_reason is None):
            return None
        self.token_ids.extend(output.token_ids[known:])
        self.logprobs.extend((output.logprobs or ())[known:])
        self.gaps.extend((output.gaps or ())[known:])
        self.finish_reason, self.error = output.finish_reason, output.error
        is_whole = known == 0
        return TokenDelta(
            request_id=output.request_id,
            epoch=self.epoch,
            position=output.position + known,
            token_ids=output.token_ids[known:],
            logprobs=output.logprobs[known:] if output.logprobs is not None else None,
            gaps=output.gaps[known:] if output.gaps is not None else None,
            finish_reason=output.finish_reason,
            error=output.error,
            recomputed_tokens=output.recomputed_tokens,
            cached_tokens=output.cached_tokens,
            draft_tokens=output.draft_tokens if is_whole else 0,
            accepted_tokens=output.accepted_tokens if is_whole else 0,
            drafter=output.drafter if is_whole else "",
        )


class Ownership:
    """All sequences of one worker, by request id."""

    def __init__(self, *, keep_finished_s: float) -> None:
        self._keep_finished_s = keep_finished_s
        self._sequences: dict[str, OwnedSequence] = {}

    def get(self, request_id: str) -> OwnedSequence | None:
        """The sequence; None when it is not here."""
        return self._sequences.get(request_id)

    def put(self, sequence: OwnedSequence) -> None:
        """Takes ownership. Of two owners the one with the larger epoch is right: an older one must not replace a newer."""
        known = self._sequences.get(sequence.request.request_id)
        assert known is None or known.epoch < sequence.epoch, "an older epoch would replace a newer one"
        self._sequences[sequence.request.request_id] = sequence

    def drop(self, request_id: str) -> OwnedSequence | None:
        """Gives ownership up."""
        return self._sequences.pop(request_id, None)

    def of_gateway(self, gateway_id: str) -> list[OwnedSequence]:
        """Sequences that a gateway waits for."""
        return [sequence for sequence in self._sequences.values() if sequence.gateway_id == gateway_id]

    def running(self) -> Iterator[OwnedSequence]:
        """Sequences that are not finished, as of now."""
        return (sequence for sequence in tuple(self._sequences.values()) if sequence.finish_reason is None)

    def forget_finished(self, now_s: float) -> None:
        """Drops what finished long enough ago."""
        old = [
            request_id
            for request_id, sequence in self._sequences.items()
            if sequence.finish_reason is not None and sequence.finished_s + self._keep_finished_s < now_s
        ]
        for request_id in old:
            del self._sequences[request_id]
