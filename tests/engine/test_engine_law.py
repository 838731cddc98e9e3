"""The law by exact enumeration: what comes out follows the product of the target's probabilities, and drafts do not move it.

A vocabulary of four tokens and texts of three have 64 outcomes, whose probabilities are computed here by themselves, from logits
that differ with every prefix. The seeds are always the same, so that a test that passes once passes for ever.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from types import MappingProxyType

import pytest
import torch
from scipy import stats

from spotserve.core.request import SamplingParams
from spotserve.engine.sampler import Sampler, SamplingRow
from spotserve.speculation.tree import EMPTY_TREE, ROOT, DraftTree
from spotserve.speculation.verify import accept

VOCABULARY, LENGTH, DRAWS = 4, 3, 6000
PROMPT, BANNED = (2, 0), (3,)
CPU = torch.device("cpu")
Text = tuple[int, ...]

KINDS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "as it is": {},
        "cool": {"temperature": 0.6},
        "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.4},
        "bias": {"temperature": 1.5, "logit_bias": {1: 1.2, 2: -0.8}},
        "least length": {"min_tokens": 2},
        "cut": {"temperature": 0.8, "top_k": 3},
    }
)


@cache
def logits_after(text: Text) -> tuple[float, ...]:
    """Of the target: another distribution after every text."""
    chance = random.Random(repr(text))
    return tuple(chance.gauss(0, 1.3) for _ in range(VOCABULARY))


def probabilities(text: Text, sampling: SamplingParams) -> list[float]:
    """The processed distribution after a text, written down from the definition of the parameters."""
    scores = list(logits_after(text))
    for token in range(VOCABULARY):
        times = text.count(token)
        if times or token in PROMPT:
            scores[token] *= sampling.repetition_penalty if scores[token] < 0 else 1 / sampling.repetition_penalty
        scores[token] -= sampling.presence_penalty * (times > 0) + sampling.frequency_penalty * times
        scores[token] += sampling.logit_bias.get(token, 0.0)
        if token in BANNED and len(text) < sampling.min_tokens:
            scores[token] = -math.inf
    scores = [score / sampling.temperature for score in scores]
    if sampling.top_k:
        least = sorted(scores, reverse=True)[sampling.top_k - 1]
        scores = [score if score >= least else -math.inf for score in scores]
    weights = [math.exp(score) for score in scores]
    return [weight / sum(weights) for weight in weights]


def probability_of(text: Text, sampling: SamplingParams) -> float:
    return math.prod(probabilities(text[:at], sampling)[token] for at, token in enumerate(text))


Drafting = Callable[[int, Text], DraftTree]


def nothing(seed: int, text: Text) -> DraftTree:
    return EMPTY_TREE


def random_trees(seed: int, text: Text) -> DraftTree:
    """Any shape and any tokens, twins included: some right by chance."""
    chance = random.Random(f"{seed} {text}")
    size = chance.randint(0, 6)
    return DraftTree(
        tuple(chance.randrange(VOCABULARY) for _ in range(size)), tuple(chance.randint(ROOT, node - 1) for node in range(size))
    )


def likely_chains(seed: int, text: Text) -> DraftTree:
    """What the target finds most likely: deterministic, as a greedy draft model's, and right more often than not."""
    tokens: list[int] = []
    for _ in range(2):
        logits = logits_after((*text, *tokens))
        tokens.append(logits.index(max(logits)))
    return DraftTree.chain(tokens)


def unlikely_chains(seed: int, text: Text) -> DraftTree:
    """What the target finds least likely: a rule that picks tokens by their chance would show."""
    logits = logits_after(text)
    return DraftTree.chain([logits.index(min(logits))])


