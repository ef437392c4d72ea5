"""From options to a checked `JobSpec`: whatever is bound to fail fails here.

Callers give options by their Python names, and `OptionError` uses these names.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from batchrun.engine.core import SamplingParams
from batchrun.fleet.devices import check_ray, devices_of
from batchrun.grammars.constraint import SHAPES, constraint_of, problem, with_constraint
from batchrun.jobs.about import AboutSpec
from batchrun.jobs.errors import InputError, OptionError
from batchrun.jobs.fleet import check_fleet
from batchrun.jobs.kinds import options_of
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.output.columns import output_columns
from batchrun.jobs.output.destination import check_place
from batchrun.jobs.output.export import check_columns
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.arrowtypes import is_text, without_dictionary
from batchrun.jobs.rows.formats import FORMATS, output_format
from batchrun.jobs.rows.row import Source, missing_column
from batchrun.jobs.rows.source import expand_inputs, open_source
from batchrun.jobs.rows.store import Noted, unnoted
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import JobSpec, input_files
from batchrun.models.resolve import chat_templates, no_chat_template, resolve
from batchrun.objectstore.paths import Location, location
from batchrun.options import OPTIONS, PIPE
from batchrun.prompts.messages import RESERVED, arguments_taken
from batchrun.prompts.template import Template, doubled, looks_like_json
from batchrun.runner import chat_columns
from batchrun.runner.chat_columns import are_chats, usual_column
from batchrun.runner.param_columns import param_columns, parameters_taken

T = TypeVar("T")
Log = Callable[[str], None]


def read_options(given: Mapping[str, Any], *sections: str) -> dict[str, Any]:
    """All options by name: the given values, converted, and defaults for the others.

    Args:
        given: Values by name.
        sections: Accept only options of these; default: all.

    Raises:
        OptionError: One is unknown, means nothing here, or has an invalid value.
    """
    for name in given:
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, 1)
            raise OptionError(
                "there is no option {}" + "; did you mean {}?" * len(near), name, *near
            )
        if sections and OPTIONS[name].section not in sections:
            raise OptionError(f"{{{name}}} does not apply here")
    return {name: option.read(given.get(name)) for name, option in OPTIONS.items()}


def part_of(kind: type[T], options: Mapping[str, Any]) -> T:
    """One part of a specification, from its options."""
    return kind(**{option.at: options[option.name] for option in options_of(kind)})


def make_spec(
    inputs: Sequence[str],
    home: Path,
    options: Mapping[str, Any],
    *,
    log: Log,
    noted: Noted = unnoted,
) -> JobSpec:
    """Check every option against the inputs, the destination and the model.

    Converts or downloads the model if necessary, and tells `log`. `noted` is told what is read of
    the inputs.

    Raises:
        OptionError: An option has an invalid value.
        JobError: An input cannot be read, a column is missing, the output cannot be written.
        ModelError: The model cannot be used.
    """
    spec, chats = modelless_spec(inputs, home, read_options(options), log=log, noted=noted)
    return with_model(spec, home, log, chats=chats)


def modelless_spec(
    inputs: Sequence[str], home: Path, options: Mapping[str, Any], *, log: Log, noted: Noted
) -> tuple[JobSpec, bool]:
    """The part of `make_spec` that reads the inputs.

    Returns:
        A job whose model is only named, and whether its prompts are chats for certain.
    """
    sampling = sampling_of(options)
    fields = _template_fields(options)
    parts, input_format = expand_inputs(inputs, log)
    place, output = options["output"], part_of(OutputSpec, options)
    if place == PIPE:
        output = to_stdout(input_format, output)
    else:
        output = output_to(place or _default_output(parts[0].path, input_format), output)
    source = open_source(parts, input_format, noted=noted)
    prompt = _prompt(options, fields, source, log)
    if sampling.score is not None:
        _check_score(sampling.score, source, log)
    _advise_spaces(prompt, sampling.choices, log)
    own = _own_columns(prompt, sampling, options["limit"], source, log)
    n, keep = options["best_of"] or options["n"], options["n"] if options["best_of"] else None
    spec = JobSpec(
        inputs=(),
        input_format=input_format,
        prompt=prompt,
        model=part_of(ModelSpec, options),
        sampling=sampling,
        seed=options["seed"],
        n=n,
        keep=keep,
        limit=options["limit"],
        output=output,
        # The columns are noted for people who look at the job, and for the type of `parsed`.
        runtime=replace(runtime_of(options), param_columns=own),
        about=part_of(AboutSpec, options),
    )
    check_columns(source.column_names, output_columns(spec))
    if not output.stdout:
        check_place(home, location(output.path), [part.path for part in parts])
        OUTPUTS.check(location(output.path), overwrite=output.overwrite)
    return replace(spec, inputs=input_files(parts)), bool(are_chats(prompt, source))


def with_model(spec: JobSpec, home: Path, log: Log, *, chats: bool = False) -> JobSpec:
    """A job whose model is ready to load, and its draft model; converts or downloads if necessary.

    Args:
        spec: The job; its models are only named.
        home: Where converted models are.
        log: Told what takes long.
        chats: Whether its prompts are chats for certain.

    Raises:
        ModelError: The model or the device can't be used, or the model has no chat template, or
            one that does not read the job's template arguments. Checks that need the tokenizer
            are left to the run.
    """
    if spec.runtime.device.startswith("cuda"):
        from batchrun.engine.settings import choose_device  # noqa: PLC0415 - imports torch

        choose_device(spec.runtime.device)
    model, args = spec.model, spec.prompt.template_args
    code = model.trust_remote_code
    ref = resolve(model.name, home / "models", trust_remote_code=code, log=log)
    sources = None if code else chat_templates(ref.path)
    if chats and sources == []:
        raise no_chat_template(ref.name)
    if args and sources:
        from batchrun.prompts.chat_source import (  # noqa: PLC0415 - Jinja, seldom
            check_template_args,
        )

        check_template_args(args, sources, ref.name)
    found = replace(model, name=ref.name, path=str(ref.path), fingerprint=ref.fingerprint)
    runtime = spec.runtime
    if runtime.draft_model is not None:
        draft = resolve(runtime.draft_model, home / "models", trust_remote_code=code, log=log)
        place, digest = str(draft.path), draft.fingerprint
        runtime = replace(runtime, draft_path=place, draft_fingerprint=digest)
    return replace(spec, model=found, runtime=runtime)


def sampling_of(options: Mapping[str, Any]) -> SamplingSpec:
    """The given sampling parameters; others have the model's or batchrun's defaults.

    Raises:
        OptionError: A value is out of range, or two can't be combined.
    """
    sampling, best_of, n = part_of(SamplingSpec, options), options["best_of"], options["n"]
    if not -(2**63) <= options["seed"] < 2**63:
        raise OptionError("{seed} {} does not fit in 64 bits", options["seed"])
    if best_of is not None:
        _check_best_of(best_of, n, sampling)
    beams = (sampling.num_beams or 1) > 1
    for name in ("length_penalty", "early_stopping"):
        if options[name] is not None and not beams:
            raise OptionError(f"{{{name}}} is for beam search: add {{num_beams}}")
    if beams:
        for name in ("best_of", "n"):
            if (options[name] or 1) > 1:
                raise OptionError(
                    f"{{num_beams}} with {{{name}}}: beam search has one answer for each row"
                )
        if sampling.temperature:
            raise OptionError("{num_beams} with {temperature}: beam search does not sample")
        if sampling.stop:
            raise OptionError("{num_beams} with {stop}: use {stop_token_ids}, or cut the text")
        sampling = replace(sampling, temperature=0.0)  # the model may ask for sampling
    _check_shape(sampling, beams=beams)
    if "" in sampling.stop:
        raise OptionError("{stop} must not be empty")
    try:
        SamplingParams(**with_constraint(sampling.given))
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise OptionError(f"{{{name}}} {{}}", rest) from error
    return sampling


def runtime_of(options: Mapping[str, Any]) -> RuntimeSpec:
    """How the job is to run; its draft model is only named.

    Raises:
        OptionError: Two options can't be combined.
        MachineError: A device is not there, or Ray is not.
    """
    if options["draft_model"] is None and options["draft_tokens"] is not None:
        raise OptionError("{draft_tokens} needs {draft_model}")
    if options["draft_model"] is not None and not options["drafts"]:
        raise OptionError("{draft_model} with {drafts} off: the draft model would be unused")
    check_fleet(options)
    if options["ray"] is not None:
        check_ray()
    elif options["devices"] is not None:
        devices_of(options["devices"])
    return part_of(RuntimeSpec, options)


def _check_shape(sampling: SamplingSpec, *, beams: bool) -> None:
    """Refuse a shape of the answer that can't be kept, or not together with the rest."""
    if sampling.choice_logprob and sampling.choices is None:
        raise OptionError("{choice_logprob} needs {choices}")
    given = [name for name in SHAPES if getattr(sampling, name)]
    if len(given) > 1:
        raise OptionError(f"{{{given[0]}}} and {{{given[1]}}} can't be combined")
    for name in given:
        if beams:
            raise OptionError(f"{{num_beams}} with {{{name}}}: beam search can't enforce a shape")
        try:
            found = problem(constraint_of(name, getattr(sampling, name)))
        except ValueError as error:
            found = str(error)
        if found is not None:
            raise OptionError(f"{{{name}}} can't be enforced: {{}}", found)


