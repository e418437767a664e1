"""The digests of the images in the chart's values, asked of their registries: `make images-lock`.

    python -m k8s.images                                  # every values file of the chart
    python -m k8s.images file=my-values.yaml check=true   # say what would change, and change nothing

A digest beside a tag makes an image unchangeable. Where `digest:` stands in a values file, the registry's own answer for
`repository:tag` is written there, everything else in the file stays as it is; what a file does not say is taken from the
chart's values.yaml, and an empty tag is the chart's appVersion. An image that its registry does not have (your own one,
before it is pushed) is left alone: the exit code is then 1, after the others were written. The registry is asked by
the distribution protocol (HTTP API v2), without an account; what it sends is hashed, not believed.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import yaml

from k8s.place import CHART
from selectmoe.entry import enter
from selectmoe.errors import Refused, Unavailable, UserError

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
"""An index first: its digest is good for every kind of processor."""
TIMEOUT = (10, 60)
DELAYS = (1.0, 3.0, 10.0)
LARGEST = 4 * 2**20
"""Bytes of a manifest at most: the distribution specification's own limit."""


@dataclass(frozen=True)
class Image:
    """An image as a registry knows it."""

    host: str
    repository: str
    tag: str

    @classmethod
    def of(cls, registry: str, repository: str, tag: str) -> Image:
        """From the words of a values file; without a registry it is Docker Hub's."""
        first, slash, rest = repository.partition("/")
        if not registry and slash and ("." in first or ":" in first or first == "localhost"):
            registry, repository = first, rest
        if registry in ("", "docker.io", "index.docker.io"):
            registry = "registry-1.docker.io"
            repository = repository if "/" in repository else f"library/{repository}"
        return cls(registry, repository, tag)

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}:{self.tag}"

    @property
    def base(self) -> str:
        """The registry's address: plain HTTP on this machine only, as container engines have it."""
        name = self.host.partition(":")[0]
        return f"{'http' if name in ('localhost', '127.0.0.1') else 'https'}://{self.host}"


class Missing(Exception):
    """The registry does not have it, or not for everybody."""


def digest(image: Image) -> str:
    """The digest of an image's manifest.

    Raises:
        Missing: there is none that everybody may read.
        Unavailable: the registry does not answer, or not with what it says that it is.
    """
    url = f"{image.base}/v2/{image.repository}/manifests/{image.tag}"
    answer = _get(url, {"Accept": ACCEPT})
    if answer.status_code == 401:
        token = _token(image, answer.headers.get("WWW-Authenticate", ""))
        answer = _get(url, {"Accept": ACCEPT, "Authorization": f"Bearer {token}"})
    if answer.status_code in (401, 403, 404):
        raise Missing(f"not there, or not for everybody (answer {answer.status_code})")
    if answer.status_code != 200:
        raise Unavailable(f"{image}: answer {answer.status_code}")
    if len(answer.content) > LARGEST:
        raise Unavailable(f"{image}: a manifest of {len(answer.content)} bytes")
    found = "sha256:" + hashlib.sha256(answer.content).hexdigest()
    said = answer.headers.get("Docker-Content-Digest", found)
    if said != found:
        raise Unavailable(f"{image}: its manifest is {found}, but the registry says {said}")
    return found


def _token(image: Image, challenge: str) -> str:
    """A token without an account, from where the registry's 401 says."""
    scheme, _, rest = challenge.partition(" ")
    given = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    realm = given.get("realm", "")
    if scheme.lower() != "bearer" or not realm:
        raise Missing(f"wants a login ({scheme or 'no scheme'})")
    place = urlsplit(realm)
    if place.scheme != "https" and not image.base.startswith("http://"):
        raise Unavailable(f"{image}: sends us to {place.scheme}://{place.hostname} for a token, which is no https")
    asked = {"scope": given.get("scope", f"repository:{image.repository}:pull")}
    asked |= {"service": given["service"]} if "service" in given else {}
    answer = _get(realm, {}, asked)
    if answer.status_code in (401, 403, 404):
        raise Missing(f"no token without an account (answer {answer.status_code})")
    try:
        found = answer.json()
        return str(found.get("token") or found["access_token"])
    except (ValueError, KeyError, AttributeError):
        raise Unavailable(f"{image}: {place.hostname} gives no token (answer {answer.status_code})") from None


