"""The engine's facade over a server: what the worker's thread asks is answered from streams that run on a thread of their own.

Two threads meet in one queue. The streams, the HTTP client and all waiting live on the event loop of the engine's own thread; the
sequences and their positions belong to whoever calls `step`. A sequence that is cancelled and comes back under the same id is
another sequence: what the old stream still delivers is dropped.
"""

import asyncio
import queue
import threading
from collections.abc import Coroutine
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter
from typing import Any, TypeVar

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError, PeerLost
from spotserve.core.messages import SequenceReport
from spotserve.core.model import ModelSpec, Portion
from spotserve.core.request import Request, TokenLogprob
from spotserve.engine.admission import check_admissible
from spotserve.engine.remote.answer_stream import AnswerStream, Arrival, Source
from spotserve.engine.remote.dialect import check_expressible
from spotserve.engine.remote.discovery import check_vocabulary, discover
from spotserve.engine.remote.upstream import Patience, Upstream
from spotserve.engine.remote.vocabulary import load_vocabulary
from spotserve.engine.results import FrozenSequence, SequenceOutput, StepResult

STEP_WAIT_S = 0.05
"""How long a step waits for something to arrive: jobs of the worker wait as long."""

Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request under way, as seen by the worker's thread."""

    request: Request
    output_tokens: int
    asked_s: float
    """When it was added, or last got tokens."""
    stream: AnswerStream | None = None
    task: "asyncio.Task[None] | None" = None
    arrivals: list[Arrival] = field(default_factory=list)
    has_begun: bool = False

    @property
    def context_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + self.output_tokens

    @property
    def pace_s(self) -> float:
        """Time per token since the last arrival before those that wait here."""
        return (self.arrivals[-1].at_s - self.asked_s) / max(1, sum(len(arrival.token_ids) for arrival in self.arrivals))


