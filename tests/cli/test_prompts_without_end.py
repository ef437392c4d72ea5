"""Whatever making a prompt or reading a file does to a run, other rows get their answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.jobs.folder import JobFolder, list_jobs
from batchrun.jobs.inflight import Making
from batchrun.runner.overdue import Overrun
from batchrun.runner.runs import _blame
from tests.cli.conftest import CommandLine
from tests.cli.test_async import trapped, until

PROMPTS = [f"prompt {i}" for i in range(30)]
ABORT = "os.abort()"


def in_prompt(what: str, row: int = 7) -> str:
    """A trap that does something as the prompt of a row is made."""
    return (
        "from batchrun.prompts.builder import PromptBuilder\n"
        "call = PromptBuilder.__call__\n"
        "def trapped(self, fields):\n"
        f"    if fields['prompt'] == 'prompt {row}':\n"
        f"        {what}\n"
        "    return call(self, fields)\n"
        "PromptBuilder.__call__ = trapped"
    )


@pytest.mark.long
def test_a_prompt_that_brings_the_process_down_is_not_made_a_third_time(
    batchrun: CommandLine,
) -> None:
    done = trapped(batchrun, in_prompt(ABORT))
    assert done.returncode == 3, done.stderr
    rows = batchrun.read("out.jsonl")
    assert [i for i, row in enumerate(rows) if row["error"]] == [7]
    assert "crashed 2 times" in rows[7]["error"]
    assert len(rows) == 30
    [job] = list_jobs(batchrun.home)
    with job.journal() as journal:
        assert journal.crash_counts() == {7: 2}, "innocent rows were blamed"


LONG_RUN = pytest.mark.long


@pytest.mark.long
@pytest.mark.parametrize("first", [0, 16])
def test_a_file_that_brings_the_process_down_is_named_and_no_row_is_blamed(
    batchrun: CommandLine, first: int
) -> None:
    trap = (
        "import batchrun.jobs.rows.parquet\n"
        "batches = batchrun.jobs.rows.parquet.batches\n"
        "def trapped(path, file, group, *arguments):\n"
        f"    if 8 * group == {first}:\n"
        "        os.abort()\n"
        "    return batches(path, file, group, *arguments)\n"
        "batchrun.jobs.rows.parquet.batches = trapped"
    )
    path = batchrun.folder / "in.parquet"
    pq.write_table(pa.table({"prompt": PROMPTS}), path, row_group_size=8)
    done = trapped(batchrun, trap, source=path)
    assert done.returncode == 1, done.stderr
    said = f"the run crashed with SIGABRT while it read {path}, rows {first} to {first + 7}"
    assert f"error: {said}: the file is damaged" in done.stderr
    [job] = list_jobs(batchrun.home)
    assert job.state() == "failed"
    with job.journal() as journal:
        assert journal.crash_counts() == {}
    assert batchrun("resume", job.id).code == 0  # without the trap
    assert len(batchrun.read("out.jsonl")) == 30


BAD = {
    7: "loop",  # in Python
    9: "double",  # what would need all memory
    11: "compare",  # in C, holding the interpreter's lock
    13: ("a" * 22 + "! ") * 120,  # in the tokenizer's native code, without it
}
# No expression of it matches anything, and where a word of 22 letters has none it takes long.
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": "(?=(a+)+c)b"},
    "behavior": "Isolated",
    "invert": False,
}
TEMPLATE = (
    "{%- set text = messages[-1].content -%}"
    "{%- if text == 'loop' -%}"
    "  {%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor -%}"
    "{%- elif text == 'double' -%}"
    "  {%- set ns = namespace(s=text) %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "  {%- endfor -%}"
    "{%- elif text == 'compare' -%}"
    "  {%- set ns = namespace(a=[], b=[]) -%}"
    "  {%- for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}"
    "  {%- endfor %}{{ ns.a == ns.b -}}"
    "{%- endif -%}"
)
SHORT = ("--max-tokens", 8, "--chat", "--max-num-seqs", 4)


def hostile(model: Path, folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of a model with more in front of its template, and in its tokenizer."""
    copy = shutil.copytree(model, folder / "hostile")
    path = copy / "chat_template.jinja"
    path.write_text(template + path.read_text())
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    steps = [SPLIT, tokenizer["pre_tokenizer"]]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(tokenizer))
    return copy


