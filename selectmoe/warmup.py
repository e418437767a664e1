"""Stage 1: train the quality gates (and, by the legacy recipe, the routers) of a Select-MoE checkpoint.

    selectmoe warmup selector_model.path=out/convert data=out/ingest output_dir=out/warmup
    torchrun --nproc-per-node 4 -m selectmoe.cli warmup training.distributed=ddp ...

In: a checkpoint and a pool. Out: `full_rank_weights.pt` and `.safetensors` (with `training.mode=lora`
`adapter_model.safetensors` and its config) with the tokenizer beside them, `warmup_rows.jsonl` (dataset, id of every row
that was trained on), `warmup.json` (what was trained, the digest of all that was not), `gates.csv` and `gates.png` (mean
gate by layer and step).

A recipe gives defaults that belong together. `observer` (default): the gates only read, so nothing but a forward pass is
needed; each learns to tell the answers of pool rows from those of corrupted copies made on the fly (loss `contrastive`).
`legacy`: applied gates and routers are trained through the model with L = CE + coef (L_lb + weight L_q), the
predecessor's `sigmoid` loss by default. Any loss goes with either.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectmoe import allowed_code, distributed, ingested, pool, stage
from selectmoe.allowed_code import names_code
from selectmoe.config import StageConfig, execution, group, identity, input_
from selectmoe.corruption import CORRUPTIONS, check_kinds
from selectmoe.errors import UserError
from selectmoe.loss_parameters import check_loss
from selectmoe.schedule import SCHEDULERS
from selectmoe.sources import DatasetConfig

STAGE = "warmup"
VERSION = 3
RECIPES = {"observer": ("observer", "contrastive"), "legacy": ("applied", "sigmoid")}
"""Recipe -> the gate mode that it needs, and its quality loss."""
MODES = ("full_rank", "lora")
SUBSET = 0.025
"""Default share of `dataset.*` that is trained on, as the predecessor had it."""
PRECISIONS = ("auto", "float32", "bfloat16", "mixed")
BOOKKEEPING = ("tokenizer_config.json", "adapter_config.json", "warmup.json", "gates.csv", "gates.png")


@dataclass
class SelectorModel:
    """The judge."""

    path: str = input_(doc="Select-MoE checkpoint, from `convert`")
    trash_expert: str = identity("", doc="import path of a custom trash expert (in allow_code too); default: its own")


@dataclass
class Lora:
    """Adapters, with `training.mode=lora`."""

    r: int = identity(16, doc="rank of the adapters")
    alpha: float = identity(64.0, doc="their scale is alpha / r")
    dropout: float = identity(0.0, doc="dropout in the adapters; adapters on routers have none")
    target_modules: list[str] = identity([], doc="linear layers that get adapters too, by name, such as q_proj")


@dataclass
class WarmupTraining:
    """How the gates are trained."""

    mode: str = identity("full_rank", doc="full_rank, or lora: adapters on the routers beside the whole gates")
    learning_rate: float = identity(3e-4, doc="peak learning rate of AdamW")
    scheduler: str = identity("linear", doc="what follows the rise: linear or cosine decay to 0, or constant")
    warmup_ratio: float = identity(0.0, doc="share of the steps in which the learning rate rises")
    weight_decay: float = identity(0.0, doc="AdamW's weight decay")
    max_grad_norm: float = identity(1.0, doc="gradients are scaled down to this norm; 0: they are left as they are")
    epochs: int = identity(2, doc="passes over the warm-up rows; every pass has new corrupted copies")
    batch_size: int = identity(16, doc="pool rows per optimizer step (their corrupted copies come on top)")
    per_device_batch_size: int = identity(1, doc="pool rows per forward pass; divides batch_size; more are faster")
    token_budget: int = identity(0, doc="padded tokens per forward pass, in place of per_device_batch_size; 0: off")
    group_by_length: bool = identity(False, doc="steps of rows of similar length: less padding, less even chance")
    rows: int = identity(0, doc="warm-up rows, drawn from the pool; 0: the share subset_ratio")
    subset_ratio: float | None = identity(
        None, doc="share of the pool that is trained on, where rows is 0; default: 1 of data=, 0.025 of dataset.*"
    )
    max_length: int = identity(1024, doc="tokens of a row; the rest is cut off")
    full_sequence_prediction: bool = identity(True, doc="cross-entropy of user and assistant text; false: answers only")
    mask_special_tokens: bool = identity(True, doc="no cross-entropy of role tags")
    quality_loss_type: str | None = identity(
        None, doc="default: the recipe's (observer: contrastive, legacy: sigmoid); or package.module:callable"
    )
    quality_loss_weight: float = identity(1.0, doc="weight of the quality loss, before router_aux_loss_coef")
    quality_loss_params: dict[str, Any] = identity({}, doc="its parameters, as in {lambda_var: 0.2}; default: its own")
    enable_load_balancing: bool = identity(False, doc="add the load-balancing loss (where routers are trained)")
    train_gates: bool = identity(True, doc="train the quality gates")
    train_routers: bool | None = identity(None, doc="train the MoE routers; default: legacy only")
    corruptions: list[str] = identity(list(CORRUPTIONS), doc="contrastive: kinds of corrupted copies, in turn")
    ratio: int = identity(1, doc="contrastive: corrupted copies per row")
    precision: str = identity(
        "auto", doc="float32; bfloat16: frozen weights in it; mixed: autocast; auto: bfloat16 on a GPU, else float32"
    )
    lora: Lora = group(Lora)
    gradient_checkpointing: bool = execution(False, doc="compute layers twice and keep less: less memory, same result")
    eval_every: int = execution(0, doc="steps between evaluations on holdout=; 0: after every epoch")
    eval_rows: int = execution(64, doc="held-out rows that are evaluated, at most")
    distributed: str = execution("single", doc="single; under torchrun ddp, or fsdp: the frozen model is sharded")


@dataclass
class WarmupConfig(StageConfig):
    """Configuration of `warmup`."""

    selector_model: SelectorModel = group(SelectorModel)
    data: str = input_("", doc="the pool, or ingest's output_dir; without it dataset.* is ingested first")
    dataset: DatasetConfig = group(DatasetConfig)
    holdout: str = input_("", doc="held-out rows to evaluate on (ingest's output_dir, or its holdout); default: none")
    recipe: str = identity("observer", doc="what belongs together: observer (ours) or legacy (the predecessor's)")
    allow_code: list[str] = execution([], doc="import paths of your own loss or trash expert that may be called")
    training: WarmupTraining = group(WarmupTraining)

    def validate(self) -> None:
        """Check ranges, names, and that nothing is given which the recipe would not read.

        Raises:
            UserError: a value is out of its range or does not fit the recipe.
        """
        t = self.training
        if self.recipe not in RECIPES:
            raise UserError(f"recipe={self.recipe!r} is unknown; known: {', '.join(RECIPES)}")
        for name, known in (("mode", MODES), ("scheduler", SCHEDULERS), ("precision", PRECISIONS)):
            if getattr(t, name) not in known:
                raise UserError(f"training.{name}={getattr(t, name)!r} is unknown; known: {', '.join(known)}")
        self._check_numbers()
        if not names_code(self.loss):
            check_loss(self.loss, t.quality_loss_params)
        check_kinds(t.corruptions, "training.corruptions")
        distributed.check_mode(t.distributed)
        self._check_trained()
        self._check_read()

    def _check_numbers(self) -> None:
        t = self.training
        for name in ("epochs", "batch_size", "per_device_batch_size", "max_length", "ratio", "eval_rows"):
            if getattr(t, name) < 1:
                raise UserError(f"training.{name}={getattr(t, name)}: at least 1")
        if t.batch_size % t.per_device_batch_size:
            raise UserError(
                f"training.batch_size={t.batch_size} is not a multiple of per_device_batch_size={t.per_device_batch_size}"
            )
        if not 0 < self.share <= 1 or t.rows < 0:
            raise UserError("training.subset_ratio must be above 0 and at most 1, training.rows at least 0")
        if not 0 < t.learning_rate <= 1:
            raise UserError(f"training.learning_rate={t.learning_rate} must be above 0 and at most 1")
        for name in ("quality_loss_weight", "weight_decay", "max_grad_norm", "eval_every", "token_budget"):
            if not 0 <= getattr(t, name) < float("inf"):
                raise UserError(f"training.{name}={getattr(t, name)} must be at least 0, and finite")
        if not 0 <= t.warmup_ratio < 1 or not 0 <= t.lora.dropout < 1:
            raise UserError("training.warmup_ratio and training.lora.dropout must be in [0, 1)")
        together = (1 + t.ratio if self.loss == "contrastive" else 1) * t.max_length
        if 0 < t.token_budget < together:
            raise UserError(f"training.token_budget={t.token_budget} holds no row of max_length: at least {together}")
        if t.token_budget and t.per_device_batch_size > 1:
            raise UserError("training.token_budget takes the place of training.per_device_batch_size: give one of them")
        if t.lora.r < 1 or not 0 < t.lora.alpha < float("inf"):
            raise UserError(f"training.lora.r={t.lora.r} and training.lora.alpha={t.lora.alpha} must be above 0")

    def _check_trained(self) -> None:
        t = self.training
        if not t.train_gates and not self.train_routers:
            raise UserError("training.train_gates and training.train_routers are both off: nothing would be trained")
        if not self.through and not t.quality_loss_weight:
            raise UserError("training.quality_loss_weight=0 where gates alone are trained: nothing would be trained")
        if self.lora and not self.train_routers and not t.lora.target_modules:
            raise UserError(
                "training.mode=lora puts adapters on routers: it needs training.train_routers=true (as recipe=legacy has it)"
            )
        if self.lora and self.train_routers and t.lora.dropout:
            raise UserError("training.lora.dropout must be 0 where routers have adapters: their weights have no input")

    def _check_read(self) -> None:
        """Nothing may be set that this run would not read."""
        unread: dict[str, str] = {}
        if not self.through:
            names = ("full_sequence_prediction", "mask_special_tokens", "enable_load_balancing")
            unread |= dict.fromkeys((*names, "gradient_checkpointing"), "recipe=legacy or training.train_routers=true")
        if self.loss != "contrastive":
            unread |= dict.fromkeys(("corruptions", "ratio"), "training.quality_loss_type=contrastive")
        if not self.lora:
            unread["lora"] = "training.mode=lora"
        if not self.holdout:
            unread |= dict.fromkeys(("eval_every", "eval_rows"), "holdout=")
        default, t = WarmupTraining(), self.training
        for name, reader in unread.items():
            if getattr(t, name) != getattr(default, name):
                raise UserError(f"training.{name} is read with {reader} only: leave it out, or give that")
        ingested.check(self)
        if names_code(self.loss) and t.quality_loss_params:
            raise UserError(f"training.quality_loss_params is not read: the loss is {self.loss}")
        code = [name for name in (self.loss, self.selector_model.trash_expert) if names_code(name)]
        if sorted(self.allow_code) != sorted(code):
            raise UserError(f"allow_code={self.allow_code} must be what is named and no more: {code}")

    @property
    def loss(self) -> str:
        """The quality loss in force."""
        return self.training.quality_loss_type or RECIPES[self.recipe][1]

    @property
    def share(self) -> float:
        """The share of the pool that is trained on, where no number of rows is given."""
        given = self.training.subset_ratio
        return (1.0 if self.data else SUBSET) if given is None else given

    @property
    def train_routers(self) -> bool:
        """Whether routers are trained."""
        given = self.training.train_routers
        return self.recipe == "legacy" if given is None else given

    @property
    def lora(self) -> bool:
        """Whether adapters are trained in the weights' place."""
        return self.training.mode == "lora"

    @property
    def through(self) -> bool:
        """Whether gradients must go through the model; observers' gates alone need a forward pass only."""
        return self.recipe == "legacy" or self.train_routers or bool(self.training.lora.target_modules)


