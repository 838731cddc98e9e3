"""The bench verb measures what it says."""

import json
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from spotserve.bench.engine import loop_figures

GAPS = st.lists(st.floats(0.001, 1.0), min_size=2, max_size=2)


@given(st.lists(st.lists(GAPS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_figures_are_those_of_the_rounds(rounds: list[list[list[float]]]) -> None:
    """Three requests of two tokens per round: first token after one gap, the second after another."""
    times = [[[first, first + gap] for first, gap in of_round] for of_round in rounds]
    figures = loop_figures(times)
    rates = sorted(6 / max(last for _, last in of_round) for of_round in times)
    assert figures.concurrency == 3
    assert rates[0] <= figures.output_tokens_per_s <= rates[-1]
    firsts = sorted(first for of_round in rounds for first, _ in of_round)
    assert firsts[0] <= figures.ttft_p50_s <= figures.ttft_p99_s == firsts[-1]
    longest = max((first + gap) - first for of_round in rounds for first, gap in of_round)
    assert figures.tpot_p50_s <= figures.tpot_p99_s == longest


def test_the_verb_prints_one_document() -> None:
    command = [sys.executable, "-m", "spotserve.cli", "bench", "engine", "--json"]
    command += ["--concurrency", "1,2", "--rounds", "1", "--new-tokens", "3"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    figures = json.loads(finished.stdout)
    assert [point["concurrency"] for point in figures["points"]] == [1, 2]
    assert all(point["output_tokens_per_s"] > 0 for point in figures["points"])
    assert figures["weights_bytes"] < figures["bandwidth_bytes_per_s"]
    assert figures["bandwidth_share"] > 0
