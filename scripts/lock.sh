#!/usr/bin/env bash
# Resolve requirements.lock from pyproject.toml: `make lock`. It names no index, no folder and no build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
links=()
[ -z "${PIP_FIND_LINKS:-}" ] || links=(--find-links "$PIP_FIND_LINKS" --no-emit-find-links)
.venv/bin/python -m uv pip compile pyproject.toml --all-extras --python-version 3.11 --quiet "${links[@]}" \
  --no-annotate --no-header -o requirements.lock
sed -i 's/+cpu//' requirements.lock
