"""Whoever drafts, and however much: the answer is that of plain decoding, token for token and value for value."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drafts import DrafterOf
from hypothesis import given, settings
from hypothesis import strategies as st
from replica_scene import devices, start
from speculation_scene import (
    KINDS,
    Answer,
    assert_same_answers,
    count_ties,
    make_mixed,
    one_by_one,
    save_llama,
    together,
)

from spotserve.config import EngineSettings
from spotserve.core.request import FinishReason, Request
from spotserve.engine.bring_up import load_draft_model
from spotserve.engine.draft_model import PagedDraftModel
from spotserve.engine.engine import Engine
from spotserve.engine.speculators import make_speculator, step_law
from spotserve.engine.weights import open_model
from spotserve.speculation.adaptive import AdaptiveSpeculator
from spotserve.speculation.drafter import Draft, Drafter, DraftTask, ModelDrafter
from spotserve.speculation.drafters.model import DraftModelDrafter
from spotserve.speculation.drafters.ngram import NgramDrafter
from spotserve.speculation.drafters.suffix import SuffixDrafter
from spotserve.speculation.fixed import FixedSpeculator
from spotserve.speculation.speculator import StepSeen
from spotserve.speculation.tree import ROOT, DraftTree

SMALL, SELF = "another model", "the target itself"
DRAFTERS = [
    ("ngram:4", None),
    ("suffix:6", None),
    ("model:3", SMALL),
    ("model:3", SELF),
    ("staged:4", SMALL),
    ("staged:4", SELF),
    ("adaptive", None),
    ("adaptive", SMALL),
    ("adaptive", SELF),
    ("smartspec-2024", None),
    ("smartspec-2024", SMALL),
]
TIGHT: Mapping[str, object] = {"block_tokens": 4, "kv_tokens": 140, "max_step_tokens": 40}
"""Evictions, chunked prompts and drafts across the borders of blocks."""
ROOMY: Mapping[str, object] = {"block_tokens": 4, "kv_tokens": 4096}
COUNT = 32


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "small-llama", seed=3)


@pytest.fixture(scope="session")
def draft_models(tiny_llama: Path, small_llama: Path) -> dict[str | None, str | None]:
    return {None: None, SMALL: str(small_llama), SELF: str(tiny_llama)}


@pytest.fixture(scope="session")
def mixed() -> list[Request]:
    return make_mixed(COUNT)


@pytest.fixture(scope="session")
def plain(make_engine: Callable[..., Engine], mixed: Sequence[Request]) -> dict[str, Answer]:
    """What each request gives when nothing is drafted and nobody else is there."""
    return one_by_one(make_engine(), mixed)


@pytest.fixture(autouse=True)
def no_failures(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that the engine could get over was hidden in the log."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_the_requests_test_something(mixed: Sequence[Request], plain: Mapping[str, Answer]) -> None:
    """They end in all ways, at all lengths, and the two choices of one prompt differ."""
    assert {answer.finish_reason for answer in plain.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    stopped = [name for name, answer in plain.items() if answer.finish_reason is FinishReason.STOP]
    assert {kind for kind in KINDS for name in stopped if name.endswith(f": {kind}")} >= {"stop", "end of text", "least length"}
    assert any(len(plain[name].token_ids) >= 2 for name in stopped if name.endswith(": stop"))
    assert plain["first choice"].token_ids != plain["second choice"].token_ids
    prompts = {request.request_id: request.prompt_token_ids for request in mixed}
    assert prompts["first choice"] == prompts["second choice"]


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize(("speculation", "draft_model"), DRAFTERS)
def test_the_answer_is_the_same_whoever_drafts(
    speculation: str,
    draft_model: str | None,
    batch: int,
    draft_models: Mapping[str | None, str | None],
    mixed: Sequence[Request],
    plain: Mapping[str, Answer],
    make_engine: Callable[..., Engine],
) -> None:
    """Alone, a few at a time, and all at once where memory is short, so that sequences are evicted and come back."""
    space = TIGHT if batch == COUNT else ROOMY
    engine = make_engine(speculation=speculation, draft_model=draft_models[draft_model], **space)
    requests = mixed if batch > 1 else [*mixed[: len(KINDS)], *mixed[-2:]]
    got = together(engine, requests, batch=batch)
    assert_same_answers(got, plain)
    assert len(got) == len(requests)
    if speculation != "adaptive" and (batch > 1 or draft_model is not None):  # the adaptive one goes by what it measures
        assert sum(answer.draft_tokens for answer in got.values()) > 0, "nothing was drafted: nothing was tested"
    if batch == COUNT:
        assert sum(output.recomputed_tokens for answer in got.values() for output in answer.outputs) > 0, "nothing was evicted"


@pytest.mark.parametrize("space", ["roomy", "tight", "cached"])
@pytest.mark.parametrize("speculation", ["model:3", "staged:4", "smartspec-2024"])
def test_a_draft_model_that_is_the_target_is_always_right(
    speculation: str,
    space: str,
    tiny_llama: Path,
    mixed: Sequence[Request],
    plain: Mapping[str, Answer],
    make_engine: Callable[..., Engine],
) -> None:
    """Its keys and values are thus those of the text, through evictions, hits of the prefix cache, chunks of prompts and borders of
    blocks; and it samples as the target does, noise and penalties included. Refused drafts: test_engine_draft_model."""
    spaces = {"roomy": ROOMY, "tight": TIGHT, "cached": {"block_tokens": 4, "kv_tokens": 1200, "max_step_tokens": 40}}
    engine = make_engine(speculation=speculation, draft_model=str(tiny_llama), max_batch=12, **spaces[space])
    got = together(engine, mixed, batch=COUNT)
    if space == "cached":
        got = together(engine, mixed, batch=COUNT)
        assert sum(output.cached_tokens for answer in got.values() for output in answer.outputs) > 0
    assert_same_answers(got, plain)
    drafted = 0
    for answer in got.values():
        for output in answer.outputs:
            if output.finish_reason is None:
                assert output.accepted_tokens == output.draft_tokens, output
            drafted += output.draft_tokens
    assert drafted > COUNT


@pytest.mark.parametrize(
    ("speculation", "draft_model"), [("model:3", SMALL), ("staged:4", SELF), ("adaptive", SMALL), ("suffix:6", None)]
)
def test_in_float32_answers_differ_at_near_ties_at_most(
    speculation: str,
    draft_model: str | None,
    draft_models: Mapping[str | None, str | None],
    mixed: Sequence[Request],
    make_engine: Callable[..., Engine],
    record_property: Callable[[str, object], None],
) -> None:
    """And where products can be packed, at none."""
    expected = one_by_one(make_engine(dtype="float32"), mixed)
    engine = make_engine(speculation=speculation, draft_model=draft_models[draft_model], dtype="float32", **TIGHT)
    ties = count_ties(together(engine, mixed, batch=COUNT), expected, "float32")
    record_property("tie_flips", ties)
    print(f"{speculation}: {ties} tie flips in {COUNT} answers, none altered")
    if torch.backends.mkldnn.is_available():
        assert ties == 0


def test_drafts_do_not_change_what_comes_out_of_two_stages(
    tiny_llama: Path,
    small_llama: Path,
    mixed: Sequence[Request],
    plain: Mapping[str, Answer],
) -> None:
    """Two steps under way at once, each with drafts of its own, and KV that the leader moves on both ranks."""
    for speculation, draft_model in (
        ("staged:4", small_llama),
        ("adaptive", tiny_llama),
        ("smartspec-2024", None),
        ("suffix:6", None),
    ):
        own = EngineSettings.model_validate(
            {
                "model": str(tiny_llama),
                "dtype": "float64",
                "speculation": speculation,
                "draft_model": None if draft_model is None else str(draft_model),
                **TIGHT,
            }
        )
        model = open_model(own)
        speculator = make_speculator(own, load_draft_model(own, model.catalogue.spec))
        with devices(2, own) as made:
            replica = start("r-1", (2, 1), made, model, own, speculator=speculator)
            got = together(replica.engine, mixed, batch=COUNT)
            replica.end()
        assert_same_answers(got, plain)
        assert sum(answer.accepted_tokens for answer in got.values()) > 0


class Forest:
    """Trees of all shapes around the answers that it knows: branches, leaves beside a trunk, twins, wrong and right nodes."""

    def __init__(self, requests: Sequence[Request], plain: Mapping[str, Answer], *, seed: int, shape: str) -> None:
        self._texts = {
            request.request_id: [*request.prompt_token_ids, *plain[request.request_id].token_ids] for request in requests
        }
        self._chance = random.Random(seed)
        self._shape = shape

    def draft(self, task: DraftTask) -> DraftTree:
        """Right where chance has it; beyond the answer's end, anything."""
        chance, ahead = self._chance, self._texts[task.sequence_id][len(task.token_ids) :]
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        for node in range(chance.randint(0, 9)):
            match self._shape:
                case "chain":
                    parent = node - 1
                case "leaves":  # as a draft model says them: the chain first, then second choices beside it
                    parent = node - 1 if node < 5 else chance.randint(ROOT, 3)
                case "twins":
                    parent = parents[chance.randrange(node)] if node and chance.random() < 0.5 else node - 1
                case _:
                    parent = chance.randint(ROOT, node - 1)
            depth = 0 if parent == ROOT else depths[parent] + 1
            is_right = depth < len(ahead) and chance.random() < 0.75
            tokens.append(ahead[depth] if is_right else chance.randrange(96))
            parents.append(parent)
            depths.append(depth)
        return DraftTree(tuple(tokens), tuple(parents))


