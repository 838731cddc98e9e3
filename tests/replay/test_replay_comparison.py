"""Two replays held against each other."""

import json
from pathlib import Path

import pytest
from played_scene import POLICIES, study_options

from spotserve.core.errors import ConfigError
from spotserve.replay import policies as registry
from spotserve.replay.comparison import FIDELITY, Comparison, compare_folders
from spotserve.replay.study import cases_of, play_all
from spotserve.replay.study_folder import config_of, write_study


@pytest.fixture(autouse=True)
def quick_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "POLICIES", POLICIES)


def play(tmp_path: Path, name: str, **rest: object) -> str:
    options = study_options(tmp_path, **rest)
    cases = cases_of(options, play_all(options, folder=None, on_result=lambda result: None))
    write_study(tmp_path / name, cases, config=config_of(options, ""), text="", page="")
    return str(tmp_path / name)


def row(comparison: Comparison, name: str):
    return next(row for row in comparison.rows if row.name == name)


def test_policies_of_one_study_are_compared_repeat_by_repeat(tmp_path: Path) -> None:
    out = play(tmp_path, "both", policies=("quick", "slow"), repeats=4)
    found = compare_folders(f"{out}:slow", f"{out}:quick")
    mean = row(found, "e2e_mean_s")
    assert found.warnings == () and mean.contrast is not None and mean.contrast.ratio is not None
    assert mean.contrast.difference.low > 0 and mean.contrast.ratio.low > 2 and mean.contrast.difference.repeats == 4
    assert mean.difference == pytest.approx(mean.contrast.difference.mean) and mean.ratio == pytest.approx(mean.first / mean.second)
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert {each["name"] for each in told["metrics"]} >= set(FIDELITY)


def test_without_repeats_there_are_no_intervals(tmp_path: Path) -> None:
    one = play(tmp_path, "one")
    found = compare_folders(one, f"{one}:quick")
    assert all(each.contrast is None for each in found.rows) and row(found, "e2e_p99_s").ratio == 1.0


def test_what_is_not_the_same_is_told(tmp_path: Path) -> None:
    one, base = play(tmp_path, "one", repeats=2), study_options(tmp_path)
    other = play(tmp_path, "other", repeats=2, max_batch=7, scaling=type(base.scaling)(seed=5, grace_s=10.0))
    (tmp_path / "other/config.json").write_text((tmp_path / "other/config.json").read_text().replace("load.csv", "LOAD.csv"))
    found = compare_folders(one, other)
    told = "; ".join(found.warnings)
    assert all(words in told for words in ("trace load.csv", "max_batch: 256 and 7", "seed: 0 and 5", "grace_s: 30.0 and 10.0"))
    assert all(each.contrast is None for each in found.rows), "repeats are not pairs"


def test_fidelity_is_an_error_in_percent(tmp_path: Path) -> None:
    slow, quick = play(tmp_path, "slow", policies=("slow",)), play(tmp_path, "quick")
    found = compare_folders(slow, quick, only_fidelity=True)
    assert [each.name for each in found.rows] == list(FIDELITY)
    ttft = row(found, "ttft_p50_s")
    assert ttft.error_percent == pytest.approx(200.0) and row(found, "requests_moved").error_percent == 0.0


@pytest.mark.parametrize(
    ("side", "says"), [("", "several were played"), (":none", "there is no none"), ("/nothing", "summary.json")]
)
def test_mistakes_are_told(tmp_path: Path, side: str, says: str) -> None:
    out = play(tmp_path, "both", policies=("quick", "slow"))
    with pytest.raises(ConfigError, match=says):
        compare_folders(out + side, out)
