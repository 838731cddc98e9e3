"""Texts that can say how a context went on before: the longest suffix that they have seen, and what followed it how often.

`GrowingText` is one sequence, from its first token to the one said just now. `AnswerWindow` is many finished answers, of which
the oldest leave. Both answer with a `Continuation`: the greedy walk along the most frequent next tokens, ties going to the one
seen last. A walk's context is the matched suffix and what the walk has added to it, the last `max_context` tokens at most.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

_NONE: Final = -1
"""No token, no state."""
_END: Final = -1
"""Follows an answer's last token."""
_UNKNOWN: Final = -2
"""The most frequent next token has to be looked up again."""
_NOT_BEATEN: Final = 2**62
"""Count of a most frequent token that is unknown: nothing counted in the meantime replaces it."""
_NO_CHILDREN: Final[dict[int, int]] = {}
"""Of all leaves."""


@dataclass(frozen=True, slots=True)
class WalkLimits:
    """Where a continuation ends at the latest."""

    max_context: int
    """Tokens of a context, at most."""
    tokens_per_match: float
    """Tokens of a continuation per token of the matched suffix, at most; at least 1 token."""
    min_probability: float
    """A walk ends before the token that is said with less than this, by the product of confidences up to it."""


class Continuation(NamedTuple):
    """A guess of how a context goes on.

    A token's confidence is n / (N + 1/c): it followed n of the context's N occurrences, and the context has c tokens. That is
    its share, with doubt that fades with evidence and faster with a long context: one occurrence of 24 tokens says more than
    one of 2.
    """

    token_ids: Sequence[int] = ()
    confidences: Sequence[float] = ()
    matched: int = 0
    """Tokens of the suffix that was found."""
    score: float = 0.0
    """Tokens of it that will be right, expected: the sum over tokens of the product of confidences up to each."""


NO_CONTINUATION: Final = Continuation()


class GrowingText:
    """A suffix automaton (Blumer et al., 1985) of one text, with counts.

    Chosen as it grows by a token at a constant amortised cost and knows the longest earlier occurrence of the text's own end
    without a search: that is where its suffix link points. Each state stands for suffixes that ended at the same positions, so
    one counter serves them all; a new token adds to the counters along the chain of links, which holds at most
    `max_context + 1` states as longer contexts are not counted, and few in text that is no loop. At most two states per token.
    """

    def __init__(self, max_context: int) -> None:
        self.num_tokens = 0
        self._max_context = max_context
        self._next: list[dict[int, int]] = [{}]
        self._link = array("q", [_NONE])
        self._length = array("q", [0])
        """Of a state's longest string."""
        self._occurrences = array("q", [0])
        self._followed = array("q", [0])
        """Occurrences that a token followed: all but one at the text's end."""
        self._best = array("q", [_NONE])
        """The most frequent next token, of equal ones the last seen."""
        self._best_count = array("q", [0])
        self._whole = 0
        """State of the whole text."""
        self._context = 0
        """State of the text's last `max_context` tokens."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Appends tokens."""
        following, link, length = self._next, self._link, self._length
        occurrences, followed, best, best_count = self._occurrences, self._followed, self._best, self._best_count
        max_context = self._max_context
        whole, context = self._whole, self._context
        for token in token_ids:
            fresh = len(following)
            following.append({})
            length.append(length[whole] + 1)
            occurrences.append(0)
            followed.append(0)
            best.append(_NONE)
            best_count.append(0)
            state = whole
            while state >= 0 and token not in following[state]:
                following[state][token] = fresh
                state = link[state]
            if state < 0:
                link.append(0)
            else:
                target = following[state][token]
                if length[target] == length[state] + 1:
                    link.append(target)
                else:  # of the target's strings, only the short ones end here too: they part from the long ones
                    short = fresh + 1
                    link.append(short)
                    following.append(following[target].copy())
                    link.append(link[target])
                    length.append(length[state] + 1)
                    occurrences.append(occurrences[target])
                    followed.append(followed[target])
                    best.append(best[target])
                    best_count.append(best_count[target])
                    link[target] = short
                    while state >= 0 and following[state].get(token) == target:
                        following[state][token] = short
                        state = link[state]
            whole = fresh
            state, counted = context, _NONE
            while state >= 0:
                target = following[state][token]
                if target != counted:  # several contexts may lead to one state
                    occurrences[target] += 1
                    counted = target
                followed[state] += 1
                count = occurrences[target]
                if count >= best_count[state]:
                    best[state] = token
                    best_count[state] = count
                state = link[state]
            context = following[context][token]
            while length[link[context]] >= max_context:
                context = link[context]
        self._whole, self._context = whole, context
        self.num_tokens += len(token_ids)

    def follow(self, max_tokens: int, limits: WalkLimits) -> Continuation:
        """How the text goes on, from the longest suffix that occurred in it before.

        A context that only occurs at the text's end gives way to its longest suffix that something followed: loops go on.
        """
        link, length, best = self._link, self._length, self._best
        max_context, min_probability = self._max_context, limits.min_probability
        state = self._context
        while state > 0 and best[state] == _NONE:
            state = link[state]
        if state <= 0:
            return NO_CONTINUATION
        size = matched = min(length[state], max_context)
        token_ids, confidences, probability, score = [], [], 1.0, 0.0
        for _ in range(min(max_tokens, max(1, int(matched * limits.tokens_per_match)))):
            confidence = self._best_count[state] / (self._followed[state] + 1 / size)
            probability *= confidence
            if probability < min_probability:
                break
            token = best[state]
            token_ids.append(token)
            confidences.append(confidence)
            score += probability
            state = self._next[state][token]
            if size < max_context:
                size += 1
            else:
                while length[link[state]] >= max_context:
                    state = link[state]
            if best[state] == _NONE:
                while state > 0 and best[state] == _NONE:
                    state = link[state]
                if state == 0:
                    break
                size = min(size, length[state])
        return Continuation(token_ids, confidences, matched, score)


