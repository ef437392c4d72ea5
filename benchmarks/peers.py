"""The same file through batchrun and through its peers, in turn, in one run.

    make peers                                  # each into an environment of its own
    python -m benchmarks.peers                  # every workload, every peer that is installed
    python -m benchmarks.peers --workloads mixed --only batchrun vllm --rows 40 --repeat 1

Every peer has the same model in bfloat16, all cores, and the settings that its own documentation
recommends; the adapters in `benchmarks/peers/` tell them with the reasons. Decoding is greedy and
every row makes exactly its `max_tokens`, which each adapter checks. Peers that can guess tokens
from a row's own text, as batchrun does on a CPU, run with and without: it pays where answers repeat
themselves, as greedy answers to prompts without meaning do.

Tokens/s are completion tokens over the seconds from the first prompt, as text, until the last
answer: tokenising is counted; loading, compiling and warming up are not. For batchrun these are the
job's seconds without loading and export, with its reading, planning and durable journal. Process
seconds are all of it, from start to exit. Peak memory is that of the whole process tree: the
proportional set size, where a page that several processes share or map twice counts once, looked at
every second; beside it the processes' largest resident sets, summed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from batchrun.jobs.folder import home
from batchrun.machine import description
from batchrun.models.resolve import DEFAULT_MODEL, resolve
from benchmarks.processes import FailedError, adopt_orphans, measured
from benchmarks.workloads import WORKLOADS, generate, write

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".peers"  # where `make peers` puts them
ADAPTERS = Path(__file__).parent / "peers"
BATCHRUN = "batchrun"
# With its defaults, and with as many sequences at once as llama.cpp, the leanest, does best with.
OURS: dict[str, tuple[str, ...]] = {BATCHRUN: (), "batchrun 16": ("--max-num-seqs", "16")}


@dataclass(frozen=True)
class Peer:
    """How a peer is started.

    Attributes:
        python: The interpreter of its environment.
        adapter: A script in `benchmarks/peers/`.
        needs: Files without which it is not installed.
        prepare: Makes its form of the model, if there is none yet: a command.
        options: Given to the adapter.
        devices: Where it can compute.
    """

    python: Path
    adapter: str
    needs: tuple[Path, ...] = ()
    prepare: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu",)


def peers() -> dict[str, Peer]:
    """All that this benchmark knows, installed or not."""
    ours, both = Path(sys.executable), ("cpu", "cuda")
    openvino, llama = PEERS / "openvino" / "bin", PEERS / "llama"
    server = llama / "bin" / "llama-server"
    export = (str(openvino / "optimum-cli"), "export", "openvino", "--model", "{model}", "--task")
    convert = ("env", f"PYTHONPATH={llama / 'convert'}", sys.executable)
    convert += (str(llama / "src" / "convert_hf_to_gguf.py"), "{model}")
    vllm = Peer(
        PEERS / "vllm" / "bin" / "python",
        "vllm_offline.py",
        needs=(PEERS / "vllm" / ".done",),
        devices=both,
    )
    # As its documentation has it.
    ngram = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
    genai = Peer(
        openvino / "python",
        "openvino_cb.py",
        needs=(PEERS / "openvino" / ".done",),
        prepare=(*export, "text-generation-with-past", "--weight-format", "fp16", "{made}"),
    )
    return {
        "transformers static": Peer(ours, "transformers_ways.py", devices=both),
        "transformers generate_batch": Peer(
            ours, "transformers_ways.py", options={"continuous": True}, devices=both
        ),
        "vllm": vllm,
        "vllm ngram": replace(vllm, options={"speculative_config": ngram}),
        "openvino": genai,
        "openvino lookup": replace(genai, options={"prompt_lookup": True}),
        "llama.cpp": Peer(
            ours,
            "llama_server.py",
            needs=(server,),
            prepare=(*convert, "--outtype", "bf16", "--outfile", "{made}"),
            options={"binary": str(server)},
        ),
    }


def run_peer(
    peer: Peer, model: Path, file: Path, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One run of a peer's adapter."""
    out = folder / "result.json"
    arguments = {"--model": model, "--input": file, "--out": out, "--device": args.device}
    command = [str(peer.python), str(ADAPTERS / peer.adapter), "--options"]
    command.append(json.dumps(dict(peer.options)))
    command += [str(part) for pair in arguments.items() for part in pair]
    figures = measured(command, {"HF_HUB_OFFLINE": "1"}, folder / "log.txt", args.timeout)
    return {**json.loads(out.read_text()), **figures}


