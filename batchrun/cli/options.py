"""The options of `submit`, in the sections that its help shows, and their types."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from batchrun.engine import attention

Command = TypeVar("Command", bound=Callable[..., Any])

_RUNNING = "Running (these never change an answer)"
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MOST_SEQUENCES = 1 << 20  # what is kept of each, even unused, would fill a machine's memory


class Size(click.ParamType[int]):
    """Bytes above 0, with an optional binary unit: `256MiB`, `2G`, `1048576`.

    Args:
        multiple_of: Other sizes are refused.
    """

    name = "size"

    def __init__(self, multiple_of: int = 1) -> None:
        self._multiple_of = multiple_of

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Text to bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", value.strip(), re.IGNORECASE)
        if found is None:
            self.fail(f"{value!r} is no size; write for example 256MiB or 2GiB", param, ctx)
        size = int(float(found[1]) * _SIZES[found[2].upper()])
        if size <= 0 or size % self._multiple_of:
            self.fail(f"{value!r} is no positive multiple of {self._multiple_of} bytes", param, ctx)
        return size


class Device(click.ParamType[str]):
    """A device by its name; whether it is there is found out when it is used."""

    name = "device"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Refuses what is no name of a device."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            self.fail(f"{value!r} is no device; there are auto, cpu, cuda and cuda:N", param, ctx)
        return str(value)


class SectionOption(click.Option):
    """An option that knows the section of the help text it belongs to."""

    def __init__(self, *args: Any, section: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionCommand(click.Command):
    """A command whose help lists its options section by section."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one list for each section, in order of first appearance."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _section(
    title: str, *options: tuple[tuple[str, ...], dict[str, Any]]
) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for names, settings in reversed(options):
            command = click.option(*names, cls=SectionOption, section=title, **settings)(command)
        return command

    return decorate


def _option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


model_options = _section(
    "Model",
    _option(
        "--model",
        "-m",
        default="smollm2-135m-instruct",
        show_default=True,
        help="Alias, folder, .gguf file or hub id.",
    ),
    _option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Type of weights and KV cache. auto: the model's own on a GPU; on a CPU bfloat16 "
        "where it has instructions for it, else float32.",
    ),
    _option(
        "--quantize",
        type=click.Choice(["int8"]),
        help="Weights of 8 bits: half the memory; answers differ a little from the model's own.",
    ),
    _option(
        "--device",
        type=Device(),
        metavar="auto|cpu|cuda|cuda:N",
        default="auto",
        show_default=True,
        help="Where to compute. auto: the first GPU if there is one that can be used.",
    ),
    _option(
        "--attention",
        type=click.Choice(["auto", *attention.NAMES]),
        default="auto",
        show_default=True,
        help="Attention kernel; `batchrun doctor` says which work here.",
    ),
    _option(
        "--max-model-len",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Prompt and completion together at most; default: the model's context length.",
    ),
    _option(
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code that comes with the model. Read it first.",
    ),
)

prompt_options = _section(
    "Prompt",
    _option(
        "--prompt-column",
        metavar="NAME",
        help="Column to read; default: prompt, else messages or conversations.",
    ),
    _option(
        "--template",
        metavar="TEXT",
        help="Build the prompt from columns: 'Summarise: {text}'. Any column's name can stand in "
        "the braces; {{ and }} are literal ones.",
    ),
    _option(
        "--chat", is_flag=True, help="Send the prompt as a user message, in the chat template."
    ),
    _option("--system", metavar="TEXT", help="System message to put before it; implies --chat."),
    _option(
        "--template-arg",
        "template_args",
        multiple=True,
        metavar="NAME=VALUE",
        help="Tell the model's chat template, such as enable_thinking=false; what a row has in a "
        "column chat_template_kwargs wins. Repeatable.",
    ),
    _option(
        "--special-tokens-in-data",
        is_flag=True,
        help="What reads like a control token (<|im_end|>, </s>) in columns of a chat or a "
        "--template is one; else it is text. In a plain prompt it always is one.",
    ),
    _option(
        "--skip-empty",
        is_flag=True,
        help="Leave out rows without a prompt; they are no errors, and have no completion.",
    ),
    _option("--limit", type=click.IntRange(min=1), metavar="ROWS", help="Only the first rows."),
    _option(
        "--ignore-param-columns",
        is_flag=True,
        help="A column named like a sampling parameter (temperature, seed, stop, ...), tools or "
        "chat_template_kwargs is data.",
    ),
)

