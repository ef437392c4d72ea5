"""What a model's own files say about generation: end tokens, defaults, logits processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec

from transformers import PreTrainedModel

from batchrun.engine.core import SamplingParams
from batchrun.engine.logits import LogitsConfig
from batchrun.prompts.messages import PromptError

Ids = tuple[int, ...]

_LENGTH = 20  # transformers' default for `max_length`, which nobody chose
# A config's names of sampling parameters: those that differ from ours, and those that don't.
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_NAMED = ("repetition_penalty", "length_penalty", "early_stopping")
# Those that apply only when sampling (`do_sample`), and the logits filters.
_DRAWN = ("temperature", "top_k", "top_p", "min_p")
_FILTERS = {"epsilon_cutoff": "epsilon", "eta_cutoff": "eta"}
_FILTERS |= {name: name for name in ("top_h", "typical_p")}
# Settings that `generate` honours and batchrun does not, by the value that turns them off.
_UNDONE = {
    1: "num_beams num_return_sequences num_beam_groups guidance_scale encoder_repetition_penalty",
    0: "diversity_penalty penalty_alpha encoder_no_repeat_ngram_size token_healing",
    None: "watermarking_config constraints force_words_ids dola_layers max_time",
}


@dataclass(frozen=True)
class Generation:
    """How a model asks to be sampled unless the job or a row says otherwise.

    Args:
        sampling: Values of `SamplingParams`, by name.
        stop: The model's own stop strings, added to those of job and row.
        max_length: Maximum tokens of prompt and answer together, unless `max_tokens` is given.
        min_length: The minimum, likewise.
        specials: Special tokens, which completions do not show, by their text.
        logits: What is done to logits beyond the sampling parameters.
        ignored: Settings of the model that batchrun ignores, as `name=value`.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    max_length: int | None = None
    min_length: int | None = None
    specials: Mapping[str, int] = field(default_factory=dict)
    logits: LogitsConfig = field(default_factory=LogitsConfig)
    ignored: tuple[str, ...] = ()

    def params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The sampling parameters of a row.

        Args:
            given: The job's values, overridden by the row's. With a constraint, which says where
                the answer ends, the model's own stop strings don't count.

        Raises:
            ValueError: A value is out of range, or two values exclude each other.
        """
        values = {**self.sampling, **given}
        if "min_tokens" not in given and "min_tokens" in values:
            most = values.get("max_tokens", SamplingParams().max_tokens)
            values["min_tokens"] = min(values["min_tokens"], most)
        stop = tuple(values.get("stop", ()))
        if not (values.get("ignore_eos") or values.get("constraint")):
            stop += tuple(text for text in self.stop if text not in stop)
        if stop:
            # Text that is searched for stop strings has no special tokens: stop at their ids.
            special = (self.specials[text] for text in stop if text in self.specials)
            ids = dict.fromkeys((*values.get("stop_token_ids", ()), *special))
            values |= {"stop": stop, "stop_token_ids": tuple(ids)}
        return SamplingParams(**values)

    def fitted(
        self, params: SamplingParams, given: Mapping[str, Any], prompt_tokens: int
    ) -> SamplingParams:
        """The same parameters, with `max_length` and `min_length` applied.

        Raises:
            PromptError: The prompt leaves no room for an answer.
        """
        most, least = params.max_tokens, params.min_tokens
        if self.max_length is not None and "max_tokens" not in given:
            most = self.max_length - prompt_tokens
            if most < 1:
                raise PromptError(
                    "prompt_too_long",
                    f"the prompt has {prompt_tokens:,} tokens, and the model's generation config "
                    f"limits prompt and answer to max_length={self.max_length:,}; --max-tokens "
                    "overrides that",
                )
        if self.min_length is not None and "min_tokens" not in given:
            least = max(0, self.min_length - prompt_tokens)
        if "min_tokens" not in given:
            least = min(least, most)
        if (most, least) == (params.max_tokens, params.min_tokens):
            return params
        return replace(params, max_tokens=most, min_tokens=least)


def read_generation(model: PreTrainedModel, tokenizer: Any, max_model_len: int) -> Generation:
    """What a model's generation config asks for; plain greedy decoding if there is none.

    Args:
        model: The model; its weights may be on torch's meta device.
        tokenizer: Its tokenizer, or None.
        max_model_len: Maximum tokens of prompt and output together.
    """
    config, ends = model.generation_config, tuple(sorted(eos_ids(model, tokenizer)))
    found = {} if config is None else {k: v for k, v in config.to_dict().items() if v is not None}
    own, sampling, logits = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    params = _RENAMED | {name: name for name in _NAMED}
    of_logits = _logits_readers(vocabulary_size(model), ends)
    if found.get("do_sample"):
        found.setdefault("temperature", 1.0)
        params |= {name: name for name in _DRAWN}
        of_logits |= {name: (ours, _share) for name, ours in _FILTERS.items()}
    readers = {name: (sampling, ours, _param(ours)) for name, ours in params.items()}
    readers |= {name: (logits, ours, read) for name, (ours, read) in of_logits.items()}
    readers["stop_strings"] = (own, "stop", _strings)
    if "max_new_tokens" not in found and found.get("max_length") != _LENGTH:
        readers["max_length"] = (own, "max_length", _length)
    if "min_new_tokens" not in found:
        readers["min_length"] = (own, "min_length", _length)
    ignored = [
        f"{name}={found[name]}"
        for nothing, names in _UNDONE.items()
        for name in names.split()
        if found.get(name) not in (None, nothing)
    ]
    for name, (values, ours, read) in readers.items():
        if name in found:
            try:
                values[ours] = read(found[name])
            except (TypeError, ValueError, LookupError, OverflowError):
                ignored.append(f"{name}={found[name]}")
    return Generation(
        sampling=sampling,
        **own,
        specials=special_tokens(tokenizer),
        logits=LogitsConfig(ends, max_model_len, **logits),
        ignored=tuple(ignored),
    )


# --- readers of a config's values; for a bad value they raise an error that is caught above ---

Read = Callable[[Any], Any]


def _param(name: str) -> Read:
    def read(value: Any) -> Any:
        SamplingParams(**{"max_tokens": 1 << 62, name: value})
        return value

    return read


def _strings(value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list | tuple) or not all(isinstance(text, str) for text in listed):
        raise TypeError(value)
    return tuple(filter(None, listed))


def _length(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _share(value: Any) -> float:
    """A number from 0 to 1; 1 becomes 0, which keeps everything."""
    if not 0 <= float(value) <= 1:
        raise ValueError(value)
    return float(value) % 1


def _logits_readers(size: int, ends: Ids) -> dict[str, tuple[str, Read]]:
    """By a config's name: our name and the reader. Tokens outside the vocabulary are dropped."""

    def known(ids: Ids) -> bool:
        return bool(ids) and all(0 <= token < size for token in ids)

    def ids(value: Any) -> Ids:
        listed = [value] if isinstance(value, int) else value
        return tuple(dict.fromkeys(t for t in map(int, listed) if 0 <= t < size))

    def words(value: Any) -> tuple[Ids, ...]:
        found = dict.fromkeys(tuple(map(int, word)) for word in value)
        return tuple(w for w in found if known(w) and not (len(w) == 1 and w[0] in ends))

    def biases(value: Any) -> dict[Ids, float]:
        pairs = value.items() if isinstance(value, Mapping) else value
        found = {tuple(map(int, ids)): float(bias) for ids, bias in pairs}
        return {ids: bias for ids, bias in found.items() if known(ids)}

    return {
        "sequence_bias": ("sequence_bias", biases),
        "bad_words_ids": ("bad_words", words),
        "no_repeat_ngram_size": ("no_repeat_ngram_size", lambda v: max(0, int(v))),
        "forced_bos_token_id": ("forced_bos", lambda v: next(iter(ids(v)), None)),
        "forced_eos_token_id": ("forced_eos", ids),
        "remove_invalid_values": ("remove_invalid_values", bool),
        "exponential_decay_length_penalty": ("decay", lambda v: (int(v[0]), float(v[1]))),
        "suppress_tokens": ("suppress", ids),
        "begin_suppress_tokens": ("begin_suppress", ids),
        "renormalize_logits": ("renormalize", bool),
    }


