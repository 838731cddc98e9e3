"""Records what drafters would draft at every place of real answers, for tests that play a speculator without torch.

    OMP_NUM_THREADS=1 python benchmarks/record_drafts.py [--out tests/speculation/data/recorded_drafts.bin]

The target that ships answers pieces of three kinds of text, every second one greedily and the others at a temperature. At each
place prompt lookup, suffix decoding and the draft model that ships draft up to eight tokens from what the target said so far. What
a step and a pass take is measured in the same process. Takes two minutes on one core.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
from scipy.optimize import nnls

from spotserve.bench.recorded_drafts import SURE, RecordedAnswer, RecordedGuesses, Recording
from spotserve.bench.step_cost import KV_TOKENS, MOST_ROWS, MOST_SEQUENCES, measure_step_cost
from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.request import Request, SamplingParams
from spotserve.demo.kinds import texts_by_kind
from spotserve.engine.bring_up import load_draft_model, lone_engine
from spotserve.engine.engine import Engine
from spotserve.gateway.tokenizer import load_tokenizer
from spotserve.speculation.cost import PassCost
from spotserve.speculation.drafter import Drafter, DraftTask
from spotserve.speculation.drafters.model import DraftModelDrafter
from spotserve.speculation.drafters.ngram import NgramDrafter
from spotserve.speculation.drafters.suffix import SuffixDrafter

DRAFT_MODEL = DEMO_MODEL.parent / "draft"
OUT = Path("tests/speculation/data/recorded_drafts.bin")
DEPTH = 8
PROMPT_TOKENS = 96
PLACES = 96
ANSWERS_PER_KIND = 40
TEMPERATURE = 0.7
BATCHES = (1, 2, 4, 8, 16, 32)
REPEATS = 5


def prompts(texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Pieces of the texts, one of each in turn."""
    for start in range(0, max(map(len, texts)) - PROMPT_TOKENS, PROMPT_TOKENS):
        for text in texts:
            if start + PROMPT_TOKENS <= len(text):
                yield tuple(text[start : start + PROMPT_TOKENS])


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """What the target says."""
    said: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            said[output.request_id].extend(output.token_ids)
    return list(said.values())


def guesses(drafter: Drafter, requests: Sequence[Request], said: Sequence[Sequence[int]]) -> list[RecordedGuesses]:
    """Of one drafter, at each place of each answer. All requests go along together; answers are learned from as they end."""
    tasks = [
        DraftTask(
            sequence_id=request.request_id,
            token_ids=[*request.prompt_token_ids, *tokens[:1]],
            max_depth=DEPTH,
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=request.sampling,
        )
        for request, tokens in zip(requests, said, strict=True)
    ]
    found: list[tuple[list[int], list[int], list[int]]] = [([], [], []) for _ in tasks]
    for place in range(1, PLACES + 1):
        for draft, tokens, (lengths, accepted, confidences) in zip(drafter.propose(tasks), said, found, strict=True):
            assert draft.tree.is_chain
            ahead = zip(draft.tree.token_ids, tokens[place:], strict=False)
            lengths.append(len(draft.tree))
            accepted.append(sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ahead)))
            confidences.extend(round(SURE * min(1.0, max(0.0, confidence))) for confidence in draft.confidences)
        for task, tokens in zip(tasks, said, strict=True):
            task.token_ids.append(tokens[place])  # type: ignore[attr-defined] -- the list made above
    for task in tasks:
        drafter.forget(task.sequence_id, task.token_ids)
    return [
        RecordedGuesses(lengths=bytes(lengths), accepted=bytes(accepted), confidences=bytes(confidences))
        for lengths, accepted, confidences in found
    ]


def host_cost(drafter: Drafter, token_ids: Sequence[int]) -> PassCost:
    """Seconds per sequence of a drafter without a model, as a text goes on."""
    known = list(token_ids[:PROMPT_TOKENS])
    task = DraftTask("timed", known, max_depth=DEPTH)
    drafter.propose([task])
    seconds = []
    for token_id in token_ids[PROMPT_TOKENS:]:
        known.append(token_id)
        started_s = perf_counter()
        drafter.propose([task])
        seconds.append(perf_counter() - started_s)
    drafter.forget("timed", ())
    return PassCost(0.0, 0.0, float(np.median(seconds)))


