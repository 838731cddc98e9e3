"""Token ids in, token ids out: one replica, as the worker of its leader sees it.

The engine owns its sequences between `add` (or `adopt`) and their end (or `release`). The same request gives the same tokens
whatever runs beside it, however often it was evicted, wherever it was resumed, and into how many stages and shards the
model is cut. Up to P steps are under way at once, of different sequences, so that no stage waits for another. Knows nothing of
epochs, clocks, peers and text. Single-threaded.
"""

from collections import ChainMap, deque
from collections.abc import Sequence as ReadOnly
from time import perf_counter
from typing import Protocol

from spotserve.config import EngineSettings
from spotserve.core.errors import PeerLost
from spotserve.core.messages import SequenceReport
from spotserve.core.model import ModelSpec
from spotserve.core.request import FinishReason, Request
from spotserve.engine.admission import check_admissible
from spotserve.engine.batch import slot_of
from spotserve.engine.blocks import BlockPool
from spotserve.engine.ranks.leader import Ranks
from spotserve.engine.results import FrozenSequence, SequenceOutput, StepResult
from spotserve.engine.runner import Runner
from spotserve.engine.sampler import SampledToken
from spotserve.engine.scheduler import DraftRoom, Schedule, ScheduledSequence, Scheduler
from spotserve.engine.sequence import Sequence, new_sequence
from spotserve.speculation.drafter import DraftTask
from spotserve.speculation.speculator import ChosenDraft, Speculator, StepSeen


class ChunkChooser(Protocol):
    """Decides how long the slices of a prompt are that follow each other through the stages; learns from what steps take."""

    def choose(self, start: int, position: int, end: int) -> int:
        """Prompt tokens for the next step, see `scheduler.ChunkTokens`."""
        ...

    def observe(self, *, tokens: int, pairs: float, seconds: float) -> None:
        """A step of so many tokens, and pairs of a token and one that it attends to, took so long on the slowest stage."""
        ...


