"""`spotserve advise` as scripts and people meet it: one real measurement of the models that ship, and its mistakes."""

import json
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from spotserve.bench import advise as measuring
from spotserve.cli import app as cli
from spotserve.cli.advise import show
from spotserve.config import DEMO_MODEL
from spotserve.speculation.advice import Advice, advice_for
from spotserve.speculation.advisor import DraftCost, DraftProfile
from spotserve.speculation.cost import StepCost
from spotserve.speculation.findings import DraftFindings, Findings

DRAFT = DEMO_MODEL.parent / "draft"


def run(*arguments: str) -> Result:
    """The verb here, its measurement in a process of its own."""
    return CliRunner().invoke(cli.app, ["advise", *arguments])


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("advise") / "prompts.txt"
    path.write_text("Write a function `add`. Add two numbers.\n\nWrite a function `join`. Join paths.\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def document(prompts: Path) -> dict[str, Any]:
    done = run(
        "--drafts", f"{DRAFT},ngram", "--lengths", "0..3", "--loads", "1,64", "--prompts", str(prompts), "--tokens", "64", "--json"
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---------------------------------------------------------------------- one real measurement


def test_the_document_says_what_was_measured(document: dict[str, Any]) -> None:
    findings = document["findings"]
    assert findings["target"] == str(DEMO_MODEL) and findings["answer_tokens"] >= 32
    step = findings["step"]
    assert step["constant_s"] > 0 and step["per_row_s"] > 0 and 0 <= step["kv_reread"] <= 1
    assert [each["profile"]["name"] for each in findings["drafts"]] == [str(DRAFT), "ngram"]
    model, ngram = findings["drafts"]
    assert model["is_model"] and model["profile"]["cost"]["per_pass_s"] > 0
    assert model["weight_bytes"] == pytest.approx(4 * 459_328, rel=0.01), "a tied embedding is in memory once"
    assert not ngram["is_model"] and ngram["profile"]["cost"]["per_pass_s"] == 0
    for each in findings["drafts"]:
        profile = each["profile"]
        assert len(profile["acceptance"]) == 3 and len(profile["tokens_by_length"]) == len(profile["drafted_by_length"]) == 4
        assert profile["tokens_by_length"][0] == 1.0 and profile["drafted_by_length"][0] == 0.0
        assert all(1 <= tokens <= 1 + length for length, tokens in enumerate(profile["tokens_by_length"]))


def test_the_document_predicts_every_load_and_length(document: dict[str, Any]) -> None:
    advice = msgspec.convert(document, Advice, strict=False)
    assert advice.lengths == (0, 1, 2, 3) and [line.sequences for line in advice.loads] == [1, 64]
    for draft in advice.drafts:
        for load in draft.loads:
            assert set(load.tokens_per_s) == {0, 1, 2, 3} and min(load.tokens_per_s.values()) > 0
            assert load.best.tokens_per_s == pytest.approx(max(load.tokens_per_s.values()))
    one, many = (draft.loads[-1].tokens_per_s[0] for draft in advice.drafts)
    assert one == many, "without a draft it does not matter whose it would be"
    assert advice.drafts[0].loads[0].cost_share > advice.drafts[1].loads[0].cost_share


# ---------------------------------------------------------------------- what people see

SMALL = DraftProfile("small", DraftCost(0.0, 2e-4, 1e-5), (0.8,) * 4)
NGRAM = DraftProfile("ngram", DraftCost(0.0, 0.0, 0.0, 1e-5), (0.3,) * 4)
FINDINGS = Findings(
    target="target",
    dtype="float32",
    threads=1,
    step=StepCost(2e-3, 0.0, 1e-4, 1e-7, row_multiple=4, kv_reread=0.3),
    step_error=0.04,
    answer_tokens=500,
    context_tokens=60.0,
    drafts=(
        DraftFindings(profile=SMALL, is_model=True, weight_bytes=9_000_000, kv_bytes_per_token=64),
        DraftFindings(profile=NGRAM, is_model=False, weight_bytes=0, kv_bytes_per_token=0),
    ),
)


def shown(**changes: Any) -> str:
    out = StringIO()
    show(advice_for(FINDINGS, **{"loads": (1, 256), "lengths": (0, 1, 2, 3, 4)} | changes), Console(file=out, width=120))
    return out.getvalue()


def test_a_table_for_each_drafter_and_a_line_for_each_load() -> None:
    told = shown()
    assert told.count("predicted tokens/s by tokens drafted, context 60") == 2
    assert told.count("*") == 4, "the best of each row"
    assert "accepted by depth 0.80 0.80 0.80 0.80" in told and "9.0 MB of weights" in told
    lines = [line for line in told.splitlines() if line.startswith("at ")]
    assert lines[0].startswith("at 1 client: small with ") and lines[0].endswith(" x")
    assert lines[1] == "at 256 clients: off"


def test_steps_that_were_timed_on_a_busy_machine_are_pointed_out() -> None:
    assert "was the machine busy" not in shown()
    out = StringIO()
    show(advice_for(msgspec.structs.replace(FINDINGS, step_error=0.3), loads=(1,), lengths=(1,)), Console(file=out, width=60))
    assert "was the machine busy" in out.getvalue()


def test_the_context_can_be_another_than_was_measured() -> None:
    assert "context 9000" in shown(context_tokens=9000)


def test_lengths_that_are_not_asked_for_are_not_advised() -> None:
    advice = advice_for(FINDINGS, loads=(1,), lengths=(2,))
    assert advice.lengths == (0, 2) and advice.loads[0].length == 2


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--drafts", ","), "no drafter is named"),
        (("--drafts", "ngram", "--loads", "1,x"), "expected numbers"),
        (("--drafts", "ngram", "--lengths", "0..99"), "expected numbers"),
        (("--drafts", "ngram", "--lengths", "0"), "above 0"),
        (("--drafts", "ngram", "--dtype", "int4"), "int4"),
        (("--drafts", "ngram", "--prompts", "/no/such/file"), "/no/such/file"),
    ],
)
def test_wrong_flags_end_with_two(arguments: tuple[str, ...], told: str) -> None:
    done = CliRunner().invoke(cli.app, ["advise", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and told in done.output


def test_a_model_that_cannot_be_read_ends_with_two(tmp_path: Path, prompts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = run("--drafts", str(tmp_path / "none"), "--prompts", str(prompts))
    told = capfd.readouterr().err
    assert done.exit_code == 2 and "Traceback" not in told
    assert told.splitlines()[-1].startswith("error: ") and str(tmp_path / "none") in told


def test_a_draft_with_another_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(DRAFT, other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 5000}), encoding="utf-8")
    assert "has a vocabulary of 5000 tokens" in refused(other, monkeypatch, capfd)


def test_a_draft_that_cuts_text_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(DRAFT, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "cuts text into other tokens" in refused(other, monkeypatch, capfd)


def refused(draft: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """The last line of a measurement that ends with exit code 2."""
    monkeypatch.setattr("sys.stdin", StringIO("Write a function that joins paths.\n"))
    with pytest.raises(SystemExit) as ended:
        measuring.main(["--target", str(DEMO_MODEL), "--drafts", str(draft)])
    told = capfd.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    return told
