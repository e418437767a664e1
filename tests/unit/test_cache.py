"""pytest tests/unit/test_cache.py   (a real S3 server, nanio, behind a proxy)"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from s3_faults import Fault

from components import _shell
from selectmoe import cache
from selectmoe import manifest as mf
from selectmoe.cache import Reference
from selectmoe.errors import UserError


def output(folder, text="weights"):
    """A finished output of two files."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    (folder / "config.json").write_text("{}")
    mf.write_manifest(
        folder,
        stage="convert",
        version=1,
        config={"identity": {}, "execution": {}},
        inputs={},
        rows={"in": 0, "out": 0, "dropped": {}},
        environment={},
        created="now",
    )
    return folder


def plain(folder):
    """A user's folder."""
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub" / "a.bin").write_bytes(b"1" * 1000)
    return folder


@pytest.fixture
def uri(request):
    return f"s3://bucket/{request.node.name.replace('_', '-')}"


def test_a_folder_is_used_where_it_is(tmp_path, s3):
    folder = output(tmp_path / "model")
    path, reference = cache.resolve_model(str(folder))
    assert path == folder
    assert reference == Reference(str(folder), mf.read_manifest(folder).identity)
    assert cache.fetch(reference) == folder
    assert s3.seen == []
    with pytest.raises(UserError, match="has changed"):
        cache.fetch(Reference(str(folder), "0" * 64))
    with pytest.raises(UserError, match="is gone"):
        cache.fetch(Reference(str(tmp_path / "none"), "0" * 64))


def test_a_checkpoint_goes_to_s3_manifest_last_and_comes_back_once(tmp_path, s3, uri):
    folder = output(tmp_path / "model")
    (folder / "logs").mkdir()
    (folder / "logs" / "x").write_text("nobody's result")
    reference = cache.store(folder, uri)
    assert reference == Reference(uri, mf.read_manifest(folder).identity)
    puts = [path.rsplit("/", 1)[1].split("?")[0] for _, path, _, _ in s3.requests("PUT")]
    assert len(puts) == 3
    assert puts[-1] == "manifest.json"
    assert cache.store(folder, uri) == reference
    assert len(s3.requests("PUT")) == 3, "what is there is not sent again"
    path = cache.fetch(reference)
    assert path == cache.root() / reference.digest
    assert mf.read_manifest(path).identity == reference.digest
    s3.seen.clear()
    assert cache.fetch(reference) == path
    assert cache.identity_of(str(path)) == reference.digest
    assert s3.seen == []
    with pytest.raises(UserError, match="holds another checkpoint"):
        cache.store(output(tmp_path / "other", "others"), uri)


def test_what_is_proved_is_not_read_again_until_it_is_touched(tmp_path, s3, uri, monkeypatch):
    reference = cache.store(output(tmp_path / "model"), uri)
    path = cache.fetch(reference)
    real, read = mf.sha256_file, []
    monkeypatch.setattr(mf, "sha256_file", lambda path: read.append(path) or real(path))
    cache.fetch(reference)
    assert cache.identity_of(str(path)) == reference.digest
    assert read == []
    os.utime(path / "config.json", ns=(1, 1))
    s3.seen.clear()
    cache.fetch(reference)
    assert read
    assert s3.seen == [], "touched, but the same bytes"
    (path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="does not have the bytes"):
        cache.identity_of(str(path))
    assert mf.read_manifest(cache.fetch(reference)).identity == reference.digest


def test_damage_on_the_server_is_found(tmp_path, s3, uri):
    reference = cache.store(output(tmp_path / "model"), uri)
    stored = s3.folder / "bucket" / uri.removeprefix("s3://bucket/") / "model.safetensors"
    stored.write_text("WEIGHTS")
    with pytest.raises(UserError, match="does not have the bytes that are expected"):
        cache.fetch(reference)
    assert not (cache.root() / reference.digest).exists()


def test_a_broken_fetch_goes_on_with_what_it_has(tmp_path, s3, uri):
    reference = cache.store(output(tmp_path / "model"), uri)
    s3.faults = [Fault("status", match="model.safetensors", status=403)]
    with pytest.raises(UserError, match="may not read"):
        cache.fetch(reference)
    s3.seen.clear()
    assert mf.read_manifest(cache.fetch(reference)).identity == reference.digest
    assert s3.requests("GET", "config.json") == []


def test_two_processes_fetch_once(tmp_path, s3, uri):
    reference = cache.store(output(tmp_path / "model"), uri)
    s3.seen.clear()
    code = "import sys; from selectmoe import cache; print(cache.fetch(cache.Reference(*sys.argv[1:])))"
    command = [sys.executable, "-c", code, reference.uri, reference.digest]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert {process.communicate()[0].strip() for process in both} == {str(cache.root() / reference.digest)}
    assert len(s3.requests("GET", "model.safetensors")) == 1


