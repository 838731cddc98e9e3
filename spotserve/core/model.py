"""What deciding needs to know of a model: its shape in layers, heads and bytes. No tensors."""

import msgspec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a causal language model.

    Embedding, and final norm with head, are pseudo-layers with bytes of their own: a tied embedding counts in both.
    """

    name: str
    """What clients call the model."""
    num_layers: int
    num_kv_heads: int
    head_size: int
    vocabulary_size: int
    context_tokens: int
    """Longest prompt and output together."""
    layer_bytes: int
    """Weights of one decoder layer."""
    embedding_bytes: int
    head_bytes: int
    value_bytes: int
    """Bytes of one element of the KV cache (4 for float32)."""

    def __post_init__(self) -> None:
        assert min(self.num_layers, self.num_kv_heads, self.head_size, self.vocabulary_size, self.context_tokens) >= 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of one whole copy of the weights."""
        return self.num_layers * self.layer_bytes + self.embedding_bytes + self.head_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token over all layers and heads, keys and values both."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.value_bytes
