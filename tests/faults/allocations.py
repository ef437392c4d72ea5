"""The n-th thing that a run asks the system for is refused: memory, a thread, a library, a file.

    python -m tests.faults.allocations                 # every n, until a run ends unharmed
    python -m tests.faults.allocations --stride 40     # every fortieth: a sample

A job of a few rows is run by the real engine over a tiny model, in a process that is forked when
everything is imported, so that a case takes a fraction of a second. The n-th mmap, memfd_create,
fallocate, pthread_create, dlopen, open, or allocation of a tensor of it fails, by the library of
shim.c; in a second series all from the n-th on. Allowed are the right output, a message, or a death
that the supervisor tells of. Then a clean process goes on, and its output must be, byte for byte,
that of a run that nothing happened to. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import json
import mmap
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from batchrun.cli.errors import describe
from batchrun.errors import StepFailed, said_by
from batchrun.jobs import folder
from batchrun.jobs.folder import JobFolder
from batchrun.jobs.options import ModelSpec, OutputSpec, PromptSpec, SamplingSpec
from batchrun.jobs.spec import InputFile, JobSpec
from batchrun.jobs.verify import verify
from batchrun.machine import end_with_lost_threads
from batchrun.models.resolve import fingerprint
from batchrun.runner.job_run import Outcome, run_job
from tests.faults import shim
from tests.faults.shim import Fault, Kind
from tests.faults.smalljob import BUG, forked
from tests.tiny import write_tiny_model

ROWS = 5
HANG_S = 60  # without an end; a run takes a second
MOST = 100_000  # no run asks that often
DONE, TOLD, ROWS_FAILED, CRASHED, SILENT = 0, 3, 6, 8, 9  # exit codes of a case; and `BUG`
ENDS = {
    DONE: "went on",
    TOLD: "ended with a message",
    CRASHED: "crashed in a step, as a supervisor tells",
    SILENT: "died before it could speak, as a supervisor tells",
    ROWS_FAILED: "blamed a row",
    BUG: "internal error",
    -signal.SIGALRM: "hung",
}
ALLOWED = {DONE, TOLD, CRASHED, SILENT}
E = errno
REQUESTS: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "mmap": (Kind.MMAP, (E.ENOMEM, E.EPERM)),
    "memfd_create": (Kind.MEMFD, (E.ENOMEM, E.EPERM, E.EMFILE, E.ENOSYS)),
    "fallocate": (Kind.FALLOCATE, (E.ENOMEM, E.EPERM, E.ENOSPC)),
    "pthread_create": (Kind.THREAD, (E.EAGAIN, E.EPERM)),
    "dlopen": (Kind.LIBRARY, (E.ENOENT,)),
    "open": (Kind.OPEN, (E.EMFILE, E.ENOMEM, E.EPERM)),
    "tensors": (Kind.MEMORY, (E.ENOMEM,)),
}


@dataclass
class Tally:
    """What the cases came to."""

    cases: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    by_call: dict[str, Counter[str]] = field(default_factory=dict)
    words: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, call: str, end: str, words: str, problems: list[str]) -> None:
        self.cases[call] += 1
        self.outcomes[end] += 1
        self.by_call.setdefault(call, Counter())[end] += 1
        if words:
            self.words[words] += 1
        for problem in problems:
            self.problems.append(f"{name}: {problem}; it said: {words}")
            print(f"PROBLEM {self.problems[-1]}", file=sys.stderr, flush=True)


class Case:
    """One job, made anew for each fault in the same place, and what its output must be."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = root, root / "model"
        self.home, self.made = root / "home", root / "made"
        self.output = self.home / "out.jsonl"
        self.said = root / "said"
        self._hit = mmap.mmap(-1, 8)  # shared with forked processes
        os.environ["BATCHRUN_HOME"] = str(self.home)
        write_tiny_model(self.model)
        prompts = root / "prompts.jsonl"
        rows = [{"prompt": f"number {i}, and what comes behind it", "i": i} for i in range(ROWS)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.home.mkdir()
        self.id = folder.create(self.home, self._spec(prompts)).id
        self.home.rename(self.made)
        self.prepare()
        assert self._resume() == DONE, self.words()
        self.want = self.output.read_bytes()
        assert self.want.count(b'"error": null') == ROWS, self.want

    @property
    def job(self) -> JobFolder:
        return JobFolder(self.home / "jobs" / self.id)

    def prepare(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.made, self.home)
        self.said.unlink(missing_ok=True)

    def strike(self, kind: Kind, error: int, n: int, *, for_good: bool) -> tuple[bool, int]:
        """Whether the n-th request was made, and how the run ended that did not get it."""

        def work() -> int:
            self._listen()
            shim.arm(Fault.FAIL, {kind}, n, error)
            if for_good:
                shim.for_good()
            try:
                return self._run()
            finally:
                self._hit[0] = shim.was_hit()

        self._hit[0] = 1  # it stays where the process dies
        status = forked(work)
        return bool(self._hit[0]), status

    def verify(self, status: int) -> list[str]:
        """What is wrong after a fault, and after a clean process has gone on; best nothing."""
        words = self.words()
        try:
            self._verify(status)
        except AssertionError as error:
            return [str(error) or repr(error)]
        except Exception as error:
            return [said_by(error)]
        finally:
            self.said.write_text(words)  # of the fault, not of the run after it
        return []

    def _verify(self, status: int) -> None:
        assert verify(self.job) == []
        if status == DONE:
            assert self.output.read_bytes() == self.want, "another output"
            return
        assert not self.output.exists() or self.output.read_bytes() == self.want, "a wrong output"
        again = self._resume()
        assert again == DONE, f"the resumed run ended with {ENDS.get(again, again)}: {self.words()}"
        assert verify(self.job) == []
        assert self.output.read_bytes() == self.want, "another output after resuming"

    def words(self) -> str:
        """The last line of what the run said, without what differs from case to case."""
        lines = self.said.read_text(errors="replace").split("\n") if self.said.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "")
        return last.replace(str(self.root), "").replace(self.id, "JOB")[:300]

    def _resume(self) -> int:
        """Run the job in a process to which nothing happens."""

        def work() -> int:
            self._listen()
            return self._run()

        return forked(work)

    def _listen(self) -> None:
        """Keep what this process says from here on; and let it end."""
        handle = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(handle, standard)
        signal.alarm(HANG_S + 10)
        faulthandler.dump_traceback_later(HANG_S, repeat=True)

    def _run(self) -> int:
        """Run the job as `run-job` does; the exit code says how it ended."""
        try:
            end_with_lost_threads(lambda what: os._exit(self._say(what, TOLD)))
            outcome = run_job(self.job.path, stop=threading.Event())
        except StepFailed as error:
            return self._say(str(error), CRASHED)
        except Exception as error:
            known = describe(error)
            if known is None:
                raise
            return self._say(": ".join(filter(None, known)), TOLD)
        except BaseException as error:  # such as a panic of the tokenizer's library
            return self._say(said_by(error), SILENT)
        return DONE if outcome is Outcome.DONE else ROWS_FAILED

    @staticmethod
    def _say(words: str, status: int) -> int:
        os.write(2, f"{words}\n".encode())
        return status

    def _spec(self, prompts: Path) -> JobSpec:
        return JobSpec(
            inputs=(InputFile.of(prompts),),
            input_format="jsonl",
            prompt=PromptSpec(column="prompt"),
            model=ModelSpec(
                name="tiny",
                path=str(self.model),
                fingerprint=fingerprint(self.model),
                dtype="float32",
            ),
            sampling=SamplingSpec(max_tokens=6, temperature=1.0),
            output=OutputSpec(path=str(self.output), format="jsonl"),
        )


