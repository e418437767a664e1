"""pytest tests/unit/test_storage.py   (S3: a real server process, nanio)"""

import logging

import pytest
from s3_faults import Fault

from selectmoe import cli
from selectmoe.errors import Unavailable, UserError
from selectmoe.s3 import split_s3
from selectmoe.storage import S3Store, open_store, prove_store


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_objects_come_back(kind, tmp_path, s3):
    store = open_store("s3://bucket/work" if kind == "s3" else str(tmp_path / "work"))
    store.put_bytes("a/b", b"1")
    store.put_bytes("a/b", b"2")
    (tmp_path / "file").write_bytes(b"3" * 100_000)
    store.put_file("c", tmp_path / "file")
    assert store.names() == ["a/b", "c"]
    assert store.get("a/b") == b"2"
    assert store.get("none") is None
    assert store.fetch("c", tmp_path / "out" / "c")
    assert (tmp_path / "out" / "c").read_bytes() == b"3" * 100_000
    assert not store.fetch("none", tmp_path / "none")
    store.delete("c")
    store.delete("c")
    store.clear()
    assert store.names() == []


def test_right_credentials_prove(s3):
    prove_store("s3://bucket/x")


WRONG = {
    "secret": ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "refuses the credentials (SignatureDoesNotMatch): set AWS_"),
    "key": ({"AWS_ACCESS_KEY_ID": "wrong-key"}, "refuses the credentials (InvalidAccessKeyId): set AWS_ACCESS_KEY_ID"),
    "endpoint": ({"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, "does not answer (EndpointConnectionError): is AWS_"),
    "address": ({"AWS_ENDPOINT_URL_S3": "nonsense"}, "AWS_ENDPOINT_URL_S3=nonsense is not an address like https://"),
    "password": ({"AWS_ENDPOINT_URL_S3": "http://user:right-secret@x"}, "AWS_ENDPOINT_URL_S3 must not hold"),
    "none": ({"AWS_SECRET_ACCESS_KEY": None}, "no credentials (PartialCredentialsError): set AWS_ACCESS_KEY_ID"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_set_up_is_one_line_without_a_secret(s3, monkeypatch, caplog, capfd, wrong):
    environment, said = WRONG[wrong]
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with caplog.at_level(logging.DEBUG), pytest.raises(UserError) as error:
        prove_store("s3://bucket/x")
    assert said in str(error.value)
    output = capfd.readouterr()
    for text in (str(error.value), caplog.text, output.out, output.err):
        assert "right-secret" not in text
        assert "wrong-secret" not in text
    assert "\n" not in str(error.value)


def test_a_missing_bucket_and_a_missing_right(s3):
    with pytest.raises(UserError, match=r"s3://absent/x/.probe: there is no bucket absent \(NoSuchBucket\): create it"):
        prove_store("s3://absent/x")
    with pytest.raises(UserError, match="there is no bucket absent"):
        S3Store("s3://absent/x").fetch("a", "never")
    s3.faults = [Fault("status", "PUT", status=403)]
    with pytest.raises(UserError, match="these credentials may not write there"):
        prove_store("s3://bucket/x")
    with pytest.raises(UserError, match="cannot be a place on S3"):
        prove_store("s3://a b/x")


def test_a_server_that_stays_down_is_exit_code_1_in_one_line(s3, monkeypatch, capsys, tmp_path):
    s3.faults = [Fault("status", method, times=99) for method in ("GET", "PUT")]
    with pytest.raises(Unavailable, match=r"answered 503 \(503\) at every attempt"):
        S3Store("s3://bucket/x", attempts=2).put_bytes("a", b"")
    monkeypatch.setattr("selectmoe.cache.S3Store", lambda uri: S3Store(uri, attempts=2))
    assert cli.main(["ingest", "data=s3://bucket/rows", f"output_dir={tmp_path / 'out'}"]) == 1
    assert not (tmp_path / "out").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("uri", ["s3://", "s3://user:pw@bucket/x", "http://x/y"])
def test_bad_uris_are_refused(uri):
    with pytest.raises(UserError):
        split_s3(uri)
