"""Register the pipeline and start it, once per name.

    python -m pipelines.install run profile=/etc/select-moe/profile.yaml name=select-moe-1 work_root=s3://select-moe/work

Everything that is no key of this command is a parameter of the pipeline. A run of this name in the experiment is left
alone, whatever became of it: a Job that is tried again starts nothing twice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pipelines import submit
from pipelines.install.options import WAIT, Connection, option
from pipelines.install.patience import patiently
from selectmoe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options(Connection):
    """The keys of the command."""

    profile: str = option("YAML of the site (pipelines/profile.py)")
    name: str = option("name of the run")
    experiment: str = option("KFP experiment; made where there is none", "Default")
    service_account: str = option("Kubernetes service account of the run's pods; default the server's", "")
    wait: int = option(WAIT, 300)
    words: tuple[str, ...] = option("further words: parameters of the pipeline", ())


def run(options: Options) -> None:
    """Start the run unless there is one of its name; its ID is the last line.

    Raises:
        UserError: profile or parameters are wrong, or KFP refuses.
        Unavailable: KFP does not answer.
    """
    pipeline = submit.compiled(options.profile)
    parsed, parameters = submit.parse(options.words, pipeline.parameters)
    for entry in dataclasses.fields(parsed):
        if getattr(parsed, entry.name) != entry.default:
            raise UserError(f"run takes no {entry.name}= (python -m pipelines.install run --help)")
    chosen = submit.Options(
        experiment=options.experiment,
        create_experiment=True,
        run_name=options.name,
        service_account=options.service_account,
    )

    def started() -> tuple[str, str]:
        server = options.server()
        run_id = submit.submit(chosen, pipeline, parameters, server, once=True)
        return run_id, server.link(run_id)

    run_id, link = patiently(options.wait, started)
    print(f"run {options.name}: {link}\n{run_id}", flush=True)
