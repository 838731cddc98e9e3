"""How well a drafter guesses a target's answers: what it would have drafted at every place of them, and how far that is right.

Greedy and teacher-forced: at each place the drafter sees what the target said so far, and guesses on. From that follows what it is
worth at any length, without running any: a step begins where the last one ended, and takes the guess that was made there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter

from spotserve.core.errors import ModelError
from spotserve.core.request import Request, SamplingParams
from spotserve.engine.engine import Engine
from spotserve.speculation.drafter import Drafter, DraftTask
from spotserve.speculation.drafters.ngram import NgramDrafter
from spotserve.speculation.drafters.suffix import SuffixDrafter
from spotserve.speculation.tree import DraftTree
from spotserve.speculation.verify import accept

HOST_DRAFTERS = ("ngram", "suffix")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the target said to a prompt."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Guess:
    """At one place of an answer."""

    drafted: tuple[int, ...]
    """Tokens of the draft by depth, from 1 on."""
    accepted: int
    """Depth to which the target says the same; what comes after the end of the answer is not known, and counts as wrong."""


@dataclass(frozen=True, slots=True)
class Worth:
    """What a drafter brings; fields as in `speculation.advisor.DraftProfile`."""

    acceptance: tuple[float, ...]
    tokens_by_length: tuple[float, ...]
    drafted_by_length: tuple[float, ...]


def worth(guesses: Sequence[Sequence[Guess]], depth: int) -> Worth:
    """Of guesses at every place of some answers, from the second token on: the first one comes with the prompt."""
    acceptance = []
    for at in range(depth):
        tried = [guess.accepted > at for each in guesses for guess in each[: len(each) - at] if guess.accepted >= at]
        acceptance.append(fmean(tried) if tried else 0.0)
    played = [_played(guesses, length) for length in range(depth + 1)]
    return Worth(tuple(acceptance), tuple(tokens for tokens, _ in played), tuple(drafted for _, drafted in played))


def _played(guesses: Sequence[Sequence[Guess]], length: int) -> tuple[float, float]:
    """Tokens and drafted tokens per step, where at most `length` are drafted.

    Steps that could reach beyond the end of an answer are left out: what they would have brought is not known.
    """
    tokens, drafted = [], []
    for of_answer in guesses:
        at = 0
        while at + length < len(of_answer):
            kept = min(of_answer[at].accepted, length) + 1
            tokens.append(kept)
            drafted.append(sum(of_answer[at].drafted[:length]))
            at += kept
    return (fmean(tokens), fmean(drafted)) if tokens else (1.0, float(length))


def model_guesses(engine: Engine, answers: Sequence[Answer], depth: int) -> list[list[Guess]]:
    """Of a draft model: its greedy continuation at every place, all places together in batches.

    The engine keeps prefixes, so that a place costs little more than its own tokens.
    """
    sampling = SamplingParams(max_tokens=depth, temperature=0.0, ignore_eos=True)
    said: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        for place in range(1, len(answer.token_ids)):
            name = f"{index}/{place}"
            said[name] = []
            prompt = (*answer.prompt_token_ids, *answer.token_ids[:place])
            engine.add(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work:
        for output in engine.step().outputs:
            said[output.request_id].extend(output.token_ids)
    return [
        [_guess(DraftTree.chain(said[f"{index}/{place}"]), answer, place, depth) for place in range(1, len(answer.token_ids))]
        for index, answer in enumerate(answers)
    ]


def host_guesses(drafter: Drafter, answers: Sequence[Answer], depth: int) -> tuple[list[list[Guess]], float]:
    """Of a drafter on the host, answer after answer as it would see them; and its seconds per draft."""
    guesses: list[list[Guess]] = []
    seconds = 0.0
    for index, answer in enumerate(answers):
        token_ids = [*answer.prompt_token_ids, *answer.token_ids[:1]]
        of_answer = []
        for place in range(1, len(answer.token_ids)):
            task = DraftTask(str(index), token_ids, max_depth=depth, num_prompt_tokens=len(answer.prompt_token_ids))
            started_s = perf_counter()
            (draft,) = drafter.propose([task])
            seconds += perf_counter() - started_s
            of_answer.append(_guess(draft.tree, answer, place, depth))
            token_ids.append(answer.token_ids[place])
        drafter.forget(str(index), token_ids)
        guesses.append(of_answer)
    return guesses, seconds / max(1, sum(map(len, guesses)))


def _guess(tree: DraftTree, answer: Answer, place: int, depth: int) -> Guess:
    """Walks the tree along what the target said from `place` on."""
    depths = tree.depths()
    said = [*answer.token_ids[place:], *[_NOTHING] * (depth + 1)]
    accepted = accept(tree, root_token_id=said[0], node_token_ids=[said[min(at, depth)] for at in depths])
    return Guess(tuple(depths.count(at) for at in range(1, depth + 1)), len(accepted.nodes))


_NOTHING = -1
"""No token: what the target would have said after its answer is not known."""


def host_drafter(name: str) -> Drafter:
    """The drafter of this name, with nothing learned yet.

    Raises:
        ModelError: there is none.
    """
    match name:
        case "ngram":
            return NgramDrafter()
        case "suffix":
            return SuffixDrafter()
    raise ModelError(f"no drafter {name!r}: there are {' and '.join(HOST_DRAFTERS)}")
