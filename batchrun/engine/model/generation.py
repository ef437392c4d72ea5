"""What a model's own files say about generating: end tokens, defaults, processors of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from batchrun.engine.core import SamplingParams
from batchrun.engine.logits import LogitsConfig
from batchrun.prompts.messages import PromptError

Ids = tuple[int, ...]

_LENGTH = 20  # transformers' own `max_length`, which nobody chose
# What `generate` would do and batchrun does not, with the values that mean nothing.
_UNDONE: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "watermarking_config": (),
    "constraints": (),
    "force_words_ids": (),
    "dola_layers": (),
    "token_healing": (False,),
    "max_time": (),
}


@dataclass(frozen=True)
class Generation:
    """How a model wants to be sampled where neither the job nor a row says.

    Args:
        sampling: Values of `SamplingParams`, by name.
        stop: The model's own stop strings: they end an answer beside those of job and row.
        max_length: Tokens of prompt and answer together, where no number of tokens is given.
        min_length: The same for the least.
        specials: Tokens that completions do not show, by their text.
        logits: What is done to logits beside what sampling parameters say.
        ignored: What the model asks for and does not get, as `name=value`.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    max_length: int | None = None
    min_length: int | None = None
    specials: Mapping[str, int] = field(default_factory=dict)
    logits: LogitsConfig = field(default_factory=LogitsConfig)
    ignored: tuple[str, ...] = ()

    def params(self, given: Mapping[str, Any]) -> SamplingParams:
        """The parameters of a row.

        Args:
            given: What the job says, and over it the row.

        Raises:
            ValueError: A value is out of range, or two of them can't be together.
        """
        values = {**self.sampling, **given}
        if "min_tokens" not in given and "min_tokens" in values:
            most = values.get("max_tokens", SamplingParams().max_tokens)
            values["min_tokens"] = min(values["min_tokens"], most)
        stop = tuple(values.get("stop", ()))
        if not values.get("ignore_eos"):
            stop += tuple(text for text in self.stop if text not in stop)
        if stop:
            # A special token is not part of the text in which stop strings are looked for.
            special = (self.specials[text] for text in stop if text in self.specials)
            ids = dict.fromkeys((*values.get("stop_token_ids", ()), *special))
            values |= {"stop": stop, "stop_token_ids": tuple(ids)}
        return SamplingParams(**values)

    def fitted(
        self, params: SamplingParams, given: Mapping[str, Any], prompt_tokens: int
    ) -> SamplingParams:
        """The same with the model's own lengths of prompt and answer together.

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
                    f"says max_length={self.max_length:,} with the answer; --max-tokens replaces "
                    "it",
                )
        if self.min_length is not None and "min_tokens" not in given:
            least = max(0, self.min_length - prompt_tokens)
        if "min_tokens" not in given:
            least = min(least, most)
        if (most, least) == (params.max_tokens, params.min_tokens):
            return params
        return replace(params, max_tokens=most, min_tokens=least)


def read_generation(model: PreTrainedModel, tokenizer: Any, max_model_len: int) -> Generation:
    """What a model's generation config asks for; greedy, and nothing more, if there is none.

    Args:
        model: The model; its weights may be on torch's meta device.
        tokenizer: Its tokenizer, or None.
        max_model_len: Tokens of prompt and output together at most.
    """
    config, ends = model.generation_config, tuple(sorted(eos_ids(model, tokenizer)))
    specials = special_tokens(tokenizer)
    if config is None:
        return Generation(specials=specials, logits=LogitsConfig(ends, max_model_len))
    found = {k: v for k, v in config.to_dict().items() if v is not None}
    values, ignored = _sampling(found)
    logits, refused = _logits(found, ends, max_model_len, vocabulary_size(model))
    ignored += refused
    ignored += [
        f"{name}={found[name]}"
        for name, nothing in _UNDONE.items()
        if name in found and found[name] not in nothing
    ]
    stop, unread = _strings(found)
    ignored += unread
    lengths = {}
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = found.get(name) if instead not in found else None
        if length is None or (type(length) is int and length >= 0):
            lengths[name] = None if length == _LENGTH and name == "max_length" else length
        else:
            ignored.append(f"{name}={length}")
    return Generation(
        sampling=values,
        stop=stop,
        **lengths,
        specials=specials,
        logits=logits,
        ignored=tuple(ignored),
    )


def _strings(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """Stop strings, and what of them can't be."""
    listed = found.get("stop_strings") or ()
    listed = [listed] if isinstance(listed, str) else listed
    if isinstance(listed, list | tuple) and all(isinstance(text, str) for text in listed):
        return tuple(filter(None, listed)), []
    return (), [f"stop_strings={listed}"]


