"""What a worker asks of an engine, whoever computes: the facade that all engines have."""

from collections.abc import Sequence
from typing import Protocol

from spotserve.core.messages import SequenceReport
from spotserve.core.model import ModelSpec
from spotserve.core.request import Request
from spotserve.engine.results import FrozenSequence, StepResult


class ServingEngine(Protocol):
    """Takes requests and makes their tokens, step by step. Single-threaded."""

    spec: ModelSpec

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        ...

    @property
    def num_running(self) -> int:
        """Sequences that are being computed."""
        ...

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission."""
        ...

    @property
    def kv_tokens_total(self) -> int:
        """Tokens that the cache can hold; 0: not known."""
        ...

    @property
    def kv_tokens_used(self) -> int:
        """Tokens' worth of the cache that is held."""
        ...

    def add(self, request: Request, *, emitted_token_ids: Sequence[int] = ()) -> None:
        """Takes a request, which goes on after `emitted_token_ids`.

        Raises:
            InvalidRequest: it cannot be served as it stands.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Forgets a request. No-op when unknown."""
        ...

    def step(self) -> StepResult:
        """What one step made.

        Raises:
            ModelError, PeerLost: the engine is broken.
        """
        ...

    def settle(self) -> list[StepResult]:
        """Waits until nothing is in the making; what that gave."""
        ...

    def freeze(self, request_id: str) -> FrozenSequence | None:
        """Stops a sequence and holds its KV until `release`; None when unknown, or when the engine has no KV to give."""
        ...

    def release(self, request_id: str) -> None:
        """Forgets a frozen sequence. No-op when unknown."""
        ...

    def adopt(self, frozen: FrozenSequence) -> bool:
        """Goes on with a sequence whose KV was fetched; False: `add` it instead."""
        ...

    def finish_before(self, deadline_s: float | None) -> None:
        """By when sequences should end, on the clock of `time.perf_counter`, because the machine goes then; None: at no time."""
        ...

    def reports(self) -> tuple[SequenceReport, ...]:
        """Every sequence, as the controller needs to know it."""
        ...

    def check_integrity(self) -> None:
        """Asserts that everything is accounted for."""
        ...

    def close(self) -> None:
        """The replica has ended."""
        ...
