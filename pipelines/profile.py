"""What belongs to a site and not to a run: image, secrets, volumes, where tasks may run, how long, how often again.

    python -m pipelines compile profile=site.yaml
    python -m pipelines compile image=registry.example.org/select-moe@sha256:...

A profile is fixed when the pipeline is compiled, because KFP takes most of it from no parameter. `load` reads one from
YAML, strictly; `Profile.place` applies it to a task. The default profile is for development: an image by tag, no
secret, no volume, no retry. KFP's local runner ignores all of it except environment and retries.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from selectmoe import runlog
from selectmoe.errors import UserError

DIGEST = re.compile(r".+@sha256:[0-9a-f]{64}")
"""An image that cannot change under its name."""
STAGES = (
    "check",
    "ingest",
    "upcycle",
    "pretrain",
    "adopt",
    "convert",
    "verify",
    "warmup",
    "route",
    "merge",
    "select",
    "finetune",
    "evaluate",
    "report",
    "gate",
    "finish",
    "prepare",
    "reuse",
    "compare",
)
ACCELERATED = ("upcycle", "pretrain", "warmup", "route", "finetune", "evaluate")
"""Tasks that use an accelerator where there is one; their memory is a parameter of the pipeline."""
SECONDS = re.compile(r"\d+s")
P = TypeVar("P")


@dataclass(frozen=True)
class SecretEnv:
    """Keys of a Secret as environment variables of every task."""

    name: str
    """The Secret's name."""
    env: dict[str, str]
    """Environment variable -> key of the Secret."""
    optional: bool = False
    """Whether a task may start without the Secret."""


@dataclass(frozen=True)
class SecretKey:
    """One key of a Secret."""

    name: str
    key: str


@dataclass(frozen=True)
class Volume:
    """A PersistentVolumeClaim, mounted in every task."""

    claim: str
    mount: str


@dataclass(frozen=True)
class Toleration:
    """A taint that tasks tolerate."""

    key: str = ""
    operator: str = "Equal"
    value: str = ""
    effect: str = ""


@dataclass(frozen=True)
class Resources:
    """What a task asks for, and may use at most."""

    cpu: str = ""
    """CPU as a quantity, such as 4 or 500m; empty: the stage's default."""
    memory: str = ""
    """Memory as a quantity, such as 16Gi; of a task that uses an accelerator the pipeline's parameter instead."""


@dataclass(frozen=True)
class Retries:
    """How often a task is started again; every task finds its own committed work."""

    count: int = 0
    backoff: str = "30s"
    """Wait before the first retry."""
    factor: float = 2.0
    """By what the wait grows."""
    longest: str = "600s"
    """The longest wait."""


DEFAULTS = {
    "check": Resources("1", "4Gi"),
    "ingest": Resources("2", "8Gi"),
    "convert": Resources("2", "16Gi"),
    "verify": Resources("4", "32Gi"),
    "merge": Resources("2", "8Gi"),
    "select": Resources("4", "16Gi"),
    "report": Resources("2", "8Gi"),
    "adopt": Resources("1", "2Gi"),
    "gate": Resources("500m", "1Gi"),
    "finish": Resources("500m", "2Gi"),
    "prepare": Resources("1", "4Gi"),
    "reuse": Resources("1", "4Gi"),
    "compare": Resources("2", "8Gi"),
    **{name: Resources("4") for name in ACCELERATED},
}
"""What a stage asks for unless the profile says otherwise."""


