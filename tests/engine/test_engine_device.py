"""What an engine computes on changes how numbers get there and in how many calls, and no answer."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spotserve.config import EngineSettings
from spotserve.core.errors import ModelError
from spotserve.core.request import Request, SamplingParams
from spotserve.engine import fused, graphs
from spotserve.engine.arithmetic import GpuArithmetic
from spotserve.engine.attention import SCRATCH_BLOCK, KvCache
from spotserve.engine.batch import ROW_MULTIPLE, GroupLayout, StepLayout, StepRows, in_lanes, joined, round_up
from spotserve.engine.bring_up import lone_engine
from spotserve.engine.device import apart, device_of
from spotserve.engine.engine import Engine
from spotserve.engine.graphs import RecordedSteps
from spotserve.engine.linear import linear_map
from spotserve.engine.selfcheck import check
from spotserve.engine.speculators import step_law
from spotserve.engine.stage import Stage
from spotserve.engine.stages import fused_maker
from spotserve.engine.weights import open_model

FLOAT64 = EngineSettings(dtype="float64", speculation="off", kv_tokens=1024)


def test_a_gpu_that_is_not_there_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"spotserve-demo: device 'cuda' .* no CUDA device here: set engine.device to 'cpu'"):
        lone_engine(EngineSettings(device="cuda", speculation="off"))
    assert device_of(EngineSettings()).type == "cpu"


def test_weights_of_8_bits_are_refused_on_a_gpu() -> None:
    weight = torch.empty(8, 8, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ModelError, match=r"on a GPU set engine.quantization to 'none'"):
        linear_map(weight, None, quantization="int8")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_norm_of_one_call_is_the_norm_of_the_library(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "arithmetic_for", lambda weight: GpuArithmetic())
    settings = EngineSettings.model_validate({"dtype": dtype})
    catalogue = open_model(settings).catalogue
    assert check(catalogue, 1, fused_maker(settings), dtype=catalogue.dtype, kind="one call") is None


GROUPS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.sampled_from(["own", "own", "shared", "slots"])), max_size=6)


@given(GROUPS)
def test_joined_groups_have_the_same_rows_keys_and_not_three_times_the_work(drawn: list[tuple[int, int, str]]) -> None:
    groups, at = [], 0
    for rows, width, kind in drawn:
        table = np.arange(1, 1 + (1 if kind == "shared" else rows) * width).reshape(-1, width)
        groups.append(GroupLayout(at, at + rows, table, kind == "slots", width * (1 if kind == "slots" else 16)))
        at += rows

    def of_rows(found: tuple[GroupLayout, ...] | list[GroupLayout]) -> list[tuple[bool, list[int]]]:
        tables = [(group.by_slot, np.broadcast_to(group.table, (group.end - group.start, group.table.shape[1]))) for group in found]
        return [
            (by_slot, [entry for entry in row.tolist() if entry != SCRATCH_BLOCK]) for by_slot, table in tables for row in table
        ]

    def work(found: tuple[GroupLayout, ...] | list[GroupLayout]) -> int:
        return sum(group.num_keys * (group.end - group.start) for group in found)

    fewer = joined(groups)
    assert of_rows(fewer) == of_rows(groups)
    assert work(groups) <= work(fewer) <= 3 ** max(0, len(groups) - 1) * work(groups)
    assert [group.start for group in fewer[1:]] == [group.end for group in fewer[:-1]]
    assert all(group.num_keys == group.table.shape[1] * (1 if group.by_slot else 16) for group in fewer)


@given(GROUPS, st.lists(st.integers(1, 4), min_size=30, max_size=30))
def test_rows_that_share_keys_come_back_in_their_places(drawn: list[tuple[int, int, str]], repeats: list[int]) -> None:
    for number, (rows, width, kind) in enumerate(drawn):
        table = np.arange(1, 1 + (1 if kind == "shared" else rows) * width).reshape(-1, width)
        if kind == "own":
            table = table.repeat(repeats[number * 5 : number * 5 + rows], axis=0)
            rows = len(table)
        group = GroupLayout(7, 7 + rows, table, kind == "slots", width * (1 if kind == "slots" else 16))
        laned = in_lanes(group)
        of_row = np.broadcast_to(table, (rows, width))
        if laned.lanes is None or laned.lane_of is None:
            assert laned is group
            continue
        assert len(laned.table) == len(np.unique(of_row, axis=0)) == len(laned.lanes)
        assert np.array_equal(laned.lanes.reshape(-1)[laned.lane_of], np.arange(rows)), "each row finds itself"
        assert np.array_equal(laned.table[laned.lane_of // laned.lanes.shape[1]], of_row), "with its own keys"
        assert np.array_equal(of_row[laned.lanes], np.broadcast_to(laned.table[:, None], (*laned.lanes.shape, width)))


@pytest.mark.parametrize("sinks", [None, torch.tensor([-3.0, 0.0, 2.0, 1.0])], ids=["no-sinks", "sinks"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 20])
def test_rows_of_one_problem_attend_as_by_themselves(window: int | None, softcap: float | None, sinks: torch.Tensor | None) -> None:
    """Three sequences with three, one and five rows, and a run with one table."""
    torch.manual_seed(0)
    cache = KvCache(
        range(1), num_kv_heads=2, head_size=16, num_blocks=30, block_tokens=16, dtype=torch.float64, device=torch.device("cpu")
    )
    cache.layer(0).normal_()
    tables = np.arange(1, 29).reshape(4, 7)
    own, run = tables[:3].repeat([3, 1, 5], axis=0), tables[3:]
    positions = np.array([80, 81, 82, 100, 70, 71, 72, 73, 74, *range(90, 97)])
    slots = np.array([table[at // 16] * 16 + at % 16 for table, at in zip([*own, *run.repeat(7, axis=0)], positions, strict=True)])
    groups = (GroupLayout(0, 9, own, False, 112), GroupLayout(9, 16, run, False, 112))
    layout = StepLayout(np.zeros(16, np.int64), positions, slots, groups)
    query, key, value = torch.randn(16, 2, 2, 16).double(), *torch.randn(2, 16, 2, 16).double()

    def attend(step: StepLayout) -> torch.Tensor:
        rows = step.bind(cache)
        return rows.paged.attend(0, query, key, value, scale=0.25, window=window, softcap=softcap, sinks=sinks)

    together = layout.for_gpu()
    assert [group.lanes is not None and group.lanes.shape for group in together.groups] == [(3, 8), (1, 7)]
    assert torch.allclose(attend(together), attend(layout), rtol=0, atol=1e-12)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(0, 3))
def test_decoding_steps_are_padded_to_few_shapes_and_compute_the_same(rows_each: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    cache = KvCache(
        range(1), num_kv_heads=1, head_size=4, num_blocks=64, block_tokens=4, dtype=torch.float64, device=torch.device("cpu")
    )
    cache.layer(0).normal_()
    tables = np.arange(1, 1 + 5 * len(rows_each)).reshape(-1, 5)
    positions = np.concatenate([np.arange(rows) + 6 + 2 * index % 9 for index, rows in enumerate(rows_each)])
    own = tables.repeat(rows_each, axis=0)
    slots = np.array([table[at // 4] * 4 + at % 4 for table, at in zip(own, positions, strict=True)])
    num_rows = len(positions)
    layout = StepLayout(np.arange(num_rows), positions, slots, (GroupLayout(0, num_rows, own, False, 20),))
    padded = layout.for_gpu()
    assert len(padded.token_ids) == round_up(num_rows)
    assert {len(array) for array in (padded.positions, padded.slots)} == {round_up(num_rows)}
    assert padded.groups[0].table.shape == (round_up(num_rows if max(rows_each) == 1 else len(rows_each)), round_up(5))
    query, key, value = torch.randn(3, num_rows, 1, 1, 4).double()

    def attend(step: StepLayout) -> torch.Tensor:
        spare = len(step.token_ids) - num_rows
        parts = [torch.cat((part, part[-1:].expand(spare, 1, 1, 4))) for part in (query, key, value)]
        rows = step.rows(cache, [torch.from_numpy(array) for array in step.arrays(())])
        return rows.paged.attend(0, parts[0], parts[1][:, 0], parts[2][:, 0], scale=0.5)[:num_rows]

    assert torch.allclose(attend(padded), attend(layout), rtol=0, atol=1e-12)
    before = cache.layer(0)[4:].clone()
    attend(padded)
    assert torch.equal(cache.layer(0)[4:], before), "padding writes to the scratch block alone"


def test_counts_are_rounded_up_to_two_per_power_of_two() -> None:
    assert [round_up(count) for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 25, 33, 65, 97)] == [
        1, 2, 3, 4, 6, 6, 8, 8, 12, 16, 24, 32, 48, 96, 128,
    ]  # fmt: skip


@given(st.integers(1, 2000))
def test_decisions_know_how_many_rows_a_gpu_computes(rows: int) -> None:
    assert step_law("cuda").computed_rows(rows) == round_up(-(-rows // ROW_MULTIPLE) * ROW_MULTIPLE)


class Graph:
    """Stands in for a CUDA graph: does what was recorded again, with the numbers that are there then."""

    recording: "Graph | None" = None

    def capture_begin(self, **_: object) -> None:
        Graph.recording = self

    def capture_end(self) -> None:
        Graph.recording = None

    def replay(self) -> None:
        stage, rows, logits = self.done
        for group in rows.paged.groups:
            group.masks.clear()  # of other positions
        logits.copy_(stage(rows, None, rows.logit_rows))


class Recorder:
    """A stage that tells the graph what it does."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, rows: StepRows, hidden: torch.Tensor | None, logit_rows: torch.Tensor | None) -> torch.Tensor:
        if Graph.recording is None:
            return self.stage(rows, hidden, logit_rows)
        assert logit_rows is not None
        logits = torch.zeros(len(logit_rows), 4096, dtype=torch.float64)
        Graph.recording.done = (self.stage, rows, logits)
        return logits


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def wait_stream(self, _: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "packed", lambda arrays: torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays])))


