"""Profiles in the published format: read as they are, and refused by name when a key is missing or holds something else."""

import json
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotserve.core.errors import ConfigError
from spotserve.planner.profiles import LayerTime, read_profile

DOCUMENT: dict[str, Any] = {
    "name": "small",
    "layer_num": 5,
    "padded_layer_num": 6,
    "final_fix_factor": 1.1,
    "pp_init_comm": 7,
    "pp_incr_comm": 0.0,
    "hidden_size": 64,
    "max_tp": 2,
    "embed": [0.5, 0.75],
    "tp-1": {"bsz-1": {"init": 10.0, "incr": 1.0}, "bsz-2": {"init": 18.0, "incr": 1.25}},
    "tp-2": {"bsz-1": {"init": 6.0, "incr": 0.75}, "bsz-2": {"init": 10.0, "incr": 0.875}},
}


def read(document: Any) -> Any:
    return read_profile(json.dumps(document).encode(), "small.json")


def test_every_key_is_read() -> None:
    profile = read(DOCUMENT)
    assert (profile.name, profile.num_layers, profile.padded_layers, profile.hidden_size) == ("small", 5, 6, 64)
    assert (profile.max_tensor, profile.fix_factor, profile.init_hop_ms, profile.incr_hop_ms) == (2, 1.1, 7.0, 0.0)
    assert profile.embed_ms == (0.5, 0.75) and profile.batches == (1, 2) and profile.tensors == (1, 2)
    assert profile.layer_ms[2, 1] == LayerTime(6.0, 0.75) and len(profile.layer_ms) == 4


def test_more_degrees_than_may_be_planned_and_unknown_keys_are_welcome() -> None:
    document = {**DOCUMENT, "max_tp": 1, "comment": "?"}
    assert read(document).tensors == (1, 2)


@pytest.mark.parametrize("key", list(DOCUMENT))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^small\.json: .*{key}"):
        read({name: value for name, value in DOCUMENT.items() if name != key})


@pytest.mark.parametrize("tensor", ["tp-1", "tp-2"])
@pytest.mark.parametrize("batch", ["bsz-1", "bsz-2"])
def test_missing_times_are_named(tensor: str, batch: str) -> None:
    without = deepcopy(DOCUMENT)
    del without[tensor][batch]
    with pytest.raises(ConfigError, match=f"{tensor}.{batch}"):
        read(without)
    for key in ("init", "incr"):
        less = deepcopy(DOCUMENT)
        del less[tensor][batch][key]
        with pytest.raises(ConfigError, match=rf"{key}.*{tensor}"):
            read(less)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("layer_num", "5", r"Expected `int`, got `str` - at `\$\.layer_num`"),
        ("layer_num", 0, "layer_num"),
        ("padded_layer_num", 4, "padded_layer_num"),
        ("final_fix_factor", 0, "final_fix_factor"),
        ("pp_init_comm", -1, "pp_init_comm"),
        ("embed", [], "embed"),
        ("embed", [0.5, None], r"embed\[1\]"),
        ("embed", [0.5, 0.7, 0.9], "bsz-4"),
        ("max_tp", 4, "tp-4"),
        ("tp-1", [], r"\$\.tp-1"),
        ("tp-x", DOCUMENT["tp-1"], r"`tp-` and a number from 1, got `tp-x`"),
        ("tp-2", {"bsz-1": {"init": 0, "incr": 1}, "bsz-2": {"init": 1, "incr": 1}}, r"init.*tp-2"),
        ("tp-2", {"bsz-one": {"init": 1, "incr": 1}}, r"`bsz-` and a number from 1, got `bsz-one` - at `\$\.tp-2`"),
    ],
)
def test_a_mangled_key_is_named(key: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read({**DOCUMENT, key: value})


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"name": NaN}', b"null"])
def test_what_is_no_profile_at_all_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"small\.json: expected a profile"):
        read_profile(content, "small.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(list(DOCUMENT)), json_values)
def test_whatever_is_accepted_is_complete(key: str, value: Any) -> None:
    with suppress(ConfigError):
        profile = read({**DOCUMENT, key: value})
        assert all((tensor, batch) in profile.layer_ms for tensor in profile.tensors for batch in profile.batches)
