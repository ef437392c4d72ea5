"""From the options of `submit` to a checked `JobSpec`: what is bound to fail, fails here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from batchrun.cli.piped import PIPE
from batchrun.engine.core import SamplingParams
from batchrun.jobs.errors import InputError
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, RuntimeSpec, SamplingSpec
from batchrun.jobs.output.destination import check_place
from batchrun.jobs.output.export import check_columns
from batchrun.jobs.output.store import OUTPUTS
from batchrun.jobs.rows.formats import FORMATS, output_format
from batchrun.jobs.rows.row import Source, missing_column
from batchrun.jobs.rows.source import expand_inputs, open_source
from batchrun.jobs.rows.store import Noted, unnoted
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.models.resolve import chat_templates, lacks_chat_template, no_chat_template, resolve
from batchrun.prompts.messages import RESERVED, arguments_taken
from batchrun.prompts.template import Template, looks_like_json
from batchrun.run.chat_columns import (
    are_chats,
    argument_columns,
    check_argument_types,
    check_prompt_type,
    usual_column,
)
from batchrun.run.param_columns import param_columns, parameters_taken

_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "num_beams",
    "length_penalty",
)
_PROMPT = (
    "template",
    "chat",
    "system",
    "skip_empty",
    "ignore_param_columns",
    "special_tokens_in_data",
)
_EARLY_STOPPING = {"no": False, "yes": True, "never": "never"}
_RUNTIME = (
    "device",
    "attention",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_budget",
    "page_size",
    "layers_per_slab",
    "share_prefixes",
    "drafts",
    "overlap",
    "graphs",
    "optimize",
    "plan",
)


def make_spec(
    inputs: Sequence[str],
    home: Path,
    options: Mapping[str, Any],
    *,
    log: Callable[[str], None],
    noted: Noted = unnoted,
) -> JobSpec:
    """Checks every option against the inputs, the destination and the model.

    Converts or downloads the model if that has not been done yet, which `log` is told. What is read
    of the inputs `noted` is told.

    Raises:
        click.UsageError: An option has a value that it cannot have.
        JobError: An input cannot be read, a column is missing, the output cannot be written.
        ModelError: The model cannot be used.
    """
    sampling = sampling_settings(options)
    fields = _template_fields(options)
    parts, input_format = expand_inputs(inputs, log)
    if options["output"] == PIPE:
        output = to_stdout(input_format)
    else:
        output = output_to(options["output"] or _default_output(parts[0].path, input_format))
    source = open_source(parts, input_format, noted=noted)
    prompt = _prompt(options, fields, source, log)
    own = [*_param_columns(options, source, sampling, log), *_argument_columns(prompt, source, log)]
    n, keep = options["best_of"] or options["n"], options["n"] if options["best_of"] else None
    prefix = options["output_prefix"]
    check_columns(source.column_names, options["token_ids"], n, keep, prefix)
    if not output.stdout:
        check_place(home, Path(output.path), [part.path for part in parts])
        OUTPUTS.check(Path(output.path), overwrite=options["overwrite"])
    model = _model(options, home, log)
    _check_chat_template(prompt, source, model)
    return JobSpec(
        inputs=tuple(InputFile.of(part.path, part.partition) for part in parts),
        input_format=input_format,
        prompt=prompt,
        model=model,
        sampling=sampling,
        seed=options["seed"],
        n=n,
        keep=keep,
        limit=options["limit"],
        output=replace(
            output, token_ids=options["token_ids"], prefix=prefix, overwrite=options["overwrite"]
        ),
        # Columns are noted for whoever looks at the job.
        runtime=RuntimeSpec(**{name: options[name] for name in _RUNTIME}, param_columns=tuple(own)),
    )


def sampling_settings(options: Mapping[str, Any]) -> SamplingSpec:
    """The sampling parameters that were given; what was not is the model's or batchrun's default.

    Raises:
        click.UsageError: A value is out of range.
    """
    given = {name: options[name] for name in _SAMPLING if options[name] is not None}
    given |= {name: options[name] for name in ("stop", "stop_token_ids") if options[name]}
    if options["ignore_eos"]:
        given["ignore_eos"] = True
    if not -(2**63) <= options["seed"] < 2**63:
        raise click.UsageError(f"--seed {options['seed']} does not fit into 64 bits")
    best_of = options["best_of"]
    if best_of is not None and best_of < options["n"]:
        raise click.UsageError(f"--best-of {best_of} is less than --n {options['n']}")
    if best_of is not None and best_of > 1 and options["temperature"] == 0:
        raise click.UsageError("--best-of with --temperature 0: all samples would be the same")
    given |= _beam_settings(options)
    if "" in options["stop"]:
        raise click.UsageError("--stop must not be empty")
    try:
        SamplingParams(**given)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise click.UsageError(f"--{name.replace('_', '-')} {rest}") from error
    return SamplingSpec(**given)


def _beam_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """What beam search adds: the model may ask for sampling, which it does not do."""
    beams = (options["num_beams"] or 1) > 1
    for name in ("length_penalty", "early_stopping"):
        if options[name] is not None and not beams:
            flag = name.replace("_", "-")
            raise click.UsageError(f"--{flag} is of beam search: add --num-beams")
    if not beams:
        return {}
    for name, value in (("best-of", options["best_of"]), ("n", options["n"])):
        if value is not None and value > 1:
            raise click.UsageError(
                f"--num-beams with --{name}: beam search has one answer for each row"
            )
    if options["temperature"]:
        raise click.UsageError("--num-beams with --temperature: beam search does not sample")
    if options["stop"]:
        raise click.UsageError("--num-beams with --stop: use --stop-token-id, or cut the text")
    early = options["early_stopping"]
    return {
        "temperature": 0.0,
        **({} if early is None else {"early_stopping": _EARLY_STOPPING[early]}),
    }


def output_to(path: str) -> OutputSpec:
    """Where the output goes and in which format, which the name's suffix says.

    Raises:
        OutputError: The suffix says nothing.
    """
    destination = Path(path).expanduser().absolute()
    return OutputSpec(str(destination), output_format(destination))


def _default_output(first: Path, input_format: str) -> str:
    name = first.name.removeprefix(".stdin-")
    stem = "stdin" if name != first.name else name.split(".")[0]
    return f"{stem}-completions{FORMATS[input_format].output_suffix(first)}"


def to_stdout(input_format: str) -> OutputSpec:
    """Settings of an output that lies in the job's folder until it is handed out."""
    kind = FORMATS[FORMATS[input_format].stdout]
    return OutputSpec(f"output{kind.suffixes[0]}", kind.name, stdout=True)


