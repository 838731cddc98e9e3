"""Plays a speculator over what real drafters drafted at every place of real answers (`spotserve.bench.recorded_drafts`).

The machine is the one of the recording, as far as its law of costs says; the clock is played. When answers run out, the same ones
come again under new names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from played import PlayedClock, PlayedStep, truth

from spotserve.bench.recorded_drafts import SURE, RecordedAnswer, Recording
from spotserve.core.request import SamplingParams
from spotserve.speculation.cost import PassCost
from spotserve.speculation.drafter import EMPTY_DRAFT, Draft, DraftTask, DraftWork, GoOn
from spotserve.speculation.speculator import Speculator, StepSeen
from spotserve.speculation.tree import DraftTree

DATA = Path(__file__).parent / "data" / "recorded_drafts.bin"


def read_recording() -> Recording:
    """The one in the repository."""
    return Recording.decode(DATA.read_bytes())


@dataclass
class _Playing:
    """An answer on its way."""

    answer: RecordedAnswer
    task: DraftTask
    token_ids: list[int]
    place: int = 0
    """Tokens after the first."""


@dataclass
class Scene:
    """Who plays: found by the drafters under the sequence's name."""

    playing: dict[str, _Playing] = field(default_factory=dict)
    drafts: dict[tuple[int, str], list[tuple[int, tuple[float, ...]]]] = field(default_factory=dict)
    """By answer (its id) and drafter: per place how much is right, and the confidences."""

    def recorded(self, answer: RecordedAnswer, drafter: str) -> list[tuple[int, tuple[float, ...]]]:
        """Unpacked once."""
        key = (id(answer), drafter)
        known = self.drafts.get(key)
        if known is None:
            guesses = answer.guesses[drafter]
            confidences = [byte / SURE for byte in guesses.confidences]
            known = self.drafts[key] = [
                (right, tuple(confidences[start : start + length]))
                for start, length, right in zip(guesses.starts(), guesses.lengths, guesses.accepted, strict=True)
            ]
        return known


class RecordedDrafter:
    """Drafts what it drafted when it was recorded; its time is the recorded machine's."""

    def __init__(self, name: str, scene: Scene, clock: PlayedClock, cost: PassCost) -> None:
        self.name, self._scene, self._clock, self._cost = name, scene, clock, cost
        self._computed: dict[str, tuple[int, int]] = {}
        """Per sequence how many tokens the model knew, and how many it drafted rightly and computed then."""
        self.work = DraftWork(0, 0)

    def lag(self, task: DraftTask) -> int:
        known, right = self._computed.get(task.sequence_id, (0, 0))
        return max(1, len(task.token_ids) - known - right)

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        if self._cost.per_pass_s:
            return self.propose_while(tasks, lambda _, confidences: [at for at, value in enumerate(confidences) if value >= 0])
        self._clock.now_s += self._cost.at(passes=0, rows=len(tasks))
        return [self._draft(task, task.max_depth)[1] for task in tasks]

    def propose_while(self, tasks: Sequence[DraftTask], go_on: GoOn) -> list[Draft]:
        whole = [self._draft(task, task.max_depth) for task in tasks]
        going = list(range(len(tasks)))
        depth, rows = 0, sum(self.lag(task) - 1 for task in tasks)
        reached = [0] * len(tasks)
        while going:
            depth += 1
            rows += len(going)
            confidences = [-1.0] * len(tasks)
            for at in going:
                reached[at] = depth
                confidences[at] = whole[at][1].confidences[depth - 1]
            live = set(going)
            going = [at for at in go_on(depth, confidences) if at in live and depth < len(whole[at][1].tree)]
        drafts = []
        for task, (right, draft), length in zip(tasks, whole, reached, strict=True):
            self._computed[task.sequence_id] = (len(task.token_ids), min(right, max(0, length - 1)))
            drafts.append(Draft(draft.tree.cut(length), draft.confidences[:length]) if length else EMPTY_DRAFT)
        self.work = DraftWork(depth, rows)
        self._clock.now_s += self._cost.at(passes=depth, rows=rows)
        return drafts

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        self._computed.pop(sequence_id, None)

    def _draft(self, task: DraftTask, depth: int) -> tuple[int, Draft]:
        """How much of it is right, and the draft."""
        playing = self._scene.playing[task.sequence_id]
        right, confidences = self._scene.recorded(playing.answer, self.name)[playing.place]
        confidences = confidences[:depth]
        known = len(playing.token_ids)
        said = [truth("", known + ahead) + (ahead >= right) for ahead in range(len(confidences))]
        return right, Draft(DraftTree.chain(said), confidences)


