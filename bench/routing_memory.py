"""Memory of routing by the number of rows: `make bench-routing-memory`.

    python -m bench.routing_memory [few=10000] [many=200000] [planned=1000000]

1. `selectmoe route` over `few` and over `many` short rows with a tiny judge, each a process of its own: peak resident
   memory may differ by at most 10 %.
2. Planning alone (tokens, batches, shares) of `planned` rows: at most 1 GB at the peak, torch and the judge included.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.judges import TINY, judge_of, tokenizer_of, word_pool
from selectmoe.config import load
from selectmoe.progress import quiet
from selectmoe.stage import peak_rss

WORDS = 16
GROWTH_BAR, PLAN_BAR = 1.1, 1e9


def routed(values: dict[str, Any]) -> None:
    """Route, in this process."""
    from selectmoe import route

    route.run(load(route.RouteConfig, values))


def planned(values: dict[str, Any]) -> None:
    """Plan and share out, in this process."""
    from selectmoe import pool, route, routing, stage
    from selectmoe.batching import share
    from selectmoe.judge import Judge

    config = load(route.RouteConfig, values)
    place = pool.locate(config.data)
    inputs = {"selector_model": config.selector_model.path, "pool": str(place)}
    with stage.begin("route", route.VERSION, config, inputs=inputs) as out:
        sources = [routing.source_of(name, folder) for name, folder in pool.datasets(place).items()]
        work = routing.plan_all(config, sources, Judge.load(config), out)
        mine = share([one.plan for one in work], 0, 1)
        print(f"{sum(len(unit.rows) for unit in mine)} rows in {len(mine)} batches", file=sys.stderr)


def measured(what: str, pool: Path, judge: Path, out: Path) -> int:
    """Peak resident bytes of a process that does `what`."""
    command = [sys.executable, "-m", "bench.routing_memory", "in-process", what, str(pool), str(judge), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main(few: int = 10_000, many: int = 200_000, planned: int = 1_000_000) -> int:
    """Measure and print; 1 where a bar is missed."""
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        judge = judge_of(root / "judge", tokenizer_of(root / "tokenizer", word_pool(root / "words", 200)), TINY)
        peaks = {}
        for rows in (few, many):
            pool = word_pool(root / f"pool-{rows}", rows, datasets=3, most=WORDS)
            peaks[rows] = measured("routed", pool, judge, root / f"out-{rows}")
            print(f"route, {rows} rows: {peaks[rows] / 1e6:.0f} MB", flush=True)
        growth = peaks[many] / peaks[few]
        print(f"growth: {growth:.3f} x (bar {GROWTH_BAR})")
        pool = word_pool(root / "million", planned, datasets=3, most=WORDS)
        plan = measured("planned", pool, judge, root / "out-plan")
        print(f"plan, {planned} rows: {plan / 1e6:.0f} MB (bar {PLAN_BAR / 1e6:.0f})")
    return int(growth > GROWTH_BAR or plan > PLAN_BAR)


if __name__ == "__main__":
    if sys.argv[1:2] == ["in-process"]:
        what, pool, judge, out = sys.argv[2:]
        values = {"selector_model": {"path": judge}, "data": pool, "output_dir": out, "threads": 1}
        {"routed": routed, "planned": planned}[what](values)
        print(peak_rss())
        sys.exit(0)
    sys.exit(main(**{key: int(value) for key, value in (word.split("=", 1) for word in sys.argv[1:])}))
