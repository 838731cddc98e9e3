"""Published profiles: how long one decoder layer of a model takes on one kind of machine, as SpotServe's artifact writes it down.

The format is that of `elastic-switch/profile` in github.com/Hsword/SpotServe (branch artifact, 832b29f), a JSON object:

    name                 of the measurement
    layer_num            decoder layers of the model
    padded_layer_num     the same with the empty layers that make it divisible by more numbers of stages
    hidden_size, max_tp  width of the model; the largest tensor degree that may be planned
    final_fix_factor     what the whole formula is multiplied by
    pp_init_comm         handing a prompt on to the next stage, ms; pp_incr_comm: a token
    embed                embedding a batch, ms, for batches of 1, 2, 4, ..
    tp-M.bsz-B           one layer over M devices with a batch of B, ms: init, a prompt of 512 tokens; incr, a token

Invariant: a `Profile` has the times of every tensor degree 1, 2, 4, .. up to `max_tensor`, for every batch for which it has
`embed`. Bytes in, typed value out: does not know files, or what the times are used for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from spotserve.core.errors import ConfigError

PROMPT_TOKENS = 512
"""Length of the prompt that `init` was measured with."""

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Time = Annotated[float, msgspec.Meta(ge=0)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class LayerTime(msgspec.Struct, frozen=True):
    """One decoder layer and one batch, in milliseconds."""

    init: _Positive
    """The prompts, of 512 tokens each."""
    incr: _Positive
    """One token of each."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Times of one model on one kind of machine, in milliseconds as published: converting them would move near ties."""

    name: str
    num_layers: int
    padded_layers: int
    """With empty layers; stages must divide it."""
    hidden_size: int
    max_tensor: int
    """The largest tensor degree to plan with; more may have been measured."""
    fix_factor: float
    init_hop_ms: float
    incr_hop_ms: float
    embed_ms: tuple[float, ...]
    """Of batches of 1, 2, 4, .."""
    layer_ms: Mapping[tuple[int, int], LayerTime]
    """By tensor degree and batch."""

    @property
    def batches(self) -> tuple[int, ...]:
        """Batches that were measured: powers of two from 1."""
        return tuple(2**power for power in range(len(self.embed_ms)))

    @property
    def tensors(self) -> tuple[int, ...]:
        """Tensor degrees that were measured."""
        return tuple(sorted({tensor for tensor, _ in self.layer_ms}))


class _Document(msgspec.Struct):
    """The keys that every profile has."""

    name: str
    layer_num: _Count
    padded_layer_num: _Count
    hidden_size: _Count
    max_tp: _Count
    final_fix_factor: _Positive
    pp_init_comm: _Time
    pp_incr_comm: _Time
    embed: Annotated[tuple[_Time, ...], msgspec.Meta(min_length=1)]


def read_profile(content: bytes, source: str) -> Profile:
    """The profile that a file holds; `source` names the file in errors.

    Raises:
        ConfigError: it is no JSON object, or a key is missing or holds something else; says which, where and what was expected.
    """
    try:
        keys = msgspec.json.decode(content, type=dict[str, Any])
        document = msgspec.convert(keys, _Document, strict=True)
        layer_ms = {
            (_degree(tensor, "tp-", "$"), _degree(batch, "bsz-", f"$.{tensor}")): time
            for tensor in keys
            if tensor.startswith("tp-")
            for batch, time in _times(keys[tensor], tensor).items()
        }
    except (msgspec.DecodeError, UnicodeDecodeError, _Mangled) as error:
        raise ConfigError(f"{source}: expected a profile in the format of SpotServe's artifact: {error}") from error
    profile = Profile(
        name=document.name,
        num_layers=document.layer_num,
        padded_layers=document.padded_layer_num,
        hidden_size=document.hidden_size,
        max_tensor=document.max_tp,
        fix_factor=document.final_fix_factor,
        init_hop_ms=document.pp_init_comm,
        incr_hop_ms=document.pp_incr_comm,
        embed_ms=document.embed,
        layer_ms=layer_ms,
    )
    if (lack := _lack(profile)) is not None:
        raise ConfigError(f"{source}: expected a profile in the format of SpotServe's artifact: {lack}")
    return profile


class _Mangled(Exception):
    """A key does not say what it should."""


def _degree(key: str, prefix: str, where: str) -> int:
    digits = key.removeprefix(prefix)
    if not key.startswith(prefix) or not (digits.isascii() and digits.isdecimal()) or int(digits) == 0:
        raise _Mangled(f"expected `{prefix}` and a number from 1, got `{key}` - at `{where}`")
    return int(digits)


def _times(value: Any, key: str) -> dict[str, LayerTime]:
    try:
        return msgspec.convert(value, dict[str, LayerTime], strict=True)
    except msgspec.ValidationError as error:
        raise _Mangled(f"{error} - in `$.{key}`") from error


def _lack(profile: Profile) -> str | None:
    """What keeps the profile from being complete; None: nothing."""
    if profile.padded_layers < profile.num_layers:
        return f"expected `padded_layer_num` to be {profile.num_layers} (`layer_num`) at least, got {profile.padded_layers}"
    wanted = {2**power for power in range(profile.max_tensor.bit_length())} | set(profile.tensors)
    for tensor in sorted(wanted):
        for batch in profile.batches:
            if (tensor, batch) not in profile.layer_ms:
                told = f"`max_tp` is {profile.max_tensor} and `embed` has {len(profile.embed_ms)} batches"
                return f"`$.tp-{tensor}.bsz-{batch}` is missing: {told}"
    return None
