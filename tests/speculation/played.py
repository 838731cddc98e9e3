"""A machine, texts and drafters whose laws are known, and a clock that they move: speculators are judged without torch.

The next token of a sequence is a function of its position. Drafters know it, and say it with the probability that the test gives
them; what follows a wrong token is wrong.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from spotserve.core.request import SamplingParams
from spotserve.speculation.cost import PassCost, StepCost
from spotserve.speculation.drafter import EMPTY_DRAFT, Draft, DraftTask, DraftWork, GoOn
from spotserve.speculation.speculator import Speculator, StepSeen
from spotserve.speculation.tree import DraftTree
from spotserve.speculation.verify import accept

VOCABULARY_SIZE = 1000


@dataclass
class PlayedClock:
    """Time that passes when somebody says so."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def truth(sequence_id: str, position: int) -> int:
    """What the target says there."""
    return (hash_of(sequence_id) + 7919 * position) % VOCABULARY_SIZE


def hash_of(sequence_id: str) -> int:
    """The same in every process."""
    return sum((place + 1) * 131 * byte for place, byte in enumerate(sequence_id.encode()))


@dataclass
class PlayedDrafter:
    """Right with the probability that `acceptance` gives for a sequence; says how sure it is with `noise`."""

    clock: PlayedClock
    cost: PassCost
    acceptance: Callable[[str], float]
    name: str = "played"
    noise: float = 0.15
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    work: DraftWork = field(default_factory=lambda: DraftWork(0, 0))
    calls: int = 0
    fails: bool = False
    computed: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """Per sequence how many of its tokens the model has computed, and what it drafted then, but for the last token."""

    def lag(self, task: DraftTask) -> int:
        """As `ModelDrafter` says: what was drafted and came true is computed already."""
        known, drafted = self.computed.get(task.sequence_id, (0, ()))
        for token_id in drafted:
            if known == len(task.token_ids) - 1 or task.token_ids[known] != token_id:
                break
            known += 1
        return len(task.token_ids) - known

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        """Drafts of `max_depth`."""
        return self.propose_while(tasks, lambda _, confidences: [at for at, value in enumerate(confidences) if value >= 0])

    def propose_while(self, tasks: Sequence[DraftTask], go_on: GoOn) -> list[Draft]:
        """A pass per depth, of those that go on; without a model, everything at once."""
        self.calls += 1
        if self.fails:
            raise RuntimeError("played")
        drafts = [self._draft(task, task.max_depth) for task in tasks]
        if not self.cost.per_pass_s:
            self.clock.now_s += self.cost.at(passes=0, rows=len(tasks))
            return drafts
        going = list(range(len(tasks)))
        depth, rows = 0, sum(self.lag(task) - 1 for task in tasks)
        reached = [0] * len(tasks)
        while going:
            depth += 1
            rows += len(going)
            for at in going:
                reached[at] = depth
            live = set(going)
            confidences = [drafts[at].confidences[depth - 1] if at in live else -1.0 for at in range(len(tasks))]
            going = [at for at in go_on(depth, confidences) if at in live and depth < tasks[at].max_depth]
        kept = [
            Draft(draft.tree.cut(length), draft.confidences[:length]) if length else EMPTY_DRAFT
            for draft, length in zip(drafts, reached, strict=True)
        ]
        for task, draft in zip(tasks, kept, strict=True):
            self.computed[task.sequence_id] = (len(task.token_ids), draft.tree.token_ids[:-1])
        self.work = DraftWork(depth, rows)
        self.clock.now_s += self.cost.at(passes=depth, rows=rows)
        return kept

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        self.computed.pop(sequence_id, None)

    def _draft(self, task: DraftTask, depth: int) -> Draft:
        chance = self.acceptance(task.sequence_id)
        token_ids, confidences, is_right = [], [], True
        for ahead in range(depth):
            said = truth(task.sequence_id, len(task.token_ids) + ahead)
            is_right = is_right and self.chance.random() < chance
            token_ids.append(said if is_right else (said + 1) % VOCABULARY_SIZE)
            confidences.append(min(1.0, max(0.0, chance + self.chance.uniform(-self.noise, self.noise))))
        return Draft(DraftTree.chain(token_ids), tuple(confidences))


