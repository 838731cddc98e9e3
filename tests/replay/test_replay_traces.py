"""The traces that ship are what their README says."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spotserve.cli.app import app
from spotserve.demo.run import SCALING
from spotserve.replay.formats import parse_capacity, parse_requests, read_trace_text
from spotserve.replay.generate import lives_s, loss_sizes
from spotserve.replay.run import read_timeline

TRACES = Path(__file__).parents[2] / "traces"
COMMANDS = dict(
    re.findall(r"^\| `([\w-]+\.csv)` \|.*\| `((?:capacity|requests) [^`]+)` \|$", (TRACES / "README.md").read_text(), re.MULTILINE)
)


def test_every_trace_has_its_command() -> None:
    assert set(COMMANDS) == {path.name for path in TRACES.glob("*.csv")} >= {"demo-capacity.csv", "demo-requests.csv"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_command_writes_the_file(name: str) -> None:
    made = CliRunner().invoke(app, ["traces", "make", *COMMANDS[name].split()])
    assert made.exit_code == 0
    text = made.stdout
    assert text == (TRACES / name).read_text()
    read = parse_capacity(text, name).events if name.startswith(("fleet", "demo-capacity")) else parse_requests(text, name).requests
    assert read


def test_the_demo_is_what_it_is_meant_to_be() -> None:
    timeline = read_timeline(TRACES / "demo-capacity.csv", TRACES / "demo-requests.csv", SCALING)
    assert len(timeline.initial) == 4 and timeline.duration_s < 65
    events = parse_capacity(read_trace_text(TRACES / "demo-capacity.csv"), "f").events
    assert 8 <= len(timeline.losses) <= 10 and sorted(loss_sizes(events))[-2:] == [1, 2]
    assert min(lives_s(events)) > SCALING.grace_s, "every instance serves before it goes"
    noticed = [take.noticed for take in timeline.losses]
    assert 3 <= sum(noticed) <= len(noticed) - 3, "both kinds of loss are shown"
    arrivals = timeline.arrivals
    assert 160 <= len(arrivals) <= 190
    assert all(60 <= one.prompt_tokens <= 250 and 100 <= one.output_tokens <= 500 for one in arrivals)
    assert 0.4 < sum(one.temperature == 0 for one in arrivals) / len(arrivals) < 0.6
    fleet = 4
    sizes = [fleet := fleet + (1 if event.change == "add" else -1) for event in events if event.time_s > 0]
    assert min(sizes) >= 2
