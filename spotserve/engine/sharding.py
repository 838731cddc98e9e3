"""How the shards of a stage divide one decoder layer.

What shards may do is Megatron's scheme (Shoeybi et al., 2019): the matrices that read the hidden state are cut by columns, so
each shard has whole attention heads and whole columns of the MLP; the matrices that write it back are cut by rows, and their
partial results are added. Which matrix is which is taken from the model's own tensor-parallel plan, checked against the heads
that it really has; `sharding_rules` knows what has no plan. What is named by neither is held whole by every shard.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from spotserve.core.cut import units_held
from spotserve.engine.cuts import WHOLE, Segment, TensorCut
from spotserve.engine.skeleton import LibraryModule


class NoRule(Exception):
    """Nobody knows how shards divide a module; the message says why, from the module's point of view."""


@dataclass(frozen=True, slots=True)
class Division:
    """How shards divide a module; all names are paths below it."""

    cuts: Mapping[str, TensorCut] = field(default_factory=dict)
    """By parameter; one that is missing is held whole."""
    sums: frozenset[str] = frozenset()
    """Modules whose outputs are partial: they are added over the shards, then comes the bias."""
    norms: Mapping[str, Segment] = field(default_factory=dict)
    """Norms over all heads at once: they see the columns of all shards, and each shard goes on with its own units."""
    first_only: frozenset[str] = frozenset()
    """Parameters added inside a partial result: every shard but the first holds zeros in their place."""
    counts: Mapping[str, Segment] = field(default_factory=dict)
    """Attributes that count what a shard holds: its units times their size. A dot leads into a configuration."""

    def below(self, path: str) -> "Division":
        """The same, with the names of a module that holds this one as `path`."""

        def full(name: str) -> str:
            return ".".join(part for part in (path, name) if part)

        return Division(
            cuts={full(name): cut for name, cut in self.cuts.items()},
            sums=frozenset(map(full, self.sums)),
            norms={full(name): segment for name, segment in self.norms.items()},
            first_only=frozenset(map(full, self.first_only)),
            counts={full(name): segment for name, segment in self.counts.items()},
        )

    def __or__(self, other: "Division") -> "Division":
        """Both."""
        return Division(
            cuts={**self.cuts, **other.cuts},
            sums=self.sums | other.sums,
            norms={**self.norms, **other.norms},
            first_only=self.first_only | other.first_only,
            counts={**self.counts, **other.counts},
        )


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention module."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def queries(self) -> Segment:
        """Rows of a query projection."""
        return Segment(self.num_heads, self.head_size)

    @property
    def keys(self) -> Segment:
        """Rows of a key or value projection."""
        return Segment(self.num_kv_heads, self.head_size)


