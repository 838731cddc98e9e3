"""`spotserve plan` as scripts and people meet it: its document, its picture, and one clear line for every mistake."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_profiles import DATA, FILES
from rich.console import Console
from typer.testing import CliRunner

from spotserve.cli import app as cli
from spotserve.cli import plan_inputs
from spotserve.cli.plan_inputs import read_machines, read_standing
from spotserve.cli.plan_picture import in_short, show
from spotserve.config import DEMO_MODEL
from spotserve.controller.rehearsal import Standing
from spotserve.core.errors import ConfigError
from spotserve.planner.models import named_model

EIGHT = ("--model", "gpt-20b", "--devices", "g4dn.12xlarge=8", "--rate", "0.35")
KEYS = {
    "policy": str,
    "replicas": list,
    "latency_s": float,
    "throughput_rps": float,
    "cost_usd_per_hour": float,
    "transfers": list,
    "bytes_moved": int,
    "bytes_lower_bound": int,
    "makespan_s": float,
    "makespan_lower_bound_s": float,
    "alternatives": list,
}


def planned(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli.app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    document: dict[str, Any] = json.loads(result.output)
    return document


def refused(*arguments: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that the whole program ends with."""
    monkeypatch.setattr("sys.argv", ["spotserve", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capfd.readouterr().err
    assert ended.value.code == 1, told
    assert told.startswith("error: ") and told.count("\n") == 1, told
    return told


@pytest.fixture(scope="session")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Eight machines, and a file that says so."""
    document = planned(*EIGHT)
    path = tmp_path_factory.mktemp("placement") / "before.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path, document


# ---------------------------------------------------------------------- the document


def test_the_document_has_what_scripts_rely_on(before: tuple[Path, dict[str, Any]]) -> None:
    _, document = before
    for key, kind in KEYS.items():
        assert isinstance(document[key], kind), key
    for replica in document["replicas"]:
        assert len(replica["devices"]) == replica["pipeline"] * replica["tensor"]
        assert replica["batch"] >= 1 and sum(replica["stage_layers"]) == 44
    devices = [device for replica in document["replicas"] for device in replica["devices"]]
    assert len(devices) == len(set(devices)) == 32
    assert document["throughput_rps"] > document["rate_rps"] == 0.35
    assert all(each["why"] for each in document["alternatives"])
    assert document["losers"] == []
    assert document["transfers"] == [] and document["bytes_moved"] == 0
    assert set(document["bytes_from_files"]) == {f"i-{number}" for number in range(1, 9)}
    assert sum(document["bytes_from_files"].values()) > 4 * 20e9 * len(document["replicas"])


def test_the_same_question_has_the_same_answer(before: tuple[Path, dict[str, Any]]) -> None:
    assert planned(*EIGHT) == before[1]


def test_a_plan_that_serves_already_is_left_alone(before: tuple[Path, dict[str, Any]]) -> None:
    path, document = before
    again = planned(*EIGHT, "--from", str(path))
    assert again["replicas"] == document["replicas"]
    assert again["transfers"] == [] and again["bytes_from_files"] == {} and again["makespan_s"] == 0


def test_losing_a_machine_keeps_the_names_and_devices_of_the_others(before: tuple[Path, dict[str, Any]]) -> None:
    path, document = before
    after = planned(*EIGHT, "--from", str(path), "--lose", "i-3")
    untouched = [each for each in document["replicas"] if not any(device.startswith("i-3/") for device in each["devices"])]
    assert all(each in after["replicas"] for each in untouched)
    assert not any(device.startswith("i-3/") for each in after["replicas"] for device in each["devices"])
    assert after["lost"] == ["i-3"]


def port_intervals(document: dict[str, Any]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """When each side of each port is busy."""
    busy = defaultdict(list)
    for each in document["transfers"]:
        source, destination = each["from"], each["to"]
        is_inside = source.partition("/")[0] == destination.partition("/")[0]
        ends = (source, destination) if is_inside else (source.partition("/")[0], destination.partition("/")[0])
        for side, end in zip(("out", "in"), ends, strict=True):
            busy[side, end].append((each["start_s"], each["end_s"]))
    return busy


SEVEN = ("--model", "gpt-20b", "--devices", "g4dn.12xlarge=7", "--rate", "0.35")


@pytest.fixture(scope="session")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three replicas on pairs of machines, and a machine beside them that has nothing yet."""
    path = tmp_path_factory.mktemp("placement") / "spare.json"
    path.write_text(json.dumps(planned(*SEVEN)), encoding="utf-8")
    return path


@pytest.mark.parametrize("lose", [["i-3"], ["i-2", "i-3", "i-5"]])
@pytest.mark.parametrize("grace", ["0", "30"])
def test_transfers_keep_their_promises(spare: Path, lose: list[str], grace: str) -> None:
    flags = [flag for machine in lose for flag in ("--lose", machine)]
    document = planned(*SEVEN, "--from", str(spare), "--grace", grace, *flags)
    assert document["transfers"], "nothing moves: this test would see nothing"
    for each in document["transfers"]:
        assert 0 <= each["start_s"] < each["end_s"] <= document["makespan_s"] + 1e-9
        assert each["to"].partition("/")[0] not in lose
        if grace == "0":
            assert each["from"].partition("/")[0] not in lose
        elif each["from"].partition("/")[0] in lose:
            assert each["end_s"] <= float(grace)
    for intervals in port_intervals(document).values():
        for (_, end_s), (start_s, _) in zip(sorted(intervals), sorted(intervals)[1:], strict=False):
            assert end_s <= start_s + 1e-9
    assert sum(each["bytes"] for each in document["transfers"]) == document["bytes_moved"]
    assert 0 <= document["bytes_lower_bound"] <= document["bytes_moved"]
    assert 0 < document["makespan_lower_bound_s"] <= document["makespan_s"] + 1e-9
    assert not lose or not set(lose) & set(document["bytes_from_files"])


def test_losing_a_machine_that_nothing_runs_on_moves_nothing(spare: Path) -> None:
    before, after = planned(*SEVEN, "--from", str(spare)), planned(*SEVEN, "--from", str(spare), "--lose", "i-7")
    assert not any(device.startswith("i-7/") for each in before["replicas"] for device in each["devices"])
    assert after["replicas"] == before["replicas"]
    assert after["transfers"] == [] and after["bytes_from_files"] == {}


def test_limits_let_dollars_decide() -> None:
    assert planned(*EIGHT, "--slo", "e2e=60")["cost_usd_per_hour"] < planned(*EIGHT)["cost_usd_per_hour"]


def test_replicas_that_draft_keep_limits_for_fewer_dollars() -> None:
    asked = ("--model", "llama-3-8b", "--devices", "g5.xlarge=4", "--rate", "1", "--slo", "ttft=2,tpot=0.04")
    plain, drafting = planned(*asked), planned(*asked, "--draft", "0.7:0.1")
    assert plain["throughput_rps"] < 1 <= drafting["throughput_rps"]
    assert drafting["cost_usd_per_hour"] < plain["cost_usd_per_hour"]
    useless = planned(*asked, "--draft", "0:0")
    assert useless["throughput_rps"] == pytest.approx(plain["throughput_rps"])


@pytest.mark.parametrize("draft", ["", "0.7", "1.2:0.1", "0.7:-1", "0.7:inf", "nan:0.1", "a:b"])
def test_a_draft_is_an_acceptance_and_a_share(
    draft: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "expected ACCEPTANCE:SHARE" in refused(*EIGHT, "--draft", draft, monkeypatch=monkeypatch, capfd=capfd)


def test_a_folder_is_a_model_and_torch_stays_out() -> None:
    """The command line plans for the model that ships, described by a process of its own."""
    program = (
        "import sys; from spotserve.cli.app import app\n"
        f"sys.argv = ['spotserve', 'plan', '--model', {str(DEMO_MODEL)!r}, '--devices', 'g4dn.xlarge=2', '--json']\n"
        "try: app()\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    document, _, loaded = done.stdout.strip().rpartition("\n")
    assert loaded == "[]"
    assert json.loads(document)["replicas"]


# ---------------------------------------------------------------------- the published rule


def test_the_published_rule_chooses_as_published() -> None:
    path = DATA / "profiles" / "spotserve" / "T4-4x" / FILES["20B"]
    if not path.is_file():
        pytest.skip(f"{path} is not there: set SPOTSERVE_DATA to a folder with the profiles of SpotServe's artifact")
    asked = ("--model", "gpt-20b", "--devices", "g4dn.12xlarge=8", "--rate", "0.4")
    asked += ("--policy", "spotserve-2024", "--profile", str(path))
    document = planned(*asked, "--min-devices", "12")
    assert [(each["pipeline"], each["tensor"]) for each in document["replicas"]] == [(2, 8)] * 2
    assert all(isinstance(document[key], kind) for key, kind in KEYS.items())
    assert planned(*asked) == document, "12 devices is what the paper has for this model"


def test_the_published_rule_needs_a_profile_and_knows_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "profile.json"
    published = (*EIGHT, "--policy", "spotserve-2024")
    profile.write_text("{}", encoding="utf-8")
    for arguments, says in [
        (published, "needs --profile FILE"),
        ((*published, "--profile", str(tmp_path / "none.json")), "No such file"),
        ((*published, "--profile", str(tmp_path)), "directory"),
        ((*published, "--profile", str(profile)), "format of SpotServe's artifact"),
        ((*published, "--profile", str(profile), "--lose", "i-1"), "knows no --slo, --from, --lose or --draft"),
        ((*EIGHT, "--min-devices", "12"), "go with --policy spotserve-2024"),
        ((*EIGHT, "--policy", "magic"), "--policy magic"),
    ]:
        assert says in refused(*arguments, monkeypatch=monkeypatch, capfd=capfd)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--devices", "g4dn.12xlarge"), "expected TYPE=COUNT"),
        (("--devices", ""), "expected TYPE=COUNT"),
        (("--devices", "g4dn.12xlarge=0"), "expected TYPE=COUNT"),
        (("--devices", "g4dn.12xlarge=-3"), "expected TYPE=COUNT"),
        (("--devices", "g4dn.12xlarge=²"), "expected TYPE=COUNT"),
        (("--devices", "g4dn.12xlarge=" + "9" * 5000), "expected TYPE=COUNT"),
        (("--devices", "g4dn.12xlarge=8:cheap"), "expected TYPE=COUNT"),
        (("--devices", "g4dn.12xlarge=20001"), "at most 20000 machines"),
        (("--devices", "abacus=8"), "instance type 'abacus' is not known; known are"),
        (("--devices", "g4dn.12xlarge=8@atlantis"), "no known price in 'atlantis'"),
        (("--devices", "a2-highgpu-1g=8"), "no known spot price"),
        (("--slo", "ttft"), "--slo ttft"),
        (("--slo", "ttft=0"), "--slo ttft=0"),
        (("--slo", "ttft=nan"), "--slo ttft=nan"),
        (("--slo", "speed=1"), "ttft=SECONDS"),
        (("--slo", "ttft=1,ttft=2"), "--slo ttft=2"),
        (("--lose", "i-9"), "they are i-1 to i-8"),
        (("--lose", "[/red]"), "--lose [/red]"),
        (("--dtype", "int3"), "--dtype int3"),
        (("--prompt", "2000"), "gpt-20b takes 2048 at most"),
        (("--from", "/nowhere/placement.json"), "No such file"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_expected(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(*EIGHT, *arguments, monkeypatch=monkeypatch, capfd=capfd)


def test_an_unknown_model_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Who describes models, in a process of its own, has found none."""
    failed = subprocess.CompletedProcess([], 1, "", "Warning: of no interest\nabacus: its configuration cannot be read\n")
    monkeypatch.setattr(plan_inputs.subprocess, "run", lambda *_, **__: failed)
    told = refused("--model", "abacus", "--devices", "g4dn.xlarge=1", monkeypatch=monkeypatch, capfd=capfd)
    assert "--model abacus: abacus: its configuration cannot be read; expected a folder, a hub id, or one of" in told
    assert "gpt-20b" in told


@pytest.mark.parametrize("numbers", [("--rate", "inf"), ("--rate", "nan"), ("--gap-cv", "inf"), ("--grace", "inf")])
def test_numbers_that_are_none_are_wrong_use(numbers: tuple[str, str]) -> None:
    assert CliRunner().invoke(cli.app, ["plan", *EIGHT, *numbers]).exit_code == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ALMOST = st.fixed_dictionaries(
    {"pipeline": st.integers(-1, 6) | JSON, "tensor": st.integers(-1, 9) | JSON},
    optional={
        "batch": st.integers(0, 2**70) | JSON,
        "id": st.sampled_from(["r-1", "r-x", ""]) | JSON,
        "stage_layers": st.lists(st.integers(0, 44), max_size=4) | JSON,
        "devices": st.lists(st.sampled_from(["i-1/0", "i-1/1", "i-2/0", "i-9/9", "x", "i-1/²"]), max_size=4) | JSON,
    },
)
MACHINES = read_machines("g4dn.12xlarge=2,g5.12xlarge=1", 4)
MODEL = named_model("gpt-20b")


@settings(max_examples=300)
@given(content=(JSON | st.fixed_dictionaries({"replicas": JSON | st.lists(ALMOST | JSON, max_size=3)})).map(json.dumps) | st.text())
def test_any_placement_file_is_read_or_refused(content: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "mangled.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    told = ""
    standing: list[Standing] = []
    try:
        standing = read_standing(path, MACHINES, MODEL)
    except ConfigError as error:
        told = str(error)
    assert not told or told.startswith(f"--from {path}: ")
    devices = [device for each in standing for device in each.devices.values()]
    assert len(devices) == len(set(devices))
    assert len({each.replica.replica_id for each in standing}) == len(standing)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 200_000, b'{"replicas":' * 100_000, b""])
def test_placement_files_that_are_no_json(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bytes.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="expected what `spotserve plan --json` prints"):
        read_standing(path, MACHINES, MODEL)


# ---------------------------------------------------------------------- the picture


def shown(document: dict[str, Any], devices_of: dict[str, int], width: int) -> str:
    console = Console(width=width, record=True, color_system=None, file=StringIO())
    show(document, devices_of, console)
    return console.export_text()


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_picture_fits_and_names_everything(width: int, spare: Path) -> None:
    document = planned(*SEVEN, "--from", str(spare), "--lose", "i-3")
    text = shown(document, {f"i-{number}": 4 for number in range(1, 8)}, width)
    assert max(map(len, text.splitlines())) <= width
    flat = re.sub(r"\s+", " ", text)
    for replica in document["replicas"]:
        assert replica["id"] in flat
    for word in ("lost", "i-3", "transfers", "USD/h", "requests/s", "p99"):
        assert word in flat


def test_a_fleet_of_more_than_can_be_shown_ends_with_how_many_more() -> None:
    document = planned("--model", "llama-3-8b", "--devices", "g5.12xlarge=30", "--rate", "1")
    text = shown(document, {f"i-{number}": 4 for number in range(1, 31)}, 80)
    assert f"... {len(document['replicas']) - 24} more" in text
    assert len(text.splitlines()) < 70


def test_one_machine_is_a_fleet() -> None:
    document = planned("--model", "llama-3-8b", "--devices", "g5.12xlarge=1", "--rate", "0.1")
    assert "llama-3-8b on 1 machine, policy" in shown(document, {"i-1": 4}, 80)


def test_too_little_is_said() -> None:
    document = planned(*EIGHT[:4], "--rate", "50")
    assert "asked for 50: too little" in re.sub(r"\s+", " ", shown(document, {f"i-{n}": 4 for n in range(1, 9)}, 160))


def test_where_nothing_can_run_the_answer_says_what_would() -> None:
    document = planned("--model", "llama-30b", "--devices", "g4dn.12xlarge=2")
    assert document["replicas"] == [] and document["losers"]
    assert document["latency_s"] is None
    assert "a replica takes 3 x g4dn.12xlarge" in document["reason"]
    assert "x p4d" in document["reason"]
    assert "nothing can run" in shown(document, {"i-1": 4, "i-2": 4}, 80)
    assert planned("--model", "llama-30b", "--devices", "g4dn.12xlarge=3")["replicas"]


@given(st.dictionaries(st.integers(1, 4), st.sets(st.integers(0, 9), min_size=1), min_size=1))
def test_devices_in_short_are_those_devices(wanted: dict[int, set[int]]) -> None:
    names = [f"i-{machine}/{index}" for machine, indices in wanted.items() for index in sorted(indices)]
    found = []
    for part in in_short(names):
        machine, _, run = part.partition("/")
        first, _, last = run.partition("-")
        found += [f"{machine}/{index}" for index in range(int(first), int(last or first) + 1)]
    assert found == names
