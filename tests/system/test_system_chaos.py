"""The promise of the whole system: instances are taken at random, and no answer is lost or altered.

The short form runs with all tests. `make chaos` runs the long one: hundreds of preemptions under hundreds of streams.
"""

import asyncio
import os
from pathlib import Path

import pytest
from chaos import disturbed, make_bodies, report, undisturbed
from local_cluster import local_cluster

LONG = os.environ.get("SPOTSERVE_CHAOS") == "long"
DTYPES = ("float64", "float32") if LONG else ("float64",)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_lost_and_nothing_is_altered(dtype: str, tmp_path: Path) -> None:
    streams, preemptions, instances = (320, 200, 4) if LONG else (24, 12, 3)
    bodies = make_bodies(streams, seed=7, model="spotserve-demo")
    with local_cluster(tmp_path, "--dtype", dtype, "--restock", "0.3", replicas=instances) as cluster:
        references = asyncio.run(undisturbed(cluster, bodies, concurrency=64))
        cluster.wait_until_idle()
        tally = asyncio.run(disturbed(cluster, bodies, references, streams=streams, preemptions=preemptions, seed=11, dtype=dtype))
        print(report(tally, dtype))
        assert tally.num_preemptions >= preemptions
        assert min(tally.preemptions.values()) > 0
        assert tally.altered == []
        if dtype == "float64":
            assert tally.tie_flips == 0
        requests = cluster.status()["requests"]
        assert requests["lost"] == 0
        cluster.wait_until_idle()
