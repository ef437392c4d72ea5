"""A job goes on with what it was submitted with, wherever that lies, and with nothing else."""

import json
import os
from dataclasses import replace

import pytest

from batchrun.jobs.errors import InputError, JobError, SpecChanged
from batchrun.jobs.folder import create
from batchrun.jobs.identity import check_unchanged, move, set_limits
from batchrun.jobs.lease import Lease
from batchrun.jobs.options import OutputSpec
from batchrun.jobs.same import find_same
from batchrun.jobs.spec import InputFile


def digest(path):
    return (path / "weights").read_text()


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("m1")
    return folder


@pytest.fixture
def job(make_job, spec, model):
    return make_job(model=replace(spec.model, path=str(model)))


def test_a_changed_input_is_refused_by_name(job, prompts):
    check_unchanged(job)
    data = bytearray(prompts.read_bytes())
    data[10] ^= 1
    prompts.write_bytes(data)
    with pytest.raises(SpecChanged, match=r"prompts\.parquet: its content changed"):
        check_unchanged(job)
    prompts.write_bytes(data + b"more")
    with pytest.raises(SpecChanged, match=f"it had {len(data)} bytes, and now has {len(data) + 4}"):
        check_unchanged(job)
    prompts.unlink()
    with pytest.raises(InputError, match=r"prompts\.parquet") as gone:
        check_unchanged(job)
    assert f"batchrun resume --moved '{prompts}'=NEW" in gone.value.hint


def test_a_changed_model_is_refused_by_name(job, model):
    check_unchanged(job, digest)
    (model / "weights").write_text("m2")
    with pytest.raises(SpecChanged, match=f"the model in {model}: its weights"):
        check_unchanged(job, digest)
    check_unchanged(job)  # whoever can't digest a model does not look
    model.rename(model.with_name("elsewhere"))
    with pytest.raises(InputError, match=f"the model in {model} can't be read") as gone:
        check_unchanged(job, digest)
    assert f"--moved '{model}'=NEW" in gone.value.hint


def test_edited_parameters_are_refused_by_name(job):
    path = job.path / "job.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "checksum": "0"}))  # it says the same
    check_unchanged(job)
    data["runtime"]["max_num_seqs"] = 99
    data["sampling"]["max_tokens"] = 9
    data["prompt"]["template"] = "{prompt}!"
    path.write_text(json.dumps(data))
    with pytest.raises(SpecChanged) as refused:
        check_unchanged(job)
    assert "runtime.max_num_seqs: 8, now 99" in str(refused.value)
    assert "sampling.max_tokens: 8, now 9" in str(refused.value)
    assert 'prompt.template: null, now "{prompt}!"' in str(refused.value)


def test_moved_input_and_model_are_found_again(job, prompts, model, tmp_path):
    before = (job.path / "job.json").read_bytes()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = prompts.rename(elsewhere / "other.parquet")
    move(job, str(prompts), str(first), digest)
    second = first.rename(elsewhere / "third.parquet")
    move(job, str(first), str(second), digest)  # by where it was last
    moved = model.rename(elsewhere / "model")
    move(job, str(model), str(moved), digest)
    check_unchanged(job, digest)
    assert job.spec().paths() == [str(second), str(moved)]
    assert (job.path / "job.json").read_bytes() == before
    second.rename(prompts)
    move(job, str(prompts), str(prompts), digest)  # by where it was at first
    check_unchanged(job, digest)


def test_a_moved_folder_takes_its_files_along(home, spec, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (data / name).write_text(name)
    inputs = tuple(InputFile.of(data / name) for name in ("a.jsonl", "b.jsonl"))
    job = create(home, replace(spec, inputs=inputs))
    data.rename(tmp_path / "database")
    move(job, str(data), str(tmp_path / "database"))
    check_unchanged(job)
    with pytest.raises(JobError, match="has neither"):
        move(job, str(tmp_path / "dat"), str(tmp_path))


def test_another_file_is_no_moved_one(job, prompts, model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "weights").write_text("m2")
    (other / "prompts.parquet").write_bytes(prompts.read_bytes() + b"x")
    for old, new, error, match in [
        (prompts, other / "prompts.parquet", SpecChanged, "not what the job was submitted with"),
        (model, other, SpecChanged, "its weights, config or tokenizer changed"),
        (prompts, tmp_path / "gone", InputError, "gone can't be read"),
        (model, tmp_path / "gone", InputError, "gone can't be read"),
        (other, prompts, JobError, "has neither an input nor its model"),
    ]:
        with pytest.raises(error, match=match):
            move(job, str(old), str(new), digest)
    assert not (job.path / "places.json").exists()
    check_unchanged(job, digest)


@pytest.mark.parametrize("name", ["places.json", "limits.json"])
def test_a_damaged_file_of_what_was_told_since_is_one_clear_error(job, name):
    (job.path / name).write_text("[]")
    with pytest.raises(JobError, match=rf"{name[:6]}\.json can't be read"):
        job.spec()


def test_limits_that_were_told_since_count_and_change_no_work(job):
    was = job.spec()
    set_limits(job.path, {"max_num_seqs": 8, "kv_budget": 1 << 20})
    set_limits(job.path, {"max_num_seqs": 4})
    assert job.spec().runtime == replace(was.runtime, max_num_seqs=4, kv_budget=1 << 20)
    assert job.spec().fingerprint() == was.fingerprint()
    assert job.submitted() == was
    check_unchanged(job, digest)


def end(job, state):
    with Lease(job.path), job.journal(readonly=False) as journal:
        journal.begin_run()
        journal.end_run(state, {})
        journal.close()
        job.set_state(state)


def test_the_newest_job_of_the_same_work_is_found(home, spec, make_job):
    assert find_same(home, spec) is None
    jobs = [make_job(), make_job(output=OutputSpec(path="/o")), make_job(seed=2), make_job()]
    for number, job in enumerate(jobs):
        os.utime(job.path / "job.json", ns=(number, number))
    assert find_same(home, spec).id == jobs[3].id
    end(jobs[3], "done")
    assert find_same(home, spec).id == jobs[1].id
    end(jobs[1], "cancelled")
    (jobs[2].path / "job.json").unlink()
    assert find_same(home, spec).id == jobs[0].id
    end(jobs[0], "interrupted")
    with jobs[0].journal(readonly=False):  # state.json is gone: the journal says it
        pass
    assert find_same(home, spec).id == jobs[0].id
    end(jobs[0], "done-with-errors")
    assert find_same(home, spec).state() == "done-with-errors"
    assert find_same(home, replace(spec, n=2)) is None
