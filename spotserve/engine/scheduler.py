"""Which tokens the next step computes.

Continuous batching: every step is put together anew, running sequences first by one token each, then pieces of prompts (of
running sequences, then of waiting ones), then draft tokens, all under `max_step_tokens`. Blocks for all known tokens are taken
when a sequence is admitted, less what the prefix cache has of them, so only decoding can run out of blocks: then the youngest
sequence is evicted and later computed again from its tokens.

Over P stages, P steps are on their way at once. A sequence is *in flight* from the step that samples its next token until
`landed`; decoding sequences form P groups of equal size, one per step. Whoever is in flight is neither scheduled nor evicted:
when only such could make room, the step does without.

Order is seniority. A waiting sequence displaces running ones only where its priority is more urgent, or where it goes on with
an answer that was interrupted elsewhere and is senior to them; who is displaced is never who may displace back.

Invariants: a step never exceeds its budget; when nothing is in flight the most senior running sequence makes progress; waiting
sequences are admitted in order of seniority, but for those that displace; a block that a step writes has one holder. So every
sequence ends, unless more urgent ones never cease to come. Knows no tensors and no time.

Blocks of a sequence that is removed, evicted or shrunk can have another holder at once, even while steps that read or write them
are on their way: every rank executes steps in the order in which they were issued, so whatever a later step writes there comes
after. Whoever writes blocks by another way than a step must keep that order.
"""

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from spotserve.engine.blocks import BlockPool
from spotserve.engine.sequence import Seniority, Sequence
from spotserve.speculation.speculator import NO_DRAFT, ChosenDraft
from spotserve.speculation.tree import DraftTree


@dataclass(frozen=True, slots=True)
class DraftRoom:
    """What drafts of the next step have room for."""

    sequences: ReadOnly[Sequence]
    """Those that decode in it."""
    limits: ReadOnly[int]
    """Nodes of each one's draft, at most."""
    max_nodes: int
    """Of all drafts together."""
    prompt_rows: int
    """Tokens of prompts in the same step."""


ProposeDrafts = Callable[[DraftRoom], ReadOnly[ChosenDraft]]
"""A draft for each sequence."""

