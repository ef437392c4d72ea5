"""Which job does the same work as another one."""

from __future__ import annotations

from pathlib import Path

from batchrun.jobs.errors import JobError
from batchrun.jobs.folder import JobFolder, list_jobs
from batchrun.jobs.snapshot import JobSnapshot
from batchrun.jobs.spec import JobSpec


def find_same(root: Path, spec: JobSpec) -> JobFolder | None:
    """The newest job with the same work that is neither done nor cancelled, or None."""
    wanted = spec.fingerprint()
    for job in reversed(list_jobs(root)):
        try:
            noted = JobSnapshot.load(job.path)
            known = noted.fingerprint if noted is not None else ""
            same = (known or job.spec().fingerprint()) == wanted
            if same and job.state() not in {"done", "cancelled"}:
                job.counts()
                return job
        except JobError:
            continue  # a damaged job can't be resumed
    return None
