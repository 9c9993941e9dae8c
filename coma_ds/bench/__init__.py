"""What a whole step costs, beside what others take for it."""