sampling_options = _section(
    "Sampling (defaults: the model's generation config; a column of the same name wins in its row)",
    _option("--max-tokens", type=int, metavar="N", help="At most so many new tokens."),
    _option("--min-tokens", type=int, metavar="N", help="Do not stop before so many."),
    _option("--temperature", type=float, metavar="X", help="0 takes the likeliest token always."),
    _option("--top-p", type=float, metavar="X", help="Draw from the likeliest with sum X."),
    _option("--top-k", type=int, metavar="N", help="Draw from the N likeliest; 0 is off."),
    _option(
        "--min-p", type=float, metavar="X", help="Drop what is less likely than X times the top."
    ),
    _option("--repetition-penalty", type=float, metavar="X", help="Above 1 discourages repeating."),
    _option(
        "--presence-penalty", type=float, metavar="X", help="Subtracted once for a used token."
    ),
    _option("--frequency-penalty", type=float, metavar="X", help="Subtracted for each use of it."),
    _option("--stop", multiple=True, metavar="TEXT", help="Stop before this text. Repeatable."),
    _option(
        "--stop-token-id",
        "stop_token_ids",
        type=click.IntRange(min=0),
        multiple=True,
        metavar="ID",
        help="Stop at this token. Repeatable.",
    ),
    _option("--ignore-eos", is_flag=True, help="Never choose the model's end tokens."),
    _option(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        show_default=True,
        help="Same seed, same answers.",
    ),
    _option(
        "--n",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Samples for each row.",
    ),
    _option(
        "--best-of",
        type=click.IntRange(min=1),
        metavar="N",
        help="Draw N samples and keep the --n likeliest, by mean log-probability of their tokens.",
    ),
    _option(
        "--num-beams",
        type=click.IntRange(min=1),
        metavar="N",
        help="Search the likeliest answer among N at once, instead of sampling (beam search).",
    ),
    _option(
        "--length-penalty",
        type=float,
        metavar="X",
        help="Of beams: above 1 favours long answers, below 1 short ones; default: 1.",
    ),
    _option(
        "--early-stopping",
        type=click.Choice(["no", "yes", "never"]),
        help="Of beams: yes ends with the first N answers, never only when none can be better; "
        "default: no, when none is likely to be.",
    ),
)

output_options = _section(
    "Output",
    _option(
        "--output",
        "-o",
        metavar="FILE",
        help="A .parquet, .jsonl, .csv or .tsv file, or - for stdout; default: "
        "INPUT-completions, in the input's format, in this folder.",
    ),
    _option(
        "--output-prefix",
        metavar="TEXT",
        default="",
        help="Put before the names of added columns: judge_ makes judge_completion, and so on.",
    ),
    _option("--overwrite", is_flag=True, help="Replace the output file if it exists."),
    _option("--token-ids", is_flag=True, help="Add the column completion_token_ids."),
)

_LIMITS = (
    _option(
        "--max-num-seqs",
        type=click.IntRange(min=1, max=_MOST_SEQUENCES),
        metavar="N",
        help="Rows that generate at the same time at most.",
    ),
    _option(
        "--max-num-batched-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens computed in one step at most; longer prompts are cut into chunks.",
    ),
    _option("--kv-budget", type=Size(), metavar="SIZE", help="KV memory at most, like 256MiB."),
)
limit_options = _section(_RUNNING, *_LIMITS)  # which a job may be told anew

runtime_options = _section(
    _RUNNING,
    *_LIMITS,
    _option(
        "--page-size",
        type=Size(mmap.PAGESIZE),
        metavar="SIZE",
        help="Physical page of the KV memory.",
    ),
    _option(
        "--layers-per-slab",
        type=click.IntRange(min=1),
        metavar="N",
        help="Layers that share a KV slab; default: all.",
    ),
    _option(
        "--share-prefixes/--no-share-prefixes",
        default=True,
        show_default=True,
        help="Compute and hold once what prompts begin with alike.",
    ),
    _option(
        "--drafts/--no-drafts",
        default=True,
        show_default=True,
        help="On a CPU in bfloat16: guess tokens from a row's own text, and check many at once.",
    ),
    _option(
        "--overlap/--no-overlap",
        default=True,
        show_default=True,
        help="On a GPU: plan, map and copy while it computes.",
    ),
    _option(
        "--graphs/--no-graphs",
        default=True,
        show_default=True,
        help="On a GPU: record steps as CUDA graphs.",
    ),
    _option(
        "--optimize/--no-optimize",
        default=True,
        show_default=True,
        help="Fuse the model's modules, and on a GPU compile them.",
    ),
    _option(
        "--plan/--no-plan",
        default=True,
        show_default=True,
        help="Compute equal rows once, rows that begin alike together, long ones early.",
    ),
)

submit_options = _section(
    _RUNNING,
    _option(
        "--wait/--detach",
        default=True,
        show_default=True,
        help="Watch until the job ends, and exit as it did; or return at once with the job's id.",
    ),
    _option("--again", is_flag=True, help="Begin anew though the same work can be resumed."),
    _option(
        "--dry-run",
        is_flag=True,
        help="Check everything but the weights, try the first 20 rows, show the job, start "
        "nothing. It fails where the run would, or where none of these rows makes a prompt.",
    ),
    _option("--json", "as_json", is_flag=True, help="Print the outcome as JSON."),
)
