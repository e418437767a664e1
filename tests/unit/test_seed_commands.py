"""The predecessor's commands: names of folders, words passed on. Run: pytest tests/unit/test_seed_commands.py"""

import re

import pytest

from selectmoe import seed_commands
from selectmoe.errors import UserError
from selectmoe.seed_commands import folder_name, output_folder, stage_1_words


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["training.learning_rate=1e-4", "tag=x"], "lr-1e-4_tag-x"),
        (["training.quality_loss_type=beta_moment_matching"], "loss-beta_moment_matching"),  # SPEC 7 (45)
        (["dataset.local.dataset_names=[cot,dolly]"], "dataset_names-cot-dolly"),
        (["training.quality_loss_params={lambda_var: 0.2}"], "quality_loss_params-lambda_var-0.2"),
        (["data=/a/b", "output_dir=/c", "selector_model.path=/m"], ""),
        ([], ""),
    ],
)
def test_spec7_45_a_folders_name_keeps_values_and_can_be_pasted_into_a_command(overrides, name):
    assert folder_name(overrides) == name
    assert re.fullmatch(r"[A-Za-z0-9._-]*", name)


def test_a_name_is_bounded():
    assert len(folder_name([f"training.key{i}={'v' * 30}" for i in range(20)])) <= seed_commands.MAX_NAME


def test_a_second_folder_of_the_same_second_gets_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [output_folder("stage_1_warmup", ["tag=x"]) for _ in range(3)]
    assert len(set(places)) == 3
    for place in places:
        assert re.fullmatch(r"outputs/stage_1_warmup/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-tag-x(-[23])?", str(place))


def test_keys_are_passed_on_with_the_predecessors_defaults(capsys):
    words = stage_1_words(["training.batch_size=32", "tag=x", "dataset.subset_ratio=0.1"])
    assert set(words) == {
        "recipe=legacy",
        f"selector_model.path={seed_commands.JUDGE}",
        "dataset.local.dataset_names=[cot,dolly,flan_v2,oasst1]",
        "training.batch_size=32",
        "training.subset_ratio=0.1",
    }
    assert capsys.readouterr().err.count("\n") == 1, "one line names the other recipe"
    assert stage_1_words(["data=p", "recipe=observer", "selector_model.path=m"]) == [
        *("recipe=observer", "selector_model.path=m", "data=p")
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["training.learning_rate"], "not of the form key=value"),
        (["training.lerning_rate=1"], "nearest known: training.learning_rate"),
        (["training.learning_rate=7"], "at most 1"),
        ([], "dataset/train/processed"),
        (["data=nowhere"], "nowhere does not exist"),
        (["token=hf_x"], "looks like a credential"),
    ],
)
def test_input_is_checked_before_anything_is_started(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seed_commands.subprocess, "Popen", lambda *a, **k: pytest.fail("a process was started"))
    assert seed_commands.main(["stage_1", *words]) == 2
    assert said in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or re.match(r"\d\d-", path.name)]


def test_a_process_for_every_gpu(tmp_path, monkeypatch):
    """No GPU is needed to see what would be started."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("selectmoe.warmup.prove", lambda config: {})
    monkeypatch.setattr(seed_commands, "logged", lambda command, out, log: started.append(command[2:]) or 0)
    for gpus, more in ((0, []), (1, []), (4, []), (2, ["training.distributed=ddp"])):
        monkeypatch.setattr(seed_commands, "devices", lambda gpus=gpus: gpus)
        assert seed_commands.stage_1(["data=p", "selector_model.path=m", *more]) == 0
    torchrun = ["torch.distributed.run", "--standalone"]
    assert [command[:1] for command in started[:2]] == [["selectmoe.cli"]] * 2
    assert started[2][:5] == [*torchrun, "--nproc-per-node=4", "-m", "selectmoe.cli"]
    assert "training.distributed=fsdp" in started[2]
    assert started[3][:3] == [*torchrun, "--nproc-per-node=2"]
    assert "training.distributed=ddp" in started[3]


def test_an_unknown_command_lists_the_known(capsys):
    assert seed_commands.main(["stage_9"]) == 2
    assert "stage_1" in capsys.readouterr().err
    with pytest.raises(UserError, match="not of the form"):
        seed_commands.given(["x"])
