"""The goal of the cost model on public measurements: errors of 10 % on average, 25 % at the 95th percentile, on rows not seen."""

import runpy
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "cost_model.py"))
DATA: Path = BENCHMARK["data_folder"]()

pytestmark = pytest.mark.skipif(
    not (DATA / "profiles" / "vidur").is_dir(), reason=f"no profiles/vidur in {DATA}; SPOTSERVE_DATA names the folder"
)


@pytest.fixture(scope="module")
def judged() -> dict[str, Any]:
    report: dict[str, Any] = BENCHMARK["judge_devices"](DATA, 0)
    return report


@pytest.mark.parametrize("gpu", BENCHMARK["GPUS"])
def test_three_constants_describe_a_gpu(judged: dict[str, Any], gpu: str) -> None:
    mean, p95 = BENCHMARK["GOAL"]
    result = judged[gpu]
    assert result["all"]["rows"] == sum(model["rows"] for model in result["models"].values()) > 2000
    for errors in (result["all"], *result["models"].values()):
        assert errors["mean"] <= mean
        assert errors["p95"] <= p95


def test_links_have_a_latency_and_a_bandwidth() -> None:
    links = BENCHMARK["judge_links"](DATA)
    assert len(links) == 6
    assert all(link["mean"] <= 0.12 and link["latency_s"] > 1e-6 for link in links)


def test_the_table_predicts_spotserves_layers() -> None:
    layers = BENCHMARK["judge_layers"](DATA)
    assert all(errors["mean"] <= (0.12 if int(key.split()[0]) <= 4 else 0.17) for key, errors in layers.items())
