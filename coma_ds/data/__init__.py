"""Records, readers, sampling and collation."""
