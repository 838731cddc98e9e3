"""Llama and its kin (RMS norm, rotary positions, gated MLP) in a third of the library's calls.

Query, key and value are one matrix, so are gate and up; rotary tables are made once; nothing is built that a step does not need. At
small sizes a step is mostly the cost of calls. Whether a model is of this family is decided by its parts (`fits`), and
whether this pass computes it rightly by trying (`selfcheck`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from spotserve.engine.batch import StepRows
from spotserve.engine.linear import Map, linear_map, side_by_side
from spotserve.engine.weights import LibraryModule, LoadedModel, decoder_layers

_FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary tables that do not change with the length of the sequence."""
_LAYER_PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_ATTENTION_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_ATTENTION_NORMS = frozenset({"q_norm", "k_norm"})
_MLP_PARTS = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_MODEL_PARTS = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one decoder layer does, apart from attention."""

    input_norm: Map
    query_key_value: Map
    query_norm: Map | None
    key_norm: Map | None
    output: Map
    mlp_norm: Map
    gate_up: Map
    activation: Map
    down: Map


class FusedForward:
    """Llama and its kin."""

    def __init__(self, model: LoadedModel) -> None:
        """`fits` must have said yes."""
        spec, base = model.spec, model.module.model
        self._embedding = base.embed_tokens.weight
        self._head = linear_map(model.module.lm_head.weight, model.module.lm_head.bias)
        self._norm = _norm(base.norm, model.dtype)
        self._layers = [_layer(layer, model.dtype) for layer in base.layers]
        self._kv_heads, self._head_size = spec.num_kv_heads, spec.head_size
        self._scale = float(base.layers[0].self_attn.scaling)
        positions = torch.arange(spec.context_tokens, device=self._embedding.device)[None]
        cos, sin = base.rotary_emb(self._embedding[:1], position_ids=positions)
        half = spec.head_size // 2
        # rotate_half(x) * sin = roll(x) * (sin with its first half negated): one call less, the same products.
        self._cos = cos[0, :, None].contiguous()  # [context, 1, head_size]
        self._sin = torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), dim=-1)

    @staticmethod
    def fits(model: LoadedModel) -> bool:
        """Whether the module consists of exactly the parts that this class knows."""
        module, config = model.module, model.module.config
        names = _names(module)
        if names != {"model", "lm_head"} or _names(module.model) != _MODEL_PARTS:
            return False
        rotary = getattr(config, "rope_parameters", None) or {}
        if rotary.get("rope_type", "default") not in _FIXED_ROTARY or rotary.get("partial_rotary_factor", 1.0) != 1.0:
            return False
        return all(_layer_fits(layer) for layer in decoder_layers(module, model.spec.num_layers))

    def __call__(self, rows: StepRows, logit_rows: torch.Tensor) -> torch.Tensor:
        """See `Forward`."""
        hidden = F.embedding(rows.token_ids, self._embedding)  # [rows, hidden]
        cos, sin = self._cos.index_select(0, rows.positions), self._sin.index_select(0, rows.positions)
        num_rows, half = hidden.shape[0], self._head_size // 2
        kv_heads, head_size, attend = self._kv_heads, self._head_size, rows.paged.attend
        for index, layer in enumerate(self._layers):
            qkv = layer.query_key_value(layer.input_norm(hidden)).view(num_rows, -1, head_size)
            turned = qkv[:, :-kv_heads]  # queries and keys [rows, heads + kv_heads, head_size]
            if layer.query_norm is not None and layer.key_norm is not None:
                turned = torch.cat((layer.query_norm(turned[:, :-kv_heads]), layer.key_norm(turned[:, -kv_heads:])), dim=1)
            turned = torch.addcmul(turned * cos, turned.roll(half, -1), sin)
            query = turned[:, :-kv_heads].view(num_rows, kv_heads, -1, head_size)
            attended = attend(
                index, query, turned[:, -kv_heads:], qkv[:, -kv_heads:], scale=self._scale
            )  # [rows, heads * head_size]
            hidden = hidden + layer.output(attended)
            gate, up = layer.gate_up(layer.mlp_norm(hidden)).chunk(2, dim=-1)
            hidden = hidden + layer.down(layer.activation(gate) * up)
        return self._head(self._norm(hidden.index_select(0, logit_rows)))


def _names(module: LibraryModule) -> set[str]:
    return {name for name, _ in module.named_children()}


def _layer_fits(layer: LibraryModule) -> bool:
    if _names(layer) != _LAYER_PARTS or _names(layer.mlp) != _MLP_PARTS:
        return False
    attention = layer.self_attn
    further = _names(attention) - _ATTENTION_PARTS
    if not _names(attention) >= _ATTENTION_PARTS or further not in (set(), _ATTENTION_NORMS):
        return False
    windowed = getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None)
    linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj)
    return not windowed and all(type(part) is torch.nn.Linear for part in (*linear, layer.mlp.down_proj))


def _norm(module: LibraryModule, dtype: torch.dtype) -> Map:
    """RMS norm in few calls where that is the same arithmetic: the library normalizes in float32 whatever the dtype."""
    epsilon, weight = getattr(module, "variance_epsilon", None), module.weight
    if dtype != torch.float32 or epsilon is None:
        norm: Map = module
        return norm

    def rms_norm(hidden: torch.Tensor) -> torch.Tensor:
        return (hidden * hidden.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()).mul_(weight)

    return rms_norm


def _layer(layer: LibraryModule, dtype: torch.dtype) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attention, "q_norm")
    return _Layer(
        input_norm=_norm(layer.input_layernorm, dtype),
        query_key_value=side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=_norm(attention.q_norm, dtype) if normed else None,
        key_norm=_norm(attention.k_norm, dtype) if normed else None,
        output=linear_map(attention.o_proj.weight, attention.o_proj.bias),
        mlp_norm=_norm(layer.post_attention_layernorm, dtype),
        gate_up=side_by_side(mlp.gate_proj, mlp.up_proj),
        activation=mlp.act_fn,
        down=linear_map(mlp.down_proj.weight, mlp.down_proj.bias),
    )
