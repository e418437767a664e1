"""The state that the stand-ins keep, for a test to look at and to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.unit.k8s import stand_in


class World:
    """What the stand-ins know."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "world.json"
        self.bin = folder / "bin"
        self.state = folder / "state"
        self.file.write_text(json.dumps(stand_in.START | {"calls": []}), encoding="utf-8")

    def __getitem__(self, key: str) -> Any:
        return json.loads(self.file.read_text(encoding="utf-8"))[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.file.write_text(
            json.dumps(json.loads(self.file.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8"
        )

    def called(self, *words: str) -> list[list[str]]:
        """The calls that begin with some words."""
        return [call for call in self["calls"] if call[: len(words)] == list(words)]

    def nodes(self) -> dict[str, Any]:
        """The cluster's nodes."""
        nodes: dict[str, Any] = self["clusters"]["select-moe"]["nodes"]
        return nodes

    def up(self) -> None:
        """The state that `make kind-up` leaves, as test_kind.py has it."""
        names = ("select-moe-control-plane", "select-moe-worker", "select-moe-worker2")
        nodes = {name: {"up": True, "images": [], "files": [], "cordoned": False} for name in names}
        self["clusters"] = {"select-moe": {"nodes": nodes, "provider": "docker", "config": ""}}
        self["namespaces"] = {"kubeflow": {}}
        self["releases"] = {"select-moe": {"namespace": "kubeflow", "set": ""}}
        (self.state / "kind").mkdir(parents=True)
        (self.state / "kind" / "kubeconfig").write_text("select-moe", encoding="utf-8")
