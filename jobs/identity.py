"""Whether a job would go on with what it was submitted with, wherever that lies by now.

A moved file is not a changed one: `places.json` says where the paths of the immutable `job.json`
lead today. Nor is a job another that has less memory: `limits.json` says how it runs today.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchrun.jobs.errors import InputError, JobError, SpecChanged, SpecDamaged, refused
from batchrun.jobs.files import read_json, write_json
from batchrun.jobs.rows.store import INPUTS
from batchrun.jobs.spec import FILE, LIMIT_NAMES, InputFile, JobSpec

if TYPE_CHECKING:
    from batchrun.jobs.folder import JobFolder

ModelFingerprint = Callable[[Path], str]

PLACES = "places.json"
LIMITS = "limits.json"


def load_places(folder: Path) -> dict[str, str]:
    """Where paths of the job lead that have moved.

    Raises:
        JobError: The file is damaged.
    """
    return {old: str(new) for old, new in _told(folder / PLACES, "--moved OLD=NEW").items()}


def load_limits(folder: Path) -> dict[str, int]:
    """How the job is to run that was told otherwise since, by names of `RuntimeSpec`.

    Raises:
        JobError: The file is damaged.
    """
    told = _told(folder / LIMITS, "--max-num-seqs N")
    return {name: v for name, v in told.items() if name in LIMIT_NAMES and isinstance(v, int)}


def set_limits(folder: Path, limits: Mapping[str, int]) -> None:
    """Note how the job is to run from now on; what was told before and is not in it stays.

    Raises:
        JobError: What was told before is damaged.
        OSError: It can't be written.
    """
    write_json(folder / LIMITS, {**load_limits(folder), **limits})


def _told(path: Path, again: str) -> dict[str, Any]:
    """What a file says that `batchrun resume` has written."""
    try:
        return {str(name): value for name, value in read_json(path).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise JobError(
            f"{path} can't be read: {error}",
            hint=f"remove it, then tell again: batchrun resume {again}",
        ) from error


def places_with_output(folder: Path, spec: JobSpec, output: Path | None) -> dict[str, str]:
    """What `load_places` says, and that the output goes elsewhere unless that is None.

    Args:
        folder: The job's.
        spec: As it was submitted.
        output: Where the output goes now.

    Raises:
        JobError: The file is damaged.
    """
    places = load_places(folder)
    if output is not None:
        places[spec.output.path] = str(output)
    return {old: new for old, new in places.items() if old != new}


def check_unchanged(job: JobFolder, model_fingerprint: ModelFingerprint | None = None) -> None:
    """Refuse to go on with other work than what was submitted.

    Args:
        job: The job.
        model_fingerprint: Digests a model; without it the model is not looked at.

    Raises:
        SpecChanged: The message names what changed.
        SpecDamaged: `job.json` says nothing any more.
        InputError: An input or the model is gone or can't be read.
    """
    spec = job.spec()
    with job.journal() as journal:
        kept = journal.meta("spec")
    edited = JobSpec.of(kept).edits(job.path) if kept is not None else []
    if edited is None:
        raise SpecDamaged(
            f"{job.path / FILE} is damaged; the journal has what it said",
            hint=f"batchrun resume {job.id} writes it anew",
        )
    if edited:
        raise SpecChanged(
            "job.json was edited since the job was submitted, or is damaged: " + "; ".join(edited),
            hint="undo that, or remove the file: `batchrun resume` writes it anew; "
            "new parameters are a job of their own",
        )
    changed = changes(spec, model_fingerprint)
    if changed:
        raise SpecChanged(
            "the input or model changed since the job was submitted: " + "; ".join(changed),
            hint="restore it, or submit the new one as a job of its own",
        )


def move(
    job: JobFolder, old: str, new: str, model_fingerprint: ModelFingerprint | None = None
) -> None:
    """Note that a file or folder is elsewhere now, if its content is the same.

    Args:
        job: The job.
        old: Where it was: as the job was submitted, or as it was moved before.
        new: Where it is.
        model_fingerprint: Digests a model; without it a moved model is not looked at.

    Raises:
        SpecChanged: What is there is not what was submitted.
        JobError: The job has nothing in `old`, or `new` can't be read.
    """
    spec, places = job.submitted(), load_places(job.path)
    before, after = Path(old).expanduser().absolute(), Path(new).expanduser().absolute()
    moved = {
        path: str(after / Path(known).relative_to(before))
        for path in spec.paths()
        for known in (places.get(path, path), path)
        if Path(known).is_relative_to(before)
    }
    if not moved:
        there = [places.get(path, path) for path in spec.paths()]
        raise JobError(
            f"the job {job.id} has neither an input nor its model in {before}",
            hint=f"it has {', '.join(there[:3])}{' and more' if len(there) > 3 else ''}",
        )
    found = changes(spec.at(moved), model_fingerprint, only=set(moved.values()))
    if found:
        raise SpecChanged(
            f"{after} is not what the job was submitted with: {'; '.join(found)}",
            hint="find the old one, or submit the new one as a job of its own",
        )
    write_json(job.path / PLACES, places | moved)


def grown(spec: JobSpec) -> list[str]:
    """What was appended to text inputs since the submission, a line each: no part of the job."""
    lines = []
    for was in spec.inputs if _may_grow(spec) else ():
        with suppress(OSError):
            more = INPUTS.stat(Path(was.path)).size - was.size
            if more > 0:
                lines.append(
                    f"{was.path} has {more:,} bytes more than when the job was submitted: "
                    "they are no part of it"
                )
    return lines


def changes(
    spec: JobSpec,
    model_fingerprint: ModelFingerprint | None = None,
    only: Container[str] | None = None,
) -> list[str]:
    """Inputs, and the model, whose content is not what it was at submission, a line each.

    A file of text that has only grown is as it was.

    Args:
        spec: The job, with paths as they are now.
        model_fingerprint: Digests a model; without it the model is not looked at.
        only: The paths to look at, all by default.

    Raises:
        InputError: One is gone or can't be read.
    """
    lines = []
    for was in spec.inputs:
        if only is None or was.path in only:
            # What was appended is no part of the job: sources of text read no further than it was.
            most = was.size if _may_grow(spec) else None
            now = InputFile.of(Path(was.path), most=most)
            if was.size != now.size:
                lines.append(f"{was.path}: it had {was.size} bytes and now has {now.size}")
            elif was.fingerprint != now.fingerprint:
                lines.append(f"{was.path}: its content changed")
    model = spec.model.path
    if model and model_fingerprint is not None and (only is None or model in only):
        elsewhere = f"if it is elsewhere now: batchrun resume --moved '{model}'=NEW"
        with refused(InputError, f"the model in {model} can't be read", elsewhere):
            os.stat(model)
            if model_fingerprint(Path(model)) != spec.model.fingerprint:
                lines.append(f"the model in {model}: its weights, config or tokenizer changed")
    return lines


def _may_grow(spec: JobSpec) -> bool:
    from batchrun.jobs.rows.formats import FORMATS  # noqa: PLC0415 - Arrow, seldom

    return not FORMATS[spec.input_format].columnar
