"""`ratchet cluster`: files that start a Ray cluster on Kubernetes, clouds, Slurm, or machines of one's own.

Runs in a process of its own, which starts nothing.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path, PurePosixPath
from shlex import join, quote
from typing import Annotated

import typer
import yaml

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.files import write_whole
from deploy.cluster import kuberay as objects
from deploy.shipped import config_file

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write files that start a Ray cluster.")
PLATFORMS = ("docker", "launcher", "slurm")  # the directories next to this file with files to be changed by hand
Size = tuple[int, int]
# A name of Kubernetes. KubeRay adds to it, and the names of pods have 63 characters at most.
NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"


@app.command()
def files(directory: Annotated[Path, typer.Argument(help="A new directory for the files.")]) -> None:
    """Copy the Dockerfiles, the files of Ray's cluster launcher and the Slurm script."""
    try:
        directory.mkdir(parents=True)
        for platform in PLATFORMS:
            shutil.copytree(Path(__file__).with_name(platform), directory / platform)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror}); name a new directory") from None
    typer.echo("\n".join(str(path) for path in sorted(directory.rglob("*")) if path.is_file()))


def _spot(given: list[str] | None) -> dict[str, str]:
    labels = [label.partition("=") for label in given or []]
    if faulty := ["".join(label) for label in labels if not (label[0] and label[2])]:
        raise UserError(
            f"--spot ({faulty[0]}) must be a label of spot machines, such as cloud.google.com/gke-spot=true"
        )
    return {key: value for key, _, value in labels}


@app.command()
def kuberay(
    config: Annotated[Path, typer.Argument(help="A TOML file or shipped config.", callback=config_file)],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value settings that override the file's.")] = None,
    image: Annotated[str, typer.Option(help="Ratchet's image, as the machines find it.")] = "",
    to: Annotated[Path, typer.Option(help="Where claim.yaml, cluster.yaml and job.yaml go.")] = Path("kuberay"),
    name: Annotated[str | None, typer.Option(help="Name of the run and of all objects [default: the file's].")] = None,
    directory: Annotated[
        str | None, typer.Option(help="Your files and runs/ on the shared storage [default: /shared/NAME].")
    ] = None,
    head: Annotated[Size, typer.Option(metavar="CPUS GIB", help="Size of the head.")] = (4, 16),
    learner: Annotated[Size, typer.Option(metavar="CPUS GIB", help="Size of a learner's pod.")] = (16, 128),
    learner_pods: Annotated[int, typer.Option(min=1, help="Pods for learner, reference and reward.")] = 1,
    learner_gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs of a learner's pod [default: what the config needs, on one pod].")
    ] = None,
    generator: Annotated[Size, typer.Option(metavar="CPUS GIB", help="Size of a generator's pod.")] = (8, 32),
    spot: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Label of spot machines, where generators run; may be repeated."),
    ] = None,
    notice: Annotated[int, typer.Option(help="Seconds from a spot machine's notice to its end.")] = 30,
    retries: Annotated[int, typer.Option(min=0, help="New clusters after failures; each continues the run.")] = 5,
    storage: Annotated[str, typer.Option(help="Size of the shared storage.")] = "500Gi",
    storage_class: Annotated[str | None, typer.Option(help="Its class; it must allow ReadWriteMany.")] = None,
    secret: Annotated[
        str | None, typer.Option(help="A secret whose entries become environment variables: keys of reward services.")
    ] = None,
) -> None:
    """Write a storage claim, a RayCluster and a RayJob for a config."""
    if not image:
        raise UserError("name Ratchet's image with --image; deploy/cluster/docker/ has the files that make it")
    chosen = name or re.sub(r"[^a-z0-9]+", "-", config.stem.lower()).strip("-")
    if not re.fullmatch(NAME, chosen):
        raise UserError(
            f"--name ({chosen}) must have lower-case letters, digits and - only, 40 at most; choose another"
        )
    cfg = load_config(config, settings or [], Config, keep_relative=True)
    place = PurePosixPath(directory or f"{objects.SHARED}/{chosen}")
    if not place.is_relative_to(objects.SHARED):
        raise UserError(f"--directory ({place}) must be on the shared storage, below {objects.SHARED}")
    gpus = math.ceil(objects.learner_gpus(cfg) / learner_pods) if learner_gpus is None else learner_gpus
    values = objects.Values(
        name=chosen,
        image=image,
        directory=place,
        head=objects.Machine(*head),
        learner=objects.Machine(*learner, gpus),
        learner_pods=learner_pods,
        generator=objects.Machine(*generator, math.ceil(cfg.generators.gpus)),
        spot=_spot(spot),
        notice_s=notice,
        retries=retries,
        storage=storage,
        storage_class=storage_class,
        secret=secret,
    )
    objects.check(cfg, values)
    documents = {
        "claim.yaml": [objects.claim(values)],
        "cluster.yaml": [objects.cluster(cfg, values)],
        "job.yaml": objects.job(cfg, values),
    }
    try:
        to.mkdir(parents=True, exist_ok=True)
        for file, contents in documents.items():
            write_whole(to / file, yaml.safe_dump_all(contents, sort_keys=False, width=1000))
    except OSError as error:
        raise UserError(f"{to} cannot be written ({error.strerror}); name another directory with --to") from None
    written = {file: quote(str(to / file)) for file in documents}
    submit = ["ratchet", "submit", str(config), *objects.settings_for_submit(), "--run", str(place / "runs" / "NEW")]
    typer.echo(
        f"storage, once:    kubectl apply -f {written['claim.yaml']}\n"
        f"one run:          kubectl apply -f {written['job.yaml']}\n"
        f"or a cluster:     kubectl apply -f {written['cluster.yaml']}\n"
        f"                  {join(submit)}"
    )
