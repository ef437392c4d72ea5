"""The job layer's small job on disk."""

from tests.jobs.conftest import home, job, make_job, prompts, spec

__all__ = ["home", "job", "make_job", "prompts", "spec"]
