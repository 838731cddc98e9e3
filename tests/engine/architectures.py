"""The architectures that the tests run, each as a tiny configuration; the page `docs/architectures.md` is made from this table."""

from collections.abc import Mapping
from dataclasses import dataclass

GROUPED: Mapping[str, object] = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS: Mapping[str, object] = {
    **GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT: Mapping[str, object] = {
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention"]
PIPELINES = (1, 2, 3)
TENSORS = (1, 2)


@dataclass(frozen=True)
class Architecture:
    """One that is served."""

    model_type: str
    """The library's word for it."""
    title: str
    settings: Mapping[str, object]
    """What the tiny configuration says beside its shape."""
    notes: str
    """What is special about it, for the page."""
    every_cut: bool = True
    """Whether the tests run it in every cut, or only in the finest one."""


SERVED = (
    Architecture("llama", "Llama", GROUPED, "short path; rotary positions, grouped heads"),
    Architecture("qwen2", "Qwen2", GROUPED, "short path; biases on query, key and value"),
    Architecture("qwen3", "Qwen3", GROUPED, "short path; a norm of each head"),
    Architecture("qwen3_moe", "Qwen3-MoE", EXPERTS, "mixture of experts, cut over the experts' inner columns"),
    Architecture("mistral", "Mistral", {**GROUPED, "sliding_window": 12}, "sliding window"),
    Architecture("mixtral", "Mixtral", EXPERTS, "mixture of experts, cut over the experts' inner columns"),
    Architecture(
        "gemma2",
        "Gemma 2",
        {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
        "windows on every other layer, soft caps, scaled and tied embedding",
    ),
    Architecture(
        "gemma3_text",
        "Gemma 3",
        {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": SLIDING_AND_FULL},
        "windows by layer, two rotary bases, a norm of each head, scaled and tied embedding",
    ),
    Architecture(
        "phi3", "Phi-3", {**GROUPED, "original_max_position_embeddings": 128}, "fused query-key-value and gate-up, cut by segment"
    ),
    Architecture("olmo2", "OLMo-2", GROUPED, "norms over all heads at once: one gather of queries and one of keys per layer"),
    Architecture("gpt2", "GPT-2", {}, "learned positions, transposed matrices, fused query-key-value, tied embedding"),
    Architecture(
        "gpt_neox",
        "GPT-NeoX",
        {"intermediate_size": 48},
        "query, key and value interleaved by head, partly rotary, parallel residual",
    ),
    Architecture(
        "opt", "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 16}, "learned positions, projections around the layers, tied embedding"
    ),
    Architecture(
        "gpt_oss",
        "GPT-OSS",
        {
            **EXPERTS,
            "sliding_window": 8,
            "layer_types": SLIDING_AND_FULL,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "attention sinks, windows by layer, experts with biases; plain weights only",
    ),
    Architecture(
        "deepseek_v3",
        "DeepSeek-V3",
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_local_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
        "latent attention (its keys and values are cached in full), a dense layer before those with experts",
    ),
    Architecture("cohere", "Cohere", GROUPED, "parallel residual, scaled logits, tied embedding", every_cut=False),
    Architecture("cohere2", "Cohere 2", GROUPED, "as Cohere, with windows by layer", every_cut=False),
    Architecture("granite", "Granite", GROUPED, "scaled embedding, residuals, scores and logits", every_cut=False),
    Architecture("starcoder2", "StarCoder2", GROUPED, "biases everywhere", every_cut=False),
    Architecture("phi", "Phi", GROUPED, "partly rotary, parallel residual, a bias on the logits", every_cut=False),
    Architecture("glm4", "GLM-4", GROUPED, "fused gate-up, partly rotary, norms after attention and MLP", every_cut=False),
    Architecture(
        "qwen2_moe",
        "Qwen2-MoE",
        {**EXPERTS, "shared_expert_intermediate_size": 24},
        "mixture of experts with a shared one",
        every_cut=False,
    ),
    Architecture("olmoe", "OLMoE", EXPERTS, "mixture of experts, norms over all heads at once", every_cut=False),
)
"""Every one is run with P in `PIPELINES` and M in `TENSORS`, or only with the largest of both."""

REFUSED: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "falcon": ("Falcon", {}),
    "bloom": ("BLOOM", {}),
    "gptj": ("GPT-J", {}),
    "mamba": ("Mamba", {}),
    "jamba": ("Jamba", GROUPED),
    "qwen3_next": ("Qwen3-Next", GROUPED),
    "stablelm": ("StableLM", GROUPED),
}
"""What is refused: model type -> title and settings. The reason in the page is what the engine says."""