def _get(url: str, headers: Mapping[str, str], query: Mapping[str, str] | None = None) -> requests.Response:
    """Ask until there is an answer that is not "later"."""
    reason = ""
    for delay in (*DELAYS, None):
        try:
            answer = requests.get(url, params=query, headers=dict(headers), timeout=TIMEOUT)
            if answer.status_code != 429 and answer.status_code < 500:
                return answer
            reason = f"answer {answer.status_code}"
        except requests.RequestException as error:
            reason = type(error).__name__
        if delay is not None:
            time.sleep(delay)
    raise Unavailable(f"{urlsplit(url).netloc}: {reason}, {len(DELAYS) + 1} times")


@dataclass(frozen=True)
class Place:
    """Where a digest stands in a file, and which image it is of."""

    path: str
    image: Image
    now: str
    start: int
    end: int


@dataclass(frozen=True)
class Chart:
    """What a values file leaves to the chart."""

    values: Mapping[str, Any]
    version: str

    @classmethod
    def of(cls, folder: Path) -> Chart:
        """From the chart's own files."""
        values, about = (
            yaml.safe_load((folder / name).read_text(encoding="utf-8")) for name in ("values.yaml", "Chart.yaml")
        )
        return cls(values, str(about["appVersion"]))


def places(text: str, chart: Chart) -> list[Place]:
    """The digests of a values file.

    Args:
        text: the file.
        chart: what it does not say.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return [] if root is None else list(_walk(root, chart.values, chart.version, ""))


def _walk(node: yaml.Node, base: Any, version: str, path: str) -> Iterator[Place]:
    if not isinstance(node, yaml.MappingNode):
        return
    entries = {key.value: value for key, value in node.value}
    own = base if isinstance(base, Mapping) else {}
    where = entries.get("digest")
    if isinstance(where, yaml.ScalarNode):

        def said(key: str) -> str:
            entry = entries.get(key)
            return str(entry.value if isinstance(entry, yaml.ScalarNode) else own.get(key) or "")

        if said("repository"):
            image = Image.of(said("registry"), said("repository"), said("tag") or version)
            yield Place(path, image, where.value, where.start_mark.index, where.end_mark.index)
    for key, value in entries.items():
        yield from _walk(value, own.get(key), version, f"{path}.{key}" if path else key)


def lock(files: list[Path], chart: Chart, check: bool) -> tuple[int, int]:
    """Write the digests of the images in some files.

    Args:
        files: values files.
        chart: what they leave to the chart.
        check: change nothing.

    Returns:
        How many digests were (or would be) changed, and how many could not be had.
    """
    known: dict[Image, str | Exception] = {}
    changed = lacking = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        for place in sorted(places(text, chart), key=lambda place: place.start, reverse=True):
            if place.image not in known:
                try:
                    known[place.image] = digest(place.image)
                except (Missing, Unavailable) as error:
                    known[place.image] = error
            found = known[place.image]
            if isinstance(found, Exception):
                lacking += 1
                print(f"{file}: {place.path}: {place.image}: {found}", file=sys.stderr)
            elif found != place.now:
                changed += 1
                space = " " if text[: place.start].endswith(":") else ""  # `digest:` with nothing behind it
                text = f'{text[: place.start]}{space}"{found}"{text[place.end :]}'
                print(f"{file}: {place.path}: {place.image}@{found}")
        if not check:
            file.write_text(text, encoding="utf-8")
    return changed, lacking


def command(arguments: list[str]) -> int:
    """Do what the command line says.

    Raises:
        UserError: a word that is not understood, or no such file.
        Refused: check=true, and a digest is not what the registry says.
    """
    files: list[Path] = []
    check = False
    for word in arguments:
        key, _, value = word.partition("=")
        if key == "file" and value:
            files.append(Path(value))
        elif key == "check" and value in ("true", "false"):
            check = value == "true"
        else:
            raise UserError(f"{word!r} is not understood: known are file=VALUES.YAML and check=true")
    files = files or sorted(CHART.glob("values*.yaml"))
    for file in files:
        if not file.is_file():
            raise UserError(f"file={file} is no file")
    changed, lacking = lock(files, Chart.of(CHART), check)
    print(f"{changed} digests {'would change' if check else 'written'}, {lacking} could not be had")
    if check and changed:
        raise Refused("the digests are not those of the registries: make images-lock")
    return 1 if lacking else 0


def main(arguments: list[str]) -> int:
    """The command line; exit codes as in docs/design.md, "Errors"."""
    return enter("images-lock", lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
