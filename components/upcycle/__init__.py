"""A dense Llama-like checkpoint to an OLMoE-shaped one (sparse upcycling)."""
