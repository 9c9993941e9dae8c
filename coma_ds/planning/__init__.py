"""What a step costs before it is taken: weights, traffic, arithmetic, memory."""