# --- tokens ---


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The model's end tokens, from its generation config, its config and its tokenizer.

    A finetune may add an end token and record it in only one of them. A config that names none has
    its class's default, which can be any token: only special tokens of a config count.
    """

    def named(source: Any) -> set[int]:
        found = getattr(source, "eos_token_id", None)
        listed = found if isinstance(found, list | tuple) else [found]
        return {t for t in listed if isinstance(t, int) and not isinstance(t, bool)}

    config = named(model.config) | named(model.config.get_text_config())
    if tokenizer is not None:
        config &= set(special_tokens(tokenizer).values())
    found = named(model.generation_config) | config | named(tokenizer)
    return frozenset(t for t in found if 0 <= t < vocabulary_size(model))


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Special tokens, which completions do not show, by their text."""
    if tokenizer is None:
        return {}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {token.content: id_ for id_, token in added.items() if token.special}
    named = (getattr(tokenizer, f"all_special_{what}", ()) for what in ("tokens", "ids"))
    return found | dict(zip(*named, strict=False))


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the model's input embedding, which bound a prompt's token ids."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return int(rows or model.config.get_text_config().vocab_size)


P = ParamSpec("P")


def within_vocabulary(
    encode: Callable[P, Ids], tokenizer: Any, size: int, what: str = "prompt"
) -> Callable[P, Ids]:
    """Wrap `encode` to refuse tokens that the model has no embedding for.

    Tokens may have been added to a tokenizer but not to its model.

    Args:
        encode: Makes tokens of a row; like the result, it may raise `PromptError`.
        tokenizer: Names the token in the error.
        size: See `vocabulary_size`.
        what: Of which part of the row.
    """

    def checked(*args: P.args, **kwargs: P.kwargs) -> Ids:
        ids = encode(*args, **kwargs)
        if ids and (max(ids) >= size or min(ids) < 0):
            token = next(t for t in ids if not 0 <= t < size)
            raise PromptError(
                "unknown_token",
                f"the {what} has the token {tokenizer.convert_ids_to_tokens(token)!r} ({token}), "
                f"but the model's vocabulary has {size:,} tokens",
            )
        return ids

    return checked
