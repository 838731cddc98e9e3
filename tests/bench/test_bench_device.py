"""What `spotserve doctor` measures and prints, from one real measurement; and what a model's configuration says of it."""

from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoConfig

from spotserve.bench import describe
from spotserve.bench import device as bench
from spotserve.config import DEMO_MODEL, EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.model import ModelSpec
from spotserve.engine import measure as measuring
from spotserve.engine.catalogue import make_catalogue
from spotserve.engine.measure import NEW_TOKENS, PRODUCT, PROMPT_TOKENS, SEQUENCES, STREAMED_BYTES, Measured, measure


@pytest.fixture(scope="module")
def measured() -> tuple[Measured, ...]:
    return measure(EngineSettings())


@pytest.fixture
def known(measured: tuple[Measured, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", lambda _: measured)
    monkeypatch.setattr(bench, "MESSAGE_BYTES", (64, 2**14, 2**18))


def test_everything_that_is_measured_took_time_and_moved_bytes(measured: tuple[Measured, ...]) -> None:
    assert all(0 < each.seconds < 10 and each.num_bytes > 0 and each.flops >= 0 for each in measured)
    layers = AutoConfig.from_pretrained(DEMO_MODEL).num_hidden_layers
    steps = [each for each in measured if each.num_layers]
    assert {each.num_layers for each in steps} == {layers}
    assert len(steps) >= len(SEQUENCES) + 1


def test_kernels_are_counted_as_they_are(measured: tuple[Measured, ...]) -> None:
    product, stream = [each for each in measured if not each.num_layers]
    rows, inputs, outputs = PRODUCT
    assert product.flops == 2 * rows * inputs * outputs
    assert product.num_bytes == 4 * (rows * inputs + inputs * outputs + rows * outputs)
    assert (stream.flops, stream.num_bytes) == (0, STREAMED_BYTES)


def test_a_step_counts_all_weights_once_and_each_of_its_tokens(measured: tuple[Measured, ...]) -> None:
    spec = describe.describe(str(DEMO_MODEL), "float32")
    weights = spec.num_layers * spec.layer_bytes + spec.head_bytes
    each_token = spec.num_layers * spec.layer_flops_per_token + spec.head_flops_per_token
    context = PROMPT_TOKENS + NEW_TOKENS / 2
    attention = 4 * spec.num_heads * spec.head_size * context * spec.num_layers
    steps = {each.flops: each for each in measured if each.num_layers}
    for count in SEQUENCES:
        step = steps[count * (each_token + attention)]
        assert step.num_bytes == weights + count * context * spec.kv_bytes_per_token


def test_a_kernel_is_timed_by_its_quickest_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 13.0, 20.0, 21.0, 30.0, 32.0, 40.0, 44.0, 50.0, 55.0])
    monkeypatch.setattr(measuring, "perf_counter", lambda: next(clock))
    assert measuring._seconds(lambda: None) == 1.0


@pytest.mark.usefixtures("known")
def test_figures_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(["--json"])
    figures = msgspec.json.decode(capsys.readouterr().out, type=bench.DeviceFigures)
    assert figures.dtype == "float32" and figures.threads == 1
    device = figures.device
    assert device.flops_per_s > 0 and device.memory_bytes_per_s > 0 and device.layer_overhead_s >= 0
    assert figures.loopback.bytes_per_s > 0 and figures.loopback.latency_s >= 0
    errors = [abs(each.predicted_s - each.seconds) / each.seconds for each in figures.figures]
    assert figures.mean_error == pytest.approx(sum(errors) / len(errors))


@pytest.mark.usefixtures("known")
def test_figures_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([])
    told = capsys.readouterr().out
    for word in ("compute", "Gflop/s", "memory", "GB/s", "overhead", "predicted", "loopback"):
        assert word in told


def test_wrong_threads_are_one_line() -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--threads", "-1"])
    told = str(ended.value.code)
    assert told.startswith("error: ") and "threads" in told and "\n" not in told


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_described_as_the_engine_has_it(dtype: str) -> None:
    config = AutoConfig.from_pretrained(DEMO_MODEL)
    expected = make_catalogue(config, name=DEMO_MODEL.name, dtype=getattr(torch, dtype)).spec
    found = describe.describe(str(DEMO_MODEL), dtype)
    assert found == expected
    assert msgspec.json.decode(msgspec.json.encode(found), type=ModelSpec) == expected


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "abacus"}'])
def test_what_is_no_model_is_refused_in_one_line(
    config: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ModelError):
        describe.describe(str(tmp_path), "float32")
    monkeypatch.setattr("sys.argv", ["describe", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        describe.main()
    assert str(tmp_path) in str(ended.value.code) and "\n" not in str(ended.value.code)
