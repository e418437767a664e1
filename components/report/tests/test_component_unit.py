"""`report` in this process: pytest components/report"""

import json
from pathlib import Path

from components.report.component import report
from tests.component import Alone


def test_it_writes_what_the_chain_wrote_and_shows_it_in_kfp(alone: Alone) -> None:
    found = alone.in_process(report)
    for shown, name in (("page", "report.html"), ("summary", "summary.md")):
        assert Path(found[shown].path).read_bytes() == Path(found["result"].path, name).read_bytes()
    verdict = json.loads(Path(alone.chain.path("report"), "verdict.json").read_text(encoding="utf-8"))
    for arm in verdict["arms"]:
        assert found["numbers"].metadata[f"{arm['name']}_effect"] == arm["effect"]
