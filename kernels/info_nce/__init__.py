"""InfoNCE over gathered targets, behind one function."""

from coma_ds.kernels.info_nce.reference import info_nce, retrieval_statistics

__all__ = ["info_nce", "retrieval_statistics"]
