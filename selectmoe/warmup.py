"""Stage 1: train the quality gates (and, by the legacy recipe, the routers) of a Select-MoE checkpoint.

    selectmoe warmup selector_model.path=out/convert data=out/ingest output_dir=out/warmup

In: a checkpoint and a pool. Out: `full_rank_weights.pt` and `.safetensors` with the tokenizer beside them, and
`warmup_rows.jsonl` (dataset, id of every row that was trained on).

`recipe=observer` (default): the gates only read, so nothing but a forward pass is needed. Each learns to tell the answers of
pool rows from those of corrupted copies made on the fly (loss `contrastive`). `recipe=legacy`: applied gates and routers are
trained through the model with L = CE + coef (L_lb + weight L_q), the predecessor's `sigmoid` loss by default.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from selectmoe import distributed, pool, stage
from selectmoe.config import StageConfig, execution, group, identity, input_
from selectmoe.corruption import CORRUPTIONS, check_kinds
from selectmoe.errors import UserError

STAGE = "warmup"
VERSION = 2
RECIPES = {"observer": ("observer", "contrastive"), "legacy": ("applied", "sigmoid")}
"""Recipe -> the gate mode that it needs, and its quality loss."""


@dataclass
class SelectorModel:
    """The judge."""

    path: str = input_(doc="Select-MoE checkpoint, from `convert`")


@dataclass
class WarmupTraining:
    """How the gates are trained."""

    learning_rate: float = identity(3e-4, doc="peak learning rate of AdamW; decays linearly to 0")
    epochs: int = identity(2, doc="passes over the warm-up rows; every pass has new corrupted copies")
    batch_size: int = identity(16, doc="pool rows per optimizer step (their corrupted copies come on top)")
    per_device_batch_size: int = identity(1, doc="pool rows per forward pass; divides batch_size; more are faster")
    rows: int = identity(0, doc="warm-up rows, drawn from the pool; 0: the share subset_ratio")
    subset_ratio: float = identity(1.0, doc="share of the pool that is trained on, where rows is 0")
    max_length: int = identity(1024, doc="tokens of a row; the rest is cut off")
    full_sequence_prediction: bool = identity(True, doc="legacy: learn user and assistant text; false: answers only")
    mask_special_tokens: bool = identity(True, doc="legacy: do not learn role tags")
    quality_loss_type: str | None = identity(None, doc="default: the recipe's (observer: contrastive, legacy: sigmoid)")
    quality_loss_weight: float = identity(1.0, doc="weight of the quality loss, before router_aux_loss_coef")
    enable_load_balancing: bool = identity(False, doc="legacy: add the load-balancing loss")
    train_gates: bool = identity(True, doc="train the quality gates")
    train_routers: bool | None = identity(None, doc="train the MoE routers; default: legacy only")
    corruptions: list[str] = identity(list(CORRUPTIONS), doc="contrastive: kinds of corrupted copies, in turn")
    ratio: int = identity(1, doc="contrastive: corrupted copies per row")
    distributed: str = execution("single", doc="single; under torchrun ddp, or fsdp: the frozen model is sharded")


@dataclass
class WarmupConfig(StageConfig):
    """Configuration of `warmup`."""

    selector_model: SelectorModel = group(SelectorModel)
    data: str = input_(doc="the pool, or ingest's output_dir")
    recipe: str = identity("observer", doc="what belongs together: observer (ours) or legacy (the predecessor's)")
    training: WarmupTraining = group(WarmupTraining)

    def validate(self) -> None:
        """Check ranges, names, and that nothing is given which the recipe would not read.

        Raises:
            UserError: a value is out of its range or does not fit the recipe.
        """
        t = self.training
        if self.recipe not in RECIPES:
            raise UserError(f"recipe={self.recipe!r} is unknown; known: {', '.join(RECIPES)}")
        for name in ("epochs", "batch_size", "per_device_batch_size", "max_length", "ratio"):
            if getattr(t, name) < 1:
                raise UserError(f"training.{name}={getattr(t, name)}: at least 1")
        if t.batch_size % t.per_device_batch_size:
            raise UserError(
                f"training.batch_size={t.batch_size} is not a multiple of per_device_batch_size={t.per_device_batch_size}"
            )
        if not 0 < t.subset_ratio <= 1 or t.rows < 0:
            raise UserError("training.subset_ratio must be above 0 and at most 1, training.rows at least 0")
        if not 0 < t.learning_rate <= 1:
            raise UserError(f"training.learning_rate={t.learning_rate} must be above 0 and at most 1")
        if not 0 <= t.quality_loss_weight < float("inf"):
            raise UserError(f"training.quality_loss_weight={t.quality_loss_weight} must be at least 0, and finite")
        check_kinds(t.corruptions, "training.corruptions")
        distributed.check_mode(t.distributed)
        self._check_recipe()
        self._check_read()

    def _check_recipe(self) -> None:
        t = self.training
        if not t.train_gates and not self.train_routers:
            raise UserError("training.train_gates and training.train_routers are both off: nothing would be trained")
        if self.recipe == "observer" and self.loss != "contrastive":
            raise UserError("recipe=observer trains with quality_loss_type=contrastive: give recipe=legacy for another")
        if self.recipe == "observer" and not t.quality_loss_weight:
            raise UserError("training.quality_loss_weight=0 with recipe=observer: nothing would be trained")
        if self.recipe == "observer" and (self.train_routers or not t.train_gates):
            raise UserError("recipe=observer trains the gates and nothing else: give recipe=legacy to train routers")

    def _check_read(self) -> None:
        """Nothing may be set that this run would not read."""
        unread: dict[str, str] = {}
        if self.recipe == "observer":
            names = ("full_sequence_prediction", "mask_special_tokens", "enable_load_balancing")
            unread |= dict.fromkeys(names, "recipe=legacy")
        if self.loss != "contrastive":
            unread |= dict.fromkeys(("corruptions", "ratio"), "training.quality_loss_type=contrastive")
        default = WarmupTraining()
        for name, reader in unread.items():
            if getattr(self.training, name) != getattr(default, name):
                raise UserError(f"training.{name} is read with {reader} only: leave it out, or give that")

    @property
    def loss(self) -> str:
        """The quality loss in force."""
        return self.training.quality_loss_type or RECIPES[self.recipe][1]

    @property
    def train_routers(self) -> bool:
        """Whether routers are trained."""
        given = self.training.train_routers
        return self.recipe == "legacy" if given is None else given


def choose_rows(rows: list[pool.Row], config: WarmupConfig) -> list[pool.Row]:
    """The warm-up rows: the first ones by a hash of seed and id, so that neither order nor other rows play a part.

    Raises:
        UserError: more rows are asked for than there are.
    """
    wanted = config.training.rows or max(1, round(config.training.subset_ratio * len(rows)))
    if wanted > len(rows):
        raise UserError(f"training.rows={wanted}: the pool has {len(rows)}")

    def place(row: pool.Row) -> bytes:
        return hashlib.sha256(f"warmup:{config.seed}:{row.dataset}:{row.id}".encode("utf-8", "surrogatepass")).digest()

    return sorted(sorted(rows, key=place)[:wanted], key=lambda row: row.key)


def run(config: WarmupConfig) -> Path:
    """Train and write the router weights.

    Returns:
        The output directory.

    Raises:
        UserError: bad values, a checkpoint whose gate mode does not fit the recipe, no row with anything to learn, or
            a training that diverged.
    """
    from selectmoe.checkpoint import resolve
    from selectmoe.losses import check_loss

    config.validate()
    distributed.check_launch(STAGE, config.training.distributed)
    check_loss(config.loss)
    where = str(pool.locate(config.data))
    source = resolve(
        config.selector_model.path, ("select_moe",), "selector_model.path", "make one with `selectmoe convert`"
    )
    mode = RECIPES[config.recipe][0]
    if source.config.get("gate_mode") != mode:
        raise UserError(
            f"recipe={config.recipe} needs gate_mode={mode}, {source.path} has {source.config.get('gate_mode')}: "
            f"convert with model.gate_mode={mode}"
        )
    inputs = {"selector_model": str(source.path), "pool": where}
    with distributed.together(config.training.distributed), stage.begin(STAGE, VERSION, config, inputs) as out:
        if out.done:
            return out.path
        from selectmoe.gate_training import GateTraining

        rows = pool.read_pool(where)
        chosen = choose_rows(rows, config)
        training = GateTraining(config, chosen, out)
        training.train()
        if not out.leads:
            return out.path
        training.save(out.staging)
        lines = (json.dumps({"dataset": r.dataset, "id": r.id}, sort_keys=True) + "\n" for r in training.rows)
        (out.staging / "warmup_rows.jsonl").write_text("".join(lines), encoding="utf-8")
        dropped = {"not a warm-up row": len(rows) - len(chosen), "nothing to learn": len(chosen) - len(training.rows)}
        out.commit(
            rows_in=len(rows), rows_out=len(training.rows), dropped=dropped, bookkeeping=["tokenizer_config.json"]
        )
    return out.path
