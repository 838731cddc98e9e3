"""A stage of Llama and its kin (RMS norm, rotary positions, gated MLP) in few calls.

Query, key and value are one matrix, so are gate and up; what stands between the matrix products is one call each (`arithmetic`).
At small sizes a step is mostly the cost of calls, at large ones the bandwidth at which weights are read (`linear`). Whether a
model is of this family is decided by its parts (`fits`), and whether this stage computes it rightly by trying (`selfcheck`).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from spotserve.engine.arithmetic import Norm, Rotary, arithmetic_for
from spotserve.engine.batch import StepRows
from spotserve.engine.cuts import StageSlice
from spotserve.engine.device import PROCESSOR
from spotserve.engine.linear import LEAST_ROWS, Map, Quantization, linear_map, padded_rows, row_sharded_map, side_by_side
from spotserve.engine.shards import Alone, Shards
from spotserve.engine.skeleton import LibraryModule, move

_FIXED_ROTARY = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary tables that do not change with the length of the sequence."""
_LAYER_PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_ATTENTION_PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_ATTENTION_NORMS = frozenset({"q_norm", "k_norm"})
_MLP_PARTS = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_MODEL_PARTS = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one decoder layer does."""

    index: int
    norm: Norm
    query_key_value: Map
    head_norms: tuple[Norm, Norm] | None
    """Of each query head and each key head."""
    output: Map
    mlp_norm: Norm
    gate_up: Map
    gate: Map
    down: Map


class FusedStage:
    """See `Stage`."""

    def __init__(
        self,
        module: LibraryModule,
        stage_slice: StageSlice,
        shards: Shards | None = None,
        *,
        invariant: Literal["batch", "full"] = "batch",
        quantization: Quantization = "none",
        device: torch.device = PROCESSOR,
    ) -> None:
        """Lays the weights of `module` out anew (a second copy of them), and takes the module apart.

        Args:
            module: the library's model, cut to the slice and to this shard; `fits` must have said yes.
            stage_slice: what it computes.
            shards: of this stage; None: it is alone.
            invariant: what logits do not depend on, see `EngineSettings.invariant`.
            quantization: of the weights of linear layers.
            device: where to compute; layer by layer the weights go there.

        Raises:
            ModelError: `full` is wanted and the model cannot be cut so.
        """
        base, config = module.model, module.config
        first = base.layers[stage_slice.layers.start]
        weight = first.self_attn.o_proj.weight
        self._slice, self._shards = stage_slice, Alone() if shards is None else shards
        self._arithmetic = arithmetic_for(weight[:1].to(device))
        self._head_size = int(first.self_attn.head_dim)
        self._kv_heads = first.self_attn.k_proj.weight.shape[0] // self._head_size
        self._scale = float(first.self_attn.scaling)
        self._rotary = Rotary(base.rotary_emb, context_tokens=config.max_position_embeddings, like=weight[:1], device=device)
        self._layers: list[_Layer] = []
        for index in stage_slice.layers:
            self._layers.append(self._layer(index, move(base.layers[index], device), invariant, quantization))
            base.layers[index] = torch.nn.Identity()  # what was laid out anew is on the device once
        if stage_slice.is_first:
            self._embedding = base.embed_tokens.weight.to(device)
        if stage_slice.is_last:
            head = move(module.lm_head, device)
            self._norm = self._arithmetic.norm(move(base.norm, device))
            self._head = linear_map(head.weight, head.bias, quantization=quantization)
            self._vocabulary_size = int(config.vocab_size)
            self._head_is_sharded = head.weight.shape[0] != self._vocabulary_size

    @staticmethod
    def fits(module: LibraryModule, stage_slice: StageSlice) -> bool:
        """Whether the module consists of exactly the parts that this class knows."""
        config = module.config
        if _names(module) != {"model", "lm_head"} or _names(module.model) != _MODEL_PARTS:
            return False
        rotary = getattr(config, "rope_parameters", None) or {}
        if rotary.get("rope_type", "default") not in _FIXED_ROTARY or rotary.get("partial_rotary_factor", 1.0) != 1.0:
            return False
        return all(_layer_fits(module.model.layers[index]) for index in stage_slice.layers)

    def __call__(self, rows: StepRows, hidden: torch.Tensor | None, logit_rows: torch.Tensor | None) -> torch.Tensor:
        """See `Stage`."""
        given = rows.positions.shape[0]
        num_rows = min(given, max(LEAST_ROWS, self._arithmetic.rows_to_compute(rows.paged)))
        positions = rows.positions[:num_rows]
        if self._slice.is_first:
            hidden = F.embedding(rows.token_ids[:num_rows], self._embedding)  # [rows, hidden]
        assert hidden is not None, "a stage that is not the first starts from a hidden state"
        stream, addend = hidden[:num_rows], None
        for layer in self._layers:
            stream, normed = layer.norm(stream, addend)
            qkv = layer.query_key_value(normed).view(num_rows, -1, self._head_size)
            if layer.head_norms is not None:
                qkv = _norm_heads(qkv, layer.head_norms, self._kv_heads)
            attended = self._arithmetic.attend(
                rows.paged, layer.index, qkv, positions=positions, rotary=self._rotary, kv_heads=self._kv_heads, scale=self._scale
            )
            stream, normed = layer.mlp_norm(stream, layer.output(attended))
            addend = layer.down(layer.gate(layer.gate_up(normed)))
        assert addend is not None, "a stage has a layer at least"
        if not self._slice.is_last:
            return F.pad(stream + addend, (0, 0, 0, given - num_rows))
        assert logit_rows is not None
        return self._logits(stream, addend, logit_rows)

    def _logits(self, stream: torch.Tensor, addend: torch.Tensor, logit_rows: torch.Tensor) -> torch.Tensor:
        wanted = logit_rows.shape[0]
        if not wanted:
            return stream.new_empty(0, self._vocabulary_size)
        padding = max(LEAST_ROWS, padded_rows(wanted)) - wanted
        if padding:
            logit_rows = torch.cat((logit_rows, logit_rows[-1:].expand(padding)))
        _, normed = self._norm(stream.index_select(0, logit_rows), addend.index_select(0, logit_rows))
        logits = self._head(normed)[:wanted]
        return self._shards.gather(logits) if self._head_is_sharded else logits

    def _layer(self, index: int, layer: LibraryModule, invariant: Literal["batch", "full"], quantization: Quantization) -> _Layer:
        attention, mlp, norm = layer.self_attn, layer.mlp, self._arithmetic.norm

        def summed(linear: torch.nn.Linear) -> Map:
            return row_sharded_map(linear.weight, linear.bias, self._shards, invariant=invariant, quantization=quantization)

        return _Layer(
            index=index,
            norm=norm(layer.input_layernorm),
            query_key_value=side_by_side((attention.q_proj, attention.k_proj, attention.v_proj), quantization=quantization),
            head_norms=(norm(attention.q_norm), norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
            output=summed(attention.o_proj),
            mlp_norm=norm(layer.post_attention_layernorm),
            gate_up=side_by_side((mlp.gate_proj, mlp.up_proj), quantization=quantization),
            gate=self._arithmetic.gate(mlp.act_fn),
            down=summed(mlp.down_proj),
        )


def _norm_heads(qkv: torch.Tensor, norms: tuple[Norm, Norm], kv_heads: int) -> torch.Tensor:
    """qkv [rows, heads + 2 * kv_heads, head_size] with every query head and key head normalized."""
    query_norm, key_norm = norms
    query, key = qkv[:, : -2 * kv_heads], qkv[:, -2 * kv_heads : -kv_heads]
    _, queries = query_norm(query.reshape(-1, query.shape[2]), None)
    _, keys = key_norm(key.reshape(-1, key.shape[2]), None)
    return torch.cat((queries.view(query.shape), keys.view(key.shape), qkv[:, -kv_heads:]), dim=1)


def _names(module: LibraryModule) -> set[str]:
    return {name for name, _ in module.named_children()}


def _layer_fits(layer: LibraryModule) -> bool:
    if _names(layer) != _LAYER_PARTS or _names(layer.mlp) != _MLP_PARTS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    further = _names(attention) - _ATTENTION_PARTS
    if not _names(attention) >= _ATTENTION_PARTS or further not in (set(), _ATTENTION_NORMS):
        return False
    windowed = getattr(attention, "sliding_window", None) or getattr(attention.config, "sliding_window", None)
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *(getattr(attention, name) for name in further)]
    linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        not windowed
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and all(type(part) is torch.nn.Linear for part in linear)
    )