def _check_best_of(best_of: int, n: int, sampling: SamplingSpec) -> None:
    if best_of < n:
        raise OptionError("{best_of} {} is less than {n} {}", best_of, n)
    if best_of > 1 and sampling.temperature == 0:
        raise OptionError("{best_of} with {temperature} 0: all samples would be the same")
    if not sampling.given.get("max_tokens", 1):
        raise OptionError("{best_of} without {max_tokens}: with scores nothing is generated")


def output_to(path: str, output: OutputSpec = OutputSpec()) -> OutputSpec:  # noqa: B008 - frozen
    """Where the output goes, and in which format, by the name's suffix.

    Raises:
        OutputError: The suffix implies no known format.
    """
    destination = location(path).absolute()
    return replace(output, path=str(destination), format=output_format(destination))


def _default_output(first: Location, input_format: str) -> str:
    name = first.name.removeprefix(".stdin-")
    stem = "stdin" if name != first.name else name.split(".")[0]
    return f"{stem}-completions{FORMATS[input_format].output_suffix(first)}"


def to_stdout(input_format: str, output: OutputSpec = OutputSpec()) -> OutputSpec:  # noqa: B008
    """Settings of an output for stdout, kept in the job's folder until the end."""
    kind = FORMATS[FORMATS[input_format].stdout]
    return replace(output, path=f"output{kind.suffixes[0]}", format=kind.name, stdout=True)


