"""The local pipeline's tasks in containers: `python -m pipelines.local run runner=docker image=select-moe:dev ...`.

KFP's DockerRunner with what a cluster would enforce: a numeric user without root, no capability, no new privileges, a
read-only root file system. A task sees rows, models and work under the same paths as this process does, and no more.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selectmoe import cache
from selectmoe.errors import UserError

if TYPE_CHECKING:
    from kfp.local import DockerRunner

USER = 10001
"""The image's own user: who a task is where this process is root."""
PASSED = ("MLFLOW_", "AWS_", "SELECTMOE_")
"""How the names of environment variables begin that a task is given."""
NAMED = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "OMP_NUM_THREADS", "DO_NOT_TRACK")
CODE = "from components import _plan; from selectmoe import check; print(_plan.code(check.code_digest()))"
"""What an image is asked for: the digest of the code that its tasks run."""
LABEL = "org.select-moe.state"
"""The state folder of the run that a container belongs to."""


@dataclass(frozen=True)
class Places:
    """Folders and files of this machine that the tasks are given, as they are called here."""

    state: Path
    written: tuple[Path, ...]
    read: tuple[Path, ...]


def places(state: Path, work_root: str, model_root: str, read: list[str], events: Path) -> Places:
    """What the tasks of a run have to see.

    Args:
        state: the state folder, in which KFP's own folders lie.
        work_root: folder or s3:// URI for committed progress.
        model_root: folder or s3:// URI for large checkpoints.
        read: rows and models; those that are not on this machine come through the model cache.
        events: the file that tells what was executed.
    """
    written = [Path(place) for place in (work_root, model_root) if not cache.is_remote(place)]
    here = {Path(place) for place in read if place and Path(place).exists()}
    if len(written) < 2 or len(here) < len({*filter(None, read)}):  # something is brought here from elsewhere
        written.append(cache.root())
    outside = [path for path in sorted(here) if not any(path.is_relative_to(folder) for folder in written)]
    return Places(state, (*written, events), tuple(outside))


def runner(image: str, given: Places) -> DockerRunner:
    """KFP's runner for an image, hardened; it mounts KFP's own folders itself.

    Args:
        image: by tag or digest; it must be there.
        given: what the tasks see.
    """
    from docker.types import Mount
    from kfp import local

    mounts = [Mount(str(path), str(path), type="bind") for path in given.written]
    mounts += [Mount(str(path), str(path), type="bind", read_only=True) for path in given.read]
    environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED) or name in NAMED}
    environment.pop(cache.CACHE, None)
    if cache.root() in given.written:
        environment[cache.CACHE] = str(cache.root())
    return local.DockerRunner(
        mounts=mounts,
        environment=environment,
        labels={LABEL: str(given.state)},
        user=user(),
        network_mode="host",  # MLflow and S3 listen on loopback
        read_only=True,
        tmpfs={"/tmp": "mode=1777"},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
    )


def user() -> str:
    """Who the tasks are: whoever runs this, or the image's user where that is root."""
    return f"{os.getuid()}:{os.getgid()}" if os.getuid() else f"{USER}:{USER}"


def share(folders: tuple[Path, ...]) -> None:
    """Let tasks write to what is there, and to what this process makes there, if they are somebody else than it is.

    Root's containers are not root: folders and files get the tasks' group, and what is made in them inherits it.

    Args:
        folders: what the tasks write to; made where they are not there. A file must be there.
    """
    for folder in folders:
        if not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
    if os.getuid():
        return
    os.umask(0o002)
    for path in (place for folder in folders for place in (folder, *folder.rglob("*"))):
        if not path.is_symlink():
            os.chown(path, -1, USER)  # before the mode: it may clear the bit that hands the group on
            path.chmod(path.stat().st_mode | (0o2070 if path.is_dir() else 0o060))


def end(state: Path) -> None:
    """End every container that a run in this state folder has left: its process was killed, theirs go on without it.

    Args:
        state: the state folder.
    """
    import docker

    client = docker.from_env()
    for container in client.containers.list(filters={"label": f"{LABEL}={state}"}):
        try:
            container.kill()
        except docker.errors.APIError as error:
            if error.status_code not in (404, 409):  # it has ended meanwhile
                raise


def prove(image: str) -> None:
    """Prove that tasks can run in an image, and would do there what they would do here.

    Args:
        image: by tag or digest.

    Raises:
        UserError: no container engine answers, it has no such image, or other code is in it.
    """
    import docker

    from components import _plan
    from selectmoe import check

    try:
        client = docker.from_env()
        client.images.get(image)
        found = client.containers.run(image, ["python", "-c", CODE], network_mode="none", user=user(), remove=True)
    except docker.errors.ImageNotFound:
        raise UserError(f"image={image} is not here: run `make image`, or docker pull {image}") from None
    except (docker.errors.ContainerError, docker.errors.APIError) as error:
        raise UserError(f"image={image} is no image of Select-MoE ({error}): run `make image`") from None
    except docker.errors.DockerException as error:
        raise UserError(f"runner=docker: no container engine answers ({error}); start it, or set DOCKER_HOST") from None
    if found.decode().strip() != _plan.code(check.code_digest()):
        raise UserError(f"image={image} was built from other code than this: run `make image`")