def test_a_store_that_was_cut_off_is_not_there(tmp_path, s3, uri):
    folder = output(tmp_path / "model")
    s3.faults = [Fault("status", "PUT", "manifest.json", status=403)]
    with pytest.raises(UserError, match="may not write"):
        cache.store(folder, uri)
    assert cache.stored(uri) is None
    assert cache.store(folder, uri) == cache.stored(uri)


def test_a_plain_folder_on_s3_has_the_identity_of_its_files(tmp_path, s3, uri):
    folder = plain(tmp_path / "model")
    cache.store(folder, uri)
    path, reference = cache.resolve_model(uri)
    assert reference == Reference(uri, mf.tree_identity(folder))
    s3.seen.clear()
    assert cache.resolve_model(uri + "/")[0] == path
    assert s3.requests("GET", "a.bin") == []
    assert cache.fetch(reference) == path
    (folder / "config.json").write_text("{}")
    cache.store(folder, uri)
    assert cache.resolve_model(uri)[1].digest == mf.tree_identity(folder)


def test_one_object_is_found_as_a_file(tmp_path, s3, uri):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    cache.S3Store(uri).put_file("rows.jsonl", tmp_path / "rows.jsonl")
    path, place = cache.locate(f"{uri}/rows.jsonl", "data")
    assert path.name == "rows.jsonl"
    assert path.read_text() == '{"a": 1}\n'
    assert place == f"{uri}/rows.jsonl"
    assert cache.identity_of(place) == mf.tree_identity(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"^data=s3://bucket/none does not exist"):
        cache.locate("s3://bucket/none", "data")


def test_rows_on_s3_give_the_identity_of_the_same_rows_here(tmp_path, s3, uri, small_pool):
    from selectmoe import ingest
    from selectmoe.config import load

    rows = small_pool.parent / "data"
    cache.store(rows, uri)
    given = load(ingest.IngestConfig, {"holdout": 4}, data=uri, output_dir=str(tmp_path / "out"))
    assert mf.read_manifest(ingest.run(given)).identity == mf.read_manifest(small_pool).identity


def test_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors
    from requests import Response

    def failing(kind):
        def fetch(name, **options):
            raise kind("no network\nand more", response=Response()) if "Repo" in kind.__name__ else kind("no network")

        return fetch

    monkeypatch.delenv(cache.CACHE, raising=False)
    cases = {
        errors.LocalEntryNotFoundError: r"^source_model=a/b is neither a local folder nor .* gives: no network$",
        errors.GatedRepoError: r"^source_model=a/b is gated: accept its terms on the hub and set HF_TOKEN",
        errors.RepositoryNotFoundError: r"^source_model=a/b: the hub has no model a/b, or it is private",
    }
    for kind, said in cases.items():
        monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(kind))
        with pytest.raises(UserError, match=said):
            cache.resolve_model("a/b")
    snapshot = plain(tmp_path / "0123abc")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **o: asked.append(o) or str(snapshot))
    path, reference = cache.resolve_model("a/b@main")
    assert (path, reference) == (snapshot, Reference("hf://a/b@0123abc", mf.tree_identity(snapshot)))
    assert cache.fetch(reference) == snapshot
    assert [o["revision"] for o in asked] == ["main", "0123abc"]
    with pytest.raises(UserError, match="does not exist; expected a folder"):
        cache.resolve_model("nothing here")


def test_a_task_makes_its_checkpoint_on_s3(tmp_path, s3, uri, monkeypatch):
    made = []

    def call(stage, config, folder, work_root, given):
        made.append(folder)
        return output(folder)

    monkeypatch.setattr(_shell, "_call", call)
    monkeypatch.setattr(_shell.sending, "submit", lambda *given: None)
    references = []
    for n, home in enumerate(["one", "one", "two"]):
        monkeypatch.setenv(cache.CACHE, str(tmp_path / home))
        artifact = SimpleNamespace(path=str(tmp_path / f"artifact-{n}"), metadata={})
        references += _shell.run_checkpoint("convert", artifact, "{}", "c", "", uri, inputs={})
        path = _shell.checkpoint(references[-1])
        assert path.startswith(str(tmp_path / home))
        assert mf.read_manifest(path).identity == artifact.metadata["identity"]
        assert os.listdir(artifact.path) == ["manifest.json"]
    assert len(set(references)) == 1
    assert json.loads(references[0])["uri"].startswith(f"{uri}/convert-")
    assert len(made) == 1, "the second task, on another node, finds it on S3"
