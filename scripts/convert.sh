#!/usr/bin/env bash
# The seed's wrapper around the conversion, as it was: bash scripts/convert.sh [--save-path DIR] [--source-model M] [--dtype D]
# Today: selectmoe convert source_model=allenai/OLMoE-1B-7B-0125 output_dir=DIR
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python3
case " $* " in
  *" --save-path"*) ;;
  *) set -- --save-path ./converted_models/select_moe_converted_OLMoE-1B-7B-0125 "$@" ;;
esac
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$root/scripts/convert_olmoe_to_select_moe.py" "$@"