ChunkTokens: TypeAlias = Callable[[int, int, int], int]
"""Prompt tokens for the next step, of a run of prompt tokens [start, end) that has come as far as a position: called with
(start, position, end). Beyond the prompt at hand the run goes on with those that wait."""


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The next `num_tokens` known tokens of a sequence, and a draft to verify after them."""

    sequence: Sequence
    num_tokens: int
    chosen: ChosenDraft = NO_DRAFT
    start: int = field(init=False)
    """Position of the first of these tokens."""
    samples: bool = field(init=False)
    """Whether the last known token is among them, so that a new one follows."""

    def __post_init__(self) -> None:
        assert 1 <= self.num_tokens <= self.sequence.pending_tokens
        object.__setattr__(self, "start", self.sequence.computed_tokens)
        object.__setattr__(self, "samples", self.num_tokens == self.sequence.pending_tokens)
        assert not self.draft or self.samples

    @property
    def draft(self) -> DraftTree:
        """The draft."""
        return self.chosen.tree


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step."""

    entries: tuple[ScheduledSequence, ...]
    evicted: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of the step, drafts included."""
        return sum(entry.num_tokens + len(entry.draft) for entry in self.entries)


class Scheduler:
    """Owns the order of sequences and their blocks."""

    def __init__(
        self,
        *,
        blocks: BlockPool,
        max_batch: int,
        max_step_tokens: int,
        context_tokens: int,
        num_groups: int = 1,
        prefix_cache: bool = False,
        chunk_tokens: ChunkTokens | None = None,
    ) -> None:
        """Starts empty.

        Args:
            blocks: the pool, which nobody else takes from.
            max_batch: sequences that run at once.
            max_step_tokens: rows of a step, at most.
            context_tokens: tokens of a sequence, at most.
            num_groups: steps that are on their way at once: the number of stages.
            prefix_cache: whether sequences that begin alike share blocks.
            chunk_tokens: how many prompt tokens a step should have; None: as many as fit.
        """
        assert max_batch >= 1 and max_step_tokens >= 1 and num_groups >= 1
        assert blocks.blocks_for(context_tokens) <= blocks.num_blocks, "the longest sequence must fit alone"
        self._blocks = blocks
        self._max_running = min(max_batch, max_step_tokens)
        self._max_step_tokens = max_step_tokens
        self._context_tokens = context_tokens
        self._num_groups = num_groups
        self._prefix_cache = prefix_cache
        self._chunk_tokens = chunk_tokens
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._suspended: list[Sequence] = []
        self._steps: deque[Schedule] = deque()
        self._in_flight: dict[Sequence, ScheduledSequence] = {}
        self._num_steps = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold none."""
        return len(self._waiting)

    @property
    def num_steps_in_flight(self) -> int:
        """Steps that were scheduled and have not landed."""
        return len(self._steps)

    def sequences(self) -> Iterator[Sequence]:
        """All but suspended ones, running ones first."""
        yield from self._running
        yield from self._waiting

    def add(self, sequence: Sequence) -> None:
        """Lets a sequence wait for admission."""
        insort(self._waiting, sequence, key=_seniority)

    def adopt(self, sequence: Sequence) -> bool:
        """Admits a sequence whose KV comes from elsewhere; False when there is no room for it now."""
        if len(self._running) >= self._max_running or not self._blocks.grow(sequence.block_ids, num_tokens=len(sequence.token_ids)):
            return False
        insort(self._running, sequence, key=_seniority)
        return True

    def suspend(self, sequence: Sequence) -> None:
        """Schedules a sequence no more; it keeps its blocks until `remove`. It must not be in flight."""
        assert sequence not in self._in_flight
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        self._suspended.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drops a sequence, in flight or not, and gives its blocks back; what it has computed stays in the prefix cache."""
        self._give_back(sequence)
        self._in_flight.pop(sequence, None)
        next(held for held in (self._running, self._waiting, self._suspended) if sequence in held).remove(sequence)

    def settle(self, sequence: Sequence) -> None:
        """Gives back blocks that only rejected drafts needed."""
        self._blocks.shrink(sequence.block_ids, num_tokens=len(sequence.token_ids))

    def schedule(self, propose: ProposeDrafts | None = None) -> Schedule:
        """The next step, in flight from now on if it has entries; sequences it evicts wait again."""
        evicted: list[Sequence] = []
        self._displace(evicted)
        idle = [sequence for sequence in self._running if sequence not in self._in_flight]
        ready = [sequence for sequence in idle if len(sequence.token_ids) - sequence.computed_tokens == 1]
        decoding = self._decode(self._turn(ready), evicted)
        budget = self._max_step_tokens - len(decoding)
        prompts: list[ScheduledSequence] = []
        if len(ready) < len(idle) or self._waiting:
            prompts = self._prompts(budget, may_admit=not evicted)
            budget -= sum(entry.num_tokens for entry in prompts)
        if propose is None or budget <= 0 or not decoding or evicted:  # who evicts for want of blocks has none to spare
            entries = [self._entry(sequence, 1) for sequence in decoding]
        else:
            elsewhere = sum(bool(sequence.block_ids) for sequence in ready) + len(self._in_flight) - len(decoding)
            room = self._room(decoding, budget, elsewhere, sum(entry.num_tokens for entry in prompts))
            entries = [self._entry(sequence, 1, chosen) for sequence, chosen in self._drafts(room, propose, elsewhere)]
        schedule = Schedule((*entries, *prompts), tuple(evicted))
        if schedule.entries:
            self._steps.append(schedule)
            self._in_flight.update((entry.sequence, entry) for entry in schedule.entries)
            self._num_steps += 1
        return schedule

    def issued(self, schedule: Schedule) -> None:
        """Every rank will execute this step before any later one: its prompt chunks count as computed from now on.

        So the next chunk of a prompt follows in the next step instead of waiting for this one to land. Calling this is a choice;
        whoever does must not `advance` entries that do not sample when the step lands.
        """
        for entry in schedule.entries:
            if not entry.samples and self._in_flight.get(entry.sequence) is entry:
                del self._in_flight[entry.sequence]
                entry.sequence.advance(entry.num_tokens)
                self._publish(entry.sequence)

    def landed(self, schedule: Schedule) -> None:
        """The oldest step in flight is done and its tokens are applied: its sequences can be scheduled again."""
        if not schedule.entries:
            return
        assert self._steps and self._steps[0] is schedule, "steps land in the order in which they were scheduled"
        self._steps.popleft()
        for entry in schedule.entries:
            if self._in_flight.get(entry.sequence) is entry:
                del self._in_flight[entry.sequence]
                self._publish(entry.sequence)

    def forget_cache(self) -> None:
        """Drops what the prefix cache has beyond the blocks of running sequences."""
        self._blocks.forget()

    def check_integrity(self) -> None:
        """Asserts that blocks are accounted for and that no sequence is twice in the books."""
        self._blocks.check_integrity([sequence.block_ids for sequence in (*self._running, *self._suspended)])
        assert not any(sequence.block_ids for sequence in self._waiting)
        assert len({id(sequence) for sequence in self.sequences()}) == len(self._running) + len(self._waiting)
        assert self._in_flight.keys() <= set(self._running), "a sequence is in flight and does not run"
        for sequence in self._running:
            unwritten = sequence.block_ids[sequence.computed_tokens // self._blocks.block_tokens :]
            assert self._blocks.writable(unwritten), "a block that will be written is shared"

    def _displace(self, evicted: list[Sequence]) -> None:
        """Admits waiting sequences that outrank running ones, in place of these where there is no room."""
        while (urgent := self._urgent()) is not None:
            idle = (sequence for sequence in reversed(self._running) if sequence not in self._in_flight)
            junior = [sequence for sequence in idle if _outranks(urgent, sequence)]
            fewest = next((count for count in range(len(junior) + 1) if self._fits(urgent, leaving=junior[:count])), None)
            if fewest is None:
                return
            for sequence in junior[:fewest]:
                self._evict(sequence, evicted)
            self._admit(urgent)

    def _urgent(self) -> Sequence | None:
        """The most senior of those that wait and outrank the youngest that runs and is not in flight."""
        if not self._waiting:
            return None
        youngest = next((sequence for sequence in reversed(self._running) if sequence not in self._in_flight), None)
        for sequence in self._waiting:
            if youngest is None or sequence.seniority > youngest.seniority:
                return None
            if _outranks(sequence, youngest):
                return sequence
        return None

    def _decode(self, turn: list[Sequence], evicted: list[Sequence]) -> list[Sequence]:
        """Those of the group that have room for one more token; evicts the youngest until there is room."""
        decoding: list[Sequence] = []
        for sequence in turn:
            while sequence.block_ids and not self._blocks.grow(sequence.block_ids, num_tokens=len(sequence.token_ids)):
                youngest = next(running for running in reversed(self._running) if running not in self._in_flight)
                if youngest is sequence and self._in_flight:
                    break
                self._evict(youngest, evicted)
            else:
                if sequence.block_ids:  # not evicted
                    decoding.append(sequence)
        return decoding

    def _turn(self, ready: list[Sequence]) -> list[Sequence]:
        """The group that decodes next, most senior first: of all that are ready those that have waited longest for their turn."""
        share = self._share(len(ready))
        if share >= len(ready):
            return ready
        most_senior = None if self._in_flight else ready[0]
        by_wait = sorted(ready, key=lambda sequence: (sequence is not most_senior, sequence.last_step))
        return sorted(by_wait[:share], key=_seniority)

    def _share(self, num_ready: int) -> int:
        """Of sequences that are ready, how many decode now, so that no group is more than one larger than another.

        Of n sequences in P groups, n mod P groups have one more than n div P.
        """
        sizes = [
            sum(entry.samples and self._in_flight.get(entry.sequence) is entry for entry in step.entries) for step in self._steps
        ]
        each, larger = divmod(num_ready + sum(sizes), self._num_groups)
        return each + (sum(size > each for size in sizes) < larger)

    def _prompts(self, budget: int, *, may_admit: bool) -> list[ScheduledSequence]:
        """Pieces of prompts: of running sequences, then of those that can be admitted."""
        prompts: list[ScheduledSequence] = []
        for sequence in self._prompting(may_admit=may_admit and budget > 0):
            if not prompts:
                budget = min(budget, self._chunk(sequence))
            if budget <= 0:
                break
            prompts.append(self._entry(sequence, min(sequence.pending_tokens, budget)))
            budget -= prompts[-1].num_tokens
            if budget <= 0:
                break
        return prompts

    def _prompting(self, *, may_admit: bool) -> Iterator[Sequence]:
        """Running sequences that lack more than one token and are not in flight, then waiting ones, admitted when asked for."""
        yield from [sequence for sequence in self._running if sequence.pending_tokens > 1 and sequence not in self._in_flight]
        while may_admit and self._waiting and self._fits(self._waiting[0]):
            yield self._admit(self._waiting[0])

    def _chunk(self, sequence: Sequence) -> int:
        """How many prompt tokens the step should have, if those of `sequence` come first."""
        if self._chunk_tokens is None:
            return self._max_step_tokens
        prompting = [running for running in self._running if running.pending_tokens > 1 and running not in self._in_flight]
        backlog = sum(running.pending_tokens for running in prompting if running is not sequence)
        backlog += sum(len(waiting.token_ids) for waiting in islice(self._waiting, self._max_running - len(self._running)))
        end = len(sequence.token_ids) + backlog
        return max(1, self._chunk_tokens(sequence.cached_tokens, sequence.computed_tokens, end))

    def _room(self, decoding: list[Sequence], budget: int, spare_blocks: int, prompt_rows: int) -> DraftRoom:
        """What fits output, context and free blocks: never worth an eviction, in other groups neither."""
        block_tokens = self._blocks.block_tokens
        free_tokens = max(0, self._blocks.free_blocks - spare_blocks) * block_tokens
        limits = []
        for sequence in decoding:
            known = len(sequence.token_ids)
            room = len(sequence.block_ids) * block_tokens + free_tokens - known
            limits.append(max(0, min(budget, sequence.remaining_tokens - 1, self._context_tokens - known - 1, room)))
        return DraftRoom(decoding, limits, budget, prompt_rows)

    def _drafts(self, room: DraftRoom, propose: ProposeDrafts, spare_blocks: int) -> Iterator[tuple[Sequence, ChosenDraft]]:
        """A draft for each sequence; blocks go to those that come first."""
        budget = room.max_nodes
        for sequence, limit, chosen in zip(room.sequences, room.limits, propose(room), strict=True):
            if chosen.tree:
                known = len(sequence.token_ids)
                free_blocks = max(0, self._blocks.free_blocks - spare_blocks)
                fitting = (len(sequence.block_ids) + free_blocks) * self._blocks.block_tokens - known
                tree = chosen.tree.cut(max(0, min(limit, budget, fitting)))
                grown = self._blocks.grow(sequence.block_ids, num_tokens=known + len(tree))
                assert grown
                budget -= len(tree)
                chosen = ChosenDraft(tree, chosen.drafter) if tree else NO_DRAFT
            yield sequence, chosen

    def _entry(self, sequence: Sequence, num_tokens: int, chosen: ChosenDraft = NO_DRAFT) -> ScheduledSequence:
        entry = ScheduledSequence(sequence, num_tokens, chosen)
        first = entry.start // self._blocks.block_tokens
        written = sequence.block_ids[first : self._blocks.blocks_for(entry.start + num_tokens + len(chosen.tree))]
        assert self._blocks.writable(written), "a block that a step writes has one holder"
        sequence.last_step = self._num_steps
        return entry

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks in the prefix cache that the sequence can take over and still have a token to compute."""
        if not self._prefix_cache:
            return []
        num_blocks = (len(sequence.token_ids) - 1) // self._blocks.block_tokens
        return self._blocks.match(sequence.prefixes(self._blocks.block_tokens), num_blocks=num_blocks)

    def _fits(self, sequence: Sequence, *, leaving: list[Sequence] | None = None) -> bool:
        """Whether it can be admitted and leaves each running sequence a block to grow into, once those `leaving` are evicted."""
        leaving = leaving or []
        running = len(self._running) - len(leaving)
        lacking = self._blocks.lacking(
            num_tokens=len(sequence.token_ids),
            shared=self._match(sequence),
            leaving=[other.block_ids for other in leaving],
        )
        return running < self._max_running and lacking + running <= 0

    def _admit(self, sequence: Sequence) -> Sequence:
        shared = self._match(sequence)
        self._blocks.share(sequence.block_ids, shared)
        admitted = self._blocks.grow(sequence.block_ids, num_tokens=len(sequence.token_ids))
        assert admitted, "what fits can be admitted"
        sequence.find_cached(len(shared) * self._blocks.block_tokens)
        sequence.published_blocks = len(shared)
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_seniority)
        return sequence

    def _evict(self, sequence: Sequence, evicted: list[Sequence]) -> None:
        assert sequence not in self._in_flight
        self._running.remove(sequence)
        self._give_back(sequence)
        sequence.lose_cache()
        insort(self._waiting, sequence, key=_seniority)
        evicted.append(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._publish(sequence)
        self._blocks.shrink(sequence.block_ids, num_tokens=0)

    def _publish(self, sequence: Sequence) -> None:
        """Offers its full blocks of computed tokens; `token_ids` has no draft tokens, so neither have they."""
        full_blocks = sequence.computed_tokens // self._blocks.block_tokens
        if not self._prefix_cache or full_blocks <= sequence.published_blocks:
            return
        prefixes = sequence.prefixes(self._blocks.block_tokens)
        for index in range(sequence.published_blocks, full_blocks):
            prefixes.put(index, self._blocks.publish(sequence.block_ids[index], prefixes.at(index)))
        sequence.published_blocks = full_blocks


def _outranks(waiting: Sequence, running: Sequence) -> bool:
    """Whether a waiting sequence may take the place of a running one."""
    if waiting.request.priority != running.request.priority:
        return waiting.request.priority < running.request.priority
    return waiting.resumed and waiting.seniority < running.seniority


def _seniority(sequence: Sequence) -> Seniority:
    return sequence.seniority
