"""Which stages run, in which order: the KFP pipeline, its compiler, the local runner and the local servers.

`python -m pipelines compile` writes the pipeline's YAML; `python -m pipelines.local run` is what `make run` calls.
"""
