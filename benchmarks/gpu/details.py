"""The check's figures without a target, as Markdown tables. Imports nothing else of batchrun."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Figures = Mapping[str, Any]


def sections(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[list[str]]:
    """A table for each part with figures, title first."""
    makers = {
        "submit": submit,
        "ceilings": ceilings,
        "steps": steps,
        "job": job,
        "pressure": pressure,
        "host": host,
        "deterministic": deterministic,
        "vmm": vmm,
        "slabs": slabs,
        "layouts": layouts,
        "memory": tests,
        "parity": tests,
        "sanitizer": tests,
    }
    for name, make in makers.items():
        figures = parts.get(name, {}).get("figures")
        if figures:
            yield [f"**{name}**", "", *make(figures)]


def submit(figures: Figures) -> Iterator[str]:
    """The submitted job, and the one that was killed."""
    if "device" in figures:
        yield (
            f"- {figures['rows']:,} rows on {figures['device']} with {figures['attention']}: "
            f"{figures['tokens']:,} tokens in {figures['engine_s']:.1f} s and {figures['steps']:,} "
            f"steps, after {figures['load_s']:.1f} s of loading"
        )
        yield (
            f"- mapping hidden for {figures['map_hidden_s']:.3f} s, exposed for "
            f"{figures['map_exposed_s']:.3f} s; device busy for {figures['device_s']:.2f} s, idle "
            f"between steps for {figures['idle_s']:.2f} s; {figures['preemptions']} preemptions"
        )
        yield from (f"- log: {line}" for line in figures["log"])
    if "answers_in_killed" in figures:
        yield (
            f"- killed with {figures['rows_at_kill']:,} rows done, then resumed: "
            f"{figures['answers_in_killed']:,} rows answered, in order and with the right length"
        )
        if "kill_s" in figures:
            yield (
                f"- its processes were gone {figures['kill_s']:.1f} s after the kill; the resumed "
                f"job ended {figures['resume_s']:.1f} s after it"
            )
    if "same_completions" in figures:
        yield f"- completions equal to the uninterrupted job's: {figures['same_completions']:.1%}"


def ceilings(figures: Figures) -> Iterator[str]:
    """The device's measured limits."""
    if "bandwidth" in figures:
        yield f"- copy: {figures['bandwidth'] / 1e9:,.0f} GB/s, reads plus writes"
    if "matrix" in figures:
        yield f"- bf16 matrix product: {figures['matrix'] / 1e12:,.1f} TFLOP/s"


def steps(figures: Figures) -> Iterator[str]:
    """Decode and prefill in absolute numbers."""
    if "decode_step_s" in figures:
        step, seqs = figures["decode_step_s"], figures["decode_sequences"]
        yield (
            f"- decode: {step * 1e3:.2f} ms per step, {figures['decode_device_s'] * 1e3:.2f} ms "
            f"of it on the device; {seqs} sequences of {figures['decode_context']:.0f} tokens, "
            f"{seqs / step:,.0f} tokens/s"
        )
    if "prefill_s" in figures:
        rate = figures["prefill_tokens"] / figures["prefill_s"]
        yield f"- prefill: {rate:,.0f} tokens/s"
    for row in figures.get("chats", ()):
        yield (
            f"- {row['requests']:,} requests of chat length, {row['sequences']} at a time: "
            f"{row['tokens_per_s']:,.0f} tokens/s out ({row['tokens']:,} in {row['seconds']:.2f} "
            f"s), {row['prompt_tokens'] / row['seconds']:,.0f} in; mapping exposed for "
            f"{row['exposed']:.2%}, device idle for {row['idle']:.2%}"
        )


def job(figures: Figures) -> Iterator[str]:
    """The whole job in absolute numbers."""
    if "seconds" not in figures:
        return
    yield (
        f"- {figures['tokens']:,} tokens in {figures['seconds']:.2f} s "
        f"({figures['tokens_per_s']:,.0f} tokens/s), {figures['steps']:.0f} steps; "
        f"mapping hidden for {figures['hidden']:.2%} of the time, "
        f"{figures['stalls']:.0f} exposed stalls; device idle for {figures['idle']:.2%}"
    )
    if "tokens_per_s_without_overlap" in figures:
        yield (
            f"- without overlap {figures['tokens_per_s_without_overlap']:,.0f} tokens/s; mapping "
            f"hidden for {figures['hidden_without_overlap']:.2%}, device idle for "
            f"{figures['idle_without_overlap']:.2%}"
        )
    for row in figures.get("choices", ()):
        yield (
            f"- {row['choice']}: {row['tokens_per_s']:,.0f} tokens/s, mapping exposed for "
            f"{row['exposed']:.2%}, live / mapped {row['utilisation']:.3f}"
        )


def pressure(figures: Figures) -> Iterator[str]:
    """The job with limited memory."""
    yield (
        f"- {figures['kv_budget'] / 2**30:.1f} GiB for keys and values: {figures['tokens']:,} "
        f"tokens in {figures['seconds']:.2f} s ({figures['tokens_per_s']:,.0f} tokens/s); "
        f"{figures['preemptions']:.0f} preemptions, {figures['recomputed']:,.0f} tokens "
        f"recomputed; live / mapped {figures['utilisation']:.2f}"
    )


