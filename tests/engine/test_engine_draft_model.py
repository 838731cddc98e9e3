"""A draft model and its cache: whatever became of its drafts, it says what it would say if it saw the text for the first time."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_scene import KINDS, VOCABULARY_SIZE, request_of, run, save_llama

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.request import SamplingParams
from spotserve.engine.bring_up import load_draft_model
from spotserve.engine.draft_model import PagedDraftModel
from spotserve.engine.engine import Engine
from spotserve.engine.sampler import Sampler, SamplingRow, truncates
from spotserve.engine.weights import open_model
from spotserve.speculation.drafter import Draft, DraftTask
from spotserve.speculation.drafters.model import MOST_REBUILT_TOKENS, Continuation, DraftModelDrafter
from spotserve.speculation.drafters.ngram import NgramDrafter

DEPTH = 5
SAMPLED = [
    SamplingParams(max_tokens=500, temperature=0.0),
    SamplingParams(max_tokens=500, temperature=0.9, seed=5, top_p=0.8),
    SamplingParams(max_tokens=500, temperature=0.7, seed=6, repetition_penalty=1.3, frequency_penalty=0.5),
]


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "long-llama", seed=8, context_tokens=1024)


MakeModel = Callable[..., PagedDraftModel]


@pytest.fixture(scope="module")
def make_model(tiny_llama: Path) -> MakeModel:
    """The tiny Llama as a draft model, in float64 and with blocks of 4 tokens."""

    def make(path: Path = tiny_llama, **changes: object) -> PagedDraftModel:
        given = {"dtype": "float64", "block_tokens": 4, "kv_tokens": 1024, "speculation": "model:3", **changes}
        own = EngineSettings.model_validate({"model": str(path), "draft_model": str(path), **given})
        model = load_draft_model(own, open_model(own).catalogue.spec)
        assert model is not None
        return model

    return make


def task_of(
    text: Sequence[int], sampling: SamplingParams = SAMPLED[0], *, name: str = "s", prompt: int = 3, depth: int = DEPTH
) -> DraftTask:
    return DraftTask(name, text, depth, num_prompt_tokens=prompt, sampling=sampling)


def guessed(draft: Draft) -> tuple[int, ...]:
    return draft.tree.token_ids[: draft.tree.trunk]


def assert_like(mine: Draft, fresh: Draft) -> None:
    assert mine.tree == fresh.tree
    assert mine.confidences == pytest.approx(fresh.confidences, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("staged", [False, True])
def test_a_draft_is_how_the_model_goes_on_by_itself(
    kind: str, staged: bool, make_model: MakeModel, make_engine: Callable[..., Engine]
) -> None:
    """For every way of sampling, noise, penalties and forbidden ends included; and whatever is proposed to it."""
    request = request_of("s", (5, 9, 13, 40, 5, 9, 13), seed=9, **{**KINDS[kind], "max_tokens": 16, "ignore_eos": True})
    engine = make_engine()
    engine.add(request)
    answer = run(engine)["s"].token_ids
    model = make_model()
    drafter = DraftModelDrafter(model, first_stage=NgramDrafter() if staged else None, second_choices=False)
    banned = tuple(sorted({1, 2, *request.sampling.stop_token_ids}))
    for known in range(len(answer)):
        text = [*request.prompt_token_ids, *answer[:known]]
        task = DraftTask(
            "s", text, 6, num_prompt_tokens=len(request.prompt_token_ids), sampling=request.sampling, banned_token_ids=banned
        )
        (draft,) = drafter.propose([task])
        assert list(draft.tree.token_ids)[: len(answer) - known] == answer[known : known + 6]
        model.check_integrity()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), staged=st.booleans(), kv_tokens=st.sampled_from([64, 96, 1024]))
def test_what_was_drafted_before_changes_no_draft(seed: int, staged: bool, kv_tokens: int, make_model: MakeModel) -> None:
    """Texts that follow a draft as far as chance will have it, several at once, in and out of a cache that is often too small:
    whoever gets a draft gets the one that a cache would give which has seen nothing before."""
    chance = random.Random(seed)
    model = make_model(kv_tokens=kv_tokens)
    drafter = DraftModelDrafter(model, first_stage=NgramDrafter() if staged else None)
    fresh_model = make_model()
    fresh = DraftModelDrafter(fresh_model)
    texts = {name: [chance.randrange(VOCABULARY_SIZE) for _ in range(chance.randint(3, 12))] for name in "abcd"}
    drafted = 0
    for _ in range(8):
        names = chance.sample("abcd", chance.randint(1, 4))
        tasks = [task_of(texts[name], SAMPLED[ord(name) % 3], name=name, depth=chance.randint(1, DEPTH)) for name in names]
        assert all(model.lag(task) >= 1 for task in tasks)
        drafts = drafter.propose(tasks)
        model.check_integrity()
        for task, draft in zip(tasks, drafts, strict=True):
            trunk = draft.tree.trunk if draft.tree else 0
            if trunk:
                (expected,) = fresh.propose([task])
                assert guessed(draft) == guessed(expected)[:trunk]
                assert draft.confidences[:trunk] == pytest.approx(expected.confidences[:trunk], abs=1e-6)
                if trunk == expected.tree.trunk:
                    assert_like(draft, expected)
                drafted += 1
            fresh.forget(task.sequence_id, ())
            right = chance.randint(0, trunk)
            texts[task.sequence_id] += guessed(draft)[:right]
            if chance.random() < 0.8 or not right:
                texts[task.sequence_id].append(chance.randrange(VOCABULARY_SIZE))
        if chance.random() < 0.2:
            drafter.forget(names[0], texts[names[0]])
    assert drafted > 0
    assert kv_tokens < 1024 or drafted > 5
    for name in texts:
        drafter.forget(name, ())
    model.check_integrity()
    assert model.kv_tokens_used == 0


def test_the_lag_is_what_it_has_to_compute(make_model: MakeModel) -> None:
    """The whole text at first, a token after a refusal, two after all were accepted, and one also where fewer were verified than
    were drafted."""
    model = make_model()
    drafter = DraftModelDrafter(model, second_choices=False)
    text = [5, 9, 13, 40]
    assert model.lag(task_of(text)) == 4
    (draft,) = drafter.propose([task_of(text)])
    assert model.lag(task_of([*text, (draft.tree.token_ids[0] + 1) % VOCABULARY_SIZE])) == 1
    assert model.lag(task_of([*text, *draft.tree.token_ids, 7])) == 2
    assert model.lag(task_of([*text, *draft.tree.token_ids[:2]])) == 1
    drafter.forget("s", text)
    assert model.lag(task_of(text)) == 4


def test_forgetting_frees_every_block(make_model: MakeModel) -> None:
    model = make_model(kv_tokens=64)
    drafter = DraftModelDrafter(model)
    drafter.propose([task_of([5] * 9, name="a"), task_of([6] * 17, name="b")])
    assert model.kv_tokens_used == 16 + 24
    drafter.forget("a", ())
    drafter.forget("nobody", ())
    model.check_integrity()
    assert model.kv_tokens_used == 24
    drafter.forget("b", ())
    assert model.kv_tokens_used == 0


def test_a_cache_too_small_for_all_drafts_for_some(make_model: MakeModel) -> None:
    """A draft in the making keeps its room to the end of the step: it ends early where more is missing, and is never wrong."""
    model = make_model(kv_tokens=64)
    drafter = DraftModelDrafter(model, second_choices=False)
    tasks = [task_of([5 + number, 9, 13, *range(20, 37)], name=f"{number}") for number in range(5)]
    alone = [DraftModelDrafter(make_model(), second_choices=False).propose([task])[0] for task in tasks]
    for _ in range(3):
        drafts = drafter.propose(tasks)
        model.check_integrity()
        assert [len(draft.tree) for draft in drafts] == [DEPTH, 1, 1, 0, 0]
        assert [draft.tree for draft in drafts] == [
            full.tree.cut(len(draft.tree)) for full, draft in zip(alone, drafts, strict=True)
        ]
    assert [model.lag(task) for task in tasks] == [1, 1, 1, 20, 20], "the first three wait in the cache"
    assert drafter.propose(tasks[3:]) == alone[3:], "those who do not draft any more give way"


def test_who_finds_no_room_takes_none_from_others(make_model: MakeModel) -> None:
    """Nobody gives way in vain: not to a text that is longer than the cache, and not where drafts in the making hold the rest."""
    model = make_model(kv_tokens=64)
    drafter = DraftModelDrafter(model, second_choices=False)
    small, large, huge = [5] * 9, [6] * 40, [7] * 70
    assert len(drafter.propose([task_of(small, name="small")])[0].tree) == DEPTH
    assert drafter.propose([task_of(huge, name="huge")])[0].tree.token_ids == ()
    assert model.lag(task_of(small, name="small")) == 1
    assert len(drafter.propose([task_of(large, name="large")])[0].tree) == DEPTH
    assert drafter.propose([task_of(large, name="large"), task_of([8] * 30, name="other")])[1].tree.token_ids == ()
    assert model.lag(task_of(small, name="small")) == 1
    model.check_integrity()


def test_a_pass_for_nobody_is_none(make_model: MakeModel) -> None:
    """What passes take is learned from their times: one that found room for nobody, and computed nothing, would teach nonsense."""
    drafter = DraftModelDrafter(make_model(kv_tokens=64))
    drafter.propose([task_of([7] * 70, name="huge")])
    assert drafter.work == (0, 0)
    drafter.propose([task_of([7] * 9), task_of([7] * 70, name="huge")])
    assert drafter.work.passes == DEPTH
    assert drafter.work.rows >= 9 + DEPTH - 1


def test_a_draft_ends_where_there_is_no_more_room(make_model: MakeModel) -> None:
    """In the cache, or in the draft model's context, which may be shorter than the target's."""
    drafter = DraftModelDrafter(make_model(kv_tokens=64), second_choices=False)
    (draft,) = drafter.propose([task_of([5] * 62, depth=8)])
    assert len(draft.tree) == 3
    assert drafter.propose([task_of([5] * 65)])[0].tree.token_ids == ()
    drafter = DraftModelDrafter(make_model(), second_choices=False)
    (draft,) = drafter.propose([task_of([5] * 254, depth=8)])
    assert len(draft.tree) == 3


def test_a_long_text_is_computed_in_slices_while_others_draft(make_model: MakeModel, long_llama: Path) -> None:
    model = make_model(long_llama, kv_tokens=2048)
    drafter = DraftModelDrafter(model, second_choices=False)
    long = [3 + (7 * place * place) % 90 for place in range(2 * MOST_REBUILT_TOKENS + 80)]
    short = [5, 9, 13]
    lags, drafted = [], []
    for _ in range(3):
        tasks = [task_of(long, name="long"), task_of(short, name="short")]
        lags.append(model.lag(tasks[0]))
        of_long, of_short = drafter.propose(tasks)
        model.check_integrity()
        drafted.append(len(of_long.tree))
        assert len(of_short.tree) == DEPTH, "the long one holds the short one up"
        short += of_short.tree.token_ids[:2]
        long.append(8)
    assert drafted == [0, 0, DEPTH]
    assert lags == [len(long) - 3, len(long) - 2 - MOST_REBUILT_TOKENS, len(long) - 1 - 2 * MOST_REBUILT_TOKENS]
    (expected,) = DraftModelDrafter(make_model(long_llama, kv_tokens=2048)).propose([task_of(long[:-1], name="fresh", depth=1)])
    assert expected.tree.token_ids == (), "a fresh one has not come so far in a step"


def test_a_pass_that_fails_leaves_the_books_in_order(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys count as computed only where they were: the next draft is that of a fresh cache."""
    model = make_model()
    drafter = DraftModelDrafter(model, second_choices=False)
    tasks = [task_of([5, 9, 13, 40], name="a"), task_of([6, 9, 13], SAMPLED[1], name="b")]
    drafter.propose(tasks)
    compute, calls = model._compute, []

    def fail_late(entries: object) -> object:
        calls.append(entries)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return compute(entries)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "_compute", fail_late)
    with pytest.raises(RuntimeError, match="memory"):
        drafter.propose([task_of([5, 9, 13, 40, 50], name="a"), task_of([6, 9, 13, 51], SAMPLED[1], name="b")])
    model.check_integrity()
    later = [task_of([5, 9, 13, 40, 50, 60, 61], name="a"), task_of([6, 9, 13, 51, 52], SAMPLED[1], name="b")]
    assert drafter.propose(later) == DraftModelDrafter(make_model(), second_choices=False).propose(later)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), kinds=st.lists(st.sampled_from([*KINDS.values()]), min_size=1, max_size=5), coarse=st.booleans())
