"""All options of a job, by name: what the command line and Python know of them.

Kept apart from `specs`, which reads inputs: help and completion load no Arrow.
"""

from __future__ import annotations

from dataclasses import replace

from batchrun.engine import attention
from batchrun.jobs import spec
from batchrun.jobs.kinds import one_of

OPTIONS = {
    **spec.OPTIONS,
    # The names are the engine's.
    "attention": replace(spec.OPTIONS["attention"], kind=one_of("auto", *attention.NAMES)),
}
PIPE = "-"  # as an output: stdout