def model_cost(drafter: DraftModelDrafter, token_ids: Sequence[int]) -> PassCost:
    """Of the draft model, from drafts of several lengths for several sequences."""
    work, quickest_s = [], []
    for batch, depth in itertools.product(BATCHES, (1, 2, DEPTH)):
        known = [[*token_ids[: PROMPT_TOKENS - 1], token_ids[index]] for index in range(batch)]
        tasks = [DraftTask(f"{batch}-{depth}-{index}", each, max_depth=depth) for index, each in enumerate(known)]
        drafter.propose(tasks)
        seconds = []
        for token_id in token_ids[PROMPT_TOKENS : PROMPT_TOKENS + REPEATS]:
            for each in known:
                each.append(token_id)
            started_s = perf_counter()
            drafter.propose(tasks)
            seconds.append(perf_counter() - started_s)
        work.append((1.0, drafter.work.passes, drafter.work.rows))
        quickest_s.append(min(seconds))
        for task in tasks:
            drafter.forget(task.sequence_id, ())
    fitted, _ = nnls(np.array(work) / np.array(quickest_s)[:, None], np.ones(len(work)))
    return PassCost(*map(float, fitted))


def main() -> None:
    """Records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    room = {"max_batch": MOST_SEQUENCES, "max_step_tokens": MOST_ROWS, "kv_tokens": KV_TOKENS, "prefix_cache": True}
    settings = EngineSettings(model=str(DEMO_MODEL), draft_model=str(DRAFT_MODEL), speculation="off", **room)
    engine = lone_engine(settings)
    model = load_draft_model(settings.model_copy(update={"speculation": "adaptive"}), engine.spec)
    assert model is not None
    drafters = (NgramDrafter(), SuffixDrafter(), DraftModelDrafter(model, second_choices=False))
    tokenizer = load_tokenizer(str(DEMO_MODEL))
    recorded: list[RecordedAnswer] = []
    for kind, texts in texts_by_kind().items():
        pieces = list(
            itertools.islice(prompts([tokenizer.encode(text, add_special_tokens=False) for text in texts]), ANSWERS_PER_KIND)
        )
        for start in range(0, len(pieces), 8):
            requests = [
                Request(
                    request_id=f"{kind}-{start + index}",
                    prompt_token_ids=piece,
                    sampling=SamplingParams(
                        max_tokens=PLACES + DEPTH + 1,
                        temperature=TEMPERATURE if index % 2 else 0.0,
                        seed=start + index,
                        ignore_eos=True,
                    ),
                )
                for index, piece in enumerate(pieces[start : start + 8])
            ]
            said = answers(engine, requests)
            by_drafter = {drafter.name: guesses(drafter, requests, said) for drafter in drafters}
            recorded += [
                RecordedAnswer(
                    kind=kind,
                    prompt_tokens=len(request.prompt_token_ids),
                    guesses={name: found[index] for name, found in by_drafter.items()},
                )
                for index, request in enumerate(requests)
            ]
    sample = [*pieces[0], *pieces[1], *pieces[2]]
    ngram, suffix, draft_model = drafters
    recording = Recording(
        target=engine.spec.name,
        model=draft_model.name,
        step=measure_step_cost(engine).cost,
        drafting={
            ngram.name: host_cost(ngram, sample),
            suffix.name: host_cost(suffix, sample),
            draft_model.name: model_cost(draft_model, sample),
        },
        answers=recorded,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    data = recording.encode()
    arguments.out.write_bytes(data)
    print(f"{len(recorded)} answers, {sum(answer.places for answer in recorded)} places, {len(data):,} bytes")
    print(recording.step)
    for name, cost in recording.drafting.items():
        drafted = sum(sum(answer.guesses[name].lengths) for answer in recorded)
        right = sum(sum(answer.guesses[name].accepted) for answer in recorded)
        print(f"{name}: {cost}; {drafted} tokens drafted, {right} right")


if __name__ == "__main__":
    main()