def _sampling(found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Sampling parameters, and what of them can't be."""
    names = {"repetition_penalty": "repetition_penalty", "max_tokens": "max_new_tokens"}
    names |= {"min_tokens": "min_new_tokens"}
    names |= {name: name for name in ("length_penalty", "early_stopping")}
    if found.get("do_sample"):
        names |= {name: name for name in ("temperature", "top_k", "top_p", "min_p")}
    values = {ours: found[theirs] for ours, theirs in names.items() if theirs in found}
    if found.get("do_sample"):
        values.setdefault("temperature", 1.0)
    ignored = []
    for name, value in list(values.items()):
        try:
            SamplingParams(**{"max_tokens": 1 << 62, name: value})
        except (ValueError, TypeError):
            ignored.append(f"{names[name]}={value}")
            del values[name]
    return values, ignored


def _logits(
    found: Mapping[str, Any], ends: Ids, max_model_len: int, size: int
) -> tuple[LogitsConfig, list[str]]:
    """What is done to logits of a vocabulary of so many tokens, and what of them can't be."""
    vocabulary = _Vocabulary(size, ends)
    readers: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "sequence_bias": ("sequence_bias", vocabulary.biases),
        "bad_words_ids": ("bad_words", vocabulary.words),
        "no_repeat_ngram_size": ("no_repeat_ngram_size", lambda v: max(0, int(v))),
        "forced_bos_token_id": ("forced_bos", lambda v: next(iter(vocabulary.ids(v)), None)),
        "forced_eos_token_id": ("forced_eos", vocabulary.ids),
        "remove_invalid_values": ("remove_invalid_values", bool),
        "exponential_decay_length_penalty": ("decay", lambda v: (int(v[0]), float(v[1]))),
        "suppress_tokens": ("suppress", vocabulary.ids),
        "begin_suppress_tokens": ("begin_suppress", vocabulary.ids),
        "renormalize_logits": ("renormalize", bool),
    }
    if found.get("do_sample"):
        readers |= {
            "top_h": ("top_h", _share),
            "typical_p": ("typical_p", _share),
            "epsilon_cutoff": ("epsilon", _share),
            "eta_cutoff": ("eta", _share),
        }
    made, ignored = LogitsConfig(ends, max_model_len), []
    for name, (ours, read) in readers.items():
        if name in found:
            try:
                made = replace(made, **{ours: read(found[name])})
            except (TypeError, ValueError, LookupError, OverflowError):
                ignored.append(f"{name}={found[name]}")
    return made, ignored


@dataclass(frozen=True)
class _Vocabulary:
    """Reads a config's lists of tokens; what names one that is none is left out."""

    size: int
    ends: Ids

    def ids(self, value: Any) -> Ids:
        listed = [value] if isinstance(value, int) else value
        return tuple(dict.fromkeys(t for t in map(int, listed) if 0 <= t < self.size))

    def words(self, value: Any) -> tuple[Ids, ...]:
        words = dict.fromkeys(tuple(map(int, word)) for word in value)
        ends = {(token,) for token in self.ends}
        return tuple(word for word in words if self._has(word) and word not in ends)

    def biases(self, value: Any) -> dict[Ids, float]:
        pairs = value.items() if isinstance(value, Mapping) else value
        biases = {tuple(map(int, ids)): float(bias) for ids, bias in pairs}
        return {ids: bias for ids, bias in biases.items() if self._has(ids)}

    def _has(self, ids: Ids) -> bool:
        return bool(ids) and all(0 <= token < self.size for token in ids)


def _share(value: Any) -> float:
    """A part of 1; 0 where it keeps everything."""
    if not 0 <= float(value) <= 1:
        raise ValueError(value)
    return float(value) % 1


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """The model's end tokens: those that its generation config, its config or its tokenizer name.

    A finetune may have taught a model another one, and told only one of them. A config that names
    none has its class's, which can be any token: of its tokens count those that are special.
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
    """Tokens that completions do not show, by their text."""
    if tokenizer is None:
        return {}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {token.content: id_ for id_, token in added.items() if token.special}
    named = (getattr(tokenizer, f"all_special_{what}", ()) for what in ("tokens", "ids"))
    return found | dict(zip(*named, strict=False))


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the model's input embedding: a prompt has no token beyond them."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(model.config.get_text_config().vocab_size if weight is None else weight.shape[0])


Encode = Callable[[Mapping[str, Any]], Ids]


def within_vocabulary(encode: Encode, tokenizer: Any, size: int) -> Encode:
    """The same, but refusing prompts with tokens that the model has no embedding for.

    Tokens may have been added to a tokenizer and not to its model.

    Args:
        encode: Makes a prompt of a row's fields; raises `PromptError`, as what is made does.
        tokenizer: Names the token.
        size: See `vocabulary_size`.
    """

    def checked(fields: Mapping[str, Any]) -> Ids:
        ids = encode(fields)
        if max(ids) >= size or min(ids) < 0:
            token = next(t for t in ids if not 0 <= t < size)
            raise PromptError(
                "unknown_token",
                f"the prompt has the token {tokenizer.convert_ids_to_tokens(token)!r} ({token}), "
                f"and the model's vocabulary has {size:,}",
            )
        return ids

    return checked
