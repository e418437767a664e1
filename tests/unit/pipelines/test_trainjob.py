"""The TrainJob manifest, read by Kubeflow Trainer's own models: `pytest tests/unit/pipelines/test_trainjob.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models

from pipelines import trainjob

SITE = """
image: registry.example.org/select-moe@sha256:{digest}
environment: {{AWS_ENDPOINT_URL_S3: http://s3}}
secrets: [{{name: s3, env: {{AWS_ACCESS_KEY_ID: id, AWS_SECRET_ACCESS_KEY: key}}}}]
model_cache: {{claim: cache, mount: /cache}}
tolerations: [{{key: dedicated, value: ml, effect: NoSchedule}}]
accelerator_node_selector: {{pool: gpu}}
image_pull_secrets: [pull]
queue: team
timeouts: {{default: 60, finetune: 3600}}
""".format(digest="0" * 64)
WORDS = ["training.model=x", "dataset.data_path=x", "output_dir=o"]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "site.yaml").write_text(SITE)
    return [
        "stage=finetune",
        f"profile={tmp_path / 'site.yaml'}",
        "nodes=2",
        "processes=4",
        "accelerator=nvidia.com/gpu",
    ]


def rendered(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    assert trainjob.main(arguments) == 0, capsys.readouterr().err
    return dict(yaml.safe_load(capsys.readouterr().out))


def test_it_is_what_trainer_defines(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    job = rendered(capsys, [*words, *WORDS])
    read = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert read is not None
    assert read.to_dict() == job  # a field that the model does not have would be lost on the way
    assert job["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
    assert job["metadata"] == {"name": "select-moe-finetune", "labels": {"kueue.x-k8s.io/queue-name": "team"}}
    assert job["spec"]["activeDeadlineSeconds"] == 3600


def test_torchrun_runs_the_stage_on_every_node(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = rendered(capsys, [*words, *WORDS])["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    assert trainer["args"] == ["-m", "selectmoe.cli", "finetune", *WORDS, "training.distributed=ddp"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    amount = {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "4"}
    assert trainer["resourcesPerNode"] == {"requests": amount, "limits": amount}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["nodes=2"], ["training.distributed=ddp"]),
        (["processes=2", "training.distributed=fsdp"], ["training.distributed=fsdp"]),
        (["nodes=1"], []),
        (["training.distributed=ddp"], ["training.distributed=ddp"]),
    ],
)
def test_several_processes_train_together(
    given: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = rendered(capsys, ["stage=finetune", *WORDS, *given])["spec"]["trainer"]["args"]
    assert [word for word in args if word.startswith("training.distributed=")] == expected


def test_the_profile_is_in_it(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    spec = rendered(capsys, [*words, *WORDS])["spec"]
    environment = {item["name"]: item for item in spec["trainer"]["env"]}
    assert environment["AWS_SECRET_ACCESS_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "s3", "key": "key"}}
    assert environment["HF_HOME"]["value"] == "/cache"
    (job,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["tolerations"] == [{"key": "dedicated", "operator": "Equal", "value": "ml", "effect": "NoSchedule"}]
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/cache", "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == {"model-cache", "shm"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stage=route"], "stage=route must be one of: warmup, finetune"),
        (["stage=finetune", "nodes=0"], "nodes=0 must be 1 or more"),
        (["stage=finetune", "nodes=many"], "nodes=many must be a whole number"),
        (["stage=finetune", "job_name=Big_Job"], "job_name=Big_Job must be"),
        (["stage=finetune", "memory=lots"], "memory=lots must be a quantity"),
        (["stage=finetune", "node=2"], "unknown key 'node'"),
        (["stage=finetune", "profile=/nowhere", *WORDS], "profile /nowhere"),
        (["stage=finetune"], "output_dir"),
        (
            ["stage=finetune", "nodes=3", "training.distributed=single", *WORDS],
            "nodes x processes is 3: give ddp or fsdp",
        ),
        (["stage=finetune", "training.distributed=dpp", *WORDS], "known: single, ddp, fsdp"),
    ],
)
def test_mistakes_of_the_user(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert trainjob.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