def host(figures: Figures) -> Iterator[str]:
    """Small steps, and a profile of the host in one."""
    yield from _head(f"{figures['shape']}, sequences", "per step", "on the device", "idle")
    for row in figures["host"]:
        times = (f"{1e3 * row[name]:.2f} ms" for name in ("step_s", "device_s", "idle_s"))
        yield f"| {row['sequences']} | {' | '.join(times)} |"
    if "functions" in figures:
        yield ""
        yield from _head("function, profiled", "calls per step", "own time per step")
        for row in figures["functions"]:
            yield f"| `{row['function']}` | {row['calls']:.0f} | {row['us']:,.0f} us |"


def deterministic(figures: Figures) -> Iterator[str]:
    """Steps without and with --deterministic, rows that differ, and linear layers."""
    columns = "decode step", "prefill, tokens/s", "rows that differ in another batch"
    yield from _head(f"{figures.get('shape')}, {figures.get('layers')} layers", *columns)
    for row in figures.get("steps", ()):
        name = "deterministic" if row["deterministic"] else "as usual"
        rate = row["prefill_tokens"] / row["prefill_s"]
        step = f"{1e3 * row['decode_step_s']:.2f} ms"
        yield f"| {name} | {step} | {rate:,.0f} | {row['differ']} of {row['compared']} |"
    if "linear" in figures:
        yield ""
        yield from _head("linear layer, tokens", "torch", "row by row", "same bits")
        for row in figures["linear"]:
            name = f"{row['rows']:,} x {row['columns']:,}, {row['tokens']:,}"
            times = f"{row['torch_us']:,.0f} us | {row['rowwise_us']:,.0f} us"
            yield f"| {name} | {times} | {'yes' if row['same'] else 'NO'} |"


def vmm(figures: Figures) -> Iterator[str]:
    """Microseconds by range length, and the effect of the calls on running kernels."""
    ranges = figures.get("ranges", [])
    names = [name for name in ranges[0] if name != "pages"] if ranges else []
    yield from _head(f"pages of {figures['granularity'] >> 10:,} KiB", *names)
    for row in ranges:
        yield f"| {row['pages']} | {' | '.join(f'{row[name]:,.1f} us' for name in names)} |"
    yield ""
    if "sizes" in figures:
        yield from _head("one page of", *names)
        for row in figures["sizes"]:
            cells = " | ".join(f"{row[name]:,.1f} us" for name in names)
            yield f"| {row['bytes'] >> 10:,} KiB | {cells} |"
        yield ""
    yield from _head(
        "call", "idle device", "during copies", "longest", "copies alone", "copies during calls"
    )
    for name in ("create", "map", "unmap"):
        found = figures.get(f"under_{name}")
        if found:
            yield (
                f"| {name}, {found['pages']} pages | {found['idle_us']:,.1f} us "
                f"| {found['busy_us']:,.1f} us | {found['longest_busy_us']:,.1f} us "
                f"| {found['copies_alone_s'] * 1e3:.1f} ms "
                f"| {found['copies_beside_s'] * 1e3:.1f} ms |"
            )


def slabs(figures: Figures) -> Iterator[str]:
    """Decode attention and waste by layers per slab."""
    yield (
        f"{figures['shape']}, {figures['sequences']} sequences of {figures['tokens']:,} tokens, "
        f"{figures['slabs'][0]['attention']}"
    )
    yield ""
    yield from _head(
        "layers per slab", "attention per layer", "KV read", "waste", "waste in the load"
    )
    for row in figures["slabs"]:
        yield (
            f"| {row['layers_per_slab']} | {row['layer_s'] * 1e6:,.0f} us "
            f"| {row['bandwidth'] / 1e9:,.1f} GB/s | {row['waste']:.1%} "
            f"| {row['waste_of_load']:.1%} |"
        )


def layouts(figures: Figures) -> Iterator[str]:
    """Contiguous slots against pages, by workload and kernel."""
    pages = figures["page_tokens"]
    yield from _head(
        figures["shape"], "kernel", "contiguous", f"pages of {pages}", "contiguous is", "difference"
    )
    for row in figures["layouts"]:
        kind = "decode" if row["queries"] == 1 else "prefill"
        label = f"{kind}, {row['sequences']} x {row['tokens']:,}"
        if "reason" in row:
            yield f"| {label} | {row['backend']} | none: {row['reason']} | | | |"
            continue
        paged = row.get("paged_s")
        rest = " | | "
        if paged:
            times = paged / row["contiguous_s"]
            rest = f"{paged * 1e6:,.0f} us | {times:.2f} times as fast | {row['difference']:.1g}"
        yield f"| {label} | {row['backend']} | {row['contiguous_s'] * 1e6:,.0f} us | {rest} |"


def tests(figures: Figures) -> Iterator[str]:
    """Counts of tests."""
    yield ", ".join(f"{count} {outcome}" for outcome, count in figures.items())


def _head(*columns: str) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
