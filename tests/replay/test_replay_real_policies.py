"""Studies of the policies that ship, from trace files to folders."""

import json
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from spotserve.cli.app import app
from spotserve.replay.policies import POLICIES

TRACES = Path(__file__).parents[2] / "traces"


def play(out: Path, *flags: str) -> Result:
    traces = ("--requests", str(TRACES / "load-bursty-20min.csv"), "--capacity", str(TRACES / "fleet-storm-20min.csv"))
    done = CliRunner().invoke(app, ["replay", *traces, "--duration", "200", "--out", str(out), *flags])
    assert done.exit_code == 0, done.output
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_however_many_run_at_once(tmp_path: Path) -> None:
    flags = ("--policy", "spotserve", "--policy", "spotserve-2024", "--repeat", "2", "--notice-share", "0.5")
    play(tmp_path / "one", *flags)
    play(tmp_path / "two", *flags, "--jobs", "2")
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    summary = json.loads(one["summary.json"])
    assert summary["spotserve"]["requests_lost"] == 0 and summary["spotserve"]["losses"] > 0
    play(tmp_path / "three", *flags, "--seed", "5")
    assert contents(tmp_path / "three")["spotserve-1/requests.jsonl"] != one["spotserve-1/requests.jsonl"]


def test_every_policy_can_be_measured_and_drawn(tmp_path: Path) -> None:
    every = [word for name in POLICIES for word in ("--policy", name)]
    summary = json.loads(play(tmp_path / "all", *every, "--json").stdout)
    assert list(summary) == list(POLICIES)
    for name, found in summary.items():
        assert found["requests_finished"] > 0 and found["cost_usd"] > 0 and 0 < found["available_share"] <= 1, name
    assert summary["on-demand"]["saved_share"] == 0 and summary["on-demand"]["losses"] == 0
    page = (tmp_path / "all/report.html").read_text()
    assert page.count('class="time"') == len(POLICIES) and len(page) < 2_000_000 and "http" not in page