def submitted(
    batchrun: CommandLine, source: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        batchrun.argv("submit", source, *SHORT, *arguments),
        cwd=batchrun.folder,
        env={**batchrun.environment(), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_prompts_that_do_not_end_are_errors_of_their_rows(
    batchrun: CommandLine, tmp_path: Path
) -> None:
    good = batchrun.write("good.jsonl", PROMPTS)
    done = submitted(batchrun, good, "--model", batchrun.model, "-o", "want.jsonl")
    assert done.returncode == 0, done.stderr
    want = batchrun.read("want.jsonl")
    source = batchrun.write("in.jsonl", [BAD.get(i, text) for i, text in enumerate(PROMPTS)])
    model = hostile(batchrun.model, tmp_path)
    done = submitted(
        batchrun, source, "--model", model, "-o", "out.jsonl", BATCHRUN_PROMPT_SECONDS="1"
    )
    assert done.returncode == 3, done.stderr
    rows = batchrun.read("out.jsonl")
    assert [row for i, row in enumerate(rows) if i not in BAD] == [
        row for i, row in enumerate(want) if i not in BAD
    ]
    long = "building its prompt took more than 1 s of processor time"
    assert rows[7]["error"] == rows[11]["error"] == f"{long}, in the model's chat template"
    assert rows[13]["error"] == f"{long}, in the tokenizer"
    assert "makes a text, list or number of more than" in rows[9]["error"]
    [job] = [job for job in list_jobs(batchrun.home) if job.state() == "done-with-errors"]
    with job.journal() as journal:
        assert journal.crash_counts() == {}
        assert set(journal.condemned()) == {11, 13}


@pytest.mark.long
def test_prompts_that_sleep_or_let_nothing_through_are_errors_of_their_rows(
    batchrun: CommandLine,
) -> None:
    caught = (
        "while True:\n            try: sum(range(10**5))\n            except BaseException: pass"
    )
    trap = (
        "from batchrun.prompts.builder import PromptBuilder\n"
        "call = PromptBuilder.__call__\n"
        "def trapped(self, fields):\n"
        "    if fields['prompt'] == 'prompt 5':\n"
        "        threading.Event().wait()\n"
        "    if fields['prompt'] == 'prompt 9':\n"
        f"        {caught}\n"
        "    return call(self, fields)\n"
        "PromptBuilder.__call__ = trapped"
    )
    done = trapped(batchrun, trap, BATCHRUN_STALL_SECONDS="10", BATCHRUN_PROMPT_SECONDS="1")
    assert done.returncode == 3, done.stderr
    rows = batchrun.read("out.jsonl")
    assert [i for i, row in enumerate(rows) if row["error"]] == [5, 9]
    assert rows[5]["error"] == "building its prompt did not finish in 10 s"
    assert rows[9]["error"] == "building its prompt took more than 1 s of processor time"
    [job] = list_jobs(batchrun.home)
    assert batchrun("resume", job.id, "--retry-failed").code == 0  # without the trap
    assert not any(row["error"] for row in batchrun.read("out.jsonl"))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
COMPARE = TEMPLATE.replace("text == 'compare'", "true").replace("text == ", "none == ")


@pytest.mark.long
@pytest.mark.parametrize("template", [LOOP, COMPARE])
def test_a_template_that_never_ends_is_named_and_ends_the_job(
    batchrun: CommandLine, tmp_path: Path, template: str
) -> None:
    """Not after one row each, for a million rows."""
    model = hostile(batchrun.model, tmp_path, template)
    done = trapped(
        batchrun,
        "from batchrun.runner import reader as r; r.Reader.__init__.__kwdefaults__['barren'] = 3",
        "--chat",
        supervisor="from batchrun.runner import runs as r; r.BARREN = 2",
        model=model,
        BATCHRUN_PROMPT_SECONDS="0.2",
    )
    assert done.returncode == 1, done.stderr
    times = 3 if template == LOOP else 2
    said = f"building prompts took too long for {times} consecutive rows"
    assert f"error: {said}, in the model's chat template" in done.stderr
    assert "fix the model's chat template" in done.stderr


@pytest.mark.parametrize(
    ("command", "template"),
    [
        (("plan",), COMPARE),
        pytest.param(("plan",), LOOP, marks=LONG_RUN),
        pytest.param(("submit", "--dry-run", "-o", "out.jsonl"), LOOP, marks=LONG_RUN),
        pytest.param(("submit", "--dry-run", "-o", "out.jsonl"), COMPARE, marks=LONG_RUN),
    ],
)
def test_looking_at_a_job_ends_with_one_message_too(
    batchrun: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    template: str,
) -> None:
    model = hostile(batchrun.model, tmp_path, template)
    source = batchrun.write("in.jsonl", PROMPTS)
    monkeypatch.setenv("BATCHRUN_PROMPT_SECONDS", "0.2")
    shown = batchrun(command[0], source, *command[1:], "--chat", "--model", model)
    assert shown.code == 1
    if template == COMPARE:
        assert shown.error == "row 0: building its prompt took more than 0.2 s of processor time"
    else:
        times = 2 if "--dry-run" in command else 16
        said = f"building prompts took too long for {times} consecutive rows"
        assert shown.error == f"{said}, in the model's chat template"
    assert "BATCHRUN_PROMPT_SECONDS" in shown.hint


def test_ctrl_c_ends_a_template_that_holds_the_interpreter(
    batchrun: CommandLine, tmp_path: Path
) -> None:
    model = hostile(batchrun.model, tmp_path, COMPARE)
    source = batchrun.write("in.jsonl", PROMPTS)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'plan' in sys.orig_argv:\n"
        "    from pathlib import Path\n"
        "    from batchrun.prompts.chat import ChatTemplate\n"
        "    render = ChatTemplate._render\n"
        "    def told(*arguments, **options):\n"
        "        Path('begun').touch()\n"
        "        return render(*arguments, **options)\n"
        "    ChatTemplate._render = told\n"
    )
    own = batchrun.environment()
    process = subprocess.Popen(
        batchrun.argv("plan", source, "--chat", "--model", model),
        cwd=batchrun.folder,
        env={**own, "PYTHONPATH": f"{tmp_path}:{own.get('PYTHONPATH', '')}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until((batchrun.folder / "begun").exists, "the template")
    [child] = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGINT)
    assert "error: interrupted" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not child.is_running()


def test_memory_that_may_be_another_threads_is_blamed_on_a_row_the_second_time(
    batchrun: CommandLine,
) -> None:
    job = JobFolder(batchrun.unstarted(batchrun.write("in.jsonl", PROMPTS)))
    overrun = Overrun(Making(3, 0, 0, 1), "too much", certain=False)
    for crashes, condemned in (({3: 1}, {}), ({3: 1}, {3: "too much, there"})):
        with job.journal(readonly=False) as journal:
            journal.begin_run()
        _blame(job, overrun, ", there")
        with job.journal() as journal:
            assert (journal.crash_counts(), journal.condemned()) == (crashes, condemned)
