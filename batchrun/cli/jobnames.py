"""The type of an argument that names a job: the shell completes its id."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain
from typing import Any

import click
from click.shell_completion import CompletionItem

from batchrun.jobs.folder import home, list_jobs
from batchrun.jobs.naming import matching
from batchrun.jobs.snapshot import JobSnapshot

_MOST = 50  # offered at a time: the newest


class JobName(click.ParamType[Any]):
    """A job's id, a part of one, or a folder."""

    name = "job"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """The text as it is: which job it means is for the command to find."""
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The ids that begin with the text, or else hold it, the newest first."""
        found: list[CompletionItem] = []
        with suppress(Exception):  # no completion is better than an error amid a command line
            jobs = {job.id: job for job in reversed(list_jobs(home()))}
            ids = [i for i in jobs if i.startswith(incomplete)] or matching([*jobs], incomplete)
            typed = {*chain.from_iterable(v for v in ctx.params.values() if isinstance(v, tuple))}
            for name in [i for i in ids if i not in typed][:_MOST]:
                noted = JobSnapshot.load(jobs[name].path)
                found.append(CompletionItem(name, help=noted.state if noted else None))
        return found


JOB = JobName()


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Have the shell offer the names of files."""
    return [CompletionItem(incomplete, type="file")]
