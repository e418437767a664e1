"""pytest tests/unit/test_manifest.py"""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selectmoe import manifest as mf
from selectmoe.errors import UserError

FIELDS = {
    "stage": "select",
    "version": 1,
    "config": {"identity": {"k": 3}, "execution": {"threads": 1}},
    "inputs": {"pool": {"uri": "/a", "identity": "i"}},
    "rows": {"in": 1, "out": 1, "dropped": {}},
    "environment": {"seconds": 1.0},
    "created": "2026-01-01T00:00:00+00:00",
}


def make(folder: Path, **changes) -> mf.Manifest:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_bytes(b"{}\n")
    (folder / "log.json").write_bytes(b"1")
    return mf.write_manifest(folder, **{**FIELDS, **changes}, bookkeeping=["log.json"])


@pytest.mark.parametrize(
    "changes",
    [
        {"created": "2027-01-01T00:00:00+00:00"},
        {"environment": {"seconds": 9.0}},
        {"config": {"identity": {"k": 3}, "execution": {"threads": 2}}},
        {"inputs": {"pool": {"uri": "s3://b/a", "identity": "i"}}},
    ],
)
def test_place_time_and_execution_leave_the_identity(tmp_path, changes):
    one, two = make(tmp_path / "a"), make(tmp_path / "b", **changes)
    assert one.identity == two.identity
    assert one.checksum != two.checksum


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"config": {"identity": {"k": 4}, "execution": {"threads": 1}}},
        {"inputs": {"pool": {"uri": "/a", "identity": "j"}}},
        {"rows": {"in": 2, "out": 1, "dropped": {"empty": 1}}},
    ],
)
def test_work_changes_the_identity(tmp_path, changes):
    assert make(tmp_path / "a").identity != make(tmp_path / "b", **changes).identity


def test_bookkeeping_is_checked_but_leaves_the_identity(tmp_path):
    before = make(tmp_path / "a").identity
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / "log.json").write_bytes(b"2")
    after = mf.write_manifest(tmp_path / "a", **FIELDS, bookkeeping=["log.json"])
    assert after.identity == before
    (tmp_path / "a" / "log.json").write_bytes(b"3")
    with pytest.raises(UserError, match=r"log\.json"):
        mf.read_manifest(tmp_path / "a")


def test_every_flipped_bit_is_found(tmp_path):
    make(tmp_path / "a")
    path = tmp_path / "a" / "rows.jsonl"
    good = path.read_bytes()
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"rows\.jsonl"):
            mf.read_manifest(tmp_path / "a")


@pytest.mark.parametrize(("damage", "word"), [("missing", "missing"), ("foreign", "foreign"), ("edited", "changed")])
def test_damage_is_named(tmp_path, damage, word):
    make(tmp_path / "a")
    if damage == "missing":
        (tmp_path / "a" / "rows.jsonl").unlink()
    elif damage == "foreign":
        (tmp_path / "a" / "extra").write_bytes(b"")
    else:
        path = tmp_path / "a" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 7}))
    with pytest.raises(UserError, match=word):
        mf.read_manifest(tmp_path / "a")


def test_nested_outputs_and_reserved_folders_are_not_its_files(tmp_path):
    inner = tmp_path / "a" / "inner"
    inner.mkdir(parents=True)
    make(inner)
    (tmp_path / "a" / ".hydra").mkdir()
    (tmp_path / "a" / ".hydra" / "x").write_text("x")
    outer = make(tmp_path / "a")
    assert [f["path"] for f in outer.files] == ["log.json", "rows.jsonl"]
    assert len(mf.find_manifests(tmp_path)) == 2


def test_a_nested_output_in_the_making_and_a_link_to_something_inside_are_not_its_files(tmp_path):
    outer = make(tmp_path / "a")
    inner = tmp_path / "a" / "inner"
    (inner / ".work" / "staging").mkdir(parents=True)
    (inner / ".work" / "staging" / "half").write_text("x")
    mf.read_manifest(tmp_path / "a")
    (inner / ".work" / "staging" / "half").rename(inner / "half")
    mf.write_manifest(inner, **FIELDS)
    (tmp_path / "a" / "result").symlink_to("inner/half")
    assert mf.read_manifest(tmp_path / "a").files == outer.files
    (inner / "half").unlink()  # leaves a name for nothing
    mf.read_manifest(tmp_path / "a")
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "a" / "other").symlink_to("../elsewhere")
    with pytest.raises(UserError, match="other is foreign"):
        mf.read_manifest(tmp_path / "a")


