"""Noise and choice: the right distribution, the same choice whatever stands beside a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spotserve.core.request import SamplingParams
from spotserve.engine import kernels
from spotserve.engine.noise import KeyedGumbel, row_key
from spotserve.engine.sampler import Sampler, SamplingRow, _keep_likely, greedy

CPU = torch.device("cpu")


def row(position: int = 0, **sampling: object) -> SamplingRow:
    given_sampling = SamplingParams(**{"max_tokens": 99, **sampling})  # type: ignore[arg-type]
    return SamplingRow(given_sampling, position, prompt_token_ids=(1, 2), output_token_ids=[3] * position, banned_token_ids=())


def test_known_bits() -> None:
    """The generator is part of every answer: a change of a single bit changes them all."""
    assert row_key(0, 0) == 0xA706DD2F4D197E6F
    noise = KeyedGumbel(vocabulary_size=3, device=CPU).draw(seeds=[42, 2**64 - 1], positions=[0, 7])
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()


@pytest.mark.parametrize("key", ["seed", "position"])
def test_sampling_draws_from_the_softmax(key: str) -> None:
    """Chi-square over many seeds at one position, and over many positions of one seed."""
    draws, logits = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, -3.0])
    noise = KeyedGumbel(vocabulary_size=6, device=CPU)
    fixed, running = [11] * draws, list(range(draws))
    perturbed = logits.double() + noise.draw(
        seeds=running if key == "seed" else fixed, positions=fixed if key == "seed" else running
    )
    counts = perturbed.argmax(-1).bincount(minlength=6)
    assert stats.chisquare(counts.numpy(), (logits.double().softmax(-1) * draws).numpy()).pvalue > 1e-3


def test_noise_of_neighbours_is_independent() -> None:
    noise = KeyedGumbel(vocabulary_size=4000, device=CPU).draw(seeds=[5, 5, 6], positions=[0, 1, 0])
    assert stats.kstest(noise.flatten().numpy(), stats.gumbel_r.cdf).pvalue > 1e-3
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(3)).abs().max() < 0.06


def test_truncated_sampling_draws_from_the_renormalized_rest() -> None:
    draws = 4000
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 1.5]]).expand(draws, -1)
    rows = [row(seed=seed, top_k=3, temperature=0.8) for seed in range(draws)]
    chosen = torch.tensor([token.token_id for token in Sampler(vocabulary_size=5, device=CPU).sample(logits, rows)])
    kept = [0, 1, 4]
    counts = chosen.bincount(minlength=5)
    assert counts[[2, 3]].sum() == 0
    expected = (logits[0, kept].double() / 0.8).softmax(-1) * draws
    assert stats.chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-3


KINDS = st.sampled_from(
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "gaps": True},
        {"temperature": 1.0, "gaps": True},
        {"temperature": 1.3, "top_p": 0.7, "logprobs": 2},
        {"top_k": 4, "min_p": 0.1},
        {"temperature": 0.0, "frequency_penalty": 1.0, "logprobs": 0},
        {"logit_bias": {3: 2.0}, "repetition_penalty": 1.2},
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.tuples(KINDS, st.integers(0, 2**64 - 1), st.integers(0, 5)), min_size=1, max_size=7), salt=st.integers(0, 99)
)
def test_a_row_does_not_see_its_neighbours(kinds: list[tuple[dict[str, object], int, int]], salt: int) -> None:
    sampler = Sampler(vocabulary_size=50, device=CPU)
    logits = torch.randn(len(kinds), 50, generator=torch.Generator().manual_seed(salt))
    rows = [row(position, seed=seed, **kind) for kind, seed, position in kinds]
    together = sampler.sample(logits, rows)
    alone = [sampler.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]
    assert together == alone


def test_of_equals_the_lowest_id_wins() -> None:
    sampler = Sampler(vocabulary_size=8, device=CPU)
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0, 3.0, 0.0, 0.0, 0.0]])
    assert sampler.sample(logits, [row(temperature=0.0)])[0].token_id == 1
    with_gap = sampler.sample(logits, [row(temperature=0.0, gaps=True)])[0]
    assert (with_gap.token_id, with_gap.gap) == (1, 0.0)
    assert sampler.sample(logits, [row(top_k=1, temperature=5.0, seed=3)])[0].token_id == 1


def test_gap_is_the_lead_and_finite_when_nothing_else_is_left() -> None:
    sampler = Sampler(vocabulary_size=3, device=CPU)
    logits = torch.tensor([[1.0, 4.5, 2.0]])
    assert sampler.sample(logits, [row(temperature=0.0, gaps=True)])[0].gap == pytest.approx(2.5)
    assert sampler.sample(logits, [row(top_k=1, gaps=True)])[0].gap == 1e9


def test_logprobs_are_raw() -> None:
    sampler = Sampler(vocabulary_size=4, device=CPU)
    logits = torch.tensor([[1.0, 4.5, 2.0, 0.0]])
    got = sampler.sample(logits, [row(temperature=0.0, logit_bias={3: 50.0}, logprobs=2)])[0]
    expected = logits[0].double().log_softmax(-1)
    assert got.token_id == 3
    assert got.logprob is not None
    assert got.logprob.logprob == pytest.approx(expected[3].item())
    assert [token_id for token_id, _ in got.logprob.top] == [1, 2]


@given(
    logits=st.lists(st.sampled_from([-torch.inf, -60.0, -20.0, -9.5, -3.0, -1.5, 0.0, 0.25, 1.0]), min_size=1, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1e-9, 0.3, 0.81, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-12, 0.07, 0.6, 1.0]),
)
def test_cutting_near_the_top_is_cutting_the_whole_row(logits: list[float], top_k: int, top_p: float, min_p: float) -> None:
    """Many equal scores, so that the order of equals matters; no sum of weights falls on a limit."""
    scores = torch.tensor([[*logits, 0.125]], dtype=torch.float64)
    asked = (torch.tensor([top_k]), *(torch.tensor([limit], dtype=torch.float64) for limit in (top_p, min_p)))
    expected = _keep_likely(scores, *(limit[:, None] for limit in asked))
    weights = (scores - scores.amax()).exp()
    kernels.keep_likely(*(tensor.numpy() for tensor in (scores, weights, *asked)))
    assert torch.equal(scores, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_greedy_takes_the_lowest_of_equals(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(-40, 8, (9, 5000), generator=generator).to(dtype)  # the greatest many times over
    logits[0], logits[1, 4999], logits[2, 1024] = -torch.inf, 9, 9
    logits[3] = -1
    logits[3, 1023], logits[3, 3000] = -0.0, 0.0
    expected = [int((of_row == of_row.max()).nonzero()[0]) for of_row in logits.double()]
    assert greedy(logits) == expected
    assert greedy(logits[:, :4321]) == [int((of_row == of_row.max()).nonzero()[0]) for of_row in logits[:, :4321].double()]
