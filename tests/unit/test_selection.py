"""Names of arms, their folders, and selected_data.jsonl. Run: pytest tests/unit/test_selection.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from selectmoe.errors import UserError
from selectmoe.kmeans import Rows
from selectmoe.pool import Row
from selectmoe.selection import (
    Arm,
    Selected,
    arm_directory,
    parse_arm,
    planted_file,
    project,
    read_planted,
    read_selected,
    write_selected,
)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("selected", Arm("selected", "kmeans", "answer", "coverage")),
        ("legacy", Arm("legacy", "kmeans", "legacy", "legacy")),
        ("nll", Arm("nll", "top", "nll", "coverage")),
        ("top-nll", Arm("top-nll", "top", "nll", "coverage")),
        ("kmeans-ifd", Arm("kmeans-ifd", "kmeans", "ifd", "coverage")),
        ("balanced_random", Arm("balanced_random", "balanced_random")),
        ("router_only", Arm("router_only", "router_only")),
    ],
)
def test_arms(name: str, want: Arm) -> None:
    assert parse_arm(name) == want


@pytest.mark.parametrize(
    "name", ["", "best", "top-", "top-loss", "random-nll", "length-answer", "kmeans-answer-x", "random-42"]
)
def test_unknown_arms_are_errors_that_list_the_known(name: str) -> None:
    with pytest.raises(UserError, match="selected, legacy, nll, kmeans"):
        parse_arm(name)


def test_folder_has_a_seed_where_the_arm_draws() -> None:
    folders = {
        name: parse_arm(name).folder(3) for name in ("random", "balanced_random", "oracle", "nll", "length", "selected")
    }
    assert folders == {
        "random": "random-3",
        "balanced_random": "balanced_random-3",
        "oracle": "oracle-3",
        "nll": "nll",
        "length": "length",
        "selected": "selected",
    }


def test_arm_directory_in_a_folder_of_arms(tmp_path: Path) -> None:
    for folder in ("nll", "random-0"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "selected_data.jsonl").touch()
    assert arm_directory(tmp_path, "nll", 7) == tmp_path / "nll"
    assert arm_directory(tmp_path, "random", 0) == tmp_path / "random-0"
    with pytest.raises(UserError, match="it has nll, random-0"):
        arm_directory(tmp_path, "random", 1)
    with pytest.raises(UserError, match="does not exist"):
        arm_directory(tmp_path / "none", "random", 1)
    with pytest.raises(UserError, match="unknown"):
        arm_directory(tmp_path, "rnd", 1)


def rows() -> list[Selected]:
    talk = [{"role": "user", "content": "Grüße\u2028?"}, {"role": "assistant", "content": "<b> 1"}]
    return [Selected(Row("d", str(i), talk), {"answer": 0.1 * i}, None if i else 4, None if i else 1) for i in range(3)]


def test_selected_data_goes_round(tmp_path: Path) -> None:
    path = tmp_path / "selected_data.jsonl"
    write_selected(path, rows())
    assert read_selected(path) == read_selected(tmp_path) == rows()
    assert list(json.loads(path.read_bytes().split(b"\n")[0])) == [
        "dataset",
        "id",
        "scores",
        "messages",
        "cluster",
        "rank",
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "line 2"),
        (b"[]", "line 2"),
        (b'{"dataset": "d", "id": "9"}', "messages"),
        (b'{"dataset": "d", "id": "9", "messages": []}', "messages is empty"),
        (b'{"dataset": "d", "id": "\xff", "messages": [{"role": "user", "content": ""}]}', "line 2"),
        (rows()[0].json().encode(), "d/0 is there twice"),
    ],
)
def test_spec7_28_a_broken_line_is_an_error_that_names_it(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "selected_data.jsonl"
    path.write_bytes(rows()[0].json().encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=what):
        read_selected(path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_selected(tmp_path)
    (tmp_path / "selected_data.jsonl").touch()
    with pytest.raises(UserError, match="holds no row"):
        read_selected(tmp_path)


def test_planted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        planted_file(str(tmp_path))
    path = tmp_path / "planted.jsonl"
    path.write_text('{"dataset": "d", "id": "1", "kind": "swapped"}\n')
    assert planted_file(str(tmp_path)) == planted_file(str(path)) == path
    assert read_planted(path) == {("d", "1")}
    path.write_text('{"dataset": "d"}\n')
    with pytest.raises(UserError, match="line 1"):
        read_planted(path)


def test_map_is_pca() -> None:
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(200, 12)) * np.linspace(3, 0.3, 12) + 4)
    x[:100, 0] += 6
    got = project(Rows(x)).astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    _, _, axes = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    want = (unit - unit.mean(0)) @ axes[:2].T
    for axis in range(2):
        assert abs(np.corrcoef(got[:, axis], want[:, axis])[0, 1]) > 0.999
    assert (got == project(Rows(x))).all()


MAP = """
import hashlib, numpy as np
from selectmoe.kmeans import Rows
from selectmoe.selection import project
x = np.random.default_rng(0).random((700, 96))  # no axis stands out
print(hashlib.sha256(project(Rows(x)).tobytes()).hexdigest())
"""


def test_map_has_the_same_bytes_at_any_thread_count() -> None:
    found = set()
    for threads in ("1", "2"):
        env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        found.add(subprocess.run([sys.executable, "-c", MAP], env=env, capture_output=True, check=True).stdout)
    assert len(found) == 1


@pytest.mark.parametrize("x", [np.ones((4, 1)), np.ones((3, 2)), np.array([[1.0, 2], [2, 1], [3, 3]])])
def test_map_of_little(x: np.ndarray) -> None:
    assert np.isfinite(project(Rows(x))).all()
