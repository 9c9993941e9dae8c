"""InfoNCE over gathered targets, behind one function."""

from coma_ds.kernels.info_nce.reference import (
    FalseNegatives,
    info_nce,
    retrieval_statistics,
)

__all__ = ["FalseNegatives", "info_nce", "retrieval_statistics"]
