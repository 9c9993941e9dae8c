"""``python -m coma_ds.kernels.bench``: are the kernels right on this card, and how fast."""
