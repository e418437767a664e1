"""Stage 1: the quality gates (and routers) of a Select-MoE model, trained on the pool."""