def _template_fields(options: Mapping[str, Any]) -> list[str] | None:
    template = options["template"]
    if template is None:
        return None
    if options["prompt_column"] is not None:
        raise OptionError("{template} and {prompt_column} can't be combined")
    try:
        return Template(template).columns
    except ValueError as error:
        fixed = doubled(template)
        meant = f"; did you mean this? {fixed}" if fixed is not None else ""
        raise OptionError("{template}: {}{}", str(error), meant) from error


def _prompt(
    options: Mapping[str, Any], fields: Sequence[str] | None, source: Source, log: Log
) -> PromptSpec:
    """How a row becomes a prompt. Uses a `messages` column if there is no `prompt`."""

    def needed(names: Sequence[str]) -> list[str]:
        if fields is not None:
            return list(fields)
        return [options["prompt_column"] or usual_column(names)]

    names = source.column_names
    if not set(needed(names)) <= set(names) and source.num_rows is None:
        log("the first rows lack a column that makes the prompt: reading all rows to find it")
        names = source.schema().names
    for name in needed(names):
        if name not in names:
            raise _missing(name, names, source, options["template"])
    column = None if fields is not None else needed(names)[0]
    if source.typed and column is not None:
        chat_columns.check_prompt_type(source.schema().field(column))
    prompt = replace(part_of(PromptSpec, options), column=column)
    for name in prompt.template_args:
        if name in RESERVED:
            raise OptionError("{template_args} {}: batchrun sets {} itself", name, name)
    if prompt.template_args and are_chats(prompt, source) is False:
        raise OptionError("{template_args} without a chat: add {chat}")
    return prompt


def _missing(name: str, names: Sequence[str], source: Source, template: str | None) -> InputError:
    """The error for a column that makes the prompt and is not there, and what to type instead."""
    error = missing_column(" ".join(name.split()) if "\n" in name else name, names)
    if template is not None:
        if looks_like_json(name):
            fixed = doubled(template, names)
            meant = f": --template {shlex.quote(fixed)}" if fixed is not None else ": {{ and }}"
            error.hint = f"double the literal braces{meant}"
    elif error.hint is None:
        error.hint = chat_columns.suggested(source)
    return error


def _advise_spaces(prompt: PromptSpec, choices: Sequence[str] | None, log: Log) -> None:
    """Say that choices are written right behind a plain prompt, if a space is likely missing."""
    if not choices or not prompt.template or prompt.chat or prompt.system is not None:
        return
    end = Template(prompt.template).end
    if end and not end[-1].isspace() and choices[0][:1].isalnum():
        spaced = json.dumps([f" {choice}" for choice in choices[:2]], ensure_ascii=False)
        more = spaced[:-1] + ", ...]" if choices[2:] else spaced
        log(
            f"the choices follow {end[-1]!r} without a space, which models rarely write: give them "
            f"as --choices {shlex.quote(more)}, or add --chat"
        )


def _check_score(column: str, source: Source, log: Log) -> None:
    """Refuse a column to score that is missing, or holds no text."""
    names = source.column_names
    if column not in names and source.num_rows is None:
        log("the first rows lack the column to score: reading all rows to find it")
        names = source.schema().names
    if column not in names:
        raise missing_column(column, names)
    if source.typed:
        field = source.schema().field(column)
        kind = without_dictionary(field.type)
        if not (is_text(kind) or pa.types.is_null(kind)):
            raise InputError(f"the column '{column}' holds {field.type}, not text to score")


def _own_columns(
    prompt: PromptSpec, sampling: SamplingSpec, limit: int | None, source: Source, log: Log
) -> tuple[str, ...]:
    """The columns with which rows set their own parameters; logs them.

    These are sampling parameters and arguments for the chat template.
    """
    if prompt.ignore_param_columns:
        return ()
    parameters = param_columns(source, sampling.given, limit)
    if parameters:
        log(parameters_taken(parameters))
    names = [
        name
        for name in chat_columns.argument_columns(prompt, source)
        if name in source.column_names
    ]
    if not names or not are_chats(prompt, source):
        return tuple(parameters)
    chat_columns.check_argument_types(names, source)
    log(arguments_taken(names))
    return *parameters, *names
