"""Drafting goes wrong, runs short, moves and is switched off: requests go on, and what is off costs nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from drafts import DrafterOf, Oracle, Recorded
from replica_scene import devices, start
from speculation_scene import Answer, assert_same_answers, make_mixed, one_by_one, request_of, run, save_llama

from spotserve.config import EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.engine import speculators
from spotserve.engine.batch import StepLayout
from spotserve.engine.bring_up import load_draft_model
from spotserve.engine.draft_model import PagedDraftModel
from spotserve.engine.engine import Engine
from spotserve.engine.ranks.memory import RankMemory
from spotserve.engine.results import FrozenSequence
from spotserve.engine.scheduler import Schedule
from spotserve.engine.speculators import make_speculator
from spotserve.engine.weights import open_model
from spotserve.speculation.acceptance import SequenceAcceptance
from spotserve.speculation.adaptive import AdaptiveSpeculator
from spotserve.speculation.drafter import Draft, DraftTask
from spotserve.speculation.drafters.model import MOST_REBUILT_TOKENS, DraftModelDrafter
from spotserve.speculation.drafters.ngram import NgramDrafter
from spotserve.speculation.drafters.suffix import SuffixDrafter
from spotserve.speculation.fixed import FixedSpeculator
from spotserve.speculation.smartspec_2024 import SmartSpec2024
from spotserve.speculation.speculator import NO_DRAFT, StepSeen
from spotserve.speculation.tree import DraftTree

MakeEngine = Callable[..., Engine]
COUNT = 12


@pytest.fixture(scope="module")
def mixed() -> list[Request]:
    return make_mixed(COUNT)


@pytest.fixture(scope="module")
def plain(make_engine: MakeEngine, mixed: Sequence[Request]) -> dict[str, Answer]:
    return one_by_one(make_engine(), mixed)


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "long-llama", seed=8, context_tokens=1024)


def load_self(model: Path, **changes: object) -> PagedDraftModel:
    """A model as its own draft model, in float64."""
    given = {"model": str(model), "draft_model": str(model), "dtype": "float64", "speculation": "model:3", "block_tokens": 4}
    own = EngineSettings.model_validate({**given, "kv_tokens": 1024, **changes})
    loaded = load_draft_model(own, open_model(own).catalogue.spec)
    assert loaded is not None
    return loaded


def add_all(engine: Engine, requests: Sequence[Request]) -> None:
    for request in requests:
        engine.add(request)


def assert_all_accepted(answers: Mapping[str, Answer]) -> None:
    """A draft model that is the target has been right wherever it spoke."""
    outputs = [output for answer in answers.values() for output in answer.outputs if output.finish_reason is None]
    assert [output for output in outputs if output.accepted_tokens != output.draft_tokens] == []


def steady_clock() -> Callable[[], float]:
    """One on which whatever is measured takes a microsecond."""
    ticks = count()
    return lambda: 1e-6 * next(ticks)


class Moody:
    """A drafter that fails when it is told to, and notes at which call it was asked."""

    name = "moody"

    def __init__(self, fails: Callable[[int], bool], clock: Callable[[], int]) -> None:
        self._fails, self._clock, self._inner = fails, clock, NgramDrafter()
        self.asked: list[int] = []

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        self.asked.append(self._clock())
        if self._fails(len(self.asked)):
            raise RuntimeError("not today")
        return self._inner.propose(tasks)

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        self._inner.forget(sequence_id, token_ids)


# ---------------------------------------------------------------------- drafters that fail


@pytest.mark.parametrize("kind", ["fixed", "smartspec"])
def test_a_drafter_that_raises_costs_the_step_its_drafts_only(
    kind: str, mixed: Sequence[Request], plain: Mapping[str, Answer], make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    moody = Moody(lambda call: call % 3 == 1, lambda: 0)
    inner = FixedSpeculator(moody, max_depth=4) if kind == "fixed" else SmartSpec2024(moody, max_depth=4)
    recorded = Recorded(inner)
    engine = make_engine(speculator=recorded, block_tokens=4)
    add_all(engine, mixed)
    assert_same_answers(run(engine), plain)
    assert any(chosen.tree for of_step in recorded.chosen for chosen in of_step)
    assert not any(chosen.tree for of_step in recorded.chosen[::3] for chosen in of_step if kind == "fixed")
    assert "drafter moody failed" in caplog.text


def test_the_adaptive_speculator_leaves_a_drafter_that_raises_alone_and_comes_back_to_it(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """For 16 steps, then for 32; then it drafts. The others draft all the time."""
    request = request_of("s", [5, 9, 13, 40, 41, 42] * 3, temperature=0.0, logit_bias={7: 500.0}, max_tokens=90)
    plain = one_by_one(make_engine(), [request])
    recorded: Recorded
    moody = Moody(lambda call: call <= 2, lambda: len(recorded.proposed))
    recorded = Recorded(AdaptiveSpeculator((moody,), max_depth=1, clock=steady_clock()))
    engine = make_engine(speculator=recorded)
    engine.add(request)
    got = run(engine)
    assert_same_answers(got, plain)
    first, second, third = moody.asked[:3]
    assert (first, second - first, third - second) == (1, 16, 32)
    assert caplog.text.count("drafter moody failed") == 2
    assert got["s"].draft_tokens > 0
    assert {output.drafter for output in got["s"].outputs} == {"", "moody"}


@pytest.mark.parametrize("kind", ["fixed", "staged", "adaptive"])
def test_a_draft_model_that_fails_in_the_middle_is_right_again_in_the_next_step(
    kind: str,
    tiny_llama: Path,
    mixed: Sequence[Request],
    plain: Mapping[str, Answer],
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load_self(tiny_llama)
    compute, calls = model._compute, []

    def fail_at_times(entries: object) -> object:
        calls.append(entries)
        if len(calls) in (1, 6, 11):
            raise RuntimeError("out of memory")
        return compute(entries)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "_compute", fail_at_times)
    drafter = DraftModelDrafter(model, first_stage=NgramDrafter() if kind == "staged" else None, second_choices=False)
    speculator = AdaptiveSpeculator((), drafter) if kind == "adaptive" else FixedSpeculator(drafter, max_depth=3)
    engine = make_engine(speculator=speculator, block_tokens=4)
    add_all(engine, mixed)
    got = run(engine)
    assert_same_answers(got, plain)
    assert_all_accepted(got)
    model.check_integrity()
    assert model.kv_tokens_used == 0
    assert "failed" in caplog.text
    if kind != "adaptive":
        assert len(calls) > 11
        assert sum(answer.accepted_tokens for answer in got.values()) > 20


# ---------------------------------------------------------------------- short of memory


@pytest.mark.parametrize("kv_tokens", [64, 120, 300])
@pytest.mark.parametrize("staged", [False, True])
def test_a_draft_model_whose_cache_is_too_small_for_all_drafts_for_some(
    staged: bool, kv_tokens: int, tiny_llama: Path, mixed: Sequence[Request], plain: Mapping[str, Answer], make_engine: MakeEngine
) -> None:
    """And every draft that it makes is right."""
    model = load_self(tiny_llama, kv_tokens=kv_tokens)
    drafter = DraftModelDrafter(model, first_stage=NgramDrafter() if staged else None, second_choices=False)
    engine = make_engine(speculator=FixedSpeculator(drafter, max_depth=4), block_tokens=4)
    add_all(engine, mixed)
    got: dict[str, Answer] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            got.setdefault(output.request_id, Answer()).take(output)
        model.check_integrity()
    assert_same_answers(got, plain)
    assert_all_accepted(got)
    outputs = [output for answer in got.values() for output in answer.outputs[1:-1]]
    assert any(output.draft_tokens for output in outputs)
    if kv_tokens < 300:
        assert not all(output.draft_tokens for output in outputs), "there was room for all: nothing was tested"
    assert model.kv_tokens_used == 0


def test_a_step_that_evicts_drafts_nothing(
    mixed: Sequence[Request], plain: Mapping[str, Answer], make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is short of blocks has none to spare, and nobody is asked to draft; nor does a draft ever cause an eviction."""
    texts = {request.request_id: [*request.prompt_token_ids, *plain[request.request_id].token_ids] for request in mixed}
    recorded = Recorded(Oracle(texts, right=lambda _: 3, wrong=3).speculator())
    engine = make_engine(speculator=recorded, block_tokens=4, kv_tokens=120)
    schedules: list[tuple[Schedule, int]] = []
    schedule = engine._scheduler.schedule

    def noted(propose: object) -> Schedule:
        before = len(recorded.proposed)
        made = schedule(propose)  # type: ignore[arg-type]
        schedules.append((made, len(recorded.proposed) - before))
        return made

    monkeypatch.setattr(engine._scheduler, "schedule", noted)
    add_all(engine, mixed)
    assert_same_answers(run(engine), plain)
    evicting = [(made, asked) for made, asked in schedules if made.evicted]
    assert len(evicting) >= 2, "memory was never short: nothing was tested"
    assert all(asked == 0 and not any(entry.draft for entry in made.entries) for made, asked in evicting)
    assert any(entry.draft for made, _ in schedules for entry in made.entries)


