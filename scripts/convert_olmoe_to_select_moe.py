#!/usr/bin/env python3
"""The seed's command for converting OLMoE, as it was; today `selectmoe convert`.

    python scripts/convert_olmoe_to_select_moe.py --save-path converted_models/select_moe_converted_OLMoE-1B-7B-0125

Whatever else is given, such as `model.quality_gate_init_std=0.01`, goes to `selectmoe convert` unchanged.
"""

from __future__ import annotations

import argparse
import sys

from selectmoe.cli import main

SOURCE = "allenai/OLMoE-1B-7B-0125"
"""The seed's model."""


def command(arguments: list[str]) -> list[str]:
    """The seed's arguments as those of `selectmoe`."""
    parser = argparse.ArgumentParser(description="OLMoE to Select-MoE; today: selectmoe convert")
    parser.add_argument("--source-model", default=SOURCE, help="hub name, folder or s3:// (default %(default)s)")
    parser.add_argument("--save-path", required=True, help="folder or s3:// to write")
    parser.add_argument("--dtype", default="bfloat16", help="keep, float32, bfloat16 or float16 (default %(default)s)")
    given, more = parser.parse_known_args(arguments)
    if not any(word.startswith("model.gate_mode=") for word in more):
        print("gates as the seed has them, model.gate_mode=applied; ours only read: model.gate_mode=observer")
        more = ["model.gate_mode=applied", *more]
    names = [f"source_model={given.source_model}", f"output_dir={given.save_path}", f"dtype={given.dtype}"]
    return ["convert", *names, *more]


if __name__ == "__main__":
    sys.exit(main(command(sys.argv[1:])))
