"""Continuous batching on one replica, iterations merged: the fast twin of `engine.scheduler` over `planner.speed`.

At each boundary between iterations those who had their last token leave; waiting calls are admitted in order of seniority as long
as there are a slot and KV for their tokens; up to `step_tokens` of their prompts are computed, which keeps everybody else waiting;
then every call whose first token is out gets one more. When the KV cache would overflow, the youngest call is evicted: it waits
again, and is computed again from its tokens. A call that was interrupted elsewhere takes the place of younger ones.

Between boundaries at which any of this happens iterations are alike but for the context, which grows by a token per call: a
*stretch* of them is one step of the simulation, its length a sum in closed form. Cost grows with calls, not with tokens.

Invariant: `next_s` is when something happens by itself; nobody changes the batch before it was advanced to that time. Knows no
other replicas, no router and no clock.
"""

import heapq
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from math import ceil, floor, inf, sqrt

from spotserve.planner.memory import STEP_TOKENS
from spotserve.replay.call import Call, seniority
from spotserve.replay.outcome import Gaps
from spotserve.replay.prefixes import Prefixes
from spotserve.replay.token_times import TokenTimes

_SAME_S = 1e-9
"""Times that differ by less are one boundary."""

_ADOPTED = -2
"""Begins without a token: its KV has come with it."""


class _Prompt:
    """A prompt that is being computed, piece by piece."""

    __slots__ = ("after_s", "call", "left_tokens", "seconds", "tokens")

    def __init__(self, call: Call, tokens: int, seconds: float, after_s: float) -> None:
        self.call = call
        self.tokens = self.left_tokens = tokens
        self.seconds = seconds
        self.after_s = after_s
        """From its last piece to its token: the way through the other stages."""