# ---------------------------------------------------------------------- to another engine


def hand_over(source: Engine, other: Engine, frozen: FrozenSequence) -> None:
    """Gives the other engine a sequence with its KV, as their ranks would."""
    request_id, heads = frozen.request.request_id, range(source.spec.num_kv_heads)
    layers = tuple(memory_of(source).read_kv(request_id, layer, heads) for layer in range(source.spec.num_layers))
    memory_of(other).keep_fetched(request_id, layers)
    assert other.adopt(frozen)
    source.release(request_id)


def memory_of(engine: Engine) -> RankMemory:
    return engine._ranks._rank._memory  # type: ignore[attr-defined,no-any-return]


def test_what_was_learned_of_a_sequence_goes_with_it(make_engine: MakeEngine) -> None:
    """By drafter; it is forgotten where it came from, and the answer goes on as if nothing had happened."""
    requests = [request_of(name, [5, 9, 13, 40] * 3, temperature=0.0, logit_bias={7: 500.0}, max_tokens=60) for name in "ab"]
    plain = one_by_one(make_engine(), requests)
    first = Recorded(AdaptiveSpeculator((NgramDrafter(), SuffixDrafter()), clock=steady_clock()))
    second = Recorded(AdaptiveSpeculator((NgramDrafter(), SuffixDrafter()), clock=steady_clock()))
    source, other = make_engine(speculator=first), make_engine(speculator=second, block_tokens=8)
    add_all(source, requests)
    answers = {name: Answer() for name in "ab"}
    for _ in range(6):
        for output in source.step().outputs:
            answers[output.request_id].take(output)
    source.settle()
    frozen = source.freeze("a")
    assert frozen is not None
    assert frozen.learned.keys() == {"ngram", "suffix"}
    assert sum(known.expected for known in frozen.learned.values()) > 0, "nothing was learned: nothing was tested"
    hand_over(source, other, frozen)
    assert second.adopted == {"a": frozen.learned}
    assert second.state("a") == frozen.learned
    assert first.state("a") == {"ngram": SequenceAcceptance(), "suffix": SequenceAcceptance()}
    assert first.forgotten["a"][12:] == list(frozen.output_token_ids)
    for engine in (source, other):
        while engine.has_work:
            for output in engine.step().outputs:
                answers[output.request_id].take(output)
            engine.check_integrity()
    assert_same_answers(answers, plain)


