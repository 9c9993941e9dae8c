"""Attention pooling of compression tokens, behind one function."""

from coma_ds.kernels.attention_pool.reference import attention_pool

__all__ = ["attention_pool"]
