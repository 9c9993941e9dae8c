"""What ``coma-ds NAME`` runs, one file each."""