def choose_rows(rows: list[pool.Row], config: WarmupConfig) -> list[pool.Row]:
    """The warm-up rows: the first ones by a hash of seed and id, so that neither order nor other rows play a part.

    Raises:
        UserError: more rows are asked for than there are.
    """
    wanted = config.training.rows or max(1, round(config.share * len(rows)))
    if wanted > len(rows):
        raise UserError(f"training.rows={wanted}: the pool has {len(rows)}")
    return drawn(rows, wanted, f"warmup:{config.seed}")


def drawn(rows: list[pool.Row], wanted: int, salt: str) -> list[pool.Row]:
    """So many of the rows, the first ones by a hash of their keys; sorted by key."""

    def place(row: pool.Row) -> bytes:
        return hashlib.sha256(f"{salt}:{row.dataset}:{row.id}".encode("utf-8", "surrogatepass")).digest()

    return sorted(sorted(rows, key=place)[:wanted], key=lambda row: row.key)


def prove(config: WarmupConfig) -> dict[str, Any]:
    """Check all that can be checked without the model's weights.

    Returns:
        The stage's inputs.

    Raises:
        UserError: something does not fit.
    """
    from selectmoe.checkpoint import resolve
    from selectmoe.template import load_tokenizer

    t = config.training
    allowed_code.allow(config.allow_code)
    where = str(pool.locate(ingested.pool_of(config)))
    held = str(pool.locate(config.holdout, "holdout")) if config.holdout else ""
    key, advice = "selector_model.path", "make one with `selectmoe convert`"
    source = resolve(config.selector_model.path, ("select_moe",), key, advice)
    mode = RECIPES[config.recipe][0]
    if source.config.get("gate_mode") != mode:
        raise UserError(
            f"recipe={config.recipe} needs gate_mode={mode}, {source.path} has {source.config.get('gate_mode')}: "
            f"convert with model.gate_mode={mode}"
        )
    check_loss(source.config.get("quality_loss_type", "sigmoid"), source.config.get("quality_loss_params"))
    positions = int(source.config.get("max_position_embeddings", t.max_length))
    if t.max_length > positions:
        raise UserError(f"training.max_length={t.max_length} is over the {positions} positions of {source.path}")
    if t.lora.target_modules:
        from selectmoe.judge_adapters import check_targets

        check_targets(source.config, t.lora.target_modules)
    tokens, rows = len(load_tokenizer(source.path)), int(source.config["vocab_size"])
    if tokens > rows:
        raise UserError(f"the tokenizer of {source.path} has {tokens} tokens, its model's embedding {rows} rows")
    inputs: dict[str, Any] = {"selector_model": str(source.path), "pool": where, "holdout": held}
    code = {"loss": config.loss, "trash_expert": config.selector_model.trash_expert}
    for name, path in code.items():
        if path in config.allow_code:
            inputs[name] = {"uri": path, "identity": allowed_code.source_digest(path)}
    return inputs