def answers(engine: Engine) -> list[tuple[int, ...]]:
    """Of five requests of different lengths, greedy and drawn."""
    for index in range(5):
        sampling = SamplingParams(max_tokens=12 + 3 * index, temperature=0.7 * (index % 2), seed=index, ignore_eos=True)
        prompt = tuple((17 + 131 * index + 7 * place * place) % 4096 for place in range(5 + 21 * index))
        engine.add(Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
    found: dict[str, tuple[int, ...]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.request_id] = found.get(output.request_id, ()) + output.token_ids
    return [found[str(index)] for index in range(5)]


@pytest.mark.usefixtures("fake_cuda")
def test_recorded_steps_answer_as_the_stage_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    expected = answers(lone_engine(FLOAT64))
    engine = lone_engine(FLOAT64)
    rank = engine._ranks._rank  # type: ignore[attr-defined]
    rank._recorded = RecordedSteps(Recorder(rank._stage), rank.cache)
    assert answers(engine) == expected
    assert len(rank._recorded._recorded) == 2, "older ones were let go"


def test_what_was_packed_comes_apart_in_the_same_shapes() -> None:
    arrays = [np.arange(3), np.empty(0, dtype=np.int64), np.arange(3, 9).reshape(2, 3)]
    parts = apart(torch.arange(9), arrays)
    assert all(np.array_equal(part.numpy(), array) for part, array in zip(parts, arrays, strict=True))
