#!/usr/bin/env bash
# Stage 1 as the predecessor's users type it; its successor is `selectmoe warmup` (torchrun for several GPUs).
#   CUDA_VISIBLE_DEVICES=0,1,2,3 bash scripts/run_stage_1.sh training.learning_rate=1e-4 tag=x
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m selectmoe.seed_commands stage_1 "$@"