class RemoteEngine:
    """Sequences that a server makes."""

    invariant = "none"
    """What its arithmetic keeps bit-equal: that is the server's business, and no server says so."""

    def __init__(self, settings: EngineSettings, *, patience: Patience | None = None) -> None:
        """Waits until the server at `settings.url` is up and asks it who it is.

        Raises:
            ModelError: it does not serve the model, or is no server of this kind; or the model's tokenizer cannot be read.
            PeerLost: it does not come up.
        """
        assert settings.url is not None, "checked by EngineSettings"
        patience = patience or Patience()
        vocabulary = load_vocabulary(settings.model)
        self._upstream = Upstream(settings.url, settings.api_key, patience)
        self._sequences: dict[str, _Sequence] = {}
        self._inbox: queue.SimpleQueue[tuple[_Sequence, Arrival] | None] = queue.SimpleQueue()
        self._tasks: set[asyncio.Task[None]] = set()
        """Streams and the watch; the loop's own."""
        self._failure: Exception | None = None
        self._step_s = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="upstream", daemon=True)
        self._thread.start()
        try:
            server = self._wait(discover(self._upstream, settings, patience))
            self._wait(check_vocabulary(self._upstream, server, vocabulary, settings))
            context_tokens = server.context_tokens or vocabulary.context_tokens
            if context_tokens is None:
                raise ModelError(f"neither {self._upstream.name} nor {settings.model} says how long a context may be")
        except BaseException:
            self.close()
            raise
        self.dialect = server.dialect
        self._source = Source(self._upstream, server, vocabulary, context_tokens, patience, asyncio.Semaphore(settings.max_batch))
        self.spec = _spec(settings.model_name, vocabulary.size, context_tokens)
        self._loop.call_soon_threadsafe(lambda: self._spawn(self._watch_health()))

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: tokens to wait for, or bad news to tell."""
        return bool(self._sequences) or self._failure is not None

    @property
    def num_running(self) -> int:
        """Sequences that the server has been asked for."""
        return sum(sequence.stream is not None and sequence.stream.is_running for sequence in self._sequences.values())

    @property
    def num_waiting(self) -> int:
        """Sequences beyond `max_batch`, which are held back here."""
        return len(self._sequences) - self.num_running

    @property
    def kv_tokens_total(self) -> int:
        """0: the cache is the server's, and no server tells its size."""
        return 0

    @property
    def kv_tokens_used(self) -> int:
        """0, as above."""
        return 0

    def add(self, request: Request, *, emitted_token_ids: ReadOnly[int] = ()) -> None:
        """Takes a request; with `emitted_token_ids` it goes on after them and does not emit them again.

        Raises:
            InvalidRequest: an id is not in the vocabulary, the request is already here, or asks for what the server cannot do.
            ContextTooLong: prompt and one more token do not fit the context.
        """
        check_admissible(request, emitted_token_ids, model=self.spec, context_tokens=self.spec.context_tokens, here=self._sequences)
        check_expressible(self.dialect, request.sampling)
        sequence = _Sequence(request, len(emitted_token_ids), asked_s=perf_counter())
        sequence.stream = AnswerStream(
            self._source, request, tuple(emitted_token_ids), lambda arrival: self._inbox.put((sequence, arrival))
        )
        self._sequences[request.request_id] = sequence
        self._loop.call_soon_threadsafe(self._start, sequence, sequence.stream)

    def cancel(self, request_id: str) -> None:
        """Forgets a request and hangs up on the server, which stops at that. No-op when unknown."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._loop.call_soon_threadsafe(self._stop, sequence)

    def step(self) -> StepResult:
        """Waits until something arrives, or a moment; `outputs` has every sequence that got tokens or ended.

        `step_s` is the time between two tokens of one sequence, and for first tokens the time since their request was added.

        Raises:
            ModelError: the server serves nobody like this any more.
            PeerLost: it is gone.
        """
        arrived = self._collect()
        if self._failure is not None and not arrived:
            raise self._failure
        first = [sequence for sequence in arrived if not sequence.has_begun]
        if first:
            step_s = fmean(sequence.arrivals[0].at_s - sequence.asked_s for sequence in first)
        elif arrived:
            step_s = self._step_s = fmean(sequence.pace_s for sequence in arrived)
        else:
            step_s = self._step_s
        outputs = tuple(self._output(sequence) for sequence in arrived)
        return StepResult(
            outputs=outputs,
            num_prefill_tokens=sum(len(sequence.request.prompt_token_ids) for sequence in first),
            num_decode_tokens=sum(len(output.token_ids) for output in outputs),
            step_s=step_s,
        )

    def settle(self) -> list[StepResult]:
        """Nothing: what is in the making is the server's."""
        return []

    def freeze(self, request_id: str) -> FrozenSequence | None:
        """None: the KV is the server's, so a sequence's next owner resumes it from its tokens."""
        del request_id
        return None

    def release(self, request_id: str) -> None:
        """Nothing is ever frozen here."""

    def adopt(self, frozen: FrozenSequence) -> bool:
        """False: KV cannot be given to a server."""
        del frozen
        return False

    def finish_before(self, deadline_s: float | None) -> None:
        """Nothing: how the server speculates is its own affair."""
        del deadline_s

    def reports(self) -> tuple[SequenceReport, ...]:
        """Every sequence, as the controller needs to know it: none has KV that could be moved."""
        return tuple(
            SequenceReport(
                request_id=request_id,
                context_tokens=sequence.context_tokens,
                computed_tokens=0,
                remaining_tokens=min(
                    sequence.request.sampling.max_tokens - sequence.output_tokens,
                    self.spec.context_tokens - sequence.context_tokens,
                ),
            )
            for request_id, sequence in self._sequences.items()
        )

    def check_integrity(self) -> None:
        """Asserts that every sequence can still end: it is on its way, or its end waits in the queue, or all ends now."""
        for request_id, sequence in self._sequences.items():
            assert sequence.request.request_id == request_id
            assert not sequence.arrivals, "arrivals are handed on in the step that finds them"
            is_over = sequence.task is not None and sequence.task.done()
            assert not is_over or not self._inbox.empty() or self._failure is not None, f"{request_id} has no stream and no end"

    def close(self) -> None:
        """Hangs up on the server and ends the engine's thread."""
        self._sequences.clear()
        self._wait(self._hang_up())
        self._end_loop()

    # ------------------------------------------------------------------ the thread that steps

    def _collect(self) -> list[_Sequence]:
        """Sequences with arrivals, in order of their first."""
        arrived: list[_Sequence] = []
        try:
            item = self._inbox.get(timeout=0.0 if self._failure is not None else STEP_WAIT_S)
            while True:
                if item is not None and self._sequences.get(item[0].request.request_id) is item[0]:
                    if not item[0].arrivals:
                        arrived.append(item[0])
                    item[0].arrivals.append(item[1])
                item = self._inbox.get_nowait()
        except queue.Empty:
            return arrived

    def _output(self, sequence: _Sequence) -> SequenceOutput:
        position, arrivals = sequence.output_tokens, sequence.arrivals
        token_ids = tuple(token_id for arrival in arrivals for token_id in arrival.token_ids)
        logprobs: tuple[TokenLogprob, ...] | None = None
        if sequence.request.sampling.logprobs is not None:
            logprobs = tuple(each for arrival in arrivals for each in arrival.logprobs or ())
        finish_reason, error = arrivals[-1].finish_reason, arrivals[-1].error
        recomputed_tokens = sum(arrival.recomputed_tokens for arrival in arrivals)
        sequence.output_tokens += len(token_ids)
        sequence.has_begun, sequence.asked_s = True, arrivals[-1].at_s
        arrivals.clear()
        if finish_reason is not None:
            del self._sequences[sequence.request.request_id]
        return SequenceOutput(
            request_id=sequence.request.request_id,
            position=position,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            error=error,
            recomputed_tokens=recomputed_tokens,
        )

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ------------------------------------------------------------------ the thread of the streams

    def _start(self, sequence: _Sequence, stream: AnswerStream) -> None:
        sequence.task = self._spawn(stream.run())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _stop(self, sequence: _Sequence) -> None:
        if sequence.task is not None:
            sequence.task.cancel()

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 -- top of the task: whatever it is ends the engine, and step says so
            self._fail(error)

    async def _watch_health(self) -> None:
        """Asks the server now and then whether it is well: a stream that is silent cannot tell waiting from death."""
        patience, misses = self._source.patience, 0
        while misses < patience.misses:
            await asyncio.sleep(patience.check_s)
            misses = 0 if await self._upstream.is_well(self.dialect.health_path) else misses + 1
        self._fail(PeerLost(f"{self._upstream.name} did not answer its health check {misses} times in a row"))

    async def _hang_up(self) -> None:
        tasks = tuple(self._tasks)  # and not those that libraries started, which their own scopes end
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._upstream.close()
        await self._loop.shutdown_asyncgens()

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
            self._inbox.put(None)


def _spec(name: str, vocabulary_size: int, context_tokens: int) -> ModelSpec:
    """A server is taken whole: one layer of one unit that has no bytes here."""
    whole = (Portion(1, 0),)
    return ModelSpec(
        name=name,
        num_layers=1,
        hidden_size=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=1,
        vocabulary_size=vocabulary_size,
        context_tokens=context_tokens,
        layer=whole,
        embedding=whole,
        head=whole,
        value_bytes=1,
        layer_flops_per_token=0,
        head_flops_per_token=0,
    )