def num_kv_blocks(settings: EngineSettings) -> int:
    """Blocks of KV that a replica's cache has, beside the scratch block; the same on each of its ranks."""
    return max(1, settings.kv_tokens // settings.block_tokens)


class Engine:
    """The sequences in the making of one replica, and the ranks that compute them."""

    def __init__(
        self,
        ranks: Ranks,
        settings: EngineSettings,
        *,
        spec: ModelSpec,
        end_token_ids: ReadOnly[int],
        speculator: Speculator | None = None,
        chunks: ChunkChooser | None = None,
    ) -> None:
        """Takes over `ranks`, whose caches have `num_kv_blocks(settings)` blocks beside the scratch block.

        Args:
            ranks: compute its steps.
            settings: the engine's section.
            spec: the model.
            end_token_ids: what ends text by itself.
            speculator: decides what is drafted; None: nothing ever is.
            chunks: how long the slices of prompts are; None: as long as a step has room.
        """
        self.spec = spec
        self._ranks = ranks
        self._end_token_ids = tuple(end_token_ids)
        num_blocks = num_kv_blocks(settings)
        self._blocks = BlockPool(num_blocks=num_blocks, block_tokens=settings.block_tokens, first_block_id=1)
        self._context_tokens = min(spec.context_tokens, num_blocks * settings.block_tokens)
        self._runner = Runner(ranks, block_tokens=settings.block_tokens)
        self._scheduler = Scheduler(
            blocks=self._blocks,
            max_batch=settings.max_batch,
            max_step_tokens=settings.max_step_tokens,
            context_tokens=self._context_tokens,
            num_groups=ranks.num_stages,
            prefix_cache=settings.prefix_cache,
            chunk_tokens=None if chunks is None else chunks.choose,
        )
        self._chunks = chunks
        self._speculator = speculator
        self._draft_tasks: dict[str, DraftTask] = {}
        """Of sequences that have decoded."""
        self._sequences: dict[str, Sequence] = {}
        self._frozen: dict[str, Sequence] = {}
        """Stopped, with their KV held for another engine."""
        self._under_way: deque[Schedule] = deque()
        self._last_step_s = perf_counter()
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences or self._under_way)

    @property
    def num_running(self) -> int:
        """Sequences that hold KV blocks."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for admission."""
        return self._scheduler.num_waiting

    @property
    def kv_tokens_total(self) -> int:
        """Tokens that the cache can hold."""
        return self._blocks.num_blocks * self._blocks.block_tokens

    @property
    def kv_tokens_used(self) -> int:
        """Tokens' worth of blocks that are held."""
        return self._blocks.used_blocks * self._blocks.block_tokens

    def add(self, request: Request, *, emitted_token_ids: ReadOnly[int] = ()) -> None:
        """Takes a request; with `emitted_token_ids` it goes on after them and does not emit them again.

        Raises:
            InvalidRequest: an id is not in the vocabulary, or the request is already here.
            ContextTooLong: prompt and one more token do not fit the context.
        """
        self._check(request, emitted_token_ids)
        sequence = self._new_sequence(request, tuple(emitted_token_ids))
        self._sequences[request.request_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Forgets a request, frozen or not, and frees its blocks. No-op when unknown."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._drop(sequence)
        self.release(request_id)

    def step(self) -> StepResult:
        """Starts as many steps as there are stages, and waits for the oldest; `outputs` has every sequence that got tokens or
        ended in it.

        Raises:
            PeerLost: a rank is gone; what ran on this replica has to go on elsewhere.
        """
        if not self._under_way:
            self._last_step_s = perf_counter()
        while len(self._under_way) < self._ranks.num_stages and self._issue():
            pass
        if not self._under_way:
            return StepResult(outputs=(), num_prefill_tokens=0, num_decode_tokens=0, step_s=0.0)
        return self._collect()

    def settle(self) -> list[StepResult]:
        """Waits for every step under way, so that nothing is in the making; what they gave.

        Raises:
            PeerLost: a rank is gone.
        """
        return [self._collect() for _ in range(len(self._under_way))]

    def freeze(self, request_id: str) -> FrozenSequence | None:
        """Stops a sequence and holds its KV for the ranks of another engine, until `release`; None when unknown.

        Nothing may be under way: `settle` first.
        """
        assert not self._under_way
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return None
        self._scheduler.suspend(sequence)
        learned = {} if self._speculator is None else self._speculator.state(request_id)
        self._forget_draft(sequence)
        self._frozen[request_id] = sequence
        computed = sequence.computed_tokens
        if computed:
            self._ranks.hold_kv(request_id, self._slots(sequence, computed))
        return FrozenSequence(
            request=sequence.request,
            output_token_ids=tuple(sequence.token_ids[len(sequence.request.prompt_token_ids) :]),
            computed_tokens=computed,
            learned=learned,
        )

    def release(self, request_id: str) -> None:
        """Forgets a frozen sequence and frees its blocks. No-op when unknown."""
        sequence = self._frozen.pop(request_id, None)
        if sequence is not None:
            self._ranks.drop_kv(request_id)
            self._scheduler.remove(sequence)

    def adopt(self, frozen: FrozenSequence) -> bool:
        """Goes on with another engine's sequence and computes nothing again: its KV has been fetched by every rank.

        Returns:
            False when there is no room for it now: `add` it then.

        Raises:
            InvalidRequest: as `add`.
            PeerLost: a rank is gone, or does not have the KV.
        """
        request, computed = frozen.request, frozen.computed_tokens
        self._check(request, frozen.output_token_ids)
        sequence = self._new_sequence(request, frozen.output_token_ids)
        if not 0 < computed < len(sequence.token_ids) or not self._scheduler.adopt(sequence):
            return False
        try:
            self._ranks.place_kv(request.request_id, self._slots(sequence, computed))
        except PeerLost:
            self._scheduler.remove(sequence)
            raise
        sequence.recompute_until = 0
        sequence.advance(computed)
        self._sequences[request.request_id] = sequence
        if self._speculator is not None:
            self._speculator.adopt(request.request_id, frozen.learned)
        return True

    def finish_before(self, deadline_s: float | None) -> None:
        """By when sequences should end, on the clock of `time.perf_counter`, because the machine goes then; None: at no time."""
        if self._speculator is not None:
            self._speculator.finish_before(deadline_s)

    def close(self) -> None:
        """The replica has ended; its ranks leave. Harmless when they are gone already."""
        self._ranks.close()

    def reports(self) -> tuple[SequenceReport, ...]:
        """Every sequence, as the controller needs to know it."""
        return tuple(
            SequenceReport(
                request_id=sequence.request_id,
                context_tokens=len(sequence.token_ids),
                computed_tokens=sequence.computed_tokens,
                remaining_tokens=min(sequence.remaining_tokens, self._context_tokens - len(sequence.token_ids)),
            )
            for sequence in self._scheduler.sequences()
        )

    def check_integrity(self) -> None:
        """Asserts that blocks and sequences are accounted for; cheap enough for every idle moment."""
        self._scheduler.check_integrity()
        assert {id(sequence) for sequence in self._scheduler.sequences()} == {id(s) for s in self._sequences.values()}
        assert len(self._under_way) == self._runner.num_issued <= self._ranks.num_stages

    def _check(self, request: Request, emitted_token_ids: ReadOnly[int]) -> None:
        here = ChainMap(self._sequences, self._frozen)
        check_admissible(request, emitted_token_ids, model=self.spec, context_tokens=self._context_tokens, here=here)

    def _new_sequence(self, request: Request, emitted_token_ids: tuple[int, ...]) -> Sequence:
        self._arrivals += 1
        return new_sequence(
            request,
            seniority=(request.priority, request.arrival_s, self._arrivals),
            end_token_ids=self._end_token_ids,
            emitted_token_ids=emitted_token_ids,
        )

    def _slots(self, sequence: Sequence, num_tokens: int) -> list[int]:
        return [slot_of(sequence.block_ids, position, self._blocks.block_tokens) for position in range(num_tokens)]

    def _issue(self) -> bool:
        """Starts a step; False when there is nothing to compute that is not under way."""
        schedule = self._scheduler.schedule(None if self._speculator is None else self._propose)
        if not schedule.entries:
            return False
        self._runner.issue(schedule.entries)
        self._scheduler.issued(schedule)
        self._under_way.append(schedule)
        return True

    def _collect(self) -> StepResult:
        """Waits for the oldest step and applies what it made."""
        sampled = self._runner.collect()
        schedule = self._under_way.popleft()
        prefill_tokens = sum(entry.num_tokens for entry in schedule.entries if not entry.samples or entry.num_tokens > 1)
        outputs = tuple(
            self._apply(entry, tokens)
            for entry, tokens in zip(schedule.entries, sampled, strict=True)
            if entry.samples and self._sequences.get(entry.sequence.request_id) is entry.sequence
        )
        self._scheduler.landed(schedule)
        now_s = perf_counter()
        step_s, self._last_step_s = now_s - self._last_step_s, now_s
        if self._chunks is not None and self._under_way:  # else stages stood idle, and the time is not that of one
            self._chunks.observe(tokens=schedule.num_tokens, pairs=_num_pairs(schedule), seconds=step_s)
        if self._speculator is not None:
            self._speculator.observe_step(_seen(schedule, outputs, prompt_rows=prefill_tokens, step_s=step_s))
        return StepResult(
            outputs=outputs,
            num_prefill_tokens=prefill_tokens,
            num_decode_tokens=schedule.num_tokens - prefill_tokens,
            step_s=step_s,
        )

    def _propose(self, room: DraftRoom) -> ReadOnly[ChosenDraft]:
        assert self._speculator is not None
        tasks = [self._draft_tasks.get(sequence.request_id) or self._new_task(sequence) for sequence in room.sequences]
        return self._speculator.propose(tasks, room.limits, prompt_rows=room.prompt_rows, max_nodes=room.max_nodes)

    def _new_task(self, sequence: Sequence) -> DraftTask:
        assert self._speculator is not None
        task = DraftTask(
            sequence_id=sequence.request_id,
            token_ids=sequence.token_ids,
            max_depth=self._speculator.max_depth,
            num_prompt_tokens=len(sequence.request.prompt_token_ids),
            sampling=sequence.request.sampling,
            banned_token_ids=sequence.banned_token_ids,
            partition=sequence.cache_salt,
        )
        self._draft_tasks[sequence.request_id] = task
        return task

    def _apply(self, entry: ScheduledSequence, sampled: list[SampledToken]) -> SequenceOutput:
        """Appends tokens up to the end of the sequence; what was accepted beyond a stop is trimmed."""
        sequence, sampling = entry.sequence, entry.sequence.request.sampling
        sequence.advance(entry.num_tokens)
        position = sequence.output_tokens
        finish_reason = None
        kept = 0
        for token in sampled:
            sequence.token_ids.append(token.token_id)
            kept += 1
            finish_reason = self._finish_reason(sequence, token.token_id)
            if finish_reason is not None:
                break
        sequence.advance(kept - 1)  # accepted draft tokens are in the cache; the last token never is
        tokens = sampled[:kept]
        accepted = min(kept, len(sampled) - 1)
        if self._speculator is not None:
            self._speculator.observe_tokens(sequence.request_id, sequence.token_ids[-kept:])
        if finish_reason is None:
            self._scheduler.settle(sequence)
        else:
            self._drop(sequence)
        return SequenceOutput(
            request_id=sequence.request_id,
            position=position,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=tuple(token.logprob for token in tokens if token.logprob) if sampling.logprobs is not None else None,
            gaps=tuple(token.gap for token in tokens if token.gap is not None) if sampling.gaps else None,
            finish_reason=finish_reason,
            recomputed_tokens=sequence.take_recomputed_tokens(),
            cached_tokens=sequence.take_cached_tokens(),
            draft_tokens=len(entry.draft),
            accepted_tokens=accepted,
            drafter=entry.chosen.drafter,
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        if token_id in sequence.stop_token_ids:
            return FinishReason.STOP
        if sequence.remaining_tokens <= 0 or len(sequence.token_ids) >= self._context_tokens:
            return FinishReason.LENGTH
        return None

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id]
        self._forget_draft(sequence)

    def _forget_draft(self, sequence: Sequence) -> None:
        self._draft_tasks.pop(sequence.request_id, None)
        if self._speculator is not None:
            self._speculator.forget(sequence.request_id, sequence.token_ids)


def _num_pairs(schedule: Schedule) -> float:
    """Pairs of a token of the step and one that it attends to, itself included."""
    return sum(entry.num_tokens * (entry.start + (entry.num_tokens + 1) / 2) for entry in schedule.entries)


def _seen(schedule: Schedule, outputs: ReadOnly[SequenceOutput], *, prompt_rows: int, step_s: float) -> StepSeen:
    decoding = [entry for entry in schedule.entries if entry.samples]
    return StepSeen(
        sequences=len(decoding),
        rows=schedule.num_tokens,
        draft_nodes=sum(len(entry.draft) for entry in decoding),
        kv_tokens=sum((entry.start + 1) * entry.num_tokens for entry in schedule.entries),
        draft_kv_tokens=sum((entry.start + 1) * len(entry.draft) for entry in decoding),
        tokens=sum(len(output.token_ids) for output in outputs),
        prompt_rows=prompt_rows,
        step_s=step_s,
    )
