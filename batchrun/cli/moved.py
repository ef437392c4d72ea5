"""`--moved OLD=NEW`: where a job's files are now."""

from __future__ import annotations

from collections.abc import Iterable

import click

from batchrun.jobs.folder import JobFolder
from batchrun.jobs.identity import move
from batchrun.models.resolve import fingerprint

moved_option = click.option(
    "--moved",
    multiple=True,
    metavar="OLD=NEW",
    help="An input or the model has moved; its content must be the same.",
)


def note_moved(job: JobFolder, moved: Iterable[str]) -> None:
    """Note where a job's files are from now on.

    Raises:
        JobError: The job has nothing there, or what is there now is not the same.
    """
    for pair in moved:
        old, equals, new = pair.partition("=")
        if not equals:
            raise click.UsageError(f"--moved {pair}: write OLD=NEW")
        move(job, old, new, fingerprint)