def _template_fields(options: Mapping[str, Any]) -> list[str] | None:
    template = options["template"]
    if template is None:
        return None
    if options["prompt_column"] is not None:
        raise click.UsageError("--template and --prompt-column exclude each other")
    try:
        return Template(template).columns
    except ValueError as error:
        raise click.UsageError(f"--template: {error}") from error


def _prompt(
    options: Mapping[str, Any],
    fields: Sequence[str] | None,
    source: Source,
    log: Callable[[str], None],
) -> PromptSpec:
    """How a row becomes a prompt. A `messages` column is used where there is no `prompt`."""

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
            raise _missing(name, names, in_template=fields is not None)
    column = None if fields is not None else needed(names)[0]
    if source.typed and column is not None:
        check_prompt_type(source.schema().field(column))
    args = _template_args(options["template_args"])
    asked = {name: options[name] for name in _PROMPT}
    prompt = PromptSpec(column, **asked, template_args=args)
    if args and are_chats(prompt, source) is False:
        raise click.UsageError("--template-arg without a chat: add --chat")
    return prompt


def _template_args(given: Sequence[str]) -> dict[str, Any]:
    """What `--template-arg NAME=VALUE` says: JSON where it is any, else text."""
    args: dict[str, Any] = {}
    for pair in given:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise click.UsageError(f"--template-arg {pair}: write NAME=VALUE")
        if name in RESERVED:
            raise click.UsageError(f"--template-arg {name}: batchrun sets {name} itself")
        if name in args:
            raise click.UsageError(f"--template-arg {name} is there twice")
        try:
            args[name] = json.loads(text)
            json.dumps(args[name], allow_nan=False)
        except (ValueError, RecursionError):
            args[name] = text
    return args


def _missing(name: str, names: Sequence[str], *, in_template: bool) -> InputError:
    error = missing_column(" ".join(name.split()) if "\n" in name else name, names)
    if in_template and looks_like_json(name):
        doubled = "braces that are no column's are doubled: {{ and }}"
        error.hint = f"{error.hint} {doubled}" if error.hint else doubled
    elif error.hint is None and not in_template:
        error.hint = f"say which one holds the prompts: --prompt-column {shlex.quote(names[0])}"
    return error


def _param_columns(
    options: Mapping[str, Any],
    source: Source,
    sampling: SamplingSpec,
    log: Callable[[str], None],
) -> list[str]:
    """The columns that act as sampling parameters, which `log` is told."""
    if options["ignore_param_columns"]:
        return []
    found = param_columns(source, sampling.given, options["limit"])
    if found:
        log(parameters_taken(found))
    return found


def _argument_columns(prompt: PromptSpec, source: Source, log: Callable[[str], None]) -> list[str]:
    """The columns that are known to speak to the chat template, which `log` is told."""
    found = [name for name in argument_columns(prompt, source) if name in source.column_names]
    if not found or not are_chats(prompt, source):
        return []
    check_argument_types(found, source)
    log(arguments_taken(found))
    return found


def _check_chat_template(prompt: PromptSpec, source: Source, model: ModelSpec) -> None:
    """Refuse chats for a model that is known to have no template for them, or another one.

    Raises:
        ModelError: It has none, or one that does not read what the job says to it. What only
            loading the tokenizer would tell is left to the run.
    """
    folder, code = Path(model.path), model.trust_remote_code
    if are_chats(prompt, source) and not code and lacks_chat_template(folder):
        raise no_chat_template(model.name)
    args = prompt.template_args
    if args and not code and (sources := chat_templates(folder)):
        from batchrun.prompts.chat_source import (  # noqa: PLC0415 - Jinja, seldom
            check_template_args,
        )

        check_template_args(args, sources, model.name)


def _model(options: Mapping[str, Any], home: Path, log: Callable[[str], None]) -> ModelSpec:
    if options["device"].startswith("cuda"):
        from batchrun.engine.settings import choose_device  # noqa: PLC0415 - imports torch

        choose_device(options["device"])
    trusted = options["trust_remote_code"]
    ref = resolve(options["model"], home / "models", trust_remote_code=trusted, log=log)
    return ModelSpec(
        name=ref.name,
        path=str(ref.path),
        fingerprint=ref.fingerprint,
        dtype=options["dtype"],
        quantize=options["quantize"],
        trust_remote_code=trusted,
        max_model_len=options["max_model_len"],
    )