def generate(kind: Mapping[str, object], draft: Drafting, *, draws: int) -> tuple[dict[int, Text], int]:
    """A text per seed, by whole steps of draft, sample and verify; and how many draft tokens were accepted."""
    sampler = Sampler(vocabulary_size=VOCABULARY, device=CPU)
    sampling = {seed: SamplingParams(**{"max_tokens": LENGTH, "seed": seed, **kind}) for seed in range(draws)}  # type: ignore[arg-type]
    texts: dict[int, Text] = dict.fromkeys(range(draws), ())
    accepted_tokens = 0
    while unfinished := [seed for seed, text in texts.items() if len(text) < LENGTH]:
        trees = {seed: draft(seed, texts[seed]) for seed in unfinished}
        rows, logits = [], []
        for seed in unfinished:
            for node in range(ROOT, len(trees[seed])):
                output = (*texts[seed], *trees[seed].path_token_ids(node))
                rows.append(SamplingRow(sampling[seed], len(output), PROMPT, output, BANNED))
                logits.append(logits_after(output))
        sampled = iter(sampler.sample(torch.tensor(logits, dtype=torch.float64), rows))
        for seed in unfinished:
            tokens = [next(sampled).token_id for _ in range(1 + len(trees[seed]))]
            accepted = accept(trees[seed], root_token_id=tokens[0], node_token_ids=tokens[1:])
            accepted_tokens += len(accepted.nodes)
            texts[seed] = (*texts[seed], *accepted.token_ids)[:LENGTH]
    return texts, accepted_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_texts_follow_the_product_of_the_targets_probabilities_whoever_drafts(kind: str) -> None:
    """And every single text is the same with drafts and without: more than any test of distributions could show."""
    plain, _ = generate(KINDS[kind], nothing, draws=DRAWS)
    sampling = SamplingParams(max_tokens=LENGTH, **KINDS[kind])  # type: ignore[arg-type]
    expected = {text: DRAWS * probability_of(text, sampling) for text in product(range(VOCABULARY), repeat=LENGTH)}
    assert sum(expected.values()) == pytest.approx(DRAWS)
    assert chance_of(Counter(plain.values()), expected) > 1e-3
    for draft in (random_trees, likely_chains, unlikely_chains):
        drafted, accepted = generate(KINDS[kind], draft, draws=DRAWS // 3)
        assert accepted > 0 or draft is unlikely_chains
        assert drafted == {seed: plain[seed] for seed in drafted}, draft.__name__


def test_the_measure_sees_a_small_error() -> None:
    """Texts of a target that is a little warmer are told from those that are expected: the test above can fail."""
    warmer, _ = generate({"temperature": 1.1}, nothing, draws=DRAWS)
    sampling = SamplingParams(max_tokens=LENGTH)
    expected = {text: DRAWS * probability_of(text, sampling) for text in product(range(VOCABULARY), repeat=LENGTH)}
    assert chance_of(Counter(warmer.values()), expected) < 1e-4


def chance_of(counts: Mapping[Text, int], expected: Mapping[Text, float]) -> float:
    """That counts differ so much from what is expected (chi-square); outcomes that are hardly expected count as one."""
    assert all(expected[text] > 0 for text in counts), "an impossible text"
    frequent = [text for text, mean in expected.items() if mean >= 8]
    rest = sum(mean for mean in expected.values() if mean < 8)
    observed = [counts.get(text, 0) for text in frequent]
    means = [expected[text] for text in frequent]
    if rest > 1:
        observed.append(sum(counts.values()) - sum(observed))
        means.append(rest)
    return float(stats.chisquare(observed, means, sum_check=False).pvalue)


DISTRIBUTIONS = [
    ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
    ([0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]),
    ([0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]),
    ([0.85, 0.05, 0.05, 0.05], [0.02, 0.9, 0.04, 0.04]),
    ([0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]),
]


@pytest.mark.parametrize(("target", "drafter"), DISTRIBUTIONS)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_a_draft_with_the_same_noise_is_right_as_often_as_the_formula_says(
    target: Sequence[float], drafter: Sequence[float], over: str
) -> None:
    """P(match) = sum over x of 1 / sum over y of max(p_y / p_x, q_y / q_x), which is at least (1 - TV) / (1 + TV)."""
    draws = 12_000
    tokens = range(VOCABULARY)
    chance = sum(1 / sum(max(target[y] / target[x], drafter[y] / drafter[x]) for y in tokens) for x in tokens)
    distance = sum(abs(p - q) for p, q in zip(target, drafter, strict=True)) / 2
    assert (1 - distance) / (1 + distance) - 1e-12 <= chance <= 1 - distance + 1e-12
    numbers = range(draws)
    sampling = SamplingParams(max_tokens=1, seed=11)
    rows = (
        [SamplingRow(SamplingParams(max_tokens=1, seed=number), 5) for number in numbers]
        if over == "seeds"
        else [SamplingRow(sampling, number) for number in numbers]
    )
    sampler = Sampler(vocabulary_size=VOCABULARY, device=CPU)
    said = sampler.sample(torch.tensor(target, dtype=torch.float64).log().expand(draws, -1), rows)
    drafted = sampler.two_best(torch.tensor(drafter, dtype=torch.float64).log().expand(draws, -1), rows)
    share = sum(token.token_id == best for token, (best, *_) in zip(said, drafted, strict=True)) / draws
    assert share == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / draws) + 1e-12)


def test_without_the_same_noise_drafts_would_be_right_less_often() -> None:
    """Sum of p * q: what the coupling is for."""
    target, drafter = DISTRIBUTIONS[0]
    draws = 12_000
    sampler = Sampler(vocabulary_size=VOCABULARY, device=CPU)
    logits = torch.tensor(target, dtype=torch.float64).log().expand(draws, -1)
    said = sampler.sample(logits, [SamplingRow(SamplingParams(max_tokens=1, seed=seed), 0) for seed in range(draws)])
    other = sampler.two_best(logits, [SamplingRow(SamplingParams(max_tokens=1, seed=seed), 1) for seed in range(draws)])
    share = sum(token.token_id == best for token, (best, *_) in zip(said, other, strict=True)) / draws
    assert share == pytest.approx(sum(p * q for p, q in zip(target, drafter, strict=True)), abs=0.02)
