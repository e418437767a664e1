"""The Select-MoE pipeline: check, then the chain from the judge to the verdict."""
