"""Rules for modules that no tensor-parallel plan describes, or that a plan would only gather; the place to add one.

A rule is a function from a module to its `Division`; it is found by the name of the module's class, and speaks for everything
below the module. A wrong rule does no harm but a refusal: a model is served on shards only after `selfcheck` saw its logits.
"""

from collections.abc import Callable, Mapping

from spotserve.core.errors import ModelError
from spotserve.engine.cuts import Segment, TensorCut
from spotserve.engine.sharding import Division, NoRule, columns, divide_attention, divide_by_plan, heads_of, is_attention, rows
from spotserve.engine.skeleton import LibraryModule

Rule = Callable[[LibraryModule], Division]

_RULES: dict[str, Rule] = {}


def register_rule(*class_names: str) -> Callable[[Rule], Rule]:
    """Makes a function the rule for modules of these classes; a later one replaces an earlier one."""

    def register(rule: Rule) -> Rule:
        for name in class_names:
            _RULES[name] = rule
        return rule

    return register


def divide_layer(layer: LibraryModule, path: str, plan: Mapping[str, str]) -> Division:
    """How shards divide a decoder layer.

    Args:
        layer: of the skeleton.
        path: where it is in the model.
        plan: the model's own, see `divide_by_plan`.

    Raises:
        ModelError: nobody knows; the message names the module.
    """
    try:
        division = _divide(layer, path, plan)
    except NoRule as missing:
        raise ModelError(f"cannot be cut into shards: {missing}; `register_rule` takes a rule for it") from missing
    attention = [name for name, module in layer.named_modules() if is_attention(module)]
    if not attention or any(not any(name.startswith(at) for name in division.sums) for at in attention):
        raise ModelError(f"cannot be cut into shards: {path} ({type(layer).__name__}) has no attention that is known")
    return division


def _divide(module: LibraryModule, path: str, plan: Mapping[str, str]) -> Division:
    rule = _RULES.get(type(module).__name__)
    if rule is not None:
        return rule(module)
    if is_attention(module):
        return divide_attention(module, path, plan)
    if is_experts(module):
        return divide_experts(module)
    children = dict(module.named_children())
    if not children:
        return divide_by_plan(module, path, plan)
    division = Division()
    for name, child in children.items():
        division |= _divide(child, f"{path}.{name}", plan).below(name)
    return division


def is_experts(module: LibraryModule) -> bool:
    """Whether a module holds the matrices of all experts, in one of the library's layouts."""
    parameters = dict(module.named_parameters(recurse=False))
    return hasattr(module, "is_transposed") and {"gate_up_proj", "down_proj"} <= parameters.keys()


def divide_experts(experts: LibraryModule) -> Division:
    """Every shard has all experts, and of each a part of the intermediate columns; one sum for all of them."""
    turned = experts.is_transposed  # [experts, in, out] instead of [experts, out, in]
    size = experts.down_proj.shape[1 if turned else 2]
    gate_up = (Segment(size, 1), Segment(size, 1)) if experts.is_concatenated else (Segment(size, 2),)
    cuts = {
        "gate_up_proj": TensorCut(2 if turned else 1, gate_up),
        "gate_up_proj_bias": TensorCut(1, gate_up),
        "down_proj": TensorCut(1 if turned else 2, (Segment(size, 1),)),
    }
    names = {name for name, _ in experts.named_parameters(recurse=False)}
    unknown = names - cuts.keys() - {"down_proj_bias"}
    if unknown:
        raise NoRule(f"{type(experts).__name__} has {', '.join(sorted(unknown))}")
    return Division(
        cuts={name: cut for name, cut in cuts.items() if name in names},
        sums=frozenset({""}),
        first_only=frozenset(names & {"down_proj_bias"}),
    )


@register_rule("GPT2Attention")
def _gpt2_attention(attention: LibraryModule) -> Division:
    heads = heads_of(attention)
    fused = (heads.queries, heads.keys, heads.keys)
    counts = {"num_heads": Segment(heads.num_heads, 1), "split_size": heads.queries}
    return (
        Division(cuts=columns(attention.c_attn, fused)).below("c_attn")
        | rows(attention.c_proj, heads.queries).below("c_proj")
        | Division(counts=counts)
    )


@register_rule("GPT2MLP")
def _gpt2_mlp(mlp: LibraryModule) -> Division:
    inner = Segment(mlp.c_proj.weight.shape[0], 1)
    return Division(cuts=columns(mlp.c_fc, (inner,))).below("c_fc") | rows(mlp.c_proj, inner).below("c_proj")


@register_rule("OPTDecoderLayer")
def _opt_layer(layer: LibraryModule) -> Division:
    inner = Segment(layer.fc1.out_features, 1)
    return (
        divide_attention(layer.self_attn, "self_attn", {}).below("self_attn")
        | Division(cuts=columns(layer.fc1, (inner,))).below("fc1")
        | rows(layer.fc2, inner).below("fc2")
    )


@register_rule("Phi3Attention")
def _fused_attention(attention: LibraryModule) -> Division:
    heads = heads_of(attention)
    counts = {
        "config.num_attention_heads": Segment(heads.num_heads, 1),
        "num_key_value_heads": Segment(heads.num_kv_heads, 1),
    }
    return (
        Division(cuts=columns(attention.qkv_proj, (heads.queries, heads.keys, heads.keys))).below("qkv_proj")
        | rows(attention.o_proj, heads.queries).below("o_proj")
        | Division(counts=counts)
    )


@register_rule("DeepseekV2Attention", "DeepseekV3Attention")
def _latent_attention(attention: LibraryModule) -> Division:
    """Queries, keys and values of all heads are made out of short vectors, which every shard computes whole."""
    heads = heads_of(attention)
    queries = "q_proj" if attention.q_lora_rank is None else "q_b_proj"
    keys_and_values = Segment(heads.num_heads, attention.qk_nope_head_dim + attention.v_head_dim)
    return (
        Division(cuts=columns(getattr(attention, queries), (heads.queries,))).below(queries)
        | Division(cuts=columns(attention.kv_b_proj, (keys_and_values,))).below("kv_b_proj")
        | rows(attention.o_proj, Segment(heads.num_heads, attention.v_head_dim)).below("o_proj")
    )


@register_rule("Phi3MLP", "GlmMLP", "Glm4MLP")
def _fused_mlp(mlp: LibraryModule) -> Division:
    inner = Segment(mlp.down_proj.in_features, 1)
    return Division(cuts=columns(mlp.gate_up_proj, (inner, inner))).below("gate_up_proj") | rows(mlp.down_proj, inner).below(
        "down_proj"
    )