def end_of(status: int) -> str:
    if status in ENDS:
        return ENDS[status]
    if status == 1 or status < 0:  # a library has ended the process, by a code or a signal
        return ENDS[SILENT]
    return f"exit code {status}"


def steps(stride: int) -> Iterator[int]:
    yield from range(1, MOST, stride)
    raise AssertionError(f"a run asks {MOST} times: the fault never passed it by")


def run_forked(case: Case, tally: Tally, stride: int, only: list[str]) -> None:
    for for_good in (False, True):
        for call, (kind, errors) in REQUESTS.items():
            if call not in only:
                continue
            for error in errors:
                name = f"{errno.errorcode[error]} at {call}"
                began = time.perf_counter()
                for n in steps(stride * (1 + 4 * for_good)):
                    case.prepare()
                    hit, status = case.strike(kind, error, n, for_good=for_good)
                    found = case.verify(status)
                    title = f"{name} {n}" + " and on" * for_good
                    if not hit:
                        assert status == DONE, f"{title} did not strike, and ended with {status}"
                        assert not found, found
                        break
                    if status not in ALLOWED and end_of(status) != ENDS[SILENT]:
                        found.insert(0, end_of(status))
                    tally.add(title, call, end_of(status), case.words(), found)
                seconds = time.perf_counter() - began
                print(f"{name}{' and on' * for_good}: up to {n}, {seconds:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--stride", type=int, default=1, help="every so many requests")
    parser.add_argument("--only", nargs="+", choices=list(REQUESTS), help="some of the requests")
    options = parser.parse_args()
    scratch = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="allocations-", dir=scratch) as name:
        if shim.unsupported_reason() is not None:
            print(f"left out: {shim.unsupported_reason()}")
            return 0
        if not shim.loaded():
            return shim.run_preloaded(Path(name), "tests.faults.allocations", sys.argv[1:])
        _import_all()
        case, tally, began = Case(Path(name)), Tally(), time.perf_counter()
        run_forked(case, tally, options.stride, options.only or list(REQUESTS))
    for words, count in tally.words.most_common():
        print(f"{count:6,}  {words}")
    report = {
        "benchmark": "faults-allocations",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": ROWS,
        "stride": options.stride,
        "cases": dict(tally.cases),
        "total": tally.cases.total(),
        "outcomes": dict(tally.outcomes),
        "by_call": {call: dict(ends) for call, ends in tally.by_call.items()},
        "problems": tally.problems,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(report))
    return 1 if tally.problems else 0


def _import_all() -> None:
    """What a run imports, here, once; without threads, which a fork would lose."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401, PLC0415

    import batchrun.engine.build  # noqa: F401, PLC0415


if __name__ == "__main__":
    sys.exit(main())
