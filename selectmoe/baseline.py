"""The other arms: `select` once per arm (and per seed, where the arm draws), each a complete output in its own folder.

    selectmoe baseline arms=[random,nll] seeds=[0,1,2] router_data_dir=out/route data=out/ingest output_dir=out/arms

Out: `ARM/`, or `ARM-SEED/` for random, balanced_random and oracle, with the bytes that `select` would have written, and
`arms.json`: folder -> identity.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selectmoe import select, stage
from selectmoe.config import StageConfig, build, group, identity, input_, values
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest
from selectmoe.select import DEFAULT_SHARE, ClusteringConfig, SelectConfig, check_budget, check_clustering
from selectmoe.selection import CLUSTERED, DRAWN, Arm, parse_arm, planted_file

STAGE = "baseline"
VERSION = 1


@dataclass
class BaselineConfig(StageConfig):
    """Configuration of `baseline`."""

    router_data_dir: str = input_(doc="router data, from route or merge")
    data: str = input_(doc="the pool that was routed, or ingest's output_dir")
    planted: str = input_("", doc="planted.jsonl or ingest's output_dir; for the arm oracle, and only there")
    arms: list[str] = identity(["random"], doc="what to compare with: selected, legacy, nll, METHOD or METHOD-SCORE")
    seeds: list[int] = identity([42], doc="a sample per seed for arms that draw; the others use seed")
    selection_percentage: float = identity(DEFAULT_SHARE, doc="share of the candidates to select, above 0, at most 1")
    selection_rows: int | None = identity(None, doc="rows to select, in the place of selection_percentage")
    selection_tokens: int | None = identity(
        None, doc="answer tokens to select at most, in the place of selection_percentage"
    )
    clustering_params: ClusteringConfig = group(ClusteringConfig)

    def validate(self) -> None:
        """Check the arms, the seeds, and every arm's own configuration."""
        arms = [parse_arm(name) for name in self.arms]
        for key, given in (("arms", self.arms), ("seeds", self.seeds)):
            if not given or len({*given}) < len(given):
                raise UserError(f"{key}={given} must name at least one, and each once")
        check_budget(self.selection_percentage, self.selection_rows, self.selection_tokens)
        if bool(self.planted) != any(arm.method == "oracle" for arm in arms):
            raise UserError("planted= and the arm oracle belong together: give both or neither")
        if not any(arm.method in CLUSTERED for arm in arms) and self.clustering_params != ClusteringConfig():
            raise UserError("clustering_params have no effect: none of the arms clusters")
        if all(arm.picking == "coverage" for arm in arms if arm.method in CLUSTERED):
            check_clustering(self.clustering_params, "coverage")
        for _, config in self.selections(Path(".")):
            config.validate()

    def selections(self, root: Path) -> Iterator[tuple[str, SelectConfig]]:
        """The folder and the configuration of every selection below `root`."""
        for arm in map(parse_arm, self.arms):
            params = self.clustering_params if arm.method in CLUSTERED else ClusteringConfig()
            if arm.picking == "coverage":  # which has no k to choose
                params = ClusteringConfig(restarts=params.restarts, max_iters=params.max_iters)
            for seed in self.seeds if arm.method in DRAWN else [self.seed]:
                config = SelectConfig(
                    output_dir=str(root / arm.folder(seed)),
                    seed=seed,
                    threads=self.threads,
                    router_data_dir=self.router_data_dir,
                    data=self.data,
                    planted=self.planted if arm.method == "oracle" else "",
                    method=arm.method,
                    score=arm.score,
                    picking=arm.picking,
                    selection_percentage=self.selection_percentage,
                    selection_rows=self.selection_rows,
                    selection_tokens=self.selection_tokens,
                    clustering_params=params,
                )
                yield arm.folder(seed), _with_settings(config, arm)


def _with_settings(config: SelectConfig, arm: Arm) -> SelectConfig:
    """A selection's configuration with the settings that its arm's name holds."""
    from selectmoe.run import parse_budget

    nested = values(config, "identity", "execution", "input")
    for key, value in arm.settings:
        given = (
            {"selection_rows": None, "selection_tokens": None} | parse_budget(value)
            if key == "budget"
            else {key: value}
        )
        for dotted, item in given.items():
            *parents, last = dotted.split(".")
            node = nested
            for parent in parents:
                node = node[parent]
            node[last] = item
    return build(SelectConfig, nested)


def run(config: BaselineConfig) -> Path:
    """Run `select` for every arm and seed.

    Returns:
        The output directory.

    Raises:
        UserError: as `select`, or an unknown arm.
    """
    from selectmoe import pool, router_data

    config.validate()
    planted = str(planted_file(config.planted)) if config.planted else ""
    inputs = {
        "router_data": str(router_data.locate(config.router_data_dir)),
        "pool": str(pool.locate(config.data)),
        "planted": planted,
    }
    with stage.begin(STAGE, VERSION, config, inputs=inputs) as out:
        if out.done:
            return out.path
        identities: dict[str, str] = {}
        rows: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        for folder, selection in config.selections(out.staging):
            manifest = read_manifest(select.run(selection), verify=False)
            identities[folder] = manifest.identity
            rows.update({"in": manifest.rows["in"], "out": manifest.rows["out"]})
            dropped.update(manifest.rows["dropped"])
        text = json.dumps(identities, indent=1, sort_keys=True)
        (out.staging / "arms.json").write_text(text + "\n", encoding="utf-8")
        out.commit(rows_in=rows["in"], rows_out=rows["out"], dropped=dropped)
    return out.path
