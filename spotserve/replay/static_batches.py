"""How the engines of SpotServe's paper answer requests: in batches that run to their end, one per pipeline at a time.

After the artifact of Miao et al., ASPLOS'24 (github.com/Hsword/SpotServe, branch artifact, 832b29f), run with `--old-batching` as
its scripts do: a request goes to the pipeline that has fewest, until that has as many as it may; an idle pipeline cuts the largest
power of two off its pool. All prompts of a batch are computed together, then all tokens, step by step.

Times are those of `planner.spotserve_2024`; of the numbers of micro-batches that the formula knows the fastest are taken.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from spotserve.planner.profiles import PROMPT_TOKENS, Profile
from spotserve.planner.spotserve_2024 import latency_ms
from spotserve.replay.agenda import Agenda, Appointment
from spotserve.replay.call import Call
from spotserve.replay.outcome import Gaps

LOOK_S = 1.0
"""How often an idle pipeline that is to stop looks whether it still may begin a batch."""


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """One pipeline of a shape."""

    profile: Profile
    pipeline: int
    tensor: int
    divide_prefill: bool
    """Whether prompts take what the published formula says, or as much as their micro-batches were measured to take."""

    def prompt_s(self, batch: int, tokens: int = PROMPT_TOKENS) -> float:
        """All prompts of a batch (t1), and the embedding of all of its tokens, which the formula counts once."""
        return self._fastest(batch, tokens=0) / 1000 * tokens / PROMPT_TOKENS

    def token_s(self, batch: int) -> float:
        """One step (t2)."""
        return (self._fastest(batch, tokens=1) - self._fastest(batch, tokens=0)) / 1000

    def _fastest(self, batch: int, *, tokens: int) -> float:
        parts = [part for part in self.profile.batches if part <= batch]
        return min(
            latency_ms(
                self.profile,
                pipeline=self.pipeline,
                tensor=self.tensor,
                batch=batch,
                prompt_parts=prompt_parts,
                token_parts=token_parts,
                output_tokens=tokens,
                divide_prefill=self.divide_prefill,
            )
            for prompt_parts in parts
            for token_parts in parts
        )


@dataclass(slots=True, eq=False)
class StaticBatch:
    """Requests that run together, and how far they have come."""

    calls: list[Call]
    steps: int = 0
    """Tokens that each of them has."""

    @property
    def output_tokens(self) -> int:
        """Steps until the last one is done."""
        return max(call.output_tokens for call in self.calls)


@dataclass(slots=True, eq=False)
class Pipeline:
    """One replica: a pool of requests, and the batch that runs."""

    times: BatchTimes
    max_batch: int
    max_pool: int
    """Requests that may wait for it, beside those that run."""
    agenda: Agenda
    gaps: Gaps
    on_ended: Callable[[Call], None]
    on_idle: Callable[[], None]
    pool: deque[Call] = field(default_factory=deque)
    running: StaticBatch | None = None
    resumed: StaticBatch | None = None
    """A batch that goes on here from where it stood."""
    limit: Callable[["Pipeline", int], int] | None = None
    """Of a pipeline that is to stop: how many more steps a batch of so many may take; 0: none. None: no limit."""
    is_stopped: bool = False
    _began_s: float = 0.0
    _began_at: int = 0
    _until: int = 0
    _end: Appointment | None = None

    @property
    def num_held(self) -> int:
        """Requests that it has."""
        return len(self.pool) + sum(len(each.calls) for each in (self.running, self.resumed) if each is not None)

    @property
    def has_room(self) -> bool:
        """Whether it takes one more."""
        return not self.is_stopped and len(self.pool) < self.max_pool

    def take(self, call: Call) -> None:
        """One more request."""
        self.pool.append(call)
        self.proceed()

    def proceed(self) -> None:
        """Begins the next batch, if it is idle and has something to do."""
        if self.running is not None or self.is_stopped:
            return
        if self.resumed is not None:
            batch, self.resumed = self.resumed, None
            self._run(batch, batch.output_tokens)
            return
        size = min(self.max_batch, 1 << (len(self.pool).bit_length() - 1)) if self.pool else 0
        if self.limit is not None:
            steps = self.limit(self, max(1, size))
            if steps <= 0:
                self.is_stopped = True
                self.on_idle()
            elif size:
                self._run(StaticBatch([self.pool.popleft() for _ in range(size)]), steps)
            else:
                self.agenda.at(self.agenda.now_s + LOOK_S, self.proceed)
        elif size:
            self._run(StaticBatch([self.pool.popleft() for _ in range(size)]), None)
        else:
            self.on_idle()

    def _run(self, batch: StaticBatch, steps: int | None) -> None:
        size = len(batch.calls)
        until = batch.output_tokens if steps is None else min(steps, batch.output_tokens)
        self.running, self._began_s, self._began_at, self._until = batch, self.agenda.now_s, batch.steps, until
        length_s = self._prompt_s(batch) + self.times.token_s(size) * (until - batch.steps)  # as many steps as tokens
        self._end = self.agenda.at(self.agenda.now_s + length_s, self._ended)

    def _prompt_s(self, batch: StaticBatch) -> float:
        """0 for a batch that has its KV."""
        if batch.steps:
            return 0.0
        return self.times.prompt_s(len(batch.calls), max(call.prompt_tokens for call in batch.calls))

    def _ended(self) -> None:
        """The batch has come as far as it was to come."""
        self._note(self._until)
        batch, self.running = self.running, None
        assert batch is not None
        if batch.steps < batch.output_tokens:
            self.resumed = batch
            self.is_stopped = True
            self.on_idle()
            return
        self.proceed()

    def _note(self, until: int) -> None:
        """Tokens that have come since the batch began here."""
        batch = self.running
        assert batch is not None
        token_s = self.times.token_s(len(batch.calls))
        first_s = self._began_s + self._prompt_s(batch)
        steps = until - self._began_at
        for call in batch.calls:
            mine = min(until, call.output_tokens) - self._began_at
            if steps <= 0 or mine <= 0:
                continue
            if self._began_at == 0:
                call.first_token_s = first_s + token_s
            else:
                gap_s = first_s + token_s - call.last_token_s
                self.gaps.add(gap_s)
                call.note_gap(gap_s, first_s + token_s)
            self.gaps.add(token_s, mine - 1)
            call.note_gap(token_s, first_s + 2 * token_s)
            call.emitted = min(until, call.output_tokens)
            call.last_token_s = first_s + mine * token_s
            call.known_tokens = call.context_tokens
            if call.emitted == call.output_tokens:
                self.on_ended(call)
        batch.steps = until

    def cut(self) -> None:
        """Everything stops at once: what the batch has come to so far is what it has."""
        self.is_stopped = True
        if self.running is None:
            return
        assert self._end is not None
        self._end.call_off()
        batch = self.running
        elapsed_s = self.agenda.now_s - self._began_s - self._prompt_s(batch)
        done = max(0, int(elapsed_s / self.times.token_s(len(batch.calls))))
        self._note(min(self._until, self._began_at + done))
        self.running, self.resumed = None, batch

    def leave(self) -> tuple[StaticBatch | None, list[Call]]:
        """The batch that is not done, and requests that have not begun; it has nothing afterwards."""
        batch, waiting = self.resumed, list(self.pool)
        self.resumed = None
        self.pool.clear()
        return batch, waiting