def run(config: WarmupConfig) -> Path:
    """Train and write the router weights.

    Returns:
        The output directory.

    Raises:
        UserError: bad values, a checkpoint whose gate mode does not fit the recipe, no row with anything to learn, or
            a training that diverged.
    """
    config.validate()
    t = config.training
    distributed.check_launch(STAGE, t.distributed)
    if not t.token_budget:
        distributed.check_batch(t.batch_size, t.per_device_batch_size)
    inputs = prove(config)
    with distributed.together(t.distributed), stage.begin(STAGE, VERSION, config, inputs) as out:
        if out.done:
            return out.path
        from selectmoe.gate_training import GateTraining

        rows = pool.read_pool(inputs["pool"])
        chosen = choose_rows(rows, config)
        held = pool.read_pool(inputs["holdout"]) if inputs["holdout"] else []
        training = GateTraining(config, chosen, drawn(held, t.eval_rows, "held out"), out)
        training.train()
        if not out.leads:
            return out.path
        training.save(out.staging)
        kept = training.plan.rows
        lines = (json.dumps({"dataset": r.dataset, "id": r.id}, sort_keys=True) + "\n" for r in kept)
        (out.staging / "warmup_rows.jsonl").write_text("".join(lines), encoding="utf-8")
        dropped = {"not a warm-up row": len(rows) - len(chosen), "nothing to learn": len(chosen) - len(kept)}
        out.commit(rows_in=len(rows), rows_out=len(kept), dropped=dropped, bookkeeping=BOOKKEEPING)
    return out.path
