"""Which part of the weights a slot holds, as exact numbers of bytes, for any number of stages and shards.

A stage holds a contiguous range of layers; embedding and head are layers of their own, on the first and the last stage. Shard
m of M holds bytes [m * n // M, (m + 1) * n // M) of each layer of n bytes, so that shards never overlap and miss nothing.
"""


def stage_layers(num_layers: int, pipeline: int, stage: int) -> range:
    """Decoder layers of `stage`: an even split over `pipeline` stages, one more for the first ones when it does not divide."""
    assert 0 <= stage < pipeline and num_layers >= 0
    each, remainder = divmod(num_layers, pipeline)
    start = stage * each + min(stage, remainder)
    return range(start, start + each + (stage < remainder))


def shard_bytes(num_bytes: int, tensor: int, shard: int) -> range:
    """Positions of the bytes of a layer of `num_bytes` that are on `shard` of `tensor` shards."""
    assert 0 <= shard < tensor
    return range(shard * num_bytes // tensor, (shard + 1) * num_bytes // tensor)


def common(first: range, second: range) -> int:
    """How many numbers are in both ranges of step 1."""
    return max(0, min(first.stop, second.stop) - max(first.start, second.start))