def test_engines_that_draft_otherwise_take_over_from_each_other(make_engine: MakeEngine) -> None:
    """What was learned of drafters that are not here is of no use, and does no harm; nor does the lack of it."""
    request = request_of("a", [5, 9, 13, 40] * 3, temperature=0.0, logit_bias={7: 500.0}, max_tokens=40)
    plain = one_by_one(make_engine(), [request])
    kinds = ["adaptive", "off", "ngram:3", "adaptive", "smartspec-2024", "adaptive"]
    engine = make_engine(speculation=kinds[0])
    engine.add(request)
    answer = Answer()
    for kind in [*kinds[1:], None]:
        for _ in range(2):
            for output in engine.step().outputs:
                answer.take(output)
        engine.settle()
        if kind is not None and answer.finish_reason is None:
            other = make_engine(speculation=kind)
            frozen = engine.freeze("a")
            assert frozen is not None
            hand_over(engine, other, frozen)
            engine = other
    for left in run(engine).values():
        for output in left.outputs:
            answer.take(output)
    assert_same_answers({"a": answer}, plain)


def test_the_draft_model_computes_a_sequence_that_came_in_slices_while_others_draft(
    long_llama: Path, make_engine: MakeEngine
) -> None:
    """No KV of the draft model moves: the new one takes three steps for a long text, none of which is longer for the others."""
    long_prompt = [3 + (7 * place * place) % 90 for place in range(2 * MOST_REBUILT_TOKENS + 30)]
    long = request_of("long", long_prompt, temperature=0.8, seed=3, max_tokens=40, logprobs=None, gaps=False)
    short = request_of("short", [5, 9, 13], temperature=0.8, seed=4, max_tokens=40, logprobs=None, gaps=False)
    space = {"model": str(long_llama), "kv_tokens": 2048, "block_tokens": 4, "max_step_tokens": 1024}
    plain = one_by_one(make_engine(**space), [long, short])

    def drafting() -> Engine:
        drafter = DraftModelDrafter(load_self(long_llama, kv_tokens=2048), second_choices=False)
        return make_engine(speculator=FixedSpeculator(drafter, max_depth=3), **space)

    source, other = drafting(), drafting()
    other.add(short)
    source.add(long)
    answers = {"long": Answer(), "short": Answer()}
    for engine in (source, other):
        for _ in range(2):
            for output in engine.step().outputs:
                answers[output.request_id].take(output)
    source.settle()
    frozen = source.freeze("long")
    assert frozen is not None
    hand_over(source, other, frozen)
    drafted: dict[str, list[int]] = {"long": [], "short": []}
    while other.has_work:
        for output in other.step().outputs:
            answers[output.request_id].take(output)
            drafted[output.request_id].append(output.draft_tokens)
    assert_same_answers(answers, plain)
    assert_all_accepted(answers)
    assert drafted["long"][:4] == [0, 0, 3, 3]
    assert drafted["short"][:4] == [3, 3, 3, 3]


