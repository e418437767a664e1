#!/usr/bin/env bash
# Stage 2 as the predecessor's users type it; its successors are `selectmoe route` and `selectmoe select`.
#   CUDA_VISIBLE_DEVICES=0 bash scripts/run_stage_2.sh model_checkpoint_path=outputs/stage_1_warmup/.../full_rank_weights.pt
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m selectmoe.seed_commands stage_2 "$@"
