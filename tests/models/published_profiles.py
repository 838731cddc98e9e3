"""The profiles that SpotServe's artifact published, where they are on this machine; they are not part of the project.

`SPOTSERVE_DATA` names the folder that holds `profiles/spotserve`; unset, it is `../shared/data` beside the checkout.
"""

import os
from pathlib import Path

import pytest

from spotserve.planner.profiles import Profile, read_profile

DATA = Path(os.environ.get("SPOTSERVE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")

FILES = {"6.7B": "megatron_6.7B_profile.json", "20B": "megatron_h6144_profile.json", "30B": "megatron_h7168_profile.json"}
"""Profiles of the paper's models on machines with four T4."""


def published_profile(model: str) -> Profile:
    """The profile of one of the paper's models; the test is skipped where it is not to be had."""
    path = DATA / "profiles" / "spotserve" / "T4-4x" / FILES[model]
    if not path.is_file():
        pytest.skip(f"{path} is not there: set SPOTSERVE_DATA to a folder with the profiles of SpotServe's artifact")
    return read_profile(path.read_bytes(), str(path))
