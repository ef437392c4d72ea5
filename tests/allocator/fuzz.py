"""Many random operations on arenas, every live byte and every invariant checked after each.

    python -m tests.allocator.fuzz --operations 100000 --memory fake-cuda

The operations are those of arena_model.py: open, share, fork, grow, truncate, close, keep, drop,
launch, execute, retire with lag, trim, budgets that change, preemption of all but one. The last
line is JSON: what was done, how often, and what it came to.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EPISODE = 2000  # operations on one arena


def fuzz(operations: int, seed: int) -> dict[str, object]:
    """Run operations over this process's memory; raises where anything is wrong."""
    from arena_model import LAYOUTS, ArenaModel  # noqa: PLC0415 - the memory is chosen before

    rng, counts, begin = random.Random(seed), Counter[str](), time.perf_counter()
    for first in range(0, operations, EPISODE):
        model = ArenaModel(
            LAYOUTS[first // EPISODE % len(LAYOUTS)],
            num_slots=rng.randint(3, 12),
            budget=rng.choice([None, rng.randint(8, 40), rng.randint(40, 120)]),
            slack=rng.choice([0.0, 0.05, 1.0]),
        )
        for number in range(first, min(first + EPISODE, operations)):
            try:
                counts[operate(model, rng)] += 1
                model.check()
            except BaseException:
                print(f"at operation {number} of seed {seed}", file=sys.stderr)
                raise
        usage = model.arena.usage()
        model.counts.update(maps=usage.work["map"].calls, unmaps=usage.work["unmap"].calls)
        model.finish()
        counts.update(model.counts)
    return {
        "operations": operations,
        "seed": seed,
        "arenas": -(-operations // EPISODE),
        "seconds": round(time.perf_counter() - begin, 1),
        "counts": dict(sorted(counts.items())),
    }


def operate(model, rng: random.Random) -> str:
    """One random operation. Returns its name."""
    live, kept, left = sorted(model.open_slots), sorted(model.kept), sorted(model.left)
    tokens = rng.choice([rng.randint(0, 96), rng.randint(0, 16)])
    choices = {"open": 6, "launch": 12, "retire": 8, "trim": 1, "run_alone": 0.1}
    choices |= {"share": 10} if live or kept or left else {}
    choices |= {"grow": 14, "fork": 5, "truncate": 2, "close": 10, "keep": 2} if live else {}
    shared = [s for s in live if model.arena._slots[s].aliased_end]
    choices |= {"rewrite": 6} if shared else {}
    choices |= {"drop": 1 + len(kept)} if kept else {}
    choices |= {"execute": 4} if model.running else {}
    choices |= {"budget": 2} if model.budget is not None else {}
    name = rng.choices([*choices], [*choices.values()])[0]
    slot = rng.choice(live) if live else 0
    match name:
        case "open" | "run_alone":
            getattr(model, name)(tokens)
        case "share":
            groups = [slots for slots in (live, kept, left) if slots]
            model.share(rng.choice(rng.choice(groups)), tokens, rng.randint(0, 96))
        case "fork":
            model.share(slot, model.shareable(slot), tokens)
        case "grow":
            length = len(model.open_slots[slot].names)
            model.ensure(slot, min(96, length + rng.choice([0, 1, 1, 2, 5, 20, 50])))
        case "truncate":
            model.ensure(slot, rng.randint(0, len(model.open_slots[slot].names)))
        case "rewrite":
            slot = rng.choice(shared)
            end = min(len(model.open_slots[slot].names), model.arena._slots[slot].aliased_end)
            begin = rng.randint(0, end)
            if model.ensure(slot, begin):
                model.ensure(slot, rng.randint(begin, 96))
        case "close" | "keep":
            model.close(slot, tokens if name == "keep" else 0, late=rng.random() < 0.5)
        case "drop":
            model.drop(rng.choice(kept))
        case "retire":
            model.retire(rng.choice([0, 0, 1, 1, 2, 3]))
        case "budget":
            model.set_budget(rng.randint(-8, 16))
        case _:
            getattr(model, name)()
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=100_000)
    memories = ["host", "unguarded-host", "fake-cuda", "cuda"]
    parser.add_argument("--memory", choices=memories, default="host")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.environ.get("BATCHRUN_TEST_MEMORY") == args.memory:
        sys.path[:0] = [str(HERE)]
        result = fuzz(args.operations, args.seed)
        print(json.dumps({"benchmark": "fuzz-arena", "memory": args.memory, **result}))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "BATCHRUN_TEST_MEMORY": args.memory}
        if args.memory == "fake-cuda":
            source = ROOT / "tests" / "fake_cuda" / "driver.c"
            options = ["-std=c11", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]
            subprocess.run(["cc", *options, "-o", f"{folder}/libcuda.so.1", source], check=True)
            path = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
            environment |= {"LD_LIBRARY_PATH": path, "FAKE_CUDA_GRANULARITY": "4096"}
        command = [sys.executable, "-m", "tests.allocator.fuzz", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