class Batch:
    """The calls of one replica."""

    def __init__(
        self, times: TokenTimes, gaps: Gaps, *, now_s: float, step_tokens: int = STEP_TOKENS, prefix_block_tokens: int = 0
    ) -> None:
        """`gaps` is told of every gap between tokens; the calls learn of their own. Prompts that begin alike share blocks of
        `prefix_block_tokens`; 0: nobody knows which do."""
        self._prefixes = Prefixes(prefix_block_tokens)
        self._times = times
        self._gaps = gaps
        self._max_batch = times.speed.max_batch
        self._kv_tokens = times.speed.kv_tokens
        self._step_tokens = step_tokens
        self._waiting: list[Call] = []
        self._prompts: deque[_Prompt] = deque()
        self._preparing: list[tuple[float, int, Call]] = []
        """(when its token is out, order, who), a heap: prompts on their way through the stages, and KV that has come."""
        self._decoding: dict[int, Call] = {}
        """By order of admission."""
        self._ends: list[tuple[int, int]] = []
        """(iteration of the last token, order), a heap; who has left stays in it until it comes up."""
        self._fresh: list[tuple[float, Call]] = []
        """Who begins with the stretch, and got a token before it."""
        self._gaps_since: deque[tuple[int, float, float]] = deque()
        """(iteration, gap, when it ended), gaps falling: the first one after an iteration is the longest since. The gap of the
        first iteration of a stretch stands under the number before it, so that it is nobody's who begins with the stretch."""
        self._num_admitted = 0
        self._iteration = 0
        self._context = 0
        """Tokens of those that decode."""
        self._reserved = 0
        """Tokens of those that are admitted and do not decode yet."""
        self._finished: list[Call] = []
        self._start_s = now_s
        self._count = 0
        """Iterations of the stretch; 0: prompts are computed, or nothing is."""
        self._first_s = self._growth_s = 0.0
        self._stalled_s = 0.0
        """For how long prompts have kept those that decode waiting since the last iteration."""
        self._has_stalled = False
        """Whether those that decode are next: prompts of one step come between two iterations."""
        self.next_s = inf

    # ------------------------------------------------------------------ reading

    def __len__(self) -> int:
        return len(self._waiting) + self.num_running

    @property
    def num_running(self) -> int:
        """Calls that have a slot."""
        return len(self._prompts) + len(self._preparing) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        """Calls that have none."""
        return len(self._waiting)

    @property
    def held_tokens(self) -> int:
        """Tokens in the KV cache, or with a place in it."""
        return self._context + self._reserved

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self._kv_tokens

    def prompt_s(self, tokens: int) -> float:
        """For how long a prompt of so many tokens keeps the others waiting."""
        return self._times.prompt_s(tokens)[0]

    @property
    def step_s(self) -> float:
        """Time of an iteration now; 0: nothing decodes."""
        return self._times.token_s(len(self._decoding), self._context) if self._decoding else 0.0

    def calls(self) -> Iterator[Call]:
        """All of them, running ones first."""
        yield from self._decoding.values()
        yield from (call for _, _, call in self._preparing)
        yield from (prompt.call for prompt in self._prompts)
        yield from self._waiting

    def emitted(self, call: Call) -> int:
        """Tokens that the client of one of its calls has, as of the last boundary."""
        return call.base + self._iteration - call.begun if call.order in self._decoding else call.emitted

    # ------------------------------------------------------------------ time

    def advance(self, now_s: float) -> list[Call]:
        """Passes all boundaries up to `now_s`; calls that have ended, whose `last_token_s` says when."""
        while self.next_s <= now_s:
            self._pass(self._count)
            self._boundary()
        if not self._finished:
            return []
        finished, self._finished = self._finished, []
        return finished

    def sync(self, now_s: float) -> None:
        """Counts iterations that are over by `now_s` within a stretch, so that `emitted` is up to date."""
        if self._count > 1 and (done := min(self._count - 1, self._reaching(now_s, up=False))) > 0:
            self._pass(done)
            self._count -= done
            self._first_s += done * self._growth_s

    # ------------------------------------------------------------------ who comes and goes

    def add(self, call: Call, now_s: float) -> None:
        """A call comes whose prompt, and what its client has, is to be computed."""
        if self._waiting and seniority(self._waiting[-1]) > seniority(call):
            insort(self._waiting, call, key=seniority)
        else:
            self._waiting.append(call)
        if self.next_s == inf:
            self._start_s = max(self._start_s, now_s)
            self._boundary()
        elif self._count > 1 and call is self._waiting[0] and self._is_admissible(call):
            self._end_stretch_at(now_s)

    def adopt(self, call: Call, now_s: float) -> bool:
        """A call comes with its KV; False: there is no room for it now."""
        tokens = call.context_tokens
        if self.num_running >= self._max_batch or self.held_tokens + tokens + len(self._decoding) + 1 > self._kv_tokens:
            return False
        self._admit(call, tokens)
        call.begun = _ADOPTED
        heapq.heappush(self._preparing, (now_s, call.order, call))
        if self.next_s == inf:
            self._start_s = max(self._start_s, now_s)
            self._boundary()
        elif self._count > 1:
            self._end_stretch_at(now_s)
        return True

    def take(self, call: Call, now_s: float) -> None:
        """A call leaves with what its client has."""
        self.sync(now_s)
        if call.order in self._decoding:
            self._leave(call)
            if self._count and self._decoding:
                self._plan()
            elif self._count:
                self._boundary()
        elif call.is_held:
            self._reserved -= call.context_tokens + (call.begun != _ADOPTED)
            self._prompts = deque(prompt for prompt in self._prompts if prompt.call is not call)
            self._preparing = [each for each in self._preparing if each[2] is not call]
            heapq.heapify(self._preparing)
            call.release()
        else:
            self._waiting.remove(call)

    def take_all(self, now_s: float) -> list[Call]:
        """All leave at once, as when a machine is lost; the batch is empty then."""
        self.sync(now_s)
        taken = list(self.calls())
        for call in list(self._decoding.values()):
            self._leave(call)
        for call in taken:
            call.release()
        self._waiting.clear()
        self._prompts.clear()
        self._preparing.clear()
        self._reserved = self._count = 0
        self.next_s = inf
        return taken

    # ------------------------------------------------------------------ boundaries

    def _boundary(self) -> None:
        """Everything that happens between two iterations; then the next stretch begins."""
        self._retire()
        self._begin()
        if not (self._has_stalled and self._decoding) and (stall_s := self._compute_prompts()) > 0:
            self._has_stalled = bool(self._decoding)
            self._stalled_s = self._stalled_s + stall_s if self._decoding else 0.0
            self._count, self.next_s = 0, self._start_s + stall_s
            return
        self._begin()  # prompts that take no time
        self._has_stalled = False
        self._make_room()
        if self._decoding:
            self._plan()
            return
        self._stalled_s = 0.0
        self._count = 0
        self.next_s = self._preparing[0][0] if self._preparing else inf

    def _plan(self) -> None:
        """The stretch from `_start_s`: as many iterations as are alike."""
        count = self._alike()
        sequences = len(self._decoding)
        token_s = self._times.token_s
        self._first_s = token_s(sequences, self._context + sequences)
        self._growth_s = 0.0
        if count > 1:
            last_s = token_s(sequences, self._context + sequences * count)
            self._growth_s = (last_s - self._first_s) / (count - 1)
            if self._preparing:
                count = max(1, min(count, self._reaching(self._preparing[0][0])))
        self._count = count
        self.next_s = self._start_s + self._length_s(count)

    def _alike(self) -> int:
        """Iterations until somebody ends or overflows; one when a prompt is to be computed after it."""
        while self._ends and self._ends[0][1] not in self._decoding:
            heapq.heappop(self._ends)
        if self._prompts or (self._waiting and self._is_admissible(self._waiting[0])):
            return 1
        until_end = self._ends[0][0] - self._iteration if self._ends else 1
        until_full = (self._kv_tokens - self._reserved - self._context) // len(self._decoding)
        return max(1, min(until_end, until_full))

    def _length_s(self, count: int) -> float:
        return count * self._first_s + self._growth_s * count * (count - 1) / 2

    def _reaching(self, at_s: float, *, up: bool = True) -> int:
        """The smallest number of iterations that takes to `at_s` or beyond; or, not `up`, the largest that does not go beyond."""
        left_s = at_s - self._start_s
        if left_s <= 0:
            return 0
        first_s, growth_s = self._first_s, self._growth_s
        linear = first_s - growth_s / 2
        if abs(growth_s) * left_s < 1e-12 * first_s * first_s:
            exact = left_s / first_s
        else:
            exact = (sqrt(max(0.0, linear * linear + 2 * growth_s * left_s)) - linear) / growth_s
        slack = _SAME_S / first_s
        return ceil(exact - slack) if up else floor(exact + slack)

    def _end_stretch_at(self, now_s: float) -> None:
        """The stretch ends with the iteration that is under way."""
        count = max(1, self._reaching(now_s))
        if count < self._count:
            self._count = count
            self.next_s = self._start_s + self._length_s(count)

    def _pass(self, count: int) -> None:
        """So many iterations of the stretch are over; 0: its prompts are computed."""
        if count == 0:
            self._start_s = self.next_s
            return
        sequences = len(self._decoding)
        first_end_s = self._start_s + self._first_s
        end_s = self._start_s + self._length_s(count)
        num_fresh = 0
        for token_s, call in self._fresh:
            if call.order in self._decoding:
                num_fresh += 1
                self._gaps.add(first_end_s - token_s)
                call.note_gap(first_end_s - token_s, first_end_s)
        self._fresh.clear()
        first_gap_s = self._stalled_s + self._first_s
        if self._stalled_s:
            self._gaps.add(first_gap_s, sequences - num_fresh)
            if count > 1:
                self._gaps.add((end_s - first_end_s) / (count - 1), sequences * (count - 1))
        else:
            self._gaps.add((end_s - self._start_s) / count, sequences * count - num_fresh)
        self._stalled_s = 0.0
        self._note_gap(first_gap_s, first_end_s)  # of those who were there before; who is fresh has been told of theirs
        self._iteration += count
        self._context += sequences * count
        self._start_s = end_s
        if count > 1:
            self._note_gap(max(self._first_s + self._growth_s, self._first_s + self._growth_s * (count - 1)), end_s)

    def _note_gap(self, gap_s: float, end_s: float) -> None:
        longest = self._gaps_since
        while longest and longest[-1][1] <= gap_s:
            longest.pop()
        longest.append((self._iteration, gap_s, end_s))

    def _retire(self) -> None:
        """Calls that had their last token leave."""
        while self._ends and self._ends[0][0] <= self._iteration:
            _, order = heapq.heappop(self._ends)
            call = self._decoding.get(order)
            if call is not None:
                self._leave(call)
                self._finished.append(call)

    def _leave(self, call: Call) -> None:
        """A call that decodes does so no more."""
        del self._decoding[call.order]
        emitted = call.base + self._iteration - call.begun
        self._context -= call.prompt_tokens + emitted
        call.emitted = call.known_tokens = emitted
        call.known_tokens += call.prompt_tokens
        if self._iteration > call.begun:
            call.last_token_s = self._start_s
            gaps = self._gaps_since
            place = bisect_right(gaps, call.begun, key=_iteration_of)
            if place < len(gaps):
                _, gap_s, end_s = gaps[place]
                call.note_gap(gap_s, end_s)
        call.release()
        if not self._decoding:
            self._gaps_since.clear()

    def _is_admissible(self, call: Call) -> bool:
        """Whether there are a slot and KV for it."""
        running, held = self.num_running, self.held_tokens
        if running >= self._max_batch:
            youngest = self._displaced(call)
            if youngest is None:
                return False
            running, held = running - 1, held - youngest.prompt_tokens - self.emitted(youngest)
        return running == 0 or held + call.context_tokens + 1 <= self._kv_tokens

    def _displaced(self, call: Call) -> Call | None:
        """The youngest call that an interrupted one may displace; None: it may not."""
        if not call.is_resumed or not self._decoding:
            return None
        youngest = max(self._decoding.values(), key=seniority)
        return youngest if not youngest.is_resumed and seniority(youngest) > seniority(call) else None

    def _admit(self, call: Call, tokens: int) -> None:
        self._num_admitted += 1
        call.order, call.is_held, call.begun = self._num_admitted, True, -1
        self._reserved += tokens

    def _compute_prompts(self) -> float:
        """Admits who can be, and computes prompts of one step; for how long that keeps the others waiting."""
        budget, stall_s = self._step_tokens, 0.0
        while budget > 0:
            if not self._prompts:
                if not self._waiting or not self._is_admissible(self._waiting[0]):
                    break
                call = self._waiting.pop(0)
                if self.num_running >= self._max_batch and (youngest := self._displaced(call)) is not None:
                    self._evict(youngest)
                tokens = call.context_tokens
                self._admit(call, tokens + 1)
                computed = tokens - self._prefixes.find(call.prefix, tokens, room_tokens=self._kv_tokens)
                call.recomputed_tokens += min(computed, call.known_tokens)
                prompt_s, first_s = self._times.prompt_s(computed)
                self._prompts.append(_Prompt(call, computed, prompt_s, first_s - prompt_s))
            prompt = self._prompts[0]
            piece = min(budget, prompt.left_tokens)
            budget -= piece
            prompt.left_tokens -= piece
            stall_s += prompt.seconds * piece / prompt.tokens
            if prompt.left_tokens == 0:
                self._prompts.popleft()
                heapq.heappush(self._preparing, (self._start_s + stall_s + prompt.after_s, prompt.call.order, prompt.call))
        return stall_s

    def _begin(self) -> None:
        """Calls whose token is out, or whose KV has come, are in every iteration from now on."""
        while self._preparing and self._preparing[0][0] <= self._start_s + _SAME_S:
            token_s, order, call = heapq.heappop(self._preparing)
            if call.begun == _ADOPTED:
                self._reserved -= call.context_tokens
                token_s = call.last_token_s
            else:
                self._reserved -= call.context_tokens + 1
                call.gain(token_s, self._gaps)
            call.known_tokens = call.context_tokens
            if call.emitted >= call.output_tokens:
                call.release()
                self._finished.append(call)
                continue
            call.begun, call.base = self._iteration, call.emitted
            self._decoding[order] = call
            self._context += call.context_tokens
            heapq.heappush(self._ends, (self._iteration + call.output_tokens - call.emitted, order))
            self._fresh.append((token_s, call))

    def _make_room(self) -> None:
        """Evicts the youngest while the next iteration does not fit: first those whose prompts are still computed."""
        while self._decoding and self._context + self._reserved + len(self._decoding) > self._kv_tokens:
            if self._prompts:
                call = self._prompts.pop().call
                self._reserved -= call.context_tokens + 1
                call.release()
                insort(self._waiting, call, key=seniority)
            elif len(self._decoding) > 1:
                self._evict(max(self._decoding.values(), key=seniority))
            else:
                return

    def _evict(self, call: Call) -> None:
        self._leave(call)
        insort(self._waiting, call, key=seniority)


def _iteration_of(entry: tuple[int, float, float]) -> int:
    return entry[0]