def test_a_name_that_is_used_again_stands_for_another_text(
    tiny_llama: Path, mixed: Sequence[Request], make_engine: MakeEngine
) -> None:
    """After a cancel, or when a request comes back with what another owner emitted: no drafter goes on with the old text."""
    drafter = DraftModelDrafter(load_self(tiny_llama), first_stage=NgramDrafter(), second_choices=False)
    engine = make_engine(speculator=FixedSpeculator(drafter, max_depth=4), block_tokens=4)
    first = request_of("s", [5, 9, 13] * 4, temperature=0.0, max_tokens=30)
    second = request_of("s", [5, 9, 14, 13] * 2, temperature=0.7, max_tokens=30)
    engine.add(first)
    for _ in range(4):
        engine.step()
    engine.cancel("s")
    expected = one_by_one(make_engine(), [second])
    engine.add(second)
    got = run(engine)
    assert_same_answers(got, expected)
    assert_all_accepted(got)
    emitted = expected["s"].token_ids[:11]
    engine.add(second, emitted_token_ids=emitted)
    outputs = [output for _ in range(40) if engine.has_work for output in engine.step().outputs]
    assert [*emitted, *(token for output in outputs for token in output.token_ids)] == expected["s"].token_ids
    assert all(output.accepted_tokens == output.draft_tokens > 0 for output in outputs[1:-1])


