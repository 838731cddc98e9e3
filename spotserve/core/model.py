"""What deciding needs to know of a model: its shape in layers, heads and bytes. No tensors."""

import msgspec


class Portion(msgspec.Struct, frozen=True, array_like=True):
    """Bytes of a layer that shards may divide among them in `units` equal parts; 1 unit: every shard needs them whole."""

    units: int
    num_bytes: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of a causal language model.

    Embedding, and final norm with head, are pseudo-layers with bytes of their own: a tied embedding counts in both.
    """

    name: str
    """What clients call the model."""
    num_layers: int
    hidden_size: int
    """Width of the state that layers hand on."""
    num_heads: int
    """Attention heads that ask (queries)."""
    num_kv_heads: int
    """Attention heads that are kept (keys and values)."""
    head_size: int
    vocabulary_size: int
    context_tokens: int
    """Longest prompt and output together."""
    layer: tuple[Portion, ...]
    """Weights of one decoder layer."""
    embedding: tuple[Portion, ...]
    head: tuple[Portion, ...]
    value_bytes: int
    """Bytes of one element of the KV cache (4 for float32), and of the state that layers hand on."""
    layer_flops_per_token: int
    """Operations of one decoder layer for one token, attention to other tokens apart: twice the weights that a token meets."""
    head_flops_per_token: int
    """The same for final norm and head."""

    def __post_init__(self) -> None:
        sizes = (self.hidden_size, self.num_heads, self.num_kv_heads, self.head_size, self.vocabulary_size, self.context_tokens)
        assert min(self.num_layers, *sizes) >= 1 and min(self.layer_flops_per_token, self.head_flops_per_token) >= 0

    @property
    def layer_bytes(self) -> int:
        """Weights of one decoder layer."""
        return _sum(self.layer)

    @property
    def embedding_bytes(self) -> int:
        """Weights of the embedding."""
        return _sum(self.embedding)

    @property
    def head_bytes(self) -> int:
        """Weights of final norm and head."""
        return _sum(self.head)

    @property
    def weight_bytes(self) -> int:
        """Bytes of one whole copy of the weights."""
        return self.num_layers * self.layer_bytes + self.embedding_bytes + self.head_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token over all layers and heads, keys and values both."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * self.value_bytes


def _sum(portions: tuple[Portion, ...]) -> int:
    return sum(portion.num_bytes for portion in portions)