@dataclass
class PlayedStep:
    """What came of one step."""

    tokens: int
    step_s: float
    draft_nodes: int
    sequences: int
    lengths: Sequence[int] = ()
    """Of the drafts that were verified, where somebody asks for them."""

    def expected_tokens(self, acceptance: float) -> float:
        """Tokens, but for the luck of this step, if drafts are chains that are right with this probability."""
        return sum(sum(acceptance**depth for depth in range(length + 1)) for length in self.lengths)


class PlayedEngine:
    """Sequences on a machine of known cost."""

    def __init__(
        self, speculator: Speculator | None, cost: StepCost, clock: PlayedClock, *, noise: float = 0.05, answer_tokens: int = 256
    ) -> None:
        """An answer of `answer_tokens` is followed by the next one, of another sequence, so that contexts stay of a size."""
        self.speculator, self.cost, self.clock, self.noise = speculator, cost, clock, noise
        self.answer_tokens = answer_tokens
        self.ended = 0
        self.sequences: dict[str, list[int]] = {}
        self._tasks: dict[str, DraftTask] = {}
        self._chance = random.Random(2)

    def start(self, sequence_id: str, prompt_tokens: int = 100, *, said: int = 0, max_tokens: int = 10**6) -> None:
        """One more sequence, which has said so many tokens elsewhere."""
        said_ids = [truth(sequence_id, prompt_tokens + place) for place in range(said)]
        self.sequences[sequence_id] = [*[0] * prompt_tokens, *said_ids]
        self._tasks[sequence_id] = DraftTask(
            sequence_id=sequence_id,
            token_ids=self.sequences[sequence_id],
            max_depth=8 if self.speculator is None else self.speculator.max_depth,
            num_prompt_tokens=prompt_tokens,
            sampling=SamplingParams(max_tokens=max_tokens),
        )

    def end_last(self) -> None:
        """The youngest sequence leaves."""
        self.end(next(reversed(self.sequences)))

    def end(self, sequence_id: str) -> None:
        """One less."""
        token_ids = self.sequences.pop(sequence_id)
        del self._tasks[sequence_id]
        if self.speculator is not None:
            self.speculator.forget(sequence_id, token_ids)

    def step(self) -> PlayedStep:
        """All sequences get a token at least."""
        started_s = self.clock.now_s
        tasks = list(self._tasks.values())
        chosen = None
        if self.speculator is not None:
            chosen = self.speculator.propose(tasks, [64] * len(tasks), prompt_rows=0, max_nodes=1024)
        nodes = tokens = kv_tokens = draft_kv_tokens = 0
        emitted, lengths = [], []
        for index, task in enumerate(tasks):
            known = len(task.token_ids)
            tree = DraftTree() if chosen is None else chosen[index].tree
            said = accept(
                tree,
                root_token_id=truth(task.sequence_id, known),
                node_token_ids=[truth(task.sequence_id, known + depth) for depth in tree.depths()],
            ).token_ids
            emitted.append(said)
            nodes += len(tree)
            lengths.append(len(tree))
            tokens += len(said)
            kv_tokens += known
            draft_kv_tokens += known * len(tree)
        rows = len(tasks) + nodes
        self.clock.now_s += self.cost.at(
            sequences=len(tasks), rows=rows, kv_tokens=kv_tokens + self.cost.kv_reread * draft_kv_tokens
        ) * (1 + self._chance.uniform(-self.noise, self.noise))
        step_s = self.clock.now_s - started_s
        for task, said in zip(tasks, emitted, strict=True):
            self.sequences[task.sequence_id].extend(said)
            if self.speculator is not None:
                self.speculator.observe_tokens(task.sequence_id, said)
        for task in tasks:
            if len(task.token_ids) - task.num_prompt_tokens >= self.answer_tokens:
                self.ended += 1
                self.end(task.sequence_id)
                self.start(f"{task.sequence_id.partition('/')[0]}/{self.ended}", task.num_prompt_tokens)
        if self.speculator is not None:
            self.speculator.observe_step(StepSeen(len(tasks), rows, nodes, kv_tokens, draft_kv_tokens, tokens, 0, step_s))
        return PlayedStep(tokens, step_s, nodes, len(tasks), lengths)


def goodput(steps: Sequence[PlayedStep]) -> float:
    """Tokens per second."""
    return sum(step.tokens for step in steps) / sum(step.step_s for step in steps)