@settings(max_examples=24, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from(["any", "chain", "leaves", "twins"]),
    count=st.integers(1, COUNT),
    block_tokens=st.sampled_from([1, 3, 4, 16]),
    max_step_tokens=st.sampled_from([16, 40, 256]),
)
def test_any_tree_gives_the_same_answer(
    seed: int,
    shape: str,
    count: int,
    block_tokens: int,
    max_step_tokens: int,
    mixed: Sequence[Request],
    plain: Mapping[str, Answer],
    make_engine: Callable[..., Engine],
) -> None:
    """In any batch, with any room in blocks and steps, and whatever is right in it."""
    requests = random.Random(seed).sample(mixed, count)
    forest = Forest(requests, plain, seed=seed, shape=shape)
    engine = make_engine(
        speculator=FixedSpeculator(DrafterOf(forest.draft), max_depth=9),
        block_tokens=block_tokens,
        max_step_tokens=max_step_tokens,
        kv_tokens=192,
    )
    got = together(engine, requests, batch=count)
    assert len(got) == count
    assert_same_answers(got, plain)
    assert sum(answer.draft_tokens for answer in got.values()) > 0


class Whimsical:
    """Of every draft any part that hangs together, as an auction might leave it."""

    def __init__(self, drafter: Drafter, *, seed: int) -> None:
        self.name = drafter.name
        self._drafter, self._chance = drafter, random.Random(seed)
        self.kept: list[DraftTree] = []

    def propose(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        """Parts of the inner drafter's trees."""
        return [self._part(draft) for draft in self._drafter.propose(tasks)]

    def _part(self, draft: Draft) -> Draft:
        nodes: list[int] = []
        for node, parent in enumerate(draft.tree.parents):
            if (parent == ROOT or parent in nodes) and self._chance.random() < 0.8:
                nodes.append(node)
        self.kept.append(draft.tree.keep(nodes))
        return Draft(self.kept[-1], tuple(draft.confidences[node] for node in nodes))

    def forget(self, sequence_id: str, token_ids: Sequence[int]) -> None:
        """As the inner one."""
        self._drafter.forget(sequence_id, token_ids)


def tight_draft_model(target: Path, draft_model: str | None) -> PagedDraftModel:
    """Beside a target with little room, and with as little itself."""
    settings = {"model": str(target), "dtype": "float64", "speculation": "adaptive", "draft_model": draft_model, **TIGHT}
    own = EngineSettings.model_validate(settings)
    model = load_draft_model(own, open_model(own).catalogue.spec)
    assert model is not None
    return model


@pytest.mark.parametrize("draft_model", [SMALL, SELF])
def test_second_choices_beside_the_first_change_no_answer(
    draft_model: str,
    draft_models: Mapping[str | None, str | None],
    tiny_llama: Path,
    mixed: Sequence[Request],
    plain: Mapping[str, Answer],
    make_engine: Callable[..., Engine],
) -> None:
    """A draft model's trees, whole branches of which an auction leaves out: accepted leaves are moved to their places."""
    model = tight_draft_model(tiny_llama, draft_models[draft_model])
    drafter = Whimsical(DraftModelDrafter(model, first_stage=NgramDrafter()), seed=5)
    engine = make_engine(speculator=FixedSpeculator(drafter, max_depth=4), **TIGHT)
    got = together(engine, mixed, batch=COUNT)
    assert_same_answers(got, plain)
    assert sum(not tree.is_chain for tree in drafter.kept) > COUNT
    assert sum(answer.accepted_tokens for answer in got.values()) > 0
    model.check_integrity()
    assert model.kv_tokens_used == 0


class AnyTimes(AdaptiveSpeculator):
    """The adaptive speculator on a machine whose times mean nothing."""

    def __init__(self, drafters: Sequence[Drafter], model: ModelDrafter, *, seed: int) -> None:
        self._chance = random.Random(seed)
        self._now_s = 0.0
        super().__init__(drafters, model, law=step_law("cpu"), clock=self._tell)

    def _tell(self) -> float:
        self._now_s += 10 ** self._chance.uniform(-7, -3)
        return self._now_s

    def observe_step(self, seen: StepSeen) -> None:
        """After any time."""
        super().observe_step(replace(seen, step_s=10 ** self._chance.uniform(-4, -1)))


@pytest.mark.parametrize("draft_model", [SMALL, SELF])
def test_whatever_the_adaptive_speculator_measures_the_answer_is_the_same(
    draft_model: str,
    draft_models: Mapping[str | None, str | None],
    tiny_llama: Path,
    mixed: Sequence[Request],
    plain: Mapping[str, Answer],
    make_engine: Callable[..., Engine],
) -> None:
    """Times at random lead it through all that it can decide: who drafts, how deep, which nodes, probes and pauses."""
    model = tight_draft_model(tiny_llama, draft_models[draft_model])
    drafters: set[str] = set()
    for seed in range(4):
        members = (NgramDrafter(), SuffixDrafter())
        speculator = AnyTimes(members, DraftModelDrafter(model, first_stage=NgramDrafter()), seed=seed)
        engine = make_engine(speculator=speculator, **(TIGHT if seed % 2 else ROOMY))
        got = together(engine, mixed, batch=COUNT if seed % 2 else 9)
        assert_same_answers(got, plain)
        drafters |= {output.drafter for answer in got.values() for output in answer.outputs}
        model.check_integrity()
        assert model.kv_tokens_used == 0
    assert drafters >= {"staged", "", "suffix"} or drafters >= {"staged", "", "ngram"}
