"""Benchmarks and studies; each module says which `make` target runs it."""