@dataclass(frozen=True)
class Profile:
    """Everything about a site that the compiled pipeline carries."""

    image: str = field(default_factory=lambda: os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0"))
    """The image of every task; by digest, unless `development` is true."""
    development: bool = False
    """Whether an image by tag will do: KFP's cache knows an image by its name only."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """What the pipeline's parameters are at this site unless a run says otherwise, work_root above all."""
    run_as_non_root: bool = True
    """Whether every task's container is refused where its user is root; false: the cluster decides."""
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    """Plain environment variables of every task, such as MLFLOW_TRACKING_URI or AWS_ENDPOINT_URL_S3."""
    secrets: list[SecretEnv] = field(default_factory=list)
    """Credentials of S3, MLflow and the model hub."""
    webhook: SecretKey | None = None
    """Where the exit handler finds the address that it posts to."""
    scratch: Volume | None = None
    """Where tasks write what is temporary (TMPDIR); none: the container's own disk."""
    model_cache: Volume | None = None
    """Where checkpoints are kept between tasks (SELECTMOE_MODEL_CACHE)."""
    tolerations: list[Toleration] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    accelerator_tolerations: list[Toleration] = field(default_factory=list)
    """Further ones of tasks that use an accelerator."""
    accelerator_node_selector: dict[str, str] = field(default_factory=dict)
    queue: str = ""
    """Kueue's LocalQueue; empty: none."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of every pod."""
    timeouts: dict[str, int] = field(default_factory=dict)
    """Stage -> seconds after which a task is ended; `default` for the others."""
    deadline_seconds: int = 0
    """After which the whole run is ended; 0: never."""
    ttl_seconds: int = 0
    """How long a finished run's pods stay; 0: as long as KFP keeps them."""
    retries: Retries = field(default_factory=Retries)
    resources: dict[str, Resources] = field(default_factory=dict)
    """Stage -> what its tasks ask for, in the place of the default."""

    def validate(self) -> None:
        """Check what no type can check.

        Raises:
            UserError: an image by tag, an unknown stage, a duration that KFP does not know, a relative mount.
        """
        if not self.development and not DIGEST.fullmatch(self.image):
            raise UserError(
                f"image={self.image} can change under its name: give NAME@sha256:DIGEST, or development=true"
            )
        for key, stages in (("timeouts", {*self.timeouts} - {"default"}), ("resources", {*self.resources})):
            if unknown := sorted(stages - {*STAGES}):
                raise UserError(f"{key}.{unknown[0]}: no such stage; known: {', '.join(STAGES)}")
        for key in ("backoff", "longest"):
            if not SECONDS.fullmatch(getattr(self.retries, key)):
                raise UserError(f"retries.{key}={getattr(self.retries, key)} must be seconds, such as 30s")
        for key in ("scratch", "model_cache"):
            volume = getattr(self, key)
            if volume and not volume.mount.startswith("/"):
                raise UserError(f"{key}.mount={volume.mount} must be an absolute path")
        for name in self.environment:
            if re.search("password|secret|token|access_key", name, re.IGNORECASE):
                raise UserError(f"environment.{name} looks like a credential: name a Secret under `secrets`")

    def with_defaults(self, pipeline: Callable[..., None]) -> Callable[..., None]:
        """A pipeline's function with this site's defaults of its parameters.

        Raises:
            UserError: a parameter that the pipeline does not have, or of another type.
        """
        signature = inspect.signature(pipeline)
        changed = dict(signature.parameters)
        for name, value in self.parameters.items():
            if name not in changed:
                raise UserError(f"parameters.{name}: no such parameter; known: {', '.join(changed)}")
            if type(value) is not changed[name].annotation:
                raise UserError(f"parameters.{name}={value!r} must be {changed[name].annotation.__name__}")
            changed[name] = changed[name].replace(default=value)

        @functools.wraps(pipeline)
        def function(*arguments: Any) -> None:
            pipeline(*arguments)

        function.__signature__ = signature.replace(parameters=list(changed.values()))  # type: ignore[attr-defined]
        return function

    def place(self, task: Any, stage: str) -> Any:
        """Apply the profile to a task of a stage; returns the task.

        Args:
            task: a KFP task.
            stage: which one it is.
        """
        from kfp import kubernetes

        task.set_container_image(self.image)
        self._resources(task, stage)
        if self.retries.count and stage not in ("gate", "finish"):
            wait = {"backoff_duration": self.retries.backoff, "backoff_max_duration": self.retries.longest}
            task.set_retry(self.retries.count, backoff_factor=self.retries.factor, **wait)
        kubernetes.use_field_path_as_env(task, runlog.RUN, "metadata.labels['pipeline/runid']")
        if self.run_as_non_root:
            kubernetes.set_security_context(task, run_as_non_root=True)
        kubernetes.set_image_pull_policy(task, self.image_pull_policy)
        if self.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, self.image_pull_secrets)
        self._environment(task, stage)
        self._nodes(task, stage)
        if seconds := self.timeouts.get(stage, self.timeouts.get("default", 0)):
            kubernetes.set_timeout(task, seconds)
        return task

    def _resources(self, task: Any, stage: str) -> None:
        own, usual = self.resources.get(stage, Resources()), DEFAULTS[stage]
        cpu = own.cpu or usual.cpu
        task.set_cpu_request(cpu).set_cpu_limit(cpu)
        memory = own.memory or usual.memory
        if memory and stage not in ACCELERATED:
            task.set_memory_request(memory).set_memory_limit(memory)

    def _environment(self, task: Any, stage: str) -> None:
        from kfp import kubernetes

        for name, value in sorted(self.environment.items()):
            task.set_env_variable(name, value)
        for secret in self.secrets:
            kubernetes.use_secret_as_env(task, secret.name, secret.env, optional=secret.optional)
        if self.webhook and stage == "finish":
            kubernetes.use_secret_as_env(task, self.webhook.name, {self.webhook.key: runlog.WEBHOOK})
        for volume, name in ((self.scratch, "TMPDIR"), (self.model_cache, "SELECTMOE_MODEL_CACHE")):
            if volume:
                kubernetes.mount_pvc(task, volume.claim, volume.mount)
                task.set_env_variable(name, volume.mount)

    def _nodes(self, task: Any, stage: str) -> None:
        from kfp import kubernetes

        uses = stage in ACCELERATED
        for toleration in [*self.tolerations, *(self.accelerator_tolerations if uses else [])]:
            given = {k: v for k, v in dataclasses.asdict(toleration).items() if v}
            kubernetes.add_toleration(task, **given)
        for key, value in (self.node_selector | (self.accelerator_node_selector if uses else {})).items():
            kubernetes.add_node_selector(task, key, value)
        queue = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue else {}
        for key, value in (self.labels | queue).items():
            kubernetes.add_pod_label(task, key, value)

    def pipeline_config(self) -> Any:
        """KFP's own settings of the whole run."""
        from kfp import dsl

        return dsl.PipelineConfig(
            ttl_seconds_after_finished=self.ttl_seconds or None, active_deadline_seconds=self.deadline_seconds or None
        )


