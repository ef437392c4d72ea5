"""The parts of a job's specification: each field declares its option, with default and help.

A default means that the user did not set the option.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from batchrun.jobs import kinds
from batchrun.jobs.kinds import NUMBER, Choice, Integer, RowRule, number, one_of, option, whole

MOST_SEQUENCES = 1 << 20  # with more, the state kept for each would fill a machine's memory
_COUNT = Integer(1)


@dataclass(frozen=True)
class ModelSpec:
    """Which model computes the answers.

    Args:
        name: What the user called it.
        path: Its folder.
        fingerprint: Digest of its content.
    """

    SECTION: ClassVar = kinds.MODEL

    name: str = option(
        "Alias, folder, .gguf file or hub id.",
        name="model",
        short="-m",
        default="smollm2-135m-instruct",
    )
    path: str = ""
    fingerprint: str = ""
    dtype: str = option(
        "Type of weights and KV cache. auto: the model's own on a GPU; on a CPU bfloat16 "
        "where it has instructions for it, else float32.",
        one_of("auto", "float32", "bfloat16", "float16"),
        "auto",
    )
    quantize: str | None = option(
        "Weights of 8 bits: half the memory; answers differ a little from the model's own.",
        one_of("int8"),
    )
    max_model_len: int | None = option(
        "Prompt and completion together at most; default: the model's context length.",
        _COUNT,
        metavar="TOKENS",
    )
    trust_remote_code: bool = option(
        "Run Python code that comes with the model. Read it first.", default=False
    )


@dataclass(frozen=True)
class PromptSpec:
    """How a row becomes a prompt. `column` is None if a template makes it."""

    SECTION: ClassVar = kinds.PROMPT

    column: str | None = option(
        "Column to read; default: prompt, else messages or conversations.",
        name="prompt_column",
        metavar="NAME",
    )
    template: str | None = option(
        "Build the prompt from columns: 'Summarise: {text}'. Any column's name can stand in "
        "the braces; {{ and }} are literal ones.",
        metavar="TEXT",
    )
    chat: bool = option("Send the prompt as a user message, in the chat template.", default=False)
    system: str | None = option("System message to put before it; implies --chat.", metavar="TEXT")
    template_args: Mapping[str, Any] = option(
        "Tell the model's chat template, such as enable_thinking=false; what a row has in a "
        "column chat_template_kwargs wins. Repeatable.",
        kinds.NAMED,
        {},
        flag="--template-arg",
    )
    special_tokens_in_data: bool = option(
        "What reads like a control token (<|im_end|>, </s>) in columns of a chat or a "
        "--template is one; else it is text. In a plain prompt it always is one.",
        default=False,
    )
    skip_empty: bool = option(
        "Leave out rows without a prompt; they are no errors, and have no completion.",
        default=False,
    )
    ignore_param_columns: bool = option(
        "A column named like a sampling parameter (temperature, seed, stop, ...), tools or "
        "chat_template_kwargs is data.",
        default=False,
    )


@dataclass(frozen=True)
class SamplingSpec:
    """Sampling parameters as the user gave them; the rest default to the model's, or batchrun's.

    Their meaning is that of `batchrun.engine.core.SamplingParams`.
    """

    SECTION: ClassVar = kinds.SAMPLING

    max_tokens: int | None = whole("At most so many new tokens.", "at least 1", 1)
    min_tokens: int | None = whole("Do not stop before so many.", "0 or more")
    temperature: float | None = number(
        "0 takes the likeliest token always.", "0 or more, and at most 5", lambda v: 0 <= v <= 5
    )
    top_p: float | None = number(
        "Draw from the likeliest with sum X.", "above 0 and at most 1", lambda v: 0 < v <= 1
    )
    top_k: int | None = whole("Draw from the N likeliest; 0 is off.", "0 (off) or more", 0, 1 << 31)
    min_p: float | None = number(
        "Drop what is less likely than X times the top.", "between 0 and 1", lambda v: 0 <= v <= 1
    )
    repetition_penalty: float | None = number(
        "Above 1 discourages repeating.", "above 0 (0.000001 to 1000000)", lambda v: 1e-6 < v < 1e6
    )
    presence_penalty: float | None = number("Subtracted once for a used token.")
    frequency_penalty: float | None = number("Subtracted for each use of it.")
    stop: tuple[str, ...] = option(
        "Stop before this text. Repeatable.",
        default=(),
        several=True,
        metavar="TEXT",
        row=RowRule("text, or a list of texts"),
    )
    stop_token_ids: tuple[int, ...] = option(
        "Stop at this token. Repeatable.",
        Integer(0),
        (),
        several=True,
        flag="--stop-token-id",
        metavar="ID",
        row=RowRule(
            "a list of whole numbers, 0 or more", lambda ids: all(0 <= i < 1 << 31 for i in ids)
        ),
    )
    ignore_eos: bool = option(
        "Never choose the model's end tokens.", default=False, row=RowRule("true or false")
    )
    logprobs: int | None = option(
        "Add the log-probability of each token, and of the N likeliest in its place.", Integer(0)
    )
    num_beams: int | None = option(
        "Search the likeliest answer among N at once, instead of sampling (beam search).", _COUNT
    )
    length_penalty: float | None = option(
        "Of beams: above 1 favours long answers, below 1 short ones; default: 1.", NUMBER
    )
    early_stopping: bool | Literal["never"] | None = option(
        "Of beams: yes ends with the first N answers, never only when none can be better; "
        "default: no, when none is likely to be.",
        Choice({"no": False, "yes": True, "never": "never"}),
    )

    @property
    def given(self) -> dict[str, Any]:
        """What the user gave, by name."""
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        return {name: value for name, value, default in values if value != default}


@dataclass(frozen=True)
class OutputSpec:
    """Where the answers go.

    Args:
        format: `parquet`, `jsonl` or `csv`.
        stdout: The file is in the job's folder, and is copied to stdout at the end.
    """

    SECTION: ClassVar = kinds.OUTPUT

    path: str = option(
        "A .parquet, .jsonl, .csv or .tsv file, or - for stdout; default: "
        "INPUT-completions, in the input's format, in this folder.",
        default="",
        name="output",
        short="-o",
        metavar="FILE",
    )
    format: str = ""
    prefix: str = option(
        "Put before the names of added columns: judge_ makes judge_completion, and so on.",
        default="",
        name="output_prefix",
        metavar="TEXT",
    )
    overwrite: bool = option("Replace the output file if it exists.", default=False)
    token_ids: bool = option("Add the column completion_token_ids.", default=False)
    stdout: bool = False


@dataclass(frozen=True)
class RuntimeSpec:
    """How a job runs, which never changes an answer. None leaves the choice to the device.

    Args:
        param_columns: Columns with rows' own parameters, as announced at submission.
    """

    SECTION: ClassVar = kinds.RUNNING

    device: str = option(
        "Where to compute. auto: the first GPU if there is one that can be used.",
        kinds.DEVICE,
        "auto",
        section=kinds.MODEL,
    )
    attention: str = option(
        "Attention kernel; `batchrun doctor` says which work here.",
        default="auto",
        section=kinds.MODEL,
    )
    max_num_seqs: int | None = option(
        "Rows that generate at the same time at most.", Integer(1, MOST_SEQUENCES), anew=True
    )
    max_num_batched_tokens: int | None = option(
        "Tokens computed in one step at most; longer prompts are cut into chunks.",
        _COUNT,
        anew=True,
    )
    kv_budget: int | None = option("KV memory at most, like 256MiB.", kinds.size(), anew=True)
    page_size: int | None = option("Physical page of the KV memory.", kinds.size(mmap.PAGESIZE))
    layers_per_slab: int | None = option("Layers that share a KV slab; default: all.", _COUNT)
    share_prefixes: bool = option(
        "Compute and hold once what prompts begin with alike.", default=True
    )
    drafts: bool = option(
        "On a CPU in bfloat16: propose tokens from a row's own text, and check many in one step.",
        default=True,
    )
    overlap: bool = option("On a GPU: plan, map and copy while it computes.", default=True)
    graphs: bool = option("On a GPU: record steps as CUDA graphs.", default=True)
    optimize: bool = option("Fuse the model's modules, and on a GPU compile them.", default=True)
    plan: bool = option(
        "Compute equal rows once, rows that begin alike together, long ones early.", default=True
    )
    param_columns: tuple[str, ...] = ()
