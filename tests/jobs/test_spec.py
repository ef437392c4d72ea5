"""What makes a job another job, and what does not."""

import json
from dataclasses import asdict, replace
from hashlib import blake2b

import pytest

from batchrun.jobs.errors import InputError, JobError, SpecDamaged
from batchrun.jobs.files import read_json, write_json
from batchrun.jobs.identity import changes
from batchrun.jobs.options import PromptSpec
from batchrun.jobs.runtime import RuntimeSpec
from batchrun.jobs.spec import InputFile, JobSpec


def moved(spec, folder):
    """The same specification over copies of its inputs elsewhere."""
    folder.mkdir()
    inputs = []
    for file in spec.inputs:
        target = folder / "copy.parquet"
        with open(file.path, "rb") as source:
            target.write_bytes(source.read())
        inputs.append(InputFile.of(target))
    return replace(spec, inputs=tuple(inputs))


def test_what_only_says_how_to_run_is_no_change(spec, tmp_path):
    same = [
        moved(spec, tmp_path / "elsewhere"),
        replace(spec, runtime=RuntimeSpec(max_num_seqs=1, device="cuda", kv_budget=1 << 30)),
        replace(spec, output=replace(spec.output, path="/other.jsonl", format="jsonl")),
        replace(spec, model=replace(spec.model, path="/somewhere/else")),
    ]
    assert {other.fingerprint() for other in same} == {spec.fingerprint()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": {"max_tokens": 9}}, "sampling.max_tokens: 8, now 9"),
        ({"sampling": {"temperature": None}}, "sampling.temperature: 0.7, now null"),
        ({"sampling": {"temperature": 0.0}}, "sampling.temperature: 0.7, now 0.0"),
        ({"sampling": {"early_stopping": False}}, "sampling.early_stopping: null, now false"),
        ({"sampling": {"stop": ("a",)}}, 'sampling.stop: [], now ["a"]'),
        ({"prompt": {"skip_empty": True}}, "prompt.skip_empty: false, now true"),
        ({"prompt": {"template": "Say {x}"}}, 'prompt.template: null, now "Say {x}"'),
        ({"seed": 2}, "seed: 1, now 2"),
        ({"n": 2}, "n: 1, now 2"),
        ({"limit": 10}, "limit: null, now 10"),
        ({"keep": 1}, "keep: null, now 1"),
        ({"model": {"dtype": "bfloat16"}}, 'model.dtype: "float32", now "bfloat16"'),
        ({"model": {"fingerprint": "m2"}}, 'model.fingerprint: "m1", now "m2"'),
        ({"input_format": "jsonl"}, 'input_format: "parquet", now "jsonl"'),
    ],
)
def test_what_determines_the_output_is_a_change_and_is_named(spec, change, named, tmp_path):
    (name, value), *_ = change.items()
    if name in ("prompt", "model", "sampling"):
        value = replace(getattr(spec, name), **value)
    other = replace(spec, **{name: value})
    assert other.fingerprint() != spec.fingerprint()
    other.save(tmp_path)
    assert spec.edits(tmp_path) == [named]


def test_changed_content_is_a_change_and_names_the_file(spec, prompts, tmp_path):
    data = bytearray(prompts.read_bytes())
    data[10] ^= 1
    prompts.write_bytes(data)
    other = replace(spec, inputs=(InputFile.of(prompts),))
    assert other.fingerprint() != spec.fingerprint()
    other.save(tmp_path)
    [named] = spec.edits(tmp_path)
    assert named.startswith("inputs: ")
    assert f"{prompts}: its content changed" in changes(spec)


def test_an_input_that_is_gone_says_what_to_do_if_it_has_moved(tmp_path):
    with pytest.raises(InputError, match=r"prompts\.parquet") as gone:
        InputFile.of(tmp_path / "prompts.parquet")
    assert "--moved" in gone.value.hint