def test_a_file_that_became_a_link_is_missing(tmp_path):
    make(tmp_path / "a")
    inner = tmp_path / "a" / "inner"
    inner.mkdir()
    make(inner)
    (tmp_path / "a" / "rows.jsonl").unlink()
    (tmp_path / "a" / "rows.jsonl").symlink_to("inner/rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl is missing"):
        mf.read_manifest(tmp_path / "a")


def test_an_output_may_lie_inside_but_not_in_or_beside_a_part(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "a" / "parts" / name).mkdir(parents=True)
        (tmp_path / "a" / "parts" / name / "rows.jsonl").write_text("a")
        mf.write_manifest(tmp_path / "a" / "parts" / name, **FIELDS)
    mf.write_manifest(tmp_path / "a", **FIELDS, parts=["parts/one", "parts/two"])
    (tmp_path / "a" / "inner").mkdir()
    make(tmp_path / "a" / "inner")
    mf.read_manifest(tmp_path / "a")
    for place in ("parts/three", "parts/one/inner"):
        (tmp_path / "a" / place).mkdir()
        make(tmp_path / "a" / place)
        with pytest.raises(UserError, match=f"{place}/manifest.json is foreign"):
            mf.read_manifest(tmp_path / "a")
        shutil.rmtree(tmp_path / "a" / place)


def test_tree_identity_knows_no_path(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "f").write_text("1")
    assert mf.tree_identity(tmp_path / "x") == mf.tree_identity(tmp_path / "y")
    (tmp_path / "y" / "sub" / "f").rename(tmp_path / "y" / "sub" / "g")
    assert mf.tree_identity(tmp_path / "x") != mf.tree_identity(tmp_path / "y")
    with pytest.raises(UserError, match="does not exist"):
        mf.tree_identity(tmp_path / "z")


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none()))
def test_canonical_json_does_not_depend_on_order(mapping):
    assert mf.canonical_json(mapping) == mf.canonical_json(dict(reversed(mapping.items())))


def with_part(folder: Path, text: str = "a") -> mf.Manifest:
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "rows.jsonl").write_text(text)
    mf.write_manifest(folder / "part", **FIELDS)
    return mf.write_manifest(folder, **FIELDS, parts=["part"])


def test_a_part_is_an_output_of_its_own_and_belongs_to_the_whole(tmp_path):
    one, two, other = with_part(tmp_path / "a"), with_part(tmp_path / "b"), with_part(tmp_path / "c", "other")
    assert one.parts == ["part"]
    assert [f["path"] for f in one.files] == ["part/manifest.json", "part/rows.jsonl"]
    assert one.identity == two.identity != other.identity
    assert mf.read_manifest(tmp_path / "a" / "part").files[0]["path"] == "rows.jsonl"
    assert [path for path, _ in mf.find_manifests(tmp_path / "a")] == [tmp_path / "a"]


def test_times_of_a_part_leave_the_identity_of_the_whole(tmp_path):
    before = with_part(tmp_path / "a").identity
    mf.write_manifest(tmp_path / "a" / "part", **{**FIELDS, "created": "2027-01-01T00:00:00+00:00"})
    assert mf.write_manifest(tmp_path / "a", **FIELDS, parts=["part"]).identity == before


@pytest.mark.parametrize("damage", ["changed", "missing", "foreign"])
def test_damage_in_a_part_is_damage_of_the_whole(tmp_path, damage):
    with_part(tmp_path / "a")
    file = tmp_path / "a" / "part" / "rows.jsonl"
    match damage:
        case "changed":
            file.write_text("b")
        case "missing":
            file.unlink()
        case "foreign":
            (file.parent / "rows 2.jsonl").write_text("a")
    with pytest.raises(UserError, match=r"part/rows"):
        mf.read_manifest(tmp_path / "a")
