"""Warm-up or fine-tuning on several nodes: a `TrainJob` of Kubeflow Trainer (2.2 or later), printed as YAML.

    python -m pipelines trainjob stage=warmup nodes=2 processes=4 accelerator=nvidia.com/gpu profile=site.yaml \
        selector_model.path=/scratch/judge data=/scratch/ingest output_dir=/scratch/warmup | kubectl apply -f -

Optional, and not part of the pipeline. Same image, same code, same keys as `selectmoe STAGE`, which is why the words that
are not options here are checked and handed on as they are. The command is `torchrun`: under Trainer's runtime
`accelerate launch` runs every process alone, at a world size of 1, and says nothing. Trainer itself tells torchrun how many nodes and
processes there are and where they meet (its PET_ variables). Several processes train together: `training.distributed` is
`ddp` unless `fsdp` is given. Inputs must be seen from every node, the output folder from the first (a volume of the profile).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.profile import DEFAULTS, Profile, Toleration, Volume
from selectmoe.errors import UserError

STAGES = ("warmup", "finetune")
CONTAINER = "node"
"""Name of job and container in Trainer's torch runtimes."""
MANAGER = "select-moe.io/pipelines"


def _option(default: Any, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Options:
    """What `trainjob` itself takes; everything else is a key of the stage."""

    stage: str = _option("", "what to run: warmup or finetune")
    nodes: int = _option(1, "number of nodes")
    processes: int = _option(1, "processes on each node: one for each accelerator")
    accelerator: str = _option("", "resource name, such as nvidia.com/gpu; none: CPU")
    memory: str = _option("32Gi", "memory of a node's pod")
    job_name: str = _option("", "name of the TrainJob; default select-moe-STAGE")
    namespace: str = _option("", "namespace of the TrainJob; default that of kubectl")
    runtime: str = _option("torch-distributed", "the ClusterTrainingRuntime")
    service_account: str = _option("", "Kubernetes service account; default the namespace's")
    profile: str = _option("", "YAML of the site (pipelines/profile.py); default: for development")

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: another stage, no node or process, or what is no name in Kubernetes.
        """
        if self.stage not in STAGES:
            raise UserError(f"stage={self.stage} must be one of: {', '.join(STAGES)}")
        for key in ("nodes", "processes"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} must be 1 or more")
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", self.name):
            raise UserError(f"job_name={self.name} must be small letters, digits and -, at most 63, a letter first")
        if not re.fullmatch(r"[1-9]\d*([KMGT]i?)?", self.memory):
            raise UserError(f"memory={self.memory} must be a quantity such as 32Gi")

    @property
    def name(self) -> str:
        """The TrainJob's name."""
        return self.job_name or f"select-moe-{self.stage}"


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Read the words of the command; those that are no options here are checked as the stage's own.

    Returns:
        The options, and the words for the stage (with `training.distributed`, where there are several processes).

    Raises:
        UserError: what is wrong with which word.
    """
    from selectmoe.cli import compose

    kinds = {f.name: f.default for f in dataclasses.fields(Options)}
    given: dict[str, Any] = {}
    rest: list[str] = []
    for word in arguments:
        key, _, value = word.partition("=")
        if key not in kinds:
            rest.append(word)
        elif isinstance(kinds[key], int):
            if not re.fullmatch(r"\d+", value):
                raise UserError(f"{key}={value} must be a whole number")
            given[key] = int(value)
        else:
            given[key] = value
    options = Options(**given)
    options.validate()
    try:
        distributed = compose(options.stage, rest).training.distributed
    except UserError as error:
        wrong = re.search(r"unknown key '([^']+)'", str(error))
        near = difflib.get_close_matches(wrong[1], list(kinds), n=1, cutoff=0.8) if wrong else []
        raise UserError(f"{error}{f'; or {near[0]}= of trainjob' if near else ''}") from None
    count = options.nodes * options.processes
    if count > 1 and distributed == "single":
        if any(word.startswith("training.distributed=") for word in rest):
            raise UserError(f"training.distributed=single, but nodes x processes is {count}: give ddp or fsdp")
        rest.append("training.distributed=ddp")
    return options, rest


def render(options: Options, overrides: Sequence[str], profile: Profile) -> dict[str, Any]:
    """The TrainJob.

    Args:
        options: what to run, on how much.
        overrides: `key=value` words of the stage.
        profile: image, secrets, volumes and placement of the site.

    Returns:
        The manifest, of what `trainer.kubeflow.org/v1alpha1` defines.
    """
    queue = {"kueue.x-k8s.io/queue-name": profile.queue} if profile.queue else {}
    metadata = {"name": options.name, "namespace": options.namespace, "labels": profile.labels | queue}
    pod = {"metadata": _given({"labels": profile.labels}), "spec": _pod(options, profile)}
    replicated = {"name": CONTAINER, "template": {"spec": {"template": _given(pod)}}}
    patch = {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}}}
    deadline = profile.timeouts.get(options.stage, profile.timeouts.get("default", 0))
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _given(metadata),
        "spec": _given(
            {
                "runtimeRef": {"name": options.runtime},
                "trainer": {
                    "image": profile.image,
                    "command": ["torchrun"],
                    "args": ["-m", "selectmoe.cli", options.stage, *overrides],
                    "numNodes": options.nodes,
                    "numProcPerNode": options.processes,
                    "resourcesPerNode": _resources(options, profile),
                    "env": _environment(profile),
                },
                "activeDeadlineSeconds": deadline,
                "runtimePatches": [patch],
            }
        ),
    }


def _given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is empty."""
    return {key: value for key, value in mapping.items() if value not in ("", 0, None, [], {})}


def _resources(options: Options, profile: Profile) -> dict[str, Any]:
    own = profile.resources.get(options.stage)
    cpu = (own.cpu if own else "") or DEFAULTS[options.stage].cpu
    amount = {"cpu": cpu, "memory": options.memory}
    if options.accelerator:
        amount[options.accelerator] = str(options.processes)
    return {"requests": dict(amount), "limits": dict(amount)}


def _environment(profile: Profile) -> list[dict[str, Any]]:
    plain: list[dict[str, Any]] = [{"name": key, "value": value} for key, value in sorted(profile.environment.items())]
    for volume, names in ((profile.scratch, ("TMPDIR",)), (profile.model_cache, ("SELECTMOE_MODEL_CACHE", "HF_HOME"))):
        plain += [{"name": name, "value": volume.mount} for name in names if volume]
    for secret in profile.secrets:
        for name, key in secret.env.items():
            reference = {"name": secret.name, "key": key, **({"optional": True} if secret.optional else {})}
            plain.append({"name": name, "valueFrom": {"secretKeyRef": reference}})
    return plain


def _pod(options: Options, profile: Profile) -> dict[str, Any]:
    """What the profile says of the pods: volumes, where they may run, who pulls their image."""
    mounted: list[tuple[str, Volume]] = []
    for name, volume in (("scratch", profile.scratch), ("model-cache", profile.model_cache)):
        if volume:
            mounted.append((name, volume))
    volumes = [{"name": name, "persistentVolumeClaim": {"claimName": v.claim}} for name, v in mounted]
    mounts = [{"name": name, "mountPath": v.mount} for name, v in mounted]
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})  # NCCL shares buffers there; 64 MB are too little
    mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    uses = bool(options.accelerator)
    tolerations: list[Toleration] = [*profile.tolerations, *(profile.accelerator_tolerations if uses else [])]
    return _given(
        {
            "serviceAccountName": options.service_account,
            "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
            "nodeSelector": profile.node_selector | (profile.accelerator_node_selector if uses else {}),
            "tolerations": [_given(dataclasses.asdict(item)) for item in tolerations],
            "volumes": volumes,
            "containers": [{"name": CONTAINER, "volumeMounts": mounts}],
        }
    )


def usage() -> str:
    """The text of `python -m pipelines trainjob --help`."""
    lines = ["usage: python -m pipelines trainjob stage=STAGE key=value ... | kubectl apply -f -", ""]
    for option in dataclasses.fields(Options):
        default = f" [default {option.default}]" if option.default not in ("", None) else ""
        lines.append(f"  {option.name}\n      {option.metadata['doc']}{default}")
    return "\n".join([*lines, "", "every other key is one of `selectmoe STAGE --help`"])


def main(arguments: Sequence[str]) -> int:
    """The command line of `python -m pipelines trainjob`: prints the manifest; exit code 2 for the user's mistakes."""
    import yaml

    from pipelines import profile as site

    if {"--help", "-h"} & set(arguments):
        print(usage())
        return 0
    try:
        options, overrides = parse(arguments)
        profile = site.load(options.profile) if options.profile else site.DEVELOPMENT
    except UserError as error:
        print(f"pipelines trainjob: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(yaml.safe_dump(render(options, overrides, profile), sort_keys=False), end="")
    return 0