# ---------------------------------------------------------------------- under notice


@pytest.mark.parametrize("left_s", [-1.0, 0.001, 0.05, 1000.0])
def test_a_deadline_reaches_the_speculator_and_changes_no_answer(
    left_s: float, mixed: Sequence[Request], plain: Mapping[str, Answer], tiny_llama: Path, make_engine: MakeEngine
) -> None:
    drafter = DraftModelDrafter(load_self(tiny_llama), first_stage=NgramDrafter())
    recorded = Recorded(AdaptiveSpeculator((NgramDrafter(), SuffixDrafter()), drafter))
    engine = make_engine(speculator=recorded, block_tokens=4)
    add_all(engine, mixed)
    got: dict[str, Answer] = {}
    deadline_s = perf_counter() + left_s
    for step in range(400):
        if step == 3:
            engine.finish_before(deadline_s)
        if step == 12:
            engine.finish_before(None)
        if not engine.has_work:
            break
        for output in engine.step().outputs:
            got.setdefault(output.request_id, Answer()).take(output)
    assert recorded.deadlines == [deadline_s, None]
    assert_same_answers(got, plain)


def test_a_deadline_without_a_speculator_is_no_matter(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.finish_before(perf_counter())
    engine.add(request_of("s", [5, 9], max_tokens=3))
    assert len(run(engine)["s"].token_ids) == 3


# ---------------------------------------------------------------------- off


def layouts_of(engine: Engine, requests: Sequence[Request], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[StepLayout, int]]:
    """Every step as the ranks get it, and the tokens' worth of blocks held after it."""
    issued: list[StepLayout] = []
    issue = engine._ranks.issue

    def noted(layout: StepLayout, logit_rows: Sequence[int], sampling: object) -> None:
        issued.append(layout)
        issue(layout, logit_rows, sampling)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._ranks, "issue", noted)
    add_all(engine, requests)
    while engine.has_work:
        engine.step()
        yield issued.pop(), engine.kv_tokens_used
    assert not issued


class Nobody(AdaptiveSpeculator):
    """Chooses nothing, whatever is offered."""

    def propose(self, tasks, limits, *, prompt_rows, max_nodes):  # type: ignore[no-untyped-def]
        super().propose(tasks, limits, prompt_rows=prompt_rows, max_nodes=max_nodes)
        return [NO_DRAFT] * len(tasks)


