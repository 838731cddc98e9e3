"""`spotserve bench speculation`: one real measurement in a process of its own, its page, and its mistakes."""

import io
import itertools
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from spotserve.bench import speculation as measuring
from spotserve.bench.speculation_picture import page
from spotserve.bench.speculation_policies import deepest, read_policies
from spotserve.bench.speculation_results import Point, Results
from spotserve.cli import app as cli

KINDS = ("repeating code", "fresh code", "prose")
SVG = "{*}body/{*}main/{*}section/{*}svg"


class Measured(NamedTuple):
    document: dict[str, Any]
    page: str
    progress: str


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    out = tmp_path_factory.mktemp("speculation") / "pages" / "page.html"
    command = [sys.executable, "-m", "spotserve.cli", "bench", "speculation", "--json", "--out", str(out), "--rounds", "1"]
    command += ["--new-tokens", "8", "--concurrency", "2,1", "--policies", "ngram:2,adaptive,oracle"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return Measured(json.loads(finished.stdout), out.read_text(encoding="utf-8"), finished.stderr)


def test_the_document_has_every_policy_at_every_load_on_every_kind(measured: Measured) -> None:
    document = measured.document
    assert document["policies"] == ["off", "ngram:2", "adaptive", "oracle"], "plain decoding is always among them"
    points = {(point["kind"], point["concurrency"], point["policy"]): point for point in document["points"]}
    assert list(points) == [(kind, load, policy) for kind in KINDS for load in (1, 2) for policy in document["policies"]]
    for (_, load, policy), point in points.items():
        assert point["output_tokens_per_s"] > 0 and len(point["paired_speedups"]) == (4 if load == 1 else 1)
        assert point["speedup"] > 0 and (policy != "off" or point["speedup"] == 1.0)
    assert set(document["altered"]) == set(document["policies"]) and document["altered"]["off"] == 0


def test_the_page_has_a_chart_for_each_kind_and_the_table(measured: Measured) -> None:
    tree = ET.fromstring(measured.page)
    assert [chart.attrib["aria-label"] for chart in tree.findall(SVG)] == list(KINDS)
    for chart in tree.findall(SVG):
        assert len(chart.findall("{*}polyline")) == 4
    table = tree.findtext("{*}body/{*}pre")
    assert table is not None and table.count("tok/s") == 6 and table.count(" x") == 18
    assert len({len(line) for line in table.splitlines()}) == 1, "columns stand below each other"


def test_progress_is_a_line_per_load_where_nobody_watches(measured: Measured) -> None:
    *lines, last = measured.progress.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"{kind}, {load}" for kind in KINDS for load in ("1 client", "2 clients")]
    assert "3 of 3 rounds" in lines[1] and last.startswith("wrote ") and "\r" not in measured.progress


# ---------------------------------------------------------------------- the picture

SPEEDUPS = st.lists(st.floats(0.1, 5.0), min_size=9, max_size=9)
DEFAULT = read_policies(None, draft_model=None)


def results(ends: list[float], *, kind: str = "text", loads: tuple[int, ...] = (1, 16)) -> Results:
    points = [
        Point(kind=kind, concurrency=load, policy=policy, output_tokens_per_s=100.0, speedup=speedup)
        for load in loads
        for policy, speedup in zip(DEFAULT, ends, strict=True)
    ]
    return Results(
        model="m", draft_model=None, dtype="float32", device="cpu", threads=1, temperature=0.0, rounds=1, policies=DEFAULT,
        altered={}, points=tuple(points),
    )  # fmt: skip


@given(SPEEDUPS)
def test_names_of_lines_never_overlap_nor_leave_the_picture(ends: list[float]) -> None:
    chart = ET.fromstring(page(results(ends))).find(SVG)
    assert chart is not None
    named = [text for text in chart.findall("{*}text") if (text.text or "").partition(" ")[0] in DEFAULT]
    heights = sorted(float(text.attrib["y"]) for text in named)
    assert len(heights) == len(DEFAULT)
    assert all(below - above >= 15.9 for above, below in itertools.pairwise(heights))
    assert heights[0] > 0 and heights[-1] < float(chart.attrib["height"])


@pytest.mark.parametrize("loads", [(4,), (1, 2, 4)])
def test_a_flat_picture_is_drawn_and_names_are_escaped(loads: tuple[int, ...]) -> None:
    tree = ET.fromstring(page(results([1.0] * 9, kind="<a & b>", loads=loads)))
    assert tree.findtext("{*}body/{*}main/{*}section/{*}h2") == "<a & b>"


# ---------------------------------------------------------------------- policies


def test_policies_are_read_once_each_and_plain_decoding_comes_first() -> None:
    assert read_policies("ngram:2, oracle,ngram:2", draft_model=None) == ("off", "ngram:2", "oracle")
    assert not any(name.startswith(("model", "staged")) for name in DEFAULT)
    assert "staged:4" in read_policies(None, draft_model="small")
    assert deepest(("off", "adaptive")) == 8 and deepest(("off", "ngram:12")) == 12


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ("--policies", "ngram:2,lucky"),
            "no policy is called lucky: there are off, adaptive, smartspec-2024, oracle, and ngram:K",
        ),
        (("--policies", "ngram"), "no policy is called ngram"),
        (("--policies", "model:2"), "--draft-model"),
        (("--concurrency", "1,0"), "expected numbers"),
        (("--dtype", "int4"), "int4"),
        (("--device", "tpu"), "tpu"),
        (("--text", "/no/such/file"), "/no/such/file"),
        (("--rounds", "0"), "--rounds"),
    ],
)
def test_wrong_flags_end_with_two(arguments: tuple[str, ...], told: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "speculation", *arguments], env={"COLUMNS": "250"})
    assert done.exit_code == 2 and told in done.output


def test_a_text_that_is_too_short_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = io.TextIOWrapper(io.BytesIO(json.dumps({"note.txt": ["Too short."]}).encode()))
    monkeypatch.setattr("sys.stdin", sent)
    monkeypatch.setattr("sys.argv", ["speculation", "--policies", "ngram:1", "--concurrency", "1"])
    with pytest.raises(SystemExit, match=r"error: note.txt: \d+ tokens are too few, a prompt takes 96"):
        measuring.main()


def test_every_file_is_a_kind_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    heard: dict[str, Any] = {}

    def run(_: list[str], **given: Any) -> subprocess.CompletedProcess[bytes]:
        heard.update(given)
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(subprocess, "run", run)
    flags = [part for name in ("one.txt", "two.txt") for part in ("--text", str(tmp_path / name))]
    assert CliRunner().invoke(cli.app, ["bench", "speculation", *flags, "--threads", "2"]).exit_code == 0
    assert json.loads(heard["input"]) == {str(tmp_path / name): [name] for name in ("one.txt", "two.txt")}
    assert heard["env"]["OMP_NUM_THREADS"] == "2"