def heads_of(attention: LibraryModule) -> Heads:
    """What an attention module says of itself, or its configuration of all layers."""
    config = attention.config
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    named = (getattr(attention, name, None) for name in ("qk_head_dim", "head_dim", "head_size"))
    return Heads(num_heads, num_kv_heads, next(filter(None, named), config.hidden_size // num_heads))


def is_attention(module: LibraryModule) -> bool:
    """Whether a module is one that calls the attention function."""
    return isinstance(getattr(module, "is_causal", None), bool) and hasattr(module, "layer_idx")


def columns(module: LibraryModule, segments: tuple[Segment, ...]) -> dict[str, TensorCut]:
    """Cuts of a linear layer by its outputs, by the leaf names of its parameters."""
    cuts = {"weight": TensorCut(0 if isinstance(module, torch.nn.Linear) else 1, segments)}  # Conv1D holds the transpose
    if module.bias is not None:
        cuts["bias"] = TensorCut(0, segments)
    return cuts


def rows(module: LibraryModule, segment: Segment) -> Division:
    """A linear layer cut by its inputs."""
    return Division(cuts={"weight": TensorCut(1 if isinstance(module, torch.nn.Linear) else 0, (segment,))}, sums=frozenset({""}))


def divide_by_plan(module: LibraryModule, path: str, plan: Mapping[str, str]) -> Division:
    """Divides a module without children, outside of attention and experts, as the model's plan wants.

    Args:
        module: its parameters are all its own.
        path: where it is in the model.
        plan: pattern of paths (a star for each number) -> style, as `model.tp_plan` gives it.

    Raises:
        NoRule: the plan wants something that this engine does not do.
    """
    style = _style(plan, path)
    if style in _HELD_WHOLE or not [*module.parameters()]:
        return Division()
    if isinstance(module, torch.nn.Linear):
        if style == "colwise":
            return Division(cuts=columns(module, (Segment(module.out_features, 1),)))
        if style == "packed_colwise":
            half = Segment(module.out_features // 2, 1)
            return Division(cuts=columns(module, (half, half)))
        if style == "rowwise":
            return rows(module, Segment(module.in_features, 1))
    raise NoRule(f"{path} ({type(module).__name__}) is to be cut as {style}")


def divide_attention(attention: LibraryModule, path: str, plan: Mapping[str, str]) -> Division:
    """Divides an attention module by heads.

    Projections are found by the plan, or by the names that nearly all of the library has for them; what their sizes say of
    heads decides how they are cut.

    Raises:
        NoRule: a part of it is not understood.
    """
    heads = heads_of(attention)
    division = _head_counts(attention, heads)
    for name, module in attention.named_children():
        style = _style(plan, f"{path}.{name}") or _STYLES.get(name)
        where = f"{path}.{name} ({type(module).__name__})"
        if not [*module.parameters()]:
            continue
        if not isinstance(module, torch.nn.Linear):
            division |= _norm(module, heads, where).below(name)
        elif style in ("colwise", "colwise_gather_output"):
            division |= Division(cuts=columns(module, (_head_segment(module.out_features, heads, where),))).below(name)
        elif style in ("rowwise", "rowwise_split_input"):
            if module.in_features != heads.num_heads * heads.head_size:
                raise NoRule(f"{where} does not read {heads.num_heads} heads of {heads.head_size}")
            division |= rows(module, heads.queries).below(name)
        else:
            raise NoRule(f"{where} is in no plan")
    for name, parameter in attention.named_parameters(recurse=False):
        if parameter.shape != (heads.num_heads,):
            raise NoRule(f"{path}.{name} is in no plan")
        division |= Division(cuts={name: TensorCut(0, (Segment(heads.num_heads, 1),))})
    if not division.sums:
        raise NoRule(f"{path} ({type(attention).__name__}) has no output projection that is known")
    return division


def _style(plan: Mapping[str, str], path: str) -> str | None:
    return plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path))


_HELD_WHOLE = frozenset({None, "replicated_with_grad_allreduce", "colwise_gather_output", "rowwise_split_input", "local_params"})
"""Outputs that the plan gathers at once are computed whole by every shard, which is as right."""
_STYLES = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise", "out_proj": "rowwise"}
_COUNTS = {"num_heads": True, "num_attention_heads": True, "num_key_value_heads": False, "num_kv_heads": False}
"""Attributes that count heads -> whether of queries."""


def _head_counts(attention: LibraryModule, heads: Heads) -> Division:
    totals = {name: Segment(heads.num_heads if of_queries else heads.num_kv_heads, 1) for name, of_queries in _COUNTS.items()}
    return Division(
        counts={name: segment for name, segment in totals.items() if getattr(attention, name, None) == segment.num_units}
    )


def _head_segment(size: int, heads: Heads, where: str) -> Segment:
    """Units of a projection with `size` outputs: its keys' heads, or its queries' heads with all that belongs to one."""
    if size == heads.num_kv_heads * heads.head_size:
        return heads.keys
    if size % (heads.num_heads * heads.head_size) == 0:
        return Segment(heads.num_heads, size // heads.num_heads)
    raise NoRule(f"{where} gives {size} numbers, which are not heads of {heads.head_size}")


def _norm(module: LibraryModule, heads: Heads, where: str) -> Division:
    """A norm of queries or keys: of each head alike, of each head with weights of its own, or over all heads at once."""
    shapes = {parameter.shape for parameter in module.parameters()}
    if shapes == {(heads.head_size,)}:
        return Division()
    for segment in (heads.queries, heads.keys):
        if shapes == {(segment.num_units, segment.unit_size)}:
            cut = TensorCut(0, (Segment(segment.num_units, 1),))
            return Division(cuts={name: cut for name, _ in module.named_parameters()})
        if shapes == {(segment.num_units * segment.unit_size,)}:
            return Division(norms={"": segment})
    raise NoRule(f"{where} is no norm of heads")


def local_count(segment: Segment, tensor: int, shard: int) -> int:
    """What a shard counts of a segment."""
    return len(units_held(segment.num_units, tensor, shard)) * segment.unit_size


def cut_of(division: Division, name: str) -> TensorCut:
    """The cut of a parameter."""
    return division.cuts.get(name, WHOLE)