def test_the_best_of_two_is_what_sampling_chooses(seed: int, kinds: list[dict[str, object]], coarse: bool) -> None:
    """And the second is what it would choose if the best were impossible; among equals the lowest, as everywhere."""
    vocabulary = 40
    sampler = Sampler(vocabulary_size=vocabulary, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(kinds), vocabulary, generator=generator, dtype=torch.float64) * 3
    if coarse:
        logits = logits.round()
    rows = [row_of({**kind, "seed": seed + number, "logit_bias": {7: 2.0}}) for number, kind in enumerate(kinds)]
    best = sampler.two_best(logits, rows)
    assert [first for first, _, _, _ in best] == [token.token_id for token in sampler.sample(logits, rows)]
    for number, (first, share, second, second_share) in enumerate(best):
        assert 0 <= second_share <= share <= 1
        assert share + second_share <= 1 + 1e-12
        if not truncates(rows[number].sampling):  # else it would let in who was cut off
            without = row_of({**kinds[number], "seed": seed + number, "logit_bias": {7: 2.0, first: -torch.inf}})
            assert second == sampler.sample(logits[number : number + 1], [without])[0].token_id


def row_of(kind: dict[str, object]) -> SamplingRow:
    sampling = SamplingParams(**{"max_tokens": 99, **kind})  # type: ignore[arg-type]
    return SamplingRow(sampling, 4, (5, 6), (7, 8, 7, 9), (1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_of_plainly_greedy_rows_the_lowest_of_equals_is_best(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randint(-9, 9, (20, 3000), generator=generator).to(dtype)
    sampler = Sampler(vocabulary_size=3000, device=torch.device("cpu"))
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    expected = [token.token_id for token in sampler.sample(logits, [SamplingRow(greedy, 0)] * 20)]
    assert [first for first, _, _, _ in sampler.two_best(logits, None)] == expected


def test_without_passes_nothing_is_run(make_model: MakeModel) -> None:
    """Nobody has room: no pass, no rows, no answer."""
    model = make_model(kv_tokens=64)
    assert model.run([Continuation(task_of([5] * 70))]) == [None]
    assert model.rows == 0
    model.check_integrity()


def test_another_vocabulary_is_refused(tiny_llama: Path) -> None:
    own = EngineSettings.model_validate({"draft_model": str(tiny_llama), "speculation": "model:3"})
    with pytest.raises(ModelError, match="tokenizer"):
        load_draft_model(own, open_model(own).catalogue.spec)


@pytest.mark.parametrize("speculation", ["off", "ngram:3", "suffix:3"])
def test_a_draft_model_that_nobody_uses_is_not_loaded(speculation: str, tiny_llama: Path, make_model: MakeModel) -> None:
    own = EngineSettings.model_validate({"model": str(tiny_llama), "draft_model": "/nowhere", "speculation": speculation})
    assert load_draft_model(own, open_model(own).catalogue.spec) is None
