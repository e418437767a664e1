#!/usr/bin/env python3
"""The seed's command for comparing a converted model with its source, as it was; today `selectmoe verify`.

    python scripts/compare_converted_model.py --converted-model converted_models/select_moe_converted_OLMoE-1B-7B-0125

Exit code 3: they differ. Whatever else is given, such as `rows=8`, goes to `selectmoe verify` unchanged.
"""

from __future__ import annotations

import argparse
import datetime
import sys

from selectmoe.cli import main

ORIGINAL = "allenai/OLMoE-1B-7B-0125"
CONVERTED = "./converted_models/select_moe_converted_OLMoE-1B-7B-0125"


def command(arguments: list[str]) -> list[str]:
    """The seed's arguments as those of `selectmoe`."""
    parser = argparse.ArgumentParser(description="a converted model against its source; today: selectmoe verify")
    parser.add_argument("--original-model", default=ORIGINAL, help="hub name, folder or s3:// (default %(default)s)")
    parser.add_argument("--converted-model", default=CONVERTED, help="what convert made of it (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="the dtype it was converted to (default %(default)s)")
    given, more = parser.parse_known_args(arguments)
    if not any(word.startswith("output_dir=") for word in more):
        more = [f"output_dir=outputs/verify/{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}", *more]
    names = [f"original_model={given.original_model}", f"converted_model={given.converted_model}"]
    return ["verify", *names, f"dtype={given.dtype}", *more]


if __name__ == "__main__":
    sys.exit(main(command(sys.argv[1:])))
