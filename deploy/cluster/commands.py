"""`ratchet cluster`: files that start a Ray cluster on Kubernetes, clouds, Slurm, or your own machines.

Runs in a process of its own, which starts nothing.
"""

from __future__ import annotations

import math
import os
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
from common.files import check_replaces, replaced_directory, write_whole
from deploy.cluster import kuberay as objects
from deploy.shipped import config_file

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write files that start a Ray cluster.")
# The directories next to this file with files that users edit. The Dockerfiles are not among them: they build in a
# checkout only.
PLATFORMS = ("launcher", "slurm")
Size = tuple[int, int]
WRITTEN = "# Written by ratchet cluster kuberay."  # begins every file of the command
# A name of Kubernetes. KubeRay adds to it, and the names of pods have 63 characters at most.
NAME = r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"


@app.command()
def files(directory: Annotated[Path, typer.Argument(help="A new directory for the files.")]) -> None:
    """Copy the files of Ray's cluster launcher and the Slurm script."""
    if os.path.lexists(directory):
        raise UserError(f"{directory} exists; name a new directory")
    try:
        with replaced_directory(directory) as staging:
            for platform in PLATFORMS:
                shutil.copytree(Path(__file__).with_name(platform), staging / platform)
    except OSError as error:
        reason = error.strerror or error  # an error of copytree has a list of files and reasons instead
        raise UserError(f"{directory} cannot be written ({reason}); name a new directory") from None
    typer.echo("\n".join(str(path) for path in sorted(directory.rglob("*")) if path.is_file()))


def _labels(option: str, given: list[str] | None, example: str) -> dict[str, str]:
    """The labels of machines that an option names."""
    labels = [label.partition("=") for label in given or []]
    if faulty := ["".join(label) for label in labels if not (label[0] and label[2])]:
        raise UserError(f"{option} ({faulty[0]}) must be a label of machines, such as {example}")
    return {key: value for key, _, value in labels}


@app.command()
def kuberay(
    config: Annotated[str, typer.Argument(help="A TOML file or shipped config.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value settings that override the file's.")] = None,
    image: Annotated[str, typer.Option(help="Ratchet's image, as the machines find it.")] = "",
    to: Annotated[Path, typer.Option(help="The directory of the files.")] = Path("kuberay"),
    name: Annotated[str | None, typer.Option(help="Name of the run and of all objects [default: the file's].")] = None,
    directory: Annotated[
        str | None, typer.Option(help="Your files and runs/ on the shared storage [default: /shared/NAME].")
    ] = None,
    head: Annotated[Size, typer.Option(metavar="CPUS GIB", help="Size of the head.")] = (4, 16),
    learner: Annotated[Size, typer.Option(metavar="CPUS GIB", help="Size of a learner's pod.")] = (16, 128),
    learner_pods: Annotated[int, typer.Option(min=1, help="Pods for all roles but the generators.")] = 1,
    learner_gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs of a learner's pod [default: what the config needs, on one pod].")
    ] = None,
    learner_node: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Label of the learner's machines; may be repeated."),
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
    pull_secret: Annotated[str | None, typer.Option(help="The secret of a private registry of images.")] = None,
) -> None:
    """Write a storage claim, a pod for copying files, a RayCluster and a RayJob for a config."""
    if not image:
        raise UserError("name Ratchet's image with --image; deploy/cluster/docker/ has the files that make it")
    path = Path(config_file(config))
    chosen = _name(name, path)
    cfg = load_config(path, settings or [], Config, keep_relative=True)
    place = _directory(directory, chosen)
    gpus = math.ceil(objects.learner_gpus(cfg) / learner_pods) if learner_gpus is None else learner_gpus
    values = objects.Values(
        name=chosen,
        image=image,
        directory=place,
        head=objects.Machine(*head),
        learner=objects.Machine(*learner, gpus),
        learner_pods=learner_pods,
        learner_node=_labels("--learner-node", learner_node, "node.kubernetes.io/instance-type=p5.48xlarge"),
        generator=objects.Machine(*generator, math.ceil(cfg.generators.gpus)),
        spot=_labels("--spot", spot, "cloud.google.com/gke-spot=true"),
        notice_s=notice,
        retries=retries,
        storage=storage,
        storage_class=storage_class,
        secret=secret,
        pull_secret=pull_secret,
    )
    objects.check(cfg, values)
    given = [*(settings or []), *objects.settings_of_run(cfg, values)]
    cfg = load_config(path, given, Config, keep_relative=True)
    from deploy.cluster.pods import check_memory  # imports torch

    check_memory(cfg, values)
    written = _write(to, cfg, values)
    there = ["--run", str(place / "runs" / "NEW"), "--address", "http://127.0.0.1:8265"]
    typer.echo(
        f"storage, once:    kubectl apply -f {written['claim.yaml']} -f {written['files.yaml']}\n"
        f"your files:       kubectl cp FILE {quote(f'{values.files}:{place}')}/\n"
        f"one run:          kubectl apply -f {written['job.yaml']}\n"
        f"or a cluster:     kubectl apply -f {written['cluster.yaml']}\n"
        f"                  {join(['ratchet', 'submit', config, *given, *there])}"
    )


def _name(name: str | None, config: Path) -> str:
    """The name of all objects. Raises UserError for one that Kubernetes does not take."""
    chosen = name or re.sub(r"[^a-z0-9]+", "-", config.stem.lower()).strip("-")
    if not re.fullmatch(NAME, chosen):
        raise UserError(
            f"--name ({chosen}) must have lower-case letters, digits and - only, 40 at most; choose another"
        )
    return chosen


def _directory(directory: str | None, name: str) -> PurePosixPath:
    """The user's directory on the shared storage. Raises UserError for one that is elsewhere."""
    place = PurePosixPath(directory or f"{objects.SHARED}/{name}")
    if not place.is_relative_to(objects.SHARED) or ".." in place.parts:
        raise UserError(f"--directory ({place}) must be on the shared storage, below {objects.SHARED}")
    return place


def _write(to: Path, cfg: Config, values: objects.Values) -> dict[str, str]:
    """Writes the objects of a run. Returns the path of each file, as a shell takes it. Raises UserError."""
    documents = {
        "claim.yaml": [objects.claim(values)],
        "files.yaml": [objects.files(values)],
        "cluster.yaml": [objects.cluster(cfg, values)],
        "job.yaml": objects.job(cfg, values),
    }
    try:
        to.mkdir(parents=True, exist_ok=True)
        for file in documents:
            check_replaces(to / file, WRITTEN, "ratchet cluster kuberay", otherwise="another directory with --to")
        for file, contents in documents.items():
            text = yaml.safe_dump_all(contents, sort_keys=False, width=1000)
            write_whole(to / file, f"{WRITTEN}\n{text}")
    except OSError as error:
        raise UserError(f"{to} cannot be written ({error.strerror}); name another directory with --to") from None
    return {file: quote(str(to / file)) for file in documents}
