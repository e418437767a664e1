"""What the Helm chart's Jobs, init containers and tests run: `python -m pipelines.install COMMAND key=value ...`."""
