"""InfoNCE over gathered targets, behind one function."""

from coma_ds.kernels.info_nce.api import info_nce
from coma_ds.kernels.info_nce.compose import matryoshka, symmetric_info_nce
from coma_ds.kernels.info_nce.inputs import FalseNegatives
from coma_ds.kernels.info_nce.plan import cost
from coma_ds.kernels.info_nce.reference import retrieval_statistics

__all__ = [
    "FalseNegatives",
    "cost",
    "info_nce",
    "matryoshka",
    "retrieval_statistics",
    "symmetric_info_nce",
]
