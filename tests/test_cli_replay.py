"""`spotserve replay`: from its flags to what is printed, left in the folder, and returned."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from played_scene import POLICIES, write_traces
from typer.testing import CliRunner

from spotserve.cli import app as cli
from spotserve.cli import replay_runs, replays
from spotserve.core.errors import ConfigError
from spotserve.replay import policies as registry
from spotserve.replay.run import ReplayOptions


@pytest.fixture(autouse=True)
def quick_policies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "POLICIES", POLICIES)
    monkeypatch.setattr(replays, "POLICIES", POLICIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPOTSERVE_URL", raising=False)
    write_traces(tmp_path / "traces")


TRACES = ("--capacity", "traces/fleet.csv", "--requests", "traces/load.csv")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["replay", *arguments], env={"COLUMNS": "200"})


def problem(*arguments: str) -> str:
    """What a mistake is told to be."""
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def summary(*arguments: str) -> dict[str, Any]:
    result = run(*TRACES, "--json", *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads(Path("runs/replay/summary.json").read_text())
    return found


def test_a_study_is_printed_and_left_in_a_folder() -> None:
    result = run(*TRACES, "--policy", "quick", "--policy", "slow", "--repeat", "2", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "50 requests" in result.stdout and "written to out" in result.stdout
    header = next(line for line in result.stdout.splitlines() if "quick" in line)
    assert header.split() == ["quick", "slow"] and "±" in result.stdout
    assert "Time to first token" in Path("out/report.txt").read_text()
    assert {path.name for path in Path("out").iterdir()} >= {"report.html", "summary.json", "quick-0", "slow-1", "intervals.json"}


def test_the_page_has_the_command_without_what_changes_nothing(tmp_path: Path) -> None:
    fleet = str(tmp_path / "traces/fleet.csv")
    given = ("--capacity", fleet, "--requests", "traces/load.csv", "--notice-share", "0.5", "--rent", "--no-fall-back")
    assert run(*given, "--rate-scale", "1", "--rate-scale", "2", "--out", "somewhere", "--jobs", "1", "--json").exit_code == 0
    command = json.loads(Path("somewhere/config.json").read_text())["command"]
    words = shlex.split(command)
    assert set(words[words.index("replay") + 1 :]) == {
        *("--capacity", "fleet.csv", "--requests", "traces/load.csv", "--notice-share", "0.5", "--rent", "--no-fall-back"),
        *("--rate-scale", "1.0", "2.0"),
    }
    assert "--no-fall-back" in Path("somewhere/report.html").read_text()


def test_the_same_seed_gives_the_same_bytes_from_the_command_line() -> None:
    for out in ("one", "two"):
        assert run(*TRACES, "--notice-share", "0.5", "--seed", "4", "--repeat", "2", "--out", out).exit_code == 0
    files = [
        {str(path.relative_to(out)): path.read_bytes() for path in Path(out).rglob("*.*") if path.is_file()}
        for out in ("one", "two")
    ]
    assert files[0] == files[1] and len(files[0]) == 12


def test_flags_reach_what_is_played() -> None:
    plain = summary("--policy", "quick")
    assert summary("--policy", "quick", "--duration", "40")["requests_total"] == 21
    assert summary("--policy", "quick", "--spot-price", "7.5")["cost_usd"] == pytest.approx(plain["instance_hours_spot"] * 7.5)
    assert summary("--policy", "quick", "--slo", "ttft=0.5")["goodput_share"] == 0 < plain["goodput_share"]
    assert summary("--policy", "quick", "--slo", "e2e=1.95")["goodput_share"] == pytest.approx(0.2, abs=0.2)
    assert summary("--policy", "quick", "--notice-share", "0")["losses_without_notice"] == 3
    assert summary("--policy", "quick", "--time-scale", "2")["trace_duration_s"] == 50
    swept = summary("--policy", "quick", "--rate-scale", "1", "--rate-scale", "2")
    assert list(swept) == ["quick@1x", "quick@2x"] and swept["quick@1x"] == plain
    config = json.loads(Path("runs/replay/config.json").read_text())["options"]
    assert config["machine"] == "g5.12xlarge" and config["rate_scales"] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("claims", "code", "told"),
    [
        (["requests_lost==0", "p99_e2e_s<60"], 0, []),
        (["e2e_p99_s<1"], 1, ["quick: e2e_p99_s is", "slow: e2e_p99_s is"]),
        (["quick:ttft_p50_s<=1.5", "slow:ttft_p50_s<=1.5"], 1, ["slow: ttft_p50_s is 3, asserted <= 1.5"]),
    ],
)
def test_assertions_decide_the_exit_code(claims: list[str], code: int, told: list[str]) -> None:
    flags = [word for claim in claims for word in ("--assert", claim)]
    result = run(*TRACES, "--policy", "quick", "--policy", "slow", "--json", *flags)
    assert result.exit_code == code, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("does not hold: ")] == [
        line for line in result.stderr.splitlines() if any(words in line for words in told)
    ]
    assert result.stderr.count("does not hold") == len(told) and list(json.loads(result.stdout)) == ["quick", "slow"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--assert", "e2e_p98_s<1", *TRACES], "near it are"),
        (["--assert", "nobody:e2e_p99_s<1", *TRACES], "there is no nobody"),
        (["--assert", "e2e_p99_s", *TRACES], "METRIC OP NUMBER"),
        (["--requests", "traces/load.csv"], "--capacity FILE"),
        ([*TRACES, "--policy", "magic"], "expected one of quick"),
        ([*TRACES, "--devices", "abacus"], "instance type 'abacus'"),
        ([*TRACES, "--slo", "ttft=fast"], "--slo"),
        ([*TRACES, "--draft", "much"], "--draft"),
        ([*TRACES, "--instances", "3"], "--instances goes with --live"),
        ([*TRACES, "--no-reference"], "--reference goes with --live"),
        (["--live", *TRACES, "--policy", "slow"], "what runs decides"),
        (["--live", *TRACES, "--model", "gpt-20b"], "--model is of the simulation"),
        (["--live", *TRACES, "--repeat", "3"], "--repeat is of the simulation"),
        (["--live", *TRACES, "--rate-scale", "1", "--rate-scale", "2"], "one rate at a time"),
        (["--live", *TRACES, "--capacity", "traces/fleet.csv"], "one trace of machines"),
    ],
)
def test_mistakes_are_told_before_anything_is_played(arguments: list[str], says: str) -> None:
    assert says in problem(*arguments)
    assert not Path("runs").exists()


def test_requests_are_needed() -> None:
    assert run("--capacity", "traces/fleet.csv").exit_code == 2
    assert run("--live").exit_code == 2


def test_flags_of_both_reach_a_live_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ReplayOptions] = []

    def fake(options: ReplayOptions, console: object) -> int:
        seen.append(options)
        options.out.mkdir(parents=True)
        (options.out / "summary.json").write_text(json.dumps({"e2e_p99_s": 9.0, "tokens_altered": 0}))
        return 0

    monkeypatch.setattr(replay_runs, "run_replay", fake)
    monkeypatch.setattr(replay_runs, "secret_of", lambda url: "secret")
    given = ("--live", *TRACES, "--url", "http://127.0.0.1:1", "--grace", "3", "--rate-scale", "2", "--slo", "ttft=1,e2e=9")
    result = run(*given, "--on-demand-price", "9", "--seed", "5", "--policy", "spotserve", "--json", "--assert", "p99_e2e_s<8")
    assert result.exit_code == 1 and "spotserve: e2e_p99_s is 9, asserted < 8" in result.stderr
    assert json.loads(result.stdout) == {"e2e_p99_s": 9.0, "tokens_altered": 0}
    (options,) = seen
    assert (options.scaling.grace_s, options.scaling.rate_scale, options.scaling.seed) == (3.0, 2.0, 5)
    assert (options.objectives.ttft_s, options.objectives.e2e_s, options.prices.on_demand_usd_per_hour) == (1.0, 9.0, 9.0)
    assert options.capacity == Path("traces/fleet.csv") and options.secret == "secret"


def test_compare_prints_a_table_or_a_document() -> None:
    assert run(*TRACES, "--policy", "quick", "--policy", "slow", "--repeat", "3", "--out", "out").exit_code == 0
    result = run("compare", "out:slow", "out:quick")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.stdout.splitlines() if line.startswith("e2e_mean_s"))
    assert re.search(r"\[.*\].*\[.*\]", line), "difference and ratio have their intervals"
    document = json.loads(run("compare", "out:slow", "out:quick", "--json").stdout)
    assert document["warnings"] == [] and document["first"] == "out:slow"
    fidelity = run("compare", "out:slow", "out:quick", "--fidelity").stdout
    assert "error, %" in fidelity and "+200.0" in fidelity
    assert "several were played" in problem("compare", "out", "out")


def test_policies_are_listed() -> None:
    output = run("policies").stdout
    assert "answers soon" in output and "leaves out" in output
    assert json.loads(run("policies", "--json").stdout)["slow"] == {"models": "answers late", "leaves_out": "all else"}


def test_help_teaches() -> None:
    output = run("--help").output
    assert all(words in output for words in ("compare", "policies", "spotserve replay --live", "--repeat 5", "What is played"))
