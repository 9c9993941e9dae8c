"""Which implementation runs: Triton's or torch's, by device, shape and ``COMA_KERNELS``."""

from coma_ds.kernels.dispatch.choice import choose, interpreted, outlook, unavailable

__all__ = ["choose", "interpreted", "outlook", "unavailable"]
