"""Register the pipeline, compiled for this site, as a version named by the digest of its YAML.

    python -m pipelines.install upload profile=/etc/select-moe/profile.yaml endpoint=http://ml-pipeline.kubeflow:8888

A version that is there already is left alone, so only a changed profile, image or pipeline makes a new one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines import submit
from pipelines.install.options import WAIT, option
from pipelines.install.patience import patiently
from pipelines.kfp_api import Server


@dataclass(frozen=True)
class Options:
    """The keys of the command."""

    profile: str = option("YAML of the site (pipelines/profile.py)")
    endpoint: str = option("URL of the KFP API; default KF_PIPELINES_ENDPOINT, in a pod the cluster's own", "")
    namespace: str = option("namespace of a Kubeflow with several users; in a pod its own", "")
    token_file: str = option("file with a bearer token; default KF_PIPELINES_TOKEN, in a pod its own token", "")
    ca_file: str = option("certificates that vouch for the endpoint; default the public ones", "")
    wait: int = option(WAIT, 300)


def run(options: Options) -> None:
    """Register the pipeline.

    Raises:
        UserError: the profile is wrong, or KFP refuses.
        Unavailable: KFP does not answer.
    """
    pipeline = submit.compiled(options.profile)

    def registered() -> dict[str, str]:
        server = Server(options.endpoint, options.namespace, options.token_file, options.ca_file)
        return submit.register(pipeline, server)

    print(patiently(options.wait, registered)["pipeline_version_id"], flush=True)
