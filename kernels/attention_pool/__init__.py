"""Attention pooling of compression tokens, behind one function."""

from coma_ds.kernels.attention_pool.op import attention_pool, attention_pool_at

__all__ = ["attention_pool", "attention_pool_at"]