class RecordedEngine:
    """Plays answers at a load that may change."""

    def __init__(
        self, recording: Recording, make_speculator: Callable[[dict[str, RecordedDrafter], PlayedClock], Speculator | None]
    ) -> None:
        self.clock = PlayedClock()
        self._recording = recording
        self._scene = Scene()
        drafters = {name: RecordedDrafter(name, self._scene, self.clock, cost) for name, cost in recording.drafting.items()}
        self.speculator = make_speculator(drafters, self.clock)
        self._started = 0
        self.chosen: list[int] = []
        """Nodes per step."""

    def steps(self, load: int, count: int) -> list[PlayedStep]:
        """With so many sequences; those beyond the load end by themselves."""
        return [self._step(load) for _ in range(count)]

    def whole(self, load: int, times: int) -> list[PlayedStep]:
        """Every answer so many times, at this load as long as there are enough."""
        steps: list[PlayedStep] = []
        while (left := times * len(self._recording.answers) - self._started) or self._scene.playing:
            steps.append(self._step(min(load, len(self._scene.playing) + left)))
        return steps

    def _start(self) -> None:
        # 7 has no factor in common with the number of answers: kinds of text mix.
        answer = self._recording.answers[7 * self._started % len(self._recording.answers)]
        name = str(self._started)
        token_ids = [0] * (answer.prompt_tokens + 1)
        task = DraftTask(
            sequence_id=name,
            token_ids=token_ids,
            max_depth=8 if self.speculator is None else self.speculator.max_depth,
            num_prompt_tokens=answer.prompt_tokens,
            sampling=SamplingParams(max_tokens=answer.places + 1),
        )
        self._scene.playing[name] = _Playing(answer, task, token_ids)
        self._started += 1

    def _step(self, load: int) -> PlayedStep:
        playing = self._scene.playing
        while len(playing) < load:
            self._start()
        started_s = self.clock.now_s
        present = list(playing.values())
        tasks = [each.task for each in present]
        chosen = None
        if self.speculator is not None:
            limits = [min(8, task.remaining_tokens - 1) for task in tasks]
            chosen = self.speculator.propose(tasks, limits, prompt_rows=0, max_nodes=1024)
        nodes = tokens = kv_tokens = draft_kv_tokens = 0
        emitted = []
        for index, each in enumerate(present):
            known = len(each.token_ids)
            said = [truth("", known)]
            if chosen is not None and (tree := chosen[index].tree):
                for token_id in tree.token_ids:  # a chain
                    if token_id != said[-1]:
                        break
                    said.append(truth("", known + len(said)))
                nodes += len(tree)
                draft_kv_tokens += known * len(tree)
            emitted.append(said)
            tokens += len(said)
            kv_tokens += known
        cost, rows = self._recording.step, len(tasks) + nodes
        self.clock.now_s += cost.at(sequences=len(tasks), rows=rows, kv_tokens=kv_tokens + cost.kv_reread * draft_kv_tokens)
        for each, said in zip(present, emitted, strict=True):
            each.token_ids.extend(said)
            each.place += len(said)
            if self.speculator is not None:
                self.speculator.observe_tokens(each.task.sequence_id, said)
            if each.place >= each.answer.places:
                del playing[each.task.sequence_id]
                if self.speculator is not None:
                    self.speculator.forget(each.task.sequence_id, each.token_ids)
        step_s = self.clock.now_s - started_s
        if self.speculator is not None:
            self.speculator.observe_step(StepSeen(len(tasks), rows, nodes, kv_tokens, draft_kv_tokens, tokens, 0, step_s))
        self.chosen.append(nodes)
        return PlayedStep(tokens, step_s, nodes, len(tasks))