@pytest.mark.parametrize("kv_tokens", [120, 4096])
def test_a_step_without_drafts_is_the_same_with_a_speculator_and_without(
    kv_tokens: int, mixed: Sequence[Request], make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row for row and table for table, and no block is held for drafts that do not come."""
    space = {"block_tokens": 4, "kv_tokens": kv_tokens, "max_step_tokens": 40}
    refusing = FixedSpeculator(DrafterOf(lambda _: DraftTree()), max_depth=9)
    speculating = [Nobody((NgramDrafter(), SuffixDrafter())), refusing]
    plain = [*layouts_of(make_engine(**space), mixed, monkeypatch)]
    for speculator in speculating:
        steps = [*layouts_of(make_engine(speculator=speculator, **space), mixed, monkeypatch)]
        assert len(steps) == len(plain)
        for (mine, held), (theirs, plainly_held) in zip(steps, plain, strict=True):
            assert held == plainly_held
            assert len(mine.groups) == len(theirs.groups)
            for ours, other in zip(mine.arrays(()), theirs.arrays(()), strict=True):
                assert np.array_equal(ours, other)
            for group, other_group in zip(mine.groups, theirs.groups, strict=True):
                assert (group.start, group.end, group.by_slot, group.num_keys) == (
                    other_group.start,
                    other_group.end,
                    other_group.by_slot,
                    other_group.num_keys,
                )


def test_where_speculation_is_off_no_drafter_is_made(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a drafter was made")

    for name in ("NgramDrafter", "SuffixDrafter", "DraftModelDrafter", "AdaptiveSpeculator", "FixedSpeculator", "SmartSpec2024"):
        monkeypatch.setattr(speculators, name, refuse)
    engine = make_engine(speculation="off", draft_model="/nowhere")
    assert engine._speculator is None
    engine.add(request_of("s", [5, 9], max_tokens=3))
    run(engine)
    assert engine._draft_tasks == {}
    with pytest.raises(AssertionError, match="was made"):
        make_engine(speculation="adaptive")


@pytest.mark.parametrize("speculation", ["model:3", "staged:3"])
def test_without_its_draft_model_a_drafter_that_needs_one_is_left_out(speculation: str) -> None:
    own = EngineSettings.model_validate({"speculation": speculation, "draft_model": "elsewhere"})
    assert make_speculator(own, None) is None


# ---------------------------------------------------------------------- several steps under way


def test_requests_that_are_cancelled_under_way_leave_the_others_alone(
    tiny_llama: Path, mixed: Sequence[Request], plain: Mapping[str, Answer]
) -> None:
    """Over two stages their blocks have other holders at once, while drafts of theirs are still being verified."""
    texts = {request.request_id: [*request.prompt_token_ids, *plain[request.request_id].token_ids] for request in mixed}

    def leaves(task: DraftTask) -> DraftTree:  # right ones stand last: accepted ones have to be moved
        ahead = [*texts[task.sequence_id][len(task.token_ids) :], 3, 3]
        return DraftTree((50, ahead[0], 51, ahead[1]), (-1, -1, 1, 1))

    own = EngineSettings.model_validate(
        {"model": str(tiny_llama), "dtype": "float64", "block_tokens": 4, "kv_tokens": 140, "speculation": "off"}
    )
    model = open_model(own)
    with devices(2, own) as made:
        speculator = FixedSpeculator(DrafterOf(leaves), max_depth=4)
        replica = start("r-1", (2, 1), made, model, own, speculator=speculator)
        engine = replica.engine
        add_all(engine, mixed)
        got: dict[str, Answer] = {}
        cancelled = [request.request_id for request in mixed[1::3]]
        for step in range(1000):
            if not engine.has_work:
                break
            for output in engine.step().outputs:
                got.setdefault(output.request_id, Answer()).take(output)
            engine.check_integrity()
            if step % 4 == 3 and cancelled:
                engine.cancel(cancelled.pop())
        replica.end()
    left = {name: answer for name, answer in got.items() if answer.finish_reason is not None}
    assert len(left) >= COUNT - 4
    assert_same_answers(left, plain)
    assert sum(answer.accepted_tokens for answer in left.values()) > 10
    for name, answer in got.items():
        assert answer.token_ids == plain[name].token_ids[: len(answer.token_ids)]


def test_smartspec_counts_what_came_of_every_group(make_engine: MakeEngine) -> None:
    """Over two stages the next group is drafted for before the tokens of the one before it are known."""
    drafter = DrafterOf(lambda task: DraftTree.chain([5, 5, 5, 5]))

    def learned(order: Sequence[str]) -> float:
        smart = SmartSpec2024(drafter, max_depth=4)
        sampling = SamplingParams(max_tokens=99)
        for move in order:
            name = move[-1]
            if move.startswith("draft"):
                smart.propose([DraftTask(name, [5, 5], 4, sampling=sampling)], [4], prompt_rows=0, max_nodes=9)
            else:
                smart.observe_tokens(name, [7])
                smart.observe_step(StepSeen(1, 5, 4, 2, 8, 1, 0, 0.01))
        return smart._acceptance

    one_after_the_other = learned(["draft a", "observe a", "draft b", "observe b"])
    assert one_after_the_other < 0.7
    assert learned(["draft a", "draft b", "observe a", "observe b"]) == one_after_the_other
