"""Register the pipeline, compiled for this site, as a version named by the digest of its YAML.

    python -m pipelines.install upload profile=/etc/select-moe/profile.yaml endpoint=http://ml-pipeline.kubeflow:8888

A version that is there already is left alone, so only a changed profile, image or pipeline makes a new one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines import submit
from pipelines.install.options import WAIT, Connection, option
from pipelines.install.patience import patiently


@dataclass(frozen=True, kw_only=True)
class Options(Connection):
    """The keys of the command."""

    profile: str = option("YAML of the site (pipelines/profile.py)")
    wait: int = option(WAIT, 300)


def run(options: Options) -> None:
    """Register the pipeline.

    Raises:
        UserError: the profile is wrong, or KFP refuses.
        Unavailable: KFP does not answer.
    """
    pipeline = submit.compiled(options.profile)

    def registered() -> dict[str, str]:
        return submit.register(pipeline, options.server())

    print(patiently(options.wait, registered)["pipeline_version_id"], flush=True)
