"""Kubernetes without Helm, and a whole cluster on one machine: `make kind-up kind-run kind-down`."""
