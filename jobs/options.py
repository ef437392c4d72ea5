"""The parts of a job's specification: each field declares its option, with default and help.

A default means that the user did not set the option. How a job runs is in `batchrun.jobs.runtime`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from batchrun.jobs import kinds, shapes
from batchrun.jobs.kinds import NUMBER, Choice, Integer, RowRule, number, one_of, option, whole

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
        "Model to run: alias, folder, .gguf file, URL of either in an object store, or id on the "
        "Hugging Face hub.",
        name="model",
        short="-m",
        default="smollm2-135m-instruct",
    )
    path: str = ""
    fingerprint: str = ""
    dtype: str = option(
        "Data type of weights and KV cache. auto: the model's own on a GPU; on a CPU, bfloat16 if "
        "the CPU has instructions for it, else float32.",
        one_of("auto", "float32", "bfloat16", "float16"),
        "auto",
    )
    quantize: str | None = option(
        "Quantize the weights to 8 bits: half the memory, slightly different answers.",
        one_of("int8"),
        without="none",
    )
    max_model_len: int | None = option(
        "Maximum context length: tokens of prompt and completion together.",
        _COUNT,
        metavar="TOKENS",
        without="the model's",
    )
    trust_remote_code: bool = option(
        "Allow Python code that comes with the model to run here. Read it first.", default=False
    )


@dataclass(frozen=True)
class PromptSpec:
    """How a row becomes a prompt. `column` is None if a template makes it."""

    SECTION: ClassVar = kinds.PROMPT

    column: str | None = option(
        "Column that holds the prompts (text) or chats (lists of messages).",
        name="prompt_column",
        metavar="NAME",
        without="prompt, else messages or conversations",
    )
    template: str | None = option(
        "Prompt template, such as 'Summarise: {text}': {column} is replaced by the row's value. "
        "Write literal braces twice: {{ and }}. @FILE reads the template from a file.",
        kinds.TEXT_OR_FILE,
    )
    chat: bool = option(
        "Wrap each prompt as a user message in the model's chat template.", default=False
    )
    system: str | None = option(
        "System message of every chat; implies --chat. @FILE reads it from a file.",
        kinds.TEXT_OR_FILE,
    )
    template_args: Mapping[str, Any] = option(
        "Pass a variable to the model's chat template, such as enable_thinking=false. Can be "
        "repeated. A row's column chat_template_kwargs takes precedence.",
        kinds.NAMED,
        {},
        flag="--template-arg",
    )
    special_tokens_in_data: bool = option(
        "Encode text in chats and template values that looks like a control token (<|im_end|>, "
        "</s>) as that token instead of as text. Plain prompts always do.",
        default=False,
    )
    skip_empty: bool = option(
        "Skip rows whose prompt is null or empty, instead of failing them.",
        default=False,
    )
    ignore_param_columns: bool = option(
        "Do not read sampling parameters, tools or chat_template_kwargs from columns of these "
        "names; treat them as data.",
        default=False,
    )


@dataclass(frozen=True)
class SamplingSpec:
    """Sampling parameters as the user gave them; the rest default to the model's, or batchrun's.

    Their meaning is that of `batchrun.engine.core.SamplingParams`.
    """

    SECTION: ClassVar = kinds.SAMPLING

    max_tokens: int | None = whole(
        "Maximum number of new tokens.",
        "at least 1, or 0 with scores",
        without="the model's, else 512; 0 with --score, --labels or --perplexity",
    )
    min_tokens: int | None = whole(
        "Minimum number of new tokens.", "0 or more", without="the model's, else 0"
    )
    temperature: float | None = number(
        "Sampling temperature; 0 is greedy decoding.",
        "between 0 and 5",
        lambda v: 0 <= v <= 5,
        without="the model's, else 0",
    )
    top_p: float | None = number(
        "Nucleus sampling: the smallest set of tokens with total probability X.",
        "above 0 and at most 1",
        lambda v: 0 < v <= 1,
        without="the model's, else 1",
    )
    top_k: int | None = whole(
        "Sample from the N most probable tokens; 0 is all.",
        "0 (off) or more",
        *(0, 1 << 31),
        without="the model's, else 0",
    )
    min_p: float | None = number(
        "Exclude tokens less probable than X times the most probable one.",
        "between 0 and 1",
        lambda v: 0 <= v <= 1,
        without="the model's, else 0",
    )
    repetition_penalty: float | None = number(
        "Penalty for tokens already in the prompt or the answer; above 1 discourages repetition.",
        "above 0 (0.000001 to 1000000)",
        lambda v: 1e-6 < v < 1e6,
        without="the model's, else 1",
    )
    presence_penalty: float | None = number(
        "Subtracted from the logit of each token already in the answer.", without="0"
    )
    frequency_penalty: float | None = number(
        "Subtracted from a token's logit for each occurrence in the answer.", without="0"
    )
    stop: tuple[str, ...] = option(
        "Stop string; the answer ends before it. Can be repeated.",
        default=(),
        several=True,
        metavar="TEXT",
        row=RowRule("text, or a list of texts"),
    )
    stop_token_ids: tuple[int, ...] = option(
        "Token that ends the answer, besides the model's end tokens. Can be repeated.",
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
        "Never generate the model's end tokens.", default=False, row=RowRule("true or false")
    )
    logprobs: int | None = option(
        "Add the log-probability of each token, and those of the N most probable tokens at its "
        "position.",
        Integer(0),
    )
    num_beams: int | None = option(
        "Beam search with N beams, instead of sampling.", _COUNT, without="1"
    )
    length_penalty: float | None = option(
        "Beam search: above 1 favours long answers, below 1 short ones.",
        NUMBER,
        without="the model's, else 1",
    )
    early_stopping: bool | Literal["never"] | None = option(
        "Beam search: when to end. yes: once N answers are complete; no: once a better one is "
        "unlikely; never: once a better one is impossible.",
        Choice({"no": False, "yes": True, "never": "never"}),
        without="the model's, else no",
    )
    json_schema: str | None = option(
        "JSON that conforms to this schema. Adds the column parsed, with the schema's types.",
        shapes.SCHEMA,
        section=kinds.SHAPE,
        row=RowRule("a JSON schema: an object"),
    )
    json_object: bool = option("Any JSON object.", default=False, section=kinds.SHAPE)
    regex: str | None = option(
        "Text that matches this regular expression from beginning to end (Rust's syntax).",
        shapes.REGEX,
        section=kinds.SHAPE,
        row=RowRule("a regular expression"),
    )
    choices: tuple[str, ...] | None = option(
        "One of these texts, separated by commas, or a JSON array of texts. Adds the column "
        "parsed, with the choices as categories.",
        shapes.CHOICES,
        section=kinds.SHAPE,
        row=RowRule("a list of texts"),
    )
    choice_logprob: bool = option(
        "With --choices: add the column choice_logprob, the log-probability of the choice, before "
        "the constraint.",
        default=False,
        section=kinds.SHAPE,
    )
    grammar: str | None = option(
        "Text that this grammar generates (Lark's notation, as in llguidance).",
        shapes.GRAMMAR,
        section=kinds.SHAPE,
    )
    score: str | None = option(
        "Log-probabilities of this column's text as a continuation of the prompt. Adds the columns "
        "score_logprobs, score_sum, score_mean and score_tokens.",
        section=kinds.SCORES,
        metavar="COLUMN",
    )
    labels: tuple[str, ...] | None = option(
        "Probability of the first token of each label after the prompt. Labels are separated by "
        "commas, or a JSON array of texts. Adds the column label_probs, which is not normalised "
        "over the labels.",
        shapes.LABELS,
        section=kinds.SCORES,
    )
    perplexity: bool = option(
        "Add the column perplexity: of the text of --score, else of the prompt without its first "
        "token.",
        default=False,
        section=kinds.SCORES,
    )

    @property
    def scores(self) -> bool:
        """Whether known text is scored."""
        return bool(self.score is not None or self.labels or self.perplexity)

    @property
    def given(self) -> dict[str, Any]:
        """The sampling parameters that the user gave, by name; with scores, also their defaults.

        With scores nothing is generated, unless that is asked for by a length or a shape.
        """
        said = [f for f in fields(self) if getattr(self, f.name) != f.default]
        sections = {f.name: f.metadata["option"].section for f in said}
        columns = [n for n, section in sections.items() if section == kinds.SCORES]
        found = {f.name: getattr(self, f.name) for f in said if f.name not in columns}
        found.pop("choice_logprob", None)  # it only adds a column
        if self.scores:
            found["scoring"] = True
            if kinds.SHAPE not in sections.values():
                found.setdefault("max_tokens", 0)
        return found


@dataclass(frozen=True)
class OutputSpec:
    """Where the answers go.

    Args:
        format: `parquet`, `jsonl` or `csv`.
        stdout: The file is in the job's folder, and is copied to stdout at the end.
    """

    SECTION: ClassVar = kinds.OUTPUT

    path: str = option(
        "Output file (.parquet, .jsonl, .csv or .tsv), or - for stdout.",
        default="",
        name="output",
        short="-o",
        metavar="FILE",
        without="INPUT-completions in the current folder, in the input's format",
    )
    format: str = ""
    prefix: str = option(
        "Prefix for the names of added columns: judge_ makes judge_completion, for example.",
        default="",
        name="output_prefix",
        metavar="TEXT",
    )
    overwrite: bool = option("Replace the output file if it exists.", default=False)
    token_ids: bool = option("Add the column completion_token_ids.", default=False)
    stdout: bool = False