class AnswerWindow:
    """A suffix tree of recent answers, `max_context + 1` tokens deep, with counts.

    Chosen over an automaton as answers must leave again: every position of an answer is one path, entered once and taken out
    once, at a cost of the nodes along it. Only branching nodes exist (one leaf and less than one branch per token), as edges
    are slices of the answers' text. A path that enters re-points the edges it passes at itself, so no edge points at
    text that has left (Larsson's sliding window, 1996), and the pointers tell which token was seen last. Each answer ends in a
    token of its own kind, so that no path ends within another.

    Entering is put off: `add` only keeps the answer, `read` enters as many positions as there is time for.
    """

    def __init__(self, max_context: int) -> None:
        self._max_context = max_context
        self._text: list[int] = []
        self._base = 0
        """Position of the text's first token. Positions count all tokens that ever were."""
        self._ends: deque[int] = deque()
        """Positions after each answer's end token, oldest first."""
        self._unread_ends: deque[int] = deque()
        """Those of answers not read to the end."""
        self._read_to = 0
        """Paths that start before this position have been entered."""
        self._children: list[dict[int, int]] = [{}]
        """Node -> first token of an edge -> node below."""
        self._depth = array("q", [0])
        self._start = array("q", [0])
        """Where the latest path through the node starts."""
        self._count = array("q", [0])
        """Paths through the node."""
        self._best = array("q", [_NONE])
        """The most frequent next token, of equal ones the last seen; `_UNKNOWN` after it lost a path."""
        self._best_count = array("q", [0])
        self._free: list[int] = []

    def __len__(self) -> int:
        """Tokens kept, end tokens included."""
        return len(self._text)

    @property
    def num_nodes(self) -> int:
        """Nodes in use, at most twice the tokens kept and one."""
        return len(self._children) - len(self._free)

    @property
    def num_unread(self) -> int:
        """Positions that `read` has to enter yet."""
        return self._base + len(self._text) - self._read_to

    def add(self, token_ids: Sequence[int]) -> None:
        """Keeps an answer."""
        self._text.extend(token_ids)
        self._text.append(_END)
        end = self._base + len(self._text)
        self._ends.append(end)
        self._unread_ends.append(end)

    def read(self, max_positions: int) -> int:
        """Enters at most so many positions of the answers added, oldest first. Returns how many."""
        stop = self._read_to + min(max_positions, self.num_unread)
        entered = stop - self._read_to
        while self._read_to < stop:
            end = self._unread_ends[0]
            until = min(stop, end)
            for start in range(self._read_to, until):
                self._enter(start, min(self._max_context + 1, end - start))
            self._read_to = until
            if until == end:
                self._unread_ends.popleft()
        return entered

    def drop_oldest(self) -> None:
        """Takes out the oldest answer: afterwards nothing tells that it ever was."""
        end = self._ends.popleft()
        for start in range(self._base, min(end, self._read_to)):
            self._leave(start)
        if self._unread_ends and self._unread_ends[0] == end:
            self._unread_ends.popleft()
        del self._text[: end - self._base]
        self._base = end
        self._read_to = max(self._read_to, end)

    def follow(self, context: list[int], at_most: int, max_tokens: int, limits: WalkLimits) -> Continuation:
        """How `context` goes on, from its longest suffix that the answers have, at most `at_most` tokens.

        A walk that comes to the end of all answers that had its context ends there.
        """
        node, matched = self._longest_suffix(context, min(at_most, len(context), self._max_context))
        if not matched:
            return NO_CONTINUATION
        text, base, depth, start, counts = self._text, self._base, self._depth, self._start, self._count
        best, best_count, max_context, min_probability = self._best, self._best_count, self._max_context, limits.min_probability
        size, probability, score = matched, 1.0, 0.0
        token_ids: list[int] = []
        confidences: list[float] = []
        for _ in range(min(max_tokens, max(1, int(matched * limits.tokens_per_match)))):
            total = counts[node]
            if size < depth[node]:
                count, token = total, text[start[node] + size - base]
                if token == _END:
                    break
            else:
                if best[node] == _UNKNOWN:
                    self._look_up_best(node)
                count, token = best_count[node], best[node]
                node = self._children[node][token]
            confidence = count / (total + 1 / size)
            probability *= confidence
            if probability < min_probability:
                break
            token_ids.append(token)
            confidences.append(confidence)
            score += probability
            if size < max_context:
                size += 1
            else:
                node = self._find([*context[-size:], *token_ids][-size:])
        return Continuation(token_ids, confidences, matched, score)

    def _longest_suffix(self, context: list[int], at_most: int) -> tuple[int, int]:
        """The node at or below the end of the longest suffix that some token follows, and the suffix's length; 0, 0 if none.

        Whatever follows a suffix follows all shorter ones too, so the length is found by bisection; `at_most` comes first.
        """
        shortest, longest, found = 0, at_most, 0
        size = at_most
        while shortest < longest:
            node = self._find(context[-size:])
            if node != _NONE and (size == self._depth[node] or self._text[self._start[node] + size - self._base] != _END):
                shortest, found = size, node
            else:
                longest = size - 1
            size = (shortest + longest + 1) // 2
        return found, shortest

    def _find(self, string: list[int]) -> int:
        """The node at or below the string's end; `_NONE` where no answer has it."""
        children, depths, starts, text, base = self._children, self._depth, self._start, self._text, self._base
        node, depth, size = 0, 0, len(string)
        while depth < size:
            child = children[node].get(string[depth])
            if child is None:
                return _NONE
            depth += 1
            bottom = min(depths[child], size)
            if depth < bottom:
                at = starts[child] - base
                if text[at + depth : at + bottom] != string[depth:bottom]:
                    return _NONE
                depth = bottom
            node = child
        return node

    def _look_up_best(self, node: int) -> None:
        children = self._children[node].items()
        self._best_count[node], _, self._best[node] = max(
            (self._count[child], self._start[child], token) for token, child in children if token != _END
        )

    def _enter(self, start: int, size: int) -> None:
        children, depths, starts, counts = self._children, self._depth, self._start, self._count
        best, best_count, text = self._best, self._best_count, self._text
        at = start - self._base
        node = depth = 0
        while depth < size:
            token = text[at + depth]
            child = children[node].get(token)
            if child is None:
                children[node][token] = self._new_node(_NO_CHILDREN, size, start, 1)
                count, child, bottom = 1, node, size
            else:
                bottom = depths[child]
                if bottom > depth + 1:
                    edge = starts[child] - self._base
                    if text[edge + depth : edge + bottom] != text[at + depth : at + bottom]:
                        parting = depth + 1
                        while text[edge + parting] == text[at + parting]:
                            parting += 1
                        child = self._part(child, parting, start, size)
                        children[node][token] = child
                        bottom = size
                count = counts[child] + 1
                counts[child] = count
                starts[child] = start
            if count >= best_count[node] and token != _END:
                best[node] = token
                best_count[node] = count
            node, depth = child, bottom

    def _part(self, node: int, depth: int, start: int, size: int) -> int:
        """A new branch at `depth` above `node`, with a leaf for the path from `start`, which is yet to be counted."""
        there = self._text[self._start[node] + depth - self._base]
        here = self._text[start + depth - self._base]
        count = self._count[node]
        leaf = self._new_node(_NO_CHILDREN, size, start, 1)
        branch = self._new_node({there: node, here: leaf}, depth, start, count)
        latest_is_best = there == _END or (count == 1 and here != _END)
        self._best[branch], self._best_count[branch] = (here, 1) if latest_is_best else (there, count)
        return branch

    def _leave(self, start: int) -> None:
        """Takes out the path from `start`."""
        children, depths, counts, best = self._children, self._depth, self._count, self._best
        at = start - self._base
        above, node, token_above = _NONE, 0, _NONE
        while True:
            token = self._text[at + depths[node]]
            child = children[node][token]
            if best[node] == token:
                best[node] = _UNKNOWN
                self._best_count[node] = _NOT_BEATEN
            counts[child] -= 1
            if not counts[child]:
                break
            if not children[child]:
                return
            above, node, token_above = node, child, token
        del children[node][token]
        self._free.append(child)
        if node and len(children[node]) == 1:  # no branch any more: its edges become one
            (children[above][token_above],) = children[node].values()
            children[node] = _NO_CHILDREN
            self._free.append(node)

    def _new_node(self, children: dict[int, int], depth: int, start: int, count: int) -> int:
        if self._free:
            node = self._free.pop()
            self._children[node] = children
            self._depth[node], self._start[node], self._count[node] = depth, start, count
            self._best[node], self._best_count[node] = _NONE, 0
            return node
        self._children.append(children)
        self._depth.append(depth)
        self._start.append(start)
        self._count.append(count)
        self._best.append(_NONE)
        self._best_count.append(0)
        return len(self._children) - 1
