"""An option stands in one place: its field. Who reads it, on whatever way, reads it there."""

import pickle
from dataclasses import fields

import pytest

from batchrun.engine.core import SamplingParams
from batchrun.jobs.errors import OptionError
from batchrun.jobs.kinds import SAMPLING, options_of
from batchrun.jobs.options import SamplingSpec
from batchrun.jobs.spec import OPTIONS


def test_every_sampling_parameter_is_one_of_the_engine():
    known = {f.name for f in fields(SamplingParams)}
    own = {option.at for option in options_of(SamplingSpec) if option.section == SAMPLING}
    assert own <= known
    assert {
        n for n, option in OPTIONS.items() if option.row and option.section == SAMPLING
    } <= known


def test_with_scores_nothing_is_generated_unless_it_is_said():
    assert SamplingSpec(labels=("a",)).given == {"max_tokens": 0, "scoring": True}
    assert SamplingSpec(score="a", max_tokens=3, top_k=2).given == {
        **{"max_tokens": 3, "top_k": 2, "scoring": True}
    }
    assert SamplingSpec(perplexity=True).scores
    assert SamplingSpec(max_tokens=3).given == {"max_tokens": 3}


def test_what_rows_can_say_the_engine_takes():
    """Also at the ends of its range."""
    for name, values in {
        "max_tokens": (1, (1 << 63) - 1),
        "temperature": (0.0, 5.0),
        "top_p": (1e-9, 1.0),
        "min_p": (0.0, 1.0),
        "top_k": (0, (1 << 31) - 1),
        "repetition_penalty": (1e-5, 999_999.0),
        "presence_penalty": (-999_999.0, 999_999.0),
    }.items():
        for value in values:
            assert OPTIONS[name].row.valid(value)
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        ("max_tokens", 5, 5),
        ("max_tokens", None, None),
        ("temperature", 1, 1.0),
        ("stop", "a", ("a",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("early_stopping", "yes", True),
        ("early_stopping", False, False),
        ("early_stopping", "never", "never"),
        ("kv_budget", "1.5MiB", 3 << 19),
        ("kv_budget", 4096, 4096),
        ("device", "cuda:1", "cuda:1"),
        ("chat", None, False),
        ("drafts", None, True),
        ("draft_tokens", "auto", None),
        ("draft_tokens", "12", 12),
        ("draft_tokens", 3, 3),
        ("seed", None, 0),
        ("dtype", "float32", "float32"),
        ("template_args", {"a": [1, None]}, {"a": [1, None]}),
        ("template_args", None, {}),
    ],
)
def test_what_is_said_of_an_option(name, given, read):
    found = OPTIONS[name].read(given)
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("max_tokens", "5", "'5' is not a whole number"),
        ("max_tokens", True, "True is not a whole number"),
        ("max_tokens", 5.5, "5.5 is not a whole number"),
        ("n", 0, "0 is less than 1"),
        ("max_num_seqs", 1 << 21, f"{1 << 21} is more than {1 << 20}"),
        ("temperature", "hot", "'hot' is not a number"),
        ("chat", 1, "1 is not a flag: True or False"),
        ("stop", [1], "1 is not text"),
        ("stop_token_ids", [1, -1], "-1 is less than 0"),
        ("early_stopping", 1, "1 is not one of 'no', 'yes', 'never'"),
        ("dtype", "int4", "'int4' is not one of 'auto', 'float32'"),
        ("kv_budget", "much", "'much' is not a size"),
        ("kv_budget", -1, "-1 is not a size"),
        ("page_size", 1000, "1000 is not a positive multiple of"),
        ("device", "tpu", "'tpu' is not a device"),
        ("draft_tokens", "some", "'some' is neither auto nor a whole number of 1 or more"),
        ("draft_tokens", 0, "0 is neither auto nor"),
        ("template_args", ["a=b"], "is not a mapping"),
        ("template_args", {"a": float("nan")}, "not JSON compliant"),
        ("template_args", {"a": object()}, "not JSON serializable"),
    ],
)
def test_what_can_not_be_said_of_it(name, given, says):
    with pytest.raises(OptionError) as refused:
        OPTIONS[name].read(given)
    assert str(refused.value).startswith(f"{name}: ")
    assert says in str(refused.value)


def test_an_error_spells_options_as_its_reader_does_and_leaves_what_a_user_said():
    error = OptionError("{best_of} {} is less than {n} {}", "{n}", 3)
    for found in (error, pickle.loads(pickle.dumps(error))):
        assert str(found) == "best_of {n} is less than n 3"
        assert found.spelled(lambda name: OPTIONS[name].flag) == "--best-of {n} is less than --n 3"
        assert found.hint is None


def test_what_only_adds_a_column_is_no_sampling_parameter():
    given = SamplingSpec(choices=("a",), choice_logprob=True, top_k=3).given
    assert given.get("top_k") == 3
    assert "choice_logprob" not in given
