"""An OLMoE checkpoint to a Select-MoE one, every original tensor unchanged."""
