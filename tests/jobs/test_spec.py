"""What makes a job another job, and what does not."""

import json
from dataclasses import replace
from hashlib import blake2b

import pytest

from batchrun.jobs.errors import InputError, JobError, SpecDamaged
from batchrun.jobs.files import read_json, write_json
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
        replace(spec, runtime={"max_num_seqs": 1, "device": "cuda", "kv_budget": 1 << 30}),
        replace(spec, output={**spec.output, "path": "/other.jsonl", "format": "jsonl"}),
        replace(spec, model={**spec.model, "path": "/somewhere/else"}),
    ]
    assert {other.fingerprint() for other in same} == {spec.fingerprint()}
    assert [spec.differences(other) for other in same] == [[]] * 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": {"max_tokens": 9, "temperature": 0.7}}, "sampling.max_tokens: 8, now 9"),
        ({"sampling": {"max_tokens": 8}}, "sampling.temperature: 0.7, now null"),
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
def test_what_determines_the_output_is_a_change_and_is_named(spec, change, named):
    (name, value), *_ = change.items()
    if name in ("prompt", "model"):
        value = {**getattr(spec, name), **value}
    other = replace(spec, **{name: value})
    assert other.fingerprint() != spec.fingerprint()
    assert spec.differences(other) == [named]


def test_changed_content_is_a_change_and_names_the_file(spec, prompts):
    data = bytearray(prompts.read_bytes())
    data[10] ^= 1
    prompts.write_bytes(data)
    other = replace(spec, inputs=(InputFile.of(prompts),))
    assert other.fingerprint() != spec.fingerprint()
    size = len(data)
    assert spec.differences(other) == [
        f"input {prompts} ({size} bytes) is not what {prompts} ({size} bytes) was"
    ]


def test_an_input_that_is_gone_says_what_to_do_if_it_has_moved(tmp_path):
    with pytest.raises(InputError, match=r"prompts\.parquet") as gone:
        InputFile.of(tmp_path / "prompts.parquet")
    assert "--moved" in gone.value.hint


def test_a_job_of_before_best_of_is_the_same_job(spec, tmp_path):
    spec.save(tmp_path)
    path = tmp_path / "job.json"
    older = {k: v for k, v in read_json(path).items() if k != "keep"}
    write_json(path, older)
    assert JobSpec.load(tmp_path) == spec
    content = {k: v for k, v in older.items() if k not in {"output", "runtime", "version"}}
    content["inputs"] = [i.fingerprint for i in spec.inputs]
    content["model"] = {"fingerprint": "m1", "dtype": "float32"}
    digest = blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
    assert spec.fingerprint() == digest


def test_moving_changes_no_work(spec):
    assert spec.paths() == [spec.inputs[0].path, "/models/tiny"]
    moved = spec.at({spec.inputs[0].path: "/b.parquet", "/models/tiny": "/m"})
    assert moved.paths() == ["/b.parquet", "/m"]
    assert moved.fingerprint() == spec.fingerprint()
    assert spec.differences(moved) == []
    assert spec.at({}) == spec.at({"/other": "/else"}) == spec


def test_order_and_number_of_inputs_are_content(spec, tmp_path):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text(path.name)
    a, b = map(InputFile.of, paths)
    variants = [replace(spec, inputs=inputs) for inputs in [(a, b), (b, a), (a,), (a, a)]]
    assert len({v.fingerprint() for v in variants}) == 4
    assert variants[0].differences(variants[2]) == ["inputs: 2 files, now 1"]
    assert len(variants[0].differences(variants[1])) == 2


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
    spec = replace(spec, n=3, limit=7, keep=2)
    spec.save(tmp_path)
    loaded = JobSpec.load(tmp_path)
    assert loaded == spec
    assert loaded.fingerprint() == spec.fingerprint()
    assert json.loads((tmp_path / "job.json").read_text())["version"] == 1


def test_a_newer_specification_is_refused(spec, tmp_path):
    replace(spec, version=2).save(tmp_path)
    with pytest.raises(JobError, match="version 2, this program knows up to 1") as refused:
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
