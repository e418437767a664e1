#!/usr/bin/env bash
# Build .venv from requirements.lock: `make setup`. CPU torch where there is no NVIDIA GPU, CUDA torch where there is one.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON3:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: $python is older than 3.11; set PYTHON3 to a newer one" >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -c 'import uv' 2>/dev/null || .venv/bin/python -m pip install --quiet uv
uv() { .venv/bin/python -m uv "$@"; }
export VIRTUAL_ENV=$PWD/.venv
backend=()
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
if [ -n "$links" ]; then
  export UV_FIND_LINKS=$links # wheels that this machine offers, torch's among them
elif [ -z "$(command -v nvidia-smi || true)" ]; then
  backend=(--torch-backend=cpu)
fi
uv pip install --quiet --compile-bytecode "${backend[@]}" -r requirements.lock
uv pip install --quiet --no-deps -e .
uv pip install --quiet --no-deps -r requirements-demo.txt
touch .venv/.done