def test_a_name_that_is_missing_has_its_default_and_one_that_is_not_known_says_nothing(
    spec, tmp_path
):
    spec.save(tmp_path)
    path = tmp_path / "job.json"
    data = read_json(path)
    del data["keep"], data["sampling"]["top_p"], data["prompt"]["chat"]
    data |= {"later": 1, "model": {**data["model"], "later": 1}}
    data["runtime"] = {**data["runtime"], "plan": False}  # a name of an earlier version
    write_json(path, data)
    assert JobSpec.load(tmp_path) == spec
    for part in ("prompt", "model", "sampling", "inputs"):
        write_json(path, {k: v for k, v in data.items() if k != part})
        with pytest.raises(SpecDamaged):
            JobSpec.load(tmp_path)
        write_json(path, {**data, part: "text"})
        with pytest.raises(SpecDamaged):
            JobSpec.load(tmp_path)


def test_the_fingerprint_is_of_all_that_determines_the_output(spec):
    """Neither a name nor how a value is written may come to mean another job."""
    content = json.loads(json.dumps(asdict(spec)))
    for name in ("output", "runtime", "version", "about"):
        del content[name]
    content["inputs"] = [i.fingerprint for i in spec.inputs]
    del content["model"]["name"], content["model"]["path"]
    digest = blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
    assert spec.fingerprint() == digest


def test_moving_changes_no_work(spec):
    assert spec.paths() == [spec.inputs[0].path, "/models/tiny"]
    moved = spec.at({spec.inputs[0].path: "/b.parquet", "/models/tiny": "/m"})
    assert moved.paths() == ["/b.parquet", "/m"]
    assert moved.fingerprint() == spec.fingerprint()
    assert spec.at({}) == spec.at({"/other": "/else"}) == spec
    drafted = replace(spec, runtime=replace(spec.runtime, draft_model="d", draft_path="/d"))
    assert drafted.paths()[2:] == ["/d"]
    assert drafted.at({"/d": "/e"}).paths()[2:] == ["/e"]
    assert drafted.fingerprint() == spec.fingerprint()


def test_order_and_number_of_inputs_are_content(spec, tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text(path.name)
    a, b = map(InputFile.of, paths)
    variants = [replace(spec, inputs=inputs) for inputs in [(a, b), (b, a), (a,), (a, a)]]
    assert len({v.fingerprint() for v in variants}) == 4


def test_a_large_file_is_sampled_at_its_head_its_tail_and_between(tmp_path):
    path = tmp_path / "large"
    size = (64 << 20) + 4097
    with path.open("wb") as file:
        file.truncate(size)
    fingerprints = {InputFile.of(path).fingerprint}
    for position in (0, size - 1, size // 2):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"x")
        fingerprints.add(InputFile.of(path).fingerprint)
    assert len(fingerprints) == 4


def test_a_saved_specification_reads_back_equal(spec, tmp_path):
    sampling = replace(spec.sampling, stop=("a", "b"), stop_token_ids=(1,), early_stopping="never")
    prompt = PromptSpec(template="{x}", template_args={"tools": [1], "deep": {"a": None}})
    spec = replace(spec, n=3, limit=7, keep=2, sampling=sampling, prompt=prompt)
    spec.save(tmp_path)
    loaded = JobSpec.load(tmp_path)
    assert loaded == spec
    assert loaded.fingerprint() == spec.fingerprint()
    assert json.loads((tmp_path / "job.json").read_text())["version"] == 1


def test_a_newer_specification_is_refused(spec, tmp_path):
    replace(spec, version=2).save(tmp_path)
    with pytest.raises(JobError, match="2; this batchrun reads versions up to 1") as refused:
        JobSpec.load(tmp_path)
    assert refused.value.hint == "pip install --upgrade batchrun-llm"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": null}'])
def test_a_damaged_specification_is_one_clear_error(tmp_path, text):
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(SpecDamaged, match=r"job\.json is not a job specification"):
        JobSpec.load(tmp_path)


def test_no_specification_is_one_clear_error(tmp_path):
    with pytest.raises(JobError, match=r"job\.json"):
        JobSpec.load(tmp_path)
