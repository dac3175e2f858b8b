"""What a configuration says of a model's attention heads."""

from __future__ import annotations

from typing import Any


def head_dim(config: Any) -> int:
    """Channels of an attention head by a configuration of ``transformers``; 0 if it does not say.

    Configurations without a width of their own divide the hidden size among the heads.
    """
    said = getattr(config, "head_dim", None)
    if isinstance(said, int) and said > 0:
        return said
    heads = getattr(config, "num_attention_heads", None)
    return (getattr(config, "hidden_size", None) or 0) // heads if heads else 0
