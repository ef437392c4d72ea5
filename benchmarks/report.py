"""Generates the tables of benchmarks/README.md from the JSON lines in benchmarks/results/.

python benchmarks/throughput.py | tail -n 1 > benchmarks/results/NAME.json
make gpu-check
python benchmarks/report.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.details import sections

HERE = Path(__file__).parent
ELSEWHERE = ("faults-", "fuzz-")  # shown in docs/durability.md and docs/memory.md
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"


def throughput(result: dict[str, Any]) -> Iterator[str]:
    yield f"### {result['model']}, {result['rows']} prompts, greedy, {result['dtype']}"
    yield ""
    yield f"{result['machine']}; torch {result['torch']}, transformers {result['transformers']};"
    yield f"{result['date']}; `{result['command']}`; {result['completion_tokens']:,} completion"
    yield f"tokens; live / mapped KV memory {result['utilisation']:.1%}."
    yield ""
    yield "| | completion tokens/s | seconds per run | same completions |"
    yield "|---|---|---|---|"
    for name, way in result["ways"].items():
        seconds = ", ".join(f"{s:.1f}" for s in way["seconds"])
        same = f"{way['same_completions']} of {result['rows']}"
        yield f"| {name} | {way['tokens_per_s']:.1f} | {seconds} | {same} |"
    yield ""
    yield f"batchrun is {result['ratio_to_generate']:.2f} times as fast as `generate` at its"
    yield f"better batch size, {result['ratio_to_generate_batch']:.2f} times as `generate_batch`."


def joblayer(result: dict[str, Any]) -> Iterator[str]:
    yield "### The job layer alone: Parquet to journal to Parquet, with a null engine"
    yield ""
    yield "| rows | run and export, rows/s | journal, rows/s | resume scan | peak memory |"
    yield "|---|---|---|---|---|"
    for size in (result["small"], result["large"]):
        yield (
            f"| {size['rows']:,} | {size['rows_per_s']:,.0f} | {size['journal_rows_per_s']:,.0f} "
            f"| {size['resume_s']:.2f} s | {size['peak_rss'] / 2**20:.0f} MiB |"
        )
    yield ""
    yield f"Ten times as many rows take {result['ratio']:.3f} times the memory."


def sigkill(result: dict[str, Any]) -> Iterator[str]:
    yield "### SIGKILL at random moments"
    yield ""
    yield (
        f"Jobs with {result['rows']} rows through {result['model']} were killed {result['kills']} "
        f"times: {result['runs']} runs, {result['runs_that_left_part_of_the_rows']} of which left "
        "some rows unfinished. Every output equals the uninterrupted one; journalled rows "
        f"computed again: {result['journalled_rows_computed_again']}."
    )


def sharing(result: dict[str, Any]) -> Iterator[str]:
    yield f"### Shared prefixes, samples, low memory: {result['model']}, {result['dtype']}"
    yield ""
    yield f"{result['machine']}; `{result['command']}`."
    yield ""
    if part := result.get("prefix"):
        yield (
            f"* {part['rows']} rows with a common prefix of 600 tokens: "
            f"{part['prefill_tokens']:,} prompt tokens computed (the minimum is "
            f"{part['prefill_tokens_least']:,}), {part['prefill_tokens_without']:,} without "
            f"sharing. {part['tokens_per_s_ratio']:.2f} times as fast, with "
            f"{part['kv_mapped_ratio']:.1f} times less memory on average and "
            f"{part['peak_kv_mapped_ratio']:.1f} times less at the peak. "
            f"{part['same_completions']} of {part['rows']} completions are the same."
        )
    if part := result.get("samples"):
        yield (
            f"* {part['n']} samples each of {part['rows']} prompts of 512 tokens: peak memory is "
            f"{part['peak_to_ideal']:.3f} times the size of the tokens."
        )
    if part := result.get("pressure"):
        yield (
            f"* {part['rows']} rows with a third of the memory that they need together: "
            f"{part['preemptions']} preemptions, {part['recomputed_share']:.1%} of the tokens "
            f"recomputed, {part['same_completions']} of {part['rows']} completions the same, "
            f"{part['seconds'] / part['seconds_with_ample_memory']:.2f} times the time."
        )


def peers(result: dict[str, Any]) -> Iterator[str]:
    yield f"### Peers, {', '.join(result['workloads'])}: {result['model']}, {result['dtype']}"
    yield ""
    yield f"{result['machine']}; {result['date']}; `{result['command']}`. Medians; memory is the"
    yield "process tree's proportional set size."
    for name, found in result["workloads"].items():
        yield ""
        yield f"{name}: {found['rows']:,} rows, {found['completion_tokens']:,} completion tokens"
        yield ""
        yield "| | tokens/s | seconds per run | whole process | peak memory | batchrun is |"
        yield "|---|---|---|---|---|---|"
        for way, figures in found["ways"].items():
            seconds = ", ".join(f"{s:.1f}" for s in figures["seconds"])
            ratio = found["ratios"].get(way)
            versions = ", ".join(f"{k} {v}" for k, v in figures["versions"].items())
            yield (
                f"| {way} ({versions}) | {figures['tokens_per_s']:.1f} | {seconds} "
                f"| {figures['process_s']:.0f} s | {figures['peak_memory'] / 2**20:,.0f} MiB "
                f"| {f'{ratio:.2f}x' if ratio else ''} |"
            )
        for way, reason in found["failures"].items():
            yield f"\n{way} failed: {reason.splitlines()[-1]}"


def plancounts(result: dict[str, Any]) -> Iterator[str]:
    yield "### Planned and unplanned order, simulated without a model"
    yield ""
    yield (
        "| workload, rows | tokens computed, planned | unplanned | ratio | `stats` estimates "
        "| steps, planned | unplanned | `stats` estimates |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for name, found in result["workloads"].items():
        planned, unplanned = found["planned"], found["unplanned"]
        tokens, steps = planned["saved"]
        yield (
            f"| {name} | {planned['computed']:,} | {unplanned['computed']:,} "
            f"| {found['ratio']:.2f} | {tokens:,} saved "
            f"| {planned['steps']:,} | {unplanned['steps']:,} | {steps:,} saved |"
        )


def planner(result: dict[str, Any]) -> Iterator[str]:
    large, small = result["large"], result["small"]
    yield "### Planning alone, with prompts of 200 tokens"
    yield ""
    yield (
        f"{large['rows']:,} rows: {large['us_a_row']:.0f} us per row, {result['share']:.2%} of a "
        f"job of {result['job_s']:,.0f} s; peak memory {large['peak_rss'] / 2**20:.0f} MiB, "
        f"{result['ratio']:.3f} times that of {small['rows']:,} rows."
    )


def planner_real(result: dict[str, Any]) -> Iterator[str]:
    yield "### A job with and without planning: 300-token documents, 8 questions each, shuffled"
    yield ""
    yield f"{result['machine']}; {result['date']}; `{result['command']}`."
    yield f"{result['same_rows']:,} of {result['rows']:,} rows have the same answer."
    yield ""
    yield "| | engine, seconds | prompt tokens computed | steps | tail |"
    yield "|---|---|---|---|---|"
    for name, way in (("planned", result["reorder"]), ("`--no-reorder`", result["no-reorder"])):
        yield (
            f"| {name} | {way['engine_s']:.1f} | {way['prefilled']:,} | {way['steps']:,} "
            f"| {way['tail_s']:.1f} s |"
        )
    yield ""
    yield f"Planning makes it {result['ratio']:.2f} times as fast."


def cpusteps(result: dict[str, Any]) -> Iterator[str]:
    yield f"### Steps on a CPU: {result['model']}, bfloat16, {result['workload']}"
    yield ""
    yield f"{result['machine']}; torch {result['torch']}; {result['date']}; `{result['command']}`."
    yield f"Ceilings in the same run: {result['bandwidth'] / 1e9:.1f} GB/s read,"
    yield f"{result['matrix'] / 1e9:,.0f} GFLOP/s."
    yield ""
    yield "| | all steps | decode steps |"
    yield "|---|---|---|"
    share, of_decodes = result["of_roofline"], result["of_roofline_decodes"]
    yield f"| share of the roofline | {share:.2f} | {of_decodes:.2f} |"
    outside, in_decodes = result["outside_forward"], result["outside_forward_decodes"]
    yield f"| time outside the model's forward | {outside:.1%} | {in_decodes:.1%} |"
    yield ""
    yield f"{result['tokens_per_s']:,.0f} completion tokens/s. With draft tokens, the default:"
    yield f"{result['drafting_tokens_per_s']:,.0f}, or {result['drafting_of_roofline']:.2f} of the"
    yield "roofline for steps that compute one token per row."


def _versions(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items())


def shapes(result: dict[str, Any]) -> Iterator[str]:
    yield "### What the shape of an answer costs: a JSON schema against free text"
    yield ""
    versions = _versions(result)
    yield f"{result['machine']}; {versions}; {result['date']}; `{result['command']}`;"
    yield f"{result['rows']} rows of {result['model']}, {result['kernels']}."
    yield ""
    yield "| answers | ms a step of one token a row | steps a row | tokens a row | seconds |"
    yield "|---|---|---|---|---|"
    for name, steps in result["steps_a_row"].items():
        step = result["step_ms"].get(name)
        shown = "" if step is None else f"{step:.2f}"
        tokens, seconds = result["tokens_a_row"][name], result["seconds"][name]
        yield f"| {name} | {shown} | {steps:.1f} | {tokens:.1f} | {seconds:.2f} |"
    yield ""
    yield f"A step takes {result['ratio']:.2f} times as long as without a schema."


def speculation(result: dict[str, Any]) -> Iterator[str]:
    yield f"### What draft tokens gain: {result['model']}, bfloat16, on a CPU"
    yield ""
    versions = _versions(result)
    yield f"{result['machine']}; {versions}; {result['date']}; `{result['command']}`;"
    yield f"{result['kernels']}. The same answers in every way."
    yield ""
    yield "| | answers | tokens/s | over none | over own text | draft tokens right | estimated |"
    yield "|---|---|---|---|---|---|---|"
    for name, each in result["workloads"].items():
        way = each["ways"]["all"]
        share = f"{way['accepted'] / way['drafted']:.0%}" if way["drafted"] else ""
        yield (
            f"| {name} | {each['answers']} | {each['tokens_per_s']['all']:,.0f} "
            f"| {each['over_off']:.2f} | {each['over_own_text']:.2f} "
            f"| {way['accepted']:,} of {way['drafted']:,} {share} | {way['saved_s']:.1f} s saved |"
        )


def overlap(result: dict[str, Any]) -> Iterator[str]:
    yield "### Draft tokens with a step in flight, over a simulated GPU"
    yield ""
    yield f"{result['date']}; `{result['command']}`. Tokens/s of the real scheduler over a formula."
    yield ""
    yield "| model, rows, share of guesses right, of rows | none | all wait | as decided |"
    yield "|---|---|---|---|"
    for name, speeds in result["speeds"].items():
        yield f"| {name} | {' | '.join(f'{speed:,}' for speed in speeds.values())} |"


def quality(result: dict[str, Any]) -> Iterator[str]:
    yield f"### Effect of lower precision: {result['model']}"
    yield ""
    yield f"{result['machine']}; torch {result['torch']}; {result['date']}; `{result['command']}`;"
    yield f"{result['tokens']:,} tokens of this project's documents."
    yield ""
    sizes = [*next(iter(result["ways"].values()))["tokens_per_s"]]
    speeds = " | ".join(f"decode tokens/s, {size} sequences" for size in sizes)
    yield f"| | perplexity | same likeliest token as float32 | divergence | weights | {speeds} |"
    yield f"|---|---|---|---|---|{'---|' * len(sizes)}"
    for way, row in result["ways"].items():
        rates = " | ".join(f"{rate:,.0f}" for rate in row["tokens_per_s"].values())
        yield (
            f"| {way} | {row['perplexity']:.2f} | {row['same_top']:.1%} | {row['divergence']:.4f} "
            f"| {row['weights_mib']:.0f} MiB | {rates} |"
        )


def gpu_check(result: dict[str, Any]) -> Iterator[str]:
    device = result["device"]
    versions = _versions(result)
    yield f"### {device.get('name', 'no device')}"
    yield ""
    yield f"{versions}; driver {device.get('driver_version', 'unknown')}; {result['date']},"
    yield f"commit {result['commit']}; `{result['command']}`; {result['seconds']:.0f} s."
    yield ""
    yield "| figure | measured | target | |"
    yield "|---|---|---|---|"
    verdicts = {True: "met", False: "missed", None: ""}
    for row in result["table"]:
        cells = (row["figure"], row["shown"], row["target"], verdicts[row["met"]])
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
    for name, part in result["parts"].items():
        if part["status"] != "done":
            yield f"\n`{name}` {part['status']}: {part.get('reason', 'no reason given')}"
        if "commit" in part:
            yield f"\n`{name}` was measured at commit {part['commit']}."
    for lines in sections(result["parts"]):
        yield ""
        yield from lines


def fleet(result: dict[str, Any]) -> Iterator[str]:
    yield "### Two workers on the CPU against one engine, on the same cores"
    yield ""
    yield f"{result['machine']}; `python -m benchmarks.fleet`; the outputs were equal."
    yield ""
    yield "| workload | rows | one engine | two workers | in all | without loading | idle |"
    yield "|---|---|---|---|---|---|---|"
    for name, found in result["workloads"].items():
        idle = max(share for run in found["idle"] for share in run)
        yield (
            f"| {name} | {found['rows']:,} | {found['one_wall_s']:.1f} s "
            f"| {found['two_wall_s']:.1f} s | {found['wall_s_ratio']:.3f} "
            f"| {found['engine_s_ratio']:.3f} | {idle:.1%} at most |"
        )


def coordinator(result: dict[str, Any]) -> Iterator[str]:
    yield f"### What one coordinator keeps up with: {result['prompts']}"
    yield ""
    yield f"{result['machine']}; {result['rows']:,} rows, {result['answer_tokens']} tokens each."
    yield ""
    yield "| workers | rows/s | output tokens/s | processor time a row |"
    yield "|---|---|---|---|"
    for found in result["ceiling"]:
        yield (
            f"| {found['workers']} | {found['rows_per_s']:,} | {found['tokens_per_s']:,} "
            f"| {found['coordinator_us_per_row']} us |"
        )


SECTIONS = {
    "fleet": fleet,
    "coordinator": coordinator,
    "throughput": throughput,
    "joblayer": joblayer,
    "sigkill": sigkill,
    "sharing": sharing,
    "peers": peers,
    "plancounts": plancounts,
    "planner": planner,
    "planner-real": planner_real,
    "cpusteps": cpusteps,
    "quality": quality,
    "shapes": shapes,
    "speculation": speculation,
    "overlap": overlap,
    "gpu-check": gpu_check,
}


def render() -> str:
    paths = sorted((HERE / "results").glob("*.json"))
    found = [json.loads(p.read_text()) for p in paths if not p.name.startswith(ELSEWHERE)]
    made = ["\n".join(SECTIONS[result["benchmark"]](result)) for result in found]
    if not any(result["benchmark"] == "gpu-check" for result in found):
        made.append("### GPU\n\nNo GPU has been checked yet, so there are no figures.")
    return "\n\n".join(made)


def main() -> int:
    readme = HERE / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    made = f"{head}{BEGIN}{render()}\n{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        return int(made != text)
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