class Placed:
    """What the pipelines have in common: their tasks are as a site's profile wants them."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def place(self, task: Any) -> Any:
        """A task as the profile wants it."""
        return self.profile.place(task, task.component_spec.name)

    def accelerate(self, component: Any, accelerator: str, accelerators: str, memory: str, **given: Any) -> Any:
        """A task that uses an accelerator, where there is one: no type (`check` sees to that) means none is asked for."""
        asked = {"accelerator": accelerator, "accelerators": accelerators, "memory": memory}
        task = self.place(component(**given, **asked))
        task.set_accelerator_type(accelerator).set_accelerator_limit(accelerators)
        return task.set_memory_request(memory).set_memory_limit(memory)


DEVELOPMENT = Profile(development=True)
"""For one machine, and for trying things out."""


def load(path: Path | str, **changes: Any) -> Profile:
    """The profile of a YAML file.

    Args:
        path: the file.
        changes: keys that are given elsewhere, and win.

    Raises:
        UserError: no such file, not YAML, an unknown key (named), a wrong type, or a value out of range.
    """
    import yaml

    try:
        mapping = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"profile {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"profile {path} is not YAML: {' '.join(str(error).split())}") from None
    profile: Profile = dataclasses.replace(_build(Profile, mapping or {}, str(path), ""), **changes)
    profile.validate()
    return profile


def _build(cls: Any, value: Any, where: str, key: str) -> Any:
    """A value of a type that a profile's field has; every mistake names its key."""
    origin, arguments = get_origin(cls), get_args(cls)
    if type(None) in arguments:
        return None if value is None else _build(arguments[0], value, where, key)
    if dataclasses.is_dataclass(cls):
        return _build_dataclass(cls, value, where, key)
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], item, where, f"{key}[{n}]") for n, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(name): _build(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if cls is float and type(value) is int:
        return float(value)
    if cls is Any or (origin is None and type(value) is cls):
        return value
    wanted = {"list": "a list", "dict": "a mapping"}.get(getattr(origin, "__name__", ""), getattr(cls, "__name__", ""))
    raise UserError(f"{where}: {key}={value!r} must be {wanted}")


def _build_dataclass(cls: Any, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key or 'the file'} must be a mapping")
    hints = get_type_hints(cls)
    dot = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise UserError(f"{where}: unknown key {dot}{name}; known: {', '.join(hints)}")
    for item in dataclasses.fields(cls):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in value:
            raise UserError(f"{where}: {dot}{item.name} is missing")
    return cls(**{name: _build(hints[name], item, where, dot + name) for name, item in value.items()})
