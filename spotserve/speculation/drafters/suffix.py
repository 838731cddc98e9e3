"""Suffix decoding: text goes on as it, or an earlier answer, did before.

The longest suffix of the sequence, up to 24 tokens, that has occurred before proposes what followed it most often (Oliaro et al.,
"SuffixDecoding", arXiv 2411.04975). It is looked for in the sequence itself, prompt and output, and in the recent answers of the
same partition; the guess expected to be right for more tokens is drafted, the sequence's own where equal. Drafts are chains.

Only answers are kept, as in the paper: prompts are found in the sequence itself, and are seldom said by a model. Answers of
different partitions never meet.

Memory: a sequence's own text takes some 450 bytes per token until it is forgotten. Answers take some 230 bytes per token, and
only the latest are kept, up to a limit per partition and one over all (30 and 120 MB as set).

Time: every token is read into its sequence once and, with its answer, into its partition once, and leaves once; about 2, 5 and
3 us of one shared core. A draft takes 15 to 20 us, most of it fetching nodes from memory. Long prompts and finished answers are
read in portions, so that none holds up a step. Dropping a full partition does: 20 ms, once per partition's worth of new answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from spotserve.speculation.drafter import EMPTY_DRAFT, Draft, DraftTask
from spotserve.speculation.suffixes import NO_CONTINUATION, AnswerWindow, Continuation, GrowingText, WalkLimits
from spotserve.speculation.tree import DraftTree

_MIN_PORTION: Final = 16
"""New tokens that a sequence may always read: more than one step says."""


@dataclass(slots=True)
class _Sequence:
    text: GrowingText
    partition: str
    num_prompt_tokens: int
    matched: int = 0
    """Tokens of the suffix last found in the partition,"""
    num_tokens: int = 0
    """when the sequence had so many tokens,"""
    num_entered: int = -1
    """and this many positions of answers had been read."""


class SuffixDrafter:
    """A `Drafter` that needs no model and learns from what was answered."""

    name: Final = "suffix"

    def __init__(
        self,
        *,
        max_match: int = 24,
        tokens_per_match: float = 2.0,
        min_probability: float = 0.1,
        max_partition_tokens: int = 131_072,
        max_tokens: int = 524_288,
        max_partitions: int = 256,
        portion_tokens: int = 512,
    ) -> None:
        """
        Args:
            max_match: tokens of a matched suffix, at most.
            tokens_per_match: tokens drafted per token matched, at most (the paper's alpha). Low confidences end drafts as well.
            min_probability: a draft ends before the token whose path is said with less than this.
            max_partition_tokens: tokens of answers kept per partition. Its oldest answers leave first; of a longer one, only
                the last so many tokens are kept. Each answer counts one token more than it has.
            max_tokens: the same over all partitions; least recently used partitions leave first.
            max_partitions: partitions kept, likewise.
            portion_tokens: tokens of long prompts, and tokens of answers, read per call of `propose`.
        """
        assert max_match >= 1 and tokens_per_match > 0 and 0 < min_probability <= 1
        assert 2 <= max_partition_tokens <= max_tokens and max_partitions >= 1 and portion_tokens >= 1
        self._limits = WalkLimits(max_match, tokens_per_match, min_probability)
        self._max_partition_tokens = max_partition_tokens
        self._max_tokens = max_tokens
        self._max_partitions = max_partitions
        self._portion_tokens = portion_tokens
        self._sequences: dict[str, _Sequence] = {}
        self._windows: dict[str, AnswerWindow] = {}
        """Partition -> its answers; the least recently used first."""
        self._unread: dict[str, AnswerWindow] = {}
        """Those with positions to enter."""
        self._num_tokens = 0
        """Over all windows."""
        self._num_entered = 0
        """Positions ever entered into any window."""

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of answers kept, over all partitions."""
        return self._num_tokens

    @property
    def num_answer_nodes(self) -> int:
        """Nodes of all partitions' trees, at most twice the tokens kept and one per partition."""
        return sum(window.num_nodes for window in self._windows.values())

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        """Chains of at most `max_depth` tokens; nothing where no suffix has occurred before."""
        if self._unread:
            self._read_answers()
        portion = self._portion_tokens
        drafts = []
        for task in tasks:
            sequence = self._sequences.get(task.sequence_id)
            if sequence is None:
                text = GrowingText(self._limits.max_context)
                sequence = self._sequences[task.sequence_id] = _Sequence(text, task.partition, task.num_prompt_tokens)
            before = sequence.text.num_tokens
            new_token_ids = task.token_ids[before : before + max(portion, _MIN_PORTION)]
            sequence.text.extend(new_token_ids)
            portion -= len(new_token_ids)
            drafts.append(self._draft(sequence, task))
        return drafts

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """The sequence's output, without its prompt, becomes an answer of its partition. No-op if never proposed for."""
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is None:
            return
        answer = token_ids[sequence.num_prompt_tokens :][1 - self._max_partition_tokens :]
        if not answer:
            return
        window = self._windows.pop(sequence.partition, None) or AnswerWindow(self._limits.max_context)
        self._windows[sequence.partition] = self._unread[sequence.partition] = window  # now the most recently used
        self._num_tokens -= len(window)
        while len(window) + len(answer) + 1 > self._max_partition_tokens:
            window.drop_oldest()
        window.add(answer)
        self._num_tokens += len(window)
        while self._num_tokens > self._max_tokens or len(self._windows) > self._max_partitions:
            partition = next(iter(self._windows))
            self._num_tokens -= len(self._windows.pop(partition))
            self._unread.pop(partition, None)

    def _read_answers(self) -> None:
        portion = self._portion_tokens
        while self._unread and portion:
            partition, window = next(iter(self._unread.items()))
            entered = window.read(portion)
            portion -= entered
            self._num_entered += entered
            if not window.num_unread:
                del self._unread[partition]

    def _draft(self, sequence: _Sequence, task: DraftTask) -> Draft:
        num_tokens = len(task.token_ids)
        own = NO_CONTINUATION
        if sequence.text.num_tokens == num_tokens:
            own = sequence.text.follow(task.max_depth, self._limits)
        theirs = self._continue_from_answers(sequence, task)
        best = theirs if theirs.score > own.score else own
        if not best.token_ids:
            return EMPTY_DRAFT
        return Draft(DraftTree.chain(best.token_ids), tuple(best.confidences))

    def _continue_from_answers(self, sequence: _Sequence, task: DraftTask) -> Continuation:
        window = self._windows.get(sequence.partition)
        if window is None:
            return NO_CONTINUATION
        if next(reversed(self._windows)) != sequence.partition:
            self._windows[sequence.partition] = self._windows.pop(sequence.partition)  # now the most recently used
        num_tokens = at_most = len(task.token_ids)
        if sequence.num_entered == self._num_entered:  # no match is new, so none can have grown by more than the sequence did
            at_most = sequence.matched + num_tokens - sequence.num_tokens
        tail = [*task.token_ids[-self._limits.max_context :]]
        continuation = window.follow(tail, at_most, task.max_depth, self._limits)
        sequence.matched, sequence.num_tokens, sequence.num_entered = continuation.matched, num_tokens, self._num_entered
        return continuation
