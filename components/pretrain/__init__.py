"""A pool to a small OLMoE of the user's own."""
