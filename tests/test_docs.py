"""The documents say what the code has: commands, links, settings, metrics, parameters of the API, states, floors, messages."""

import importlib.util
import re
import tomllib
import typing
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer

from spotserve.cli.app import app
from spotserve.core import cluster, messages
from spotserve.gateway import openai

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks/README.md", ROOT / "traces/README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = typing.cast("click.Group", typer.main.get_command(app)).commands


def _flags(command: click.Command) -> set[str]:
    """Of a verb; of a group of verbs, of all of them."""
    own = {flag for option in command.params for flag in option.opts + option.secondary_opts}
    return own.union(*(_flags(one) for one in getattr(command, "commands", {}).values()))


FLAGS = {name: _flags(command) for name, command in COMMANDS.items()}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    """From one heading to the next of its level or above."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"no section {title!r}"
    return match[2]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@each_page
def test_paths_in_the_text_exist(page: Path) -> None:
    for path in re.findall(r"`((?:spotserve|tests|benchmarks|traces|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        if not path.startswith("spotserve/demo/models/"):  # made by training
            assert (ROOT / path).exists(), path


@each_page
def test_commands_have_their_verbs_and_flags(page: Path) -> None:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for verb, rest in re.findall(r"(?:^|[`$ ])spotserve ([a-z]+)([^`\n#]*)", text, re.MULTILINE):
        if verb not in FLAGS:
            assert f"`spotserve {verb}" not in text, verb
            assert not re.search(rf"^spotserve {verb}", text, re.MULTILINE), verb
            continue
        assert set(re.findall(r"--[a-z-]+", rest)) <= FLAGS[verb], (verb, rest)


@pytest.mark.parametrize("verb", sorted(FLAGS))
def test_every_flag_is_documented_under_its_verb(verb: str) -> None:
    text = read("docs/replay.md") if verb == "replay" else read("docs/operate.md")
    if verb != "replay":
        text = next(part for part in text.split("\n### ") if part.startswith(f"`spotserve {verb}`"))
    rows = "".join(re.findall(r"^\| (`--[^|]*) \|", text, re.MULTILINE))
    assert set(re.findall(r"--[a-z-]+", rows)) == {flag for flag in FLAGS[verb] if flag.startswith("--")} - {"--help"}


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= targets, page


@pytest.mark.parametrize("name", ["operate.md", "planning.md"])
def test_tables_are_those_of_the_code(name: str) -> None:
    page = read(f"docs/{name}")
    assert _tables().filled(page, name) == page, "run: python docs/tables.py"


def test_metrics_named_in_the_text_exist() -> None:
    known = set(re.findall(r"spotserve_\w+", _tables().metrics_table()))
    for page in PAGES:
        assert set(re.findall(r"\bspotserve_\w+", page.read_text(encoding="utf-8"))) <= known, page


def test_settings_named_in_the_text_exist() -> None:
    known = set(re.findall(r"`(\w+\.\w+)`", _tables().settings_table()))
    sections = "|".join({name.partition(".")[0] for name in known})
    variables = set(re.findall(r"SPOTSERVE_\w+__\w+", _tables().settings_table()))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert {name for name in re.findall(rf"`((?:{sections})\.\w+)`", text) if not name.endswith(".py")} <= known | {
            "controller.state"
        }
        assert set(re.findall(r"SPOTSERVE_\w+__\w+", text)) <= variables


def test_every_parameter_of_the_api_is_documented() -> None:
    page = read("docs/openai-api.md")
    served = {*openai.ChatBody.__struct_fields__, *openai.CompletionBody.__struct_fields__}
    written = {
        name
        for row in re.findall(r"^\| (`[^|]+) \|", section(page, "Parameters"), re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert served <= written
    harmless = {"best_of", "user", "metadata", "store", "service_tier"}
    assert written - served == harmless
    refused = set(re.findall(r"`(\w+)`", section(page, "Refused")))
    assert set(openai._UNSERVED) == refused - {"tool_calls"}


def test_state_machines_are_those_of_the_tables() -> None:
    page = read("docs/architecture.md")
    for name, table in (
        ("Instance", cluster.INSTANCE_TRANSITIONS),
        ("Replica", cluster.REPLICA_TRANSITIONS),
        ("Request", cluster.REQUEST_TRANSITIONS),
    ):
        drawn = re.search(rf"state {name} {{(.*?)}}", page, re.DOTALL)
        assert drawn
        arrows = set(re.findall(r"(\w+) --> (\w+)", drawn[1]))
        assert arrows == {(start.name, end.name) for start, ends in table.items() for end in ends}


def test_floors_are_those_of_the_contracts() -> None:
    contracts = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    rows = re.findall(r"^\| (\d) \| ([^|]+) \|", section(read("docs/architecture.md"), "Rooms and floors"), re.MULTILINE)
    assert [int(floor) for floor, _ in rows] == list(reversed(range(len(layers))))
    assert [set(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows] == [set(layer.split(" | ")) for layer in layers]


def test_messages_are_listed_by_edge() -> None:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| ([A-Z][^|]*) \|$", section(read("docs/architecture.md"), "The wire"), re.MULTILINE)
    written = {name for _, _, names in rows for name in re.findall(r"\b[A-Z]\w+", names)}
    assert written == {kind.__name__ for kind in messages.Message.__subclasses__()} - {"Publish"}


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
