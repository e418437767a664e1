"""Study: which gate loss makes a judge that tells good rows from bad ones?

    make study-judge                                       # python -m bench.study_judge .selectmoe/study-judge
    python -m bench.study_judge FOLDER --smoke --page DIR   # everything on a tiny model, in less than a minute
    python -m bench.study_judge                             # no FOLDER: the page anew from judge.json, nothing is run

SmolLM2-135M, upcycled at full depth, is warmed up with every loss in both gate modes, and ranks rows some of which are
corrupted copies. Observers cannot change what the model computes: the model reads every row once, and all observers are
trained on what their gates would have read. Applied gates go through the real stages, on fewer rows. The configuration is
chosen on pool A by a rule (`findings.choose`) and confirmed once on pool B, whose sources are others.

Written to `docs/experiments/`: `judge.md`, `judge.png`, `judge.json`. What is finished is kept in FOLDER (14 GB while it runs,
4 afterwards); after `kill -9` the same command goes on. It is quickest with 8 GB of memory free.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from selectmoe.progress import quiet

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    """Run the study, or what is missing of it, and write the page."""
    parser = argparse.ArgumentParser(description="Which gate loss makes a judge?")
    parser.add_argument("folder", type=Path, nargs="?", help="where finished work is kept")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few rows: proves that it runs")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/experiments", help="folder of the page")
    given = parser.parse_args(arguments)
    quiet()
    from bench.judge import findings, page

    if given.folder is None:
        if given.smoke:
            parser.error("--smoke needs a folder")
        page.rewrite(given.page)
        print(given.page / page.PAGE)
        return 0
    from bench.judge.design import Cell, Design, applied_cells, confirming_cells, observer_cells, smoke, untrained_cells
    from bench.judge.study import Study

    d = smoke() if given.smoke else Design()
    study = Study(given.folder.resolve(), d)
    observers, through = observer_cells(d), applied_cells(d)
    confirming = confirming_cells(d, Cell("A", "observer", "contrastive", 0.0, 0, rows=d.warm, rate=d.rate))
    untrained = {pool: untrained_cells(d, pool) for pool in study.pools}
    study.estimate([*observers, *through, *confirming, *untrained["A"], *untrained["B"]])

    study.run_observers("A", [*untrained["A"], *observers])
    study.run_applied(through)
    study.run_observers("B", untrained["B"])
    found = findings.Findings(study)
    groups = found.pool_a()
    chosen = findings.choose(groups, d)
    cell = findings.as_cell(chosen)
    confirming = confirming_cells(d, cell)
    study.run_observers("B", [c for c in confirming if c.mode == "observer"])
    study.run_applied([c for c in confirming if c.mode == "applied"])
    study.run_transfer(findings.brought_cells(d, cell), "B")
    results = {
        **page.provenance(study, given.smoke),
        "rivals": {
            f"{name}, {rows}": e.rival_table() for rows, part in found.sets().items() for name, e in part.items()
        },
        "groups": groups,
        "chosen": chosen,
        "confirmed": found.confirmed(chosen, confirming),
        "controls": found.controls(),
        "unseen": found.unseen(),
        "layers": found.layers(findings.best_observer(chosen, groups, d)),
    }
    page.write(results, given.page)
    study.tidy()
    print(given.page / page.PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