def run_batchrun(
    more: tuple[str, ...], model: Path, file: Path, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One job, as a user starts it, in a home of its own that knows the model's verdict already."""
    made = folder / "home"
    made.mkdir(exist_ok=True)
    if (home() / "verdicts").is_dir() and not (made / "verdicts").exists():
        shutil.copytree(home() / "verdicts", made / "verdicts")
    output = folder / "completions.jsonl"
    command = [sys.executable, "-m", "batchrun", "submit", str(file), "--model", str(model)]
    command += ["--dtype", "bfloat16", "--device", args.device, "--temperature", "0", "--again"]
    command += ["--output", str(output), "--overwrite", "--json", *more]
    environment = {"BATCHRUN_HOME": str(made)}
    figures = measured(command, environment, folder / "log.txt", args.timeout)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    wrong = [row for row in rows if row["completion_tokens"] != row["max_tokens"]]
    if wrong:
        raise FailedError(f"{len(wrong)} of {len(rows)} rows have not the tokens that they ask for")
    newest = max((made / "jobs").iterdir(), key=lambda job: job.stat().st_mtime)
    stats = json.loads((newest / "stats.json").read_text())
    spent = stats["time"]
    return {
        "seconds": spent["wall_s"] - spent["load_s"] - spent["export_s"],
        "load_s": spent["load_s"],
        "completion_tokens": sum(row["completion_tokens"] for row in rows),
        "settings": {
            "dtype": "bfloat16",
            "attention": stats["attention"],
            **dict(zip(more[::2], more[1::2], strict=True)),
        },
        "versions": {
            "batchrun": version("batchrun-llm"),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        **figures,
    }


def prepared(name: str, peer: Peer, model: Path, fingerprint: str) -> Path:
    """The model in the form that a peer reads, made when there is none yet.

    Raises:
        FailedError: It could not be made.
    """
    if not peer.prepare:
        return model
    made = PEERS / "models" / f"{fingerprint[:16]}-{Path(peer.adapter).stem}"
    if not made.exists():
        print(f"{name}: converting the model", file=sys.stderr)
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_name(f"part-{made.name}")
        values = {"model": model, "made": part}
        command = [word.format(**values) for word in peer.prepare]
        if code := subprocess.run(command, check=False, stdout=sys.stderr).returncode:
            raise FailedError(f"converting the model ended with {code}")
        part.rename(made)
    return made


Way = Callable[[Path, Path], dict[str, Any]]  # one run on a file, in an empty folder


def ways(args: argparse.Namespace) -> tuple[dict[str, Way], dict[str, str]]:
    """How each chosen engine is run, and why those cannot be whose model could not be made."""
    ref = resolve(args.model, home() / "models")
    found: dict[str, Way] = {}
    failures: dict[str, str] = {}
    for name, more in OURS.items():
        if not args.only or name in args.only:
            found[name] = lambda file, folder, more=more: run_batchrun(
                more, ref.path, file, folder, args
            )
    for name, peer in installed(args.device).items():
        if args.only and name not in args.only:
            continue
        try:
            model = prepared(name, peer, ref.path, ref.fingerprint)
        except (FailedError, OSError) as error:
            failures[name] = str(error)
            continue
        found[name] = lambda file, folder, peer=peer, model=model: run_peer(
            peer, model, file, folder, args
        )
    return found, failures


def compare(
    name: str,
    file: Path,
    ways: Mapping[str, Way],
    args: argparse.Namespace,
    done: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One workload through all, in turn; medians.

    A way that fails is not run again, and spoils nothing: what it has finished counts, and its
    reason is told. One that is slow is not run again either.

    Args:
        name: Of the workload, for what is printed.
        file: Its rows.
        ways: Runs of each engine.
        args: `repeat` and `once_over`.
        done: Takes the result so far, after each run.
    """
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    result: dict[str, Any] = {
        "rows": len(rows),
        "completion_tokens": sum(row["max_tokens"] for row in rows),
        "ways": {},
        "failures": {},
        "ratios": {},
    }
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(args.repeat):
        for way, run in ways.items():
            slow = any(figures["process_s"] > args.once_over for figures in runs[way])
            if slow or way in result["failures"]:
                continue
            label = f"{name}, {way}, {number + 1}"
            try:
                with tempfile.TemporaryDirectory(prefix="peers-") as folder:
                    runs[way].append(run(file, Path(folder)))
            except (FailedError, OSError, ValueError, KeyError) as error:
                result["failures"][way] = str(error)
                print(f"{label}: failed: {error}\n{getattr(error, 'log', '')}", file=sys.stderr)
            else:
                speed = runs[way][-1]["completion_tokens"] / runs[way][-1]["seconds"]
                print(f"{label}: {speed:.0f} tokens/s", file=sys.stderr)
                result["ways"] = {way: summary(found) for way, found in runs.items() if found}
                result["ratios"] = ratios(result["ways"])
            done(result)
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a way's runs, and what does not change between them."""
    middle = statistics.median(run["seconds"] for run in runs)
    return {
        "tokens_per_s": round(runs[0]["completion_tokens"] / middle, 1),
        "seconds": [round(run["seconds"], 2) for run in runs],
        "process_s": round(statistics.median(run["process_s"] for run in runs), 1),
        "load_s": round(statistics.median(run["load_s"] for run in runs), 1),
        "peak_memory": int(statistics.median(run["peak_memory"] for run in runs)),
        "peak_resident_sum": int(statistics.median(run["peak_resident_sum"] for run in runs)),
        "settings": runs[0]["settings"],
        "versions": runs[0]["versions"],
    }


def ratios(ways: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Speed of batchrun over each other way's, and memory over the leanest's."""
    others = {name: way for name, way in ways.items() if name not in OURS}
    if BATCHRUN not in ways or not others:
        return {}
    ours = ways[BATCHRUN]
    found = {name: ours["tokens_per_s"] / way["tokens_per_s"] for name, way in others.items()}
    leanest = min(way["peak_memory"] for way in others.values())
    found["fastest peer"] = min(found.values())
    found["memory of the leanest"] = ours["peak_memory"] / leanest
    return {name: round(value, 2) for name, value in found.items()}


def table(name: str, result: Mapping[str, Any]) -> None:
    print(f"\n{name}: {result['rows']} rows, {result['completion_tokens']:,} completion tokens")
    print(f"{'':28} {'tokens/s':>9} {'process s':>10} {'peak MiB':>9} {'batchrun is':>12}")
    for way, figures in result["ways"].items():
        ratio = result["ratios"].get(way)
        print(
            f"{way:28} {figures['tokens_per_s']:9.1f} {figures['process_s']:10.1f} "
            f"{figures['peak_memory'] / 2**20:9.0f} {f'{ratio:.2f}x' if ratio else '':>12}"
        )
    for way, reason in result["failures"].items():
        print(f"{way:28} failed: {reason}")


def installed(device: str) -> dict[str, Peer]:
    """The peers that can run here."""
    return {
        name: peer
        for name, peer in peers().items()
        if device in peer.devices and all(path.exists() for path in (peer.python, *peer.needs))
    }


def _told(words: list[str]) -> list[str]:
    """A command's words without the file that it writes: where that lies is nobody else's."""
    at = words.index("--out") if "--out" in words else len(words)
    return words[:at] + words[at + 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--only", nargs="*", choices=[*OURS, *peers()], metavar="NAME")
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rows", type=int, help="default: as each workload says")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--once-over",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="what took longer than this, with loading, is not repeated",
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for each run; a peer that is slower fails"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--out", type=Path, help="the JSON line, written after each run")
    args = parser.parse_args()
    adopt_orphans()
    chosen, failures = ways(args)
    if missing := sorted(set(args.only or peers()) - set(chosen) - set(failures)):
        print(f"not here: {', '.join(missing)}; `make peers` installs them", file=sys.stderr)
    line: dict[str, Any] = {
        "benchmark": "peers",
        "command": f"python -m benchmarks.peers {shlex.join(_told(sys.argv[1:]))}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": description(),
        "device": args.device,
        "model": resolve(args.model, home() / "models").name,
        "dtype": "bfloat16",
        "workloads": {},
    }

    with tempfile.TemporaryDirectory(prefix="workloads-") as folder:
        for name in args.workloads:
            file = Path(folder) / f"{name}.jsonl"
            write(file, generate(name, args.rows))

            def done(result: dict[str, Any], name: str = name) -> None:
                result["failures"] = {**failures, **result["failures"]}
                line["workloads"][name] = result
                if args.out:
                    keep(args.out, line)

            table(name, compare(name, file, chosen, args, done))
    print(json.dumps(line))


def keep(path: Path, line: Mapping[str, Any]) -> None:
    """Put the line in a file at once: what is read there is always whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(f"{json.dumps(line)}\n")
    part.replace(path)


if __name__ == "__main__":
    main()
