"""Results as text and as docs/benchmarks.md. Both come from the JSON alone: no number is written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_backend.bench.cases import CASES, GPU_CASES, REBUILT, STREAMING

FORMAT = 1

HEADS = (
    "path", "events", "spikes %", "active %", "forward ms", "backward ms", "whole ms", "forward", "backward", "whole",
    "kept MB", "of stock",
)  # fmt: skip
PARTS = ("forward", "backward", "whole")
PEAK_HEADS = ("peak MB", "of stock")

LEGEND = (
    "Times are medians of interleaved repeats in one process. Forward is with the loss; whole is a training step: "
    "zero_grad, forward, loss, backward, SGD. Columns with × are speed-ups: stock's median time over this path's. "
    "events: input events per sample; spikes and active: % of all (t, b, j) of the hidden layers, after training. "
    "kept: storages alive for the backward pass after the forward, without parameters and the caller's own tensors. "
    "A + behind a commit: tracked files differed from it."
)

OF_GPU = (
    "On a GPU times are CUDA events' around work asked of an idle device, so that what Python takes is in them; inputs "
    "are gone through in turn, together several times the second-level cache; peak is the allocator's, over what was "
    "allocated before the step. *Fused dense loop* is one matrix product over T * B a layer and one kernel over time, "
    "forward and backward, without sparsity. *As a CUDA graph* forward with loss and backward are replayed, after "
    "copying events in, while a dense input is read where it is; a graph has a pool of memory of its own, which is not "
    "counted."
)

NOT_MEASURED = (
    "Not measured: there is no result of `--device cuda` here. `make gpu-bench` on a machine with a GPU makes one: "
    "[Measuring](cuda.md#measuring)."
)

OF_REBUILT = (
    "snnTorch was not installed: *stock* is its loop rebuilt from its documented equations, with no more operations a "
    "step than its own."
)

OF_ALPHA = (
    "Norse 1.1.0's SuperSpike ignores `alpha`. Where a case says *as documented*, stock and ours both run with the "
    "derivative that Norse documents, 1 / (alpha |x| + 1)², put in its place; *as installed* is Norse's own. *Mended "
    "by unbind* is stock whose modules read the steps of their input from one `unbind`: each `input[t]` of Norse's own "
    "writes a gradient of the whole sequence, so that its backward pass is quadratic in T."
)


def document(results: Sequence[Mapping[str, Any]], where: Mapping[str, Any]) -> dict[str, Any]:
    """What is written as JSON: cases' entries of `measure`, and `where` they were measured."""
    return {"format": FORMAT, **where, "cases": list(results)}


def load(path: Path) -> dict[str, Any]:
    """Raises ValueError naming the file where it is not one of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a result of `python -m sparse_backend bench --json`: {error}") from error
    got = content.get("format") if isinstance(content, dict) else None
    if got != FORMAT:
        raise ValueError(f"{path}: expected a benchmark result of format {FORMAT}, got {got!r}; measure again")
    if content["quick"]:
        raise ValueError(f"{path}: expected a full run, got one of --quick, whose ratios mean nothing; measure again")
    return content


def case_title(result: Mapping[str, Any]) -> str:
    case = result["case"]
    return (
        f"{case['name']}: {result['sizes']}, T {case['steps']}, B {case['batch']}, {result['surrogate']}, "
        f"{_b_th(result)}"
    )


def _b_th(result: Mapping[str, Any]) -> str:
    b_th = result["case"]["b_th"]
    if b_th == "auto":
        return f"b_th auto = {float(result['band']):.3g}"
    return f"b_th {b_th}" if isinstance(b_th, str) else f"b_th {b_th:.4g}"


def case_note(result: Mapping[str, Any]) -> str:
    training = result["training"]
    layers = ", ".join(
        f"{_percent(spikes)} / {_percent(active)}"
        for spikes, active in zip(result["spikes_pct_by_layer"], result["active_pct_by_layer"], strict=True)
    )
    note = (
        f"Input: {result['input']}. Trained {training['steps']} steps, loss {training['first_loss']:.3g} → "
        f"{training['last_loss']:.3g}. Spikes / active % by hidden layer: {layers}."
    )
    return f"{note} {OF_REBUILT}" if result["case"]["framework"] == REBUILT else note


def _rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads, and the rows of what was timed."""
    peaks = any("peak_bytes" in row for row in result["rows"])
    digits = 2 if result.get("device") == "cuda" else 1
    rows = []
    for row in result["rows"]:
        if "ms" not in row:
            continue
        ratio = row.get("ratio")
        cells = [row["label"], f"{result['input_events']:.0f}", _percent(result["spikes_pct"])]
        cells.append(_percent(result["active_pct"]))
        cells += [f"{row['ms'][part]['median']:.{digits}f}" if part in row["ms"] else "–" for part in PARTS]
        cells += [f"{ratio[part]:.2f}×" if ratio and part in ratio else "–" for part in PARTS]
        cells.append(f"{row['kept_bytes'] / 1e6:.1f}" if "kept_bytes" in row else "–")
        cells.append(f"{100 * row['kept_share']:.1f} %" if "kept_share" in row else "–")
        if peaks:
            cells.append(f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "–")
            cells.append(f"{100 * row['peak_share']:.1f} %" if "peak_share" in row else "–")
        rows.append(tuple(cells))
    return HEADS + (PEAK_HEADS if peaks else ()), rows


def _percent(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _remarks(result: Mapping[str, Any]) -> list[str]:
    """Targets with what was got, and what was not timed with its reason."""
    lines = []
    for row in result["rows"]:
        if "note" in row:
            lines.append(f"{row['label']}: {row['note']}")
        if "left_out" in row:
            lines.append(f"{row['label']}: LEFT OUT, {row['left_out']}")
        if "refused" in row:
            lines.append(f"{row['label']}: REFUSED, not timed: {row['refused']}")
        elif share := row.get("check", {}).get("samples_left_out", 0.0):
            lines.append(
                f"{row['label']}: checked without the {100 * share:.2g} % of the samples in which a spike flipped"
            )
        targets = [_target(target) for target in row.get("targets", ())]
        if targets:
            lines.append(f"{row['label']}: " + "; ".join(targets))
    return lines


def failure(case: str, why: str) -> str:
    """Of a case that could not be measured."""
    return f"{case}: FAILED, {why}"


def _target(target: Mapping[str, Any]) -> str:
    share = f"{100 * target['got']:.2g} %"
    got = {"kept": share, "peak": share, "recording": f"{target['got']:.1f} µs"}.get(
        target["quantity"], f"{target['got']:.2f}×"
    )
    return f"{target['target']}: {'reached' if target['reached'] else 'MISSED'} ({got})"


def text_table(result: Mapping[str, Any]) -> str:
    """One case for the terminal."""
    lines = [case_title(result), "  " + case_note(result), *_columns(*_rows(result))]
    lines += ["  " + remark for remark in _remarks(result)]
    if "kernels" in result:
        lines += ["  " + _of_kernels(result), *_columns(KERNEL_HEADS, _kernel_rows(result))]
    return "\n".join(lines)


def _columns(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        first, *others = (
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *others]).rstrip())
    return lines


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    return [_line(*row) for row in (heads, ("---", *["---:"] * (len(heads) - 1)), *rows)]


KERNEL_HEADS = (
    "kernel",
    "kind",
    "launches",
    "ms",
    "MB that must move",
    "floor ms",
    "times its floor",
    "µs a step of T",
)


def _of_kernels(result: Mapping[str, Any]) -> str:
    rate = result["kernels"]["copy_gb_s"]
    if not result["kernels"]["rows"]:
        return "Kernels of one step: torch's profiler sees none here."
    streaming = [row for row in result["kernels"]["rows"] if row["kind"] == "streaming"]
    return (
        f"Kernels of one step, sequence, dense input. Floor: bytes over {rate:.0f} GB/s, what a copy reads and writes "
        f"here. Streaming kernels within {STREAMING:g}× of it: {sum(row['reached'] for row in streaming)} of "
        f"{len(streaming)}."
    )


def _kernel_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for row in result["kernels"]["rows"]:
        cells = [row["kernel"], row["kind"], f"{row['launches']:.0f}", f"{row['ms']:.3f}"]
        if row["kind"] == "streaming":
            cells += [f"{row['bytes'] / 1e6:.1f}", f"{row['floor_ms']:.3f}", f"{row['times']:.1f}×", "–"]
        else:
            cells += ["–", "–", "–", f"{row['us_per_step']:.2f}"]
        rows.append(tuple(cells))
    return rows


CROSSOVER_HEADS = (
    "activity", "input %", "spikes %", "active %", "fused dense ms", "dense input ms", "of fused", "event input ms",
    "of fused",
)  # fmt: skip


def _crossover_rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The time of a training step by activity, and its share of the fused dense loop's."""
    rows = []
    for result in sorted(results, key=lambda result: result["case"]["crossover"]):
        case, timed = result["case"], _timed(result)
        share = 100 * result["input_events"] / (case["steps"] * case["inputs"])
        cells = [f"{case['crossover']:g} %", _percent(share)]
        cells += [_percent(result["spikes_pct"]), _percent(result["active_pct"])]
        dense = timed["fused-dense"]["ms"]["whole"]["median"] if "fused-dense" in timed else None
        cells.append("–" if dense is None else f"{dense:.2f}")
        for path in ("sequence", "sequence-events"):
            ours = timed[path]["ms"]["whole"]["median"] if path in timed else None
            cells.append("–" if ours is None else f"{ours:.2f}")
            cells.append("–" if ours is None or dense is None else f"{ours / dense:.2f}×")
        rows.append(tuple(cells))
    return rows


def _crossover_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    first = results[0]
    case = first["case"]
    targets = [target for result in results for row in result["rows"] for target in row.get("targets", ())]
    lines = [
        f"### Crossover: {first['sizes']}, T {case['steps']}, B {case['batch']}, {first['surrogate']}",
        "",
        "Activity from 0.1 % to 100 %: of the input, drawn entry by entry; of the hidden layers' spikes, as near as "
        "weights alone bring them; of the active entries, by b_th. A training step of the sequence form against the "
        f"fused dense loop; at most 1.05× of it: {sum(target['reached'] for target in targets)} of {len(targets)}.",
        "",
        *_table(CROSSOVER_HEADS, _crossover_rows(results)),
        "",
    ]
    lines += [f"- {case_of['case']['crossover']:g} %: {remark}" for case_of in results for remark in _problems(case_of)]
    return lines


def _problems(result: Mapping[str, Any]) -> list[str]:
    return [
        remark for remark in _remarks({"rows": [{**row, "targets": ()} for row in result["rows"]]}) if "ED" in remark
    ]


def is_crossover(result: Mapping[str, Any]) -> bool:
    return result["case"].get("crossover") is not None


def closing(content: Mapping[str, Any]) -> str:
    """What follows the tables on a terminal."""
    crossover = [result for result in content["cases"] if is_crossover(result)]
    lines = [*_columns(CROSSOVER_HEADS, _crossover_rows(crossover)), LEGEND]
    if _is_gpu(content):
        lines.append(OF_GPU)
    return "\n".join([*lines, where_line(content)])


def _is_gpu(content: Mapping[str, Any]) -> bool:
    return "gpu" in content["machine"]


def merged(contents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of one title as one, at the place of the first: their cases in the registry's order; "failed", why those
    that no file has measured were not; and "where", a line for each machine with what it is of, at which commits.
    Raises ValueError if they share a case."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for content in contents:
        groups.setdefault(content["title"], []).append(content)
    return [_merged(title, group) for title, group in groups.items()]


def _merged(title: str, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    places = {name: place for place, name in enumerate([*CASES, *GPU_CASES])}
    cases: dict[str, Any] = {}
    failed: dict[str, str] = {}
    where: dict[str, dict[str, list[str]]] = {}  # machine -> commit -> cases
    for content in group:
        for result in content["cases"]:
            name = result["case"]["name"]
            if name in cases:
                raise ValueError(f"{title}: expected each case in one file only, got {name} in two; remove one")
            cases[name] = result
            where.setdefault(_machine(content), {}).setdefault(_commit(content), []).append(name)
    for content in group:
        for name, why in content.get("failed", {}).items():
            if name not in cases:
                failed[name] = why
                where.setdefault(_machine(content), {}).setdefault(_commit(content), []).append(name)

    def order(name: str) -> int:
        return places.get(name, len(places))

    def listed(names: Sequence[str]) -> str:
        return ", ".join(sorted(names, key=order))

    lines = []
    for machine, commits in where.items():
        of = "" if len(where) == 1 else listed([name for names in commits.values() for name in names]) + ": "
        if len(commits) == 1:
            at = next(iter(commits))
        else:
            at = "; ".join(f"{commit or 'no commit'}: {listed(names)}" for commit, names in commits.items())
        lines.append(of + "; ".join(filter(None, (machine, at))))
    return {
        "title": title,
        "where": lines,
        "cases": [cases[name] for name in sorted(cases, key=order)],
        "failed": failed,
    }


def tally(results: Sequence[Mapping[str, Any]]) -> str:
    """How many targets there were and how many were reached."""
    targets = [target for result in results for row in result["rows"] for target in row.get("targets", ())]
    return f"targets reached: {sum(target['reached'] for target in targets)} of {len(targets)}"


def where_line(content: Mapping[str, Any]) -> str:
    """Machine, versions, commit in one line."""
    return "; ".join(filter(None, (_machine(content), _commit(content))))


def _commit(content: Mapping[str, Any]) -> str:
    return f"commit {content['commit']}" if content["commit"] else ""


def _machine(content: Mapping[str, Any]) -> str:
    """Machine and versions."""
    machine, versions = content["machine"], content["versions"]
    gpu = machine.get("gpu")
    parts = [
        f"{gpu['name']}, {gpu['memory_gb']} GB, capability {gpu['capability']}, copies at {gpu['copy_gb_s']} GB/s"
        + (", matrix products in TF32" if gpu["tf32"] else "")
        if gpu
        else None,
        machine["cpu"],
        _count(machine["cores"], "core"),
        _count(machine["threads"], "thread"),
        f"{machine['memory_gb']} GB" if machine["memory_gb"] else None,
        ", ".join(machine["features"]) or None,
        machine["system"],
        *(f"{name} {version}" for name, version in versions.items() if version),
        f"kernels: {content['kernels']['origin'] or content['kernels']['state']}",
    ]
    return "; ".join(part for part in parts if part)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def markdown(contents: Sequence[Mapping[str, Any]]) -> str:
    """docs/benchmarks.md."""
    lines = [
        "<!-- Generated by `python -m sparse_backend bench --render` from docs/benchmarks/*.json: do not edit. -->",
        "",
        "# Benchmarks",
        "",
        "`python -m sparse_backend bench --json FILE` measures, on your machine, what stands here. Before anything is "
        "timed it is checked against the stock framework: outputs and gradients in float64, and in float32 on the "
        "batch that is timed.",
        "",
        LEGEND,
    ]
    if any(_is_gpu(content) for content in contents):
        lines += ["", OF_GPU]
    if any(result["case"].get("surrogate") == "super_alpha" for content in contents for result in content["cases"]):
        lines += ["", OF_ALPHA]
    for content in merged(contents):
        lines += ["", f"## {content['title']}", ""]
        for line in content["where"][:-1]:
            lines += [line + ".", ""]
        lines.append(content["where"][-1] + ". " + tally(content["cases"]).capitalize() + ".")
        if content["failed"]:
            lines += ["", *(f"- {failure(name, why)}" for name, why in content["failed"].items())]
        for result in content["cases"]:
            if is_crossover(result):
                continue
            lines += ["", f"### {case_title(result)}", "", case_note(result), ""]
            lines += [*_table(*_rows(result)), ""]
            lines += [f"- {remark}" for remark in _remarks(result)]
            if "kernels" in result:
                lines += ["", _of_kernels(result), "", *_table(KERNEL_HEADS, _kernel_rows(result))]
            _trim(lines)
        crossover = [result for result in content["cases"] if is_crossover(result)]
        if crossover:
            lines += ["", *_crossover_lines(crossover)]
            _trim(lines)
    if not any(_is_gpu(content) for content in contents):
        lines += ["", "## GPU", "", NOT_MEASURED]
    return "\n".join(lines) + "\n"


def _trim(lines: list[str]) -> None:
    while not lines[-1]:
        lines.pop()


def render(folder: Path) -> tuple[Path, str]:
    """The file that belongs to a folder of results, and what must stand in it. Raises ValueError if there are none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: expected results *.json, found none; make one with --json {folder / 'cpu.json'}")
    return folder.with_suffix(".md"), markdown([load(file) for file in files])


BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def summary(contents: Sequence[Mapping[str, Any]]) -> str:
    """The README's tables: a line per case, whole training steps and bytes kept, of the first title measured on a CPU
    and of the first measured on a GPU."""
    tables: list[str] = []
    for on_gpu, frameworks in ((False, _ON_CPU), (True, _ON_GPU)):
        of_device = merged([content for content in contents if _is_gpu(content) == on_gpu])[:1]
        for content in of_device:
            told = False
            for names, table in frameworks:
                results = [result for result in content["cases"] if result["case"]["framework"] in names]
                results = [
                    result
                    for result in results
                    if sum("ms" in row for row in result["rows"]) > 1 and not is_crossover(result)
                ]  # docs/benchmarks.md says why a case was refused
                if results:
                    tables.append(table(results, "The same machine" if told else ". ".join(content["where"])))
                    told = True
    return "\n\n".join(tables)


def _leaky_table(results: Sequence[Mapping[str, Any]], where: str) -> str:
    columns = {
        "sequence": "sequence, dense input",
        "sequence-events": "sequence, event input",
        "loop": "your loop, dense input",
        "loop-events": "your loop, event input",
    }
    batch = results[0]["case"]["batch"]
    lines = [
        "One training step against stock snnTorch, at b_th 0.2 and fast_sigmoid(slope=100) unless the case says "
        f"otherwise, batch {batch}. {where}. "
        "*Sequence* is `sparse_backend.functional`, *your loop* the unmodified model after `enable`. "
        f"{_OF_CONDITIONS} All rows, and the targets missed: [docs/benchmarks.md](docs/benchmarks.md).",
        "",
        f"| case | {_CONDITIONS} | stock ms | " + " | ".join(columns.values()) + " | kept for backward |",
        "| --- | --- |" + " ---: |" * (len(columns) + 3),
    ]
    for result in results:
        rows = _timed(result)
        ratios = [f"{rows[path]['ratio']['whole']:.1f}×" if path in rows else "–" for path in columns]
        kept = _kept_share(rows, "loop")
        lines.append(_line(_name(result, batch), *_conditions(result), _whole_ms(rows, "stock"), *ratios, kept))
    return "\n".join(lines)


def _norse_table(results: Sequence[Mapping[str, Any]], where: str) -> str:
    columns = {
        "enabled": "enabled, dense input",
        "enabled-events": "enabled, event input",
        "cells": "cells in a loop, dense input",
        "cells-events": "cells in a loop, event input",
    }
    batch = results[0]["case"]["batch"]
    lines = [
        "One training step against stock Norse / against stock Norse mended by `unbind`: unmended, its backward pass "
        "is quadratic in T. At b_th 0.2 and SuperSpike(alpha=100) as Norse documents it unless the case says "
        f"otherwise, batch {batch}. {where}. *Enabled* is the unmodified `SequentialState` after `enable`, *cells in a "
        "loop* an unmodified loop over its steps.",
        "",
        f"| case | {_CONDITIONS} | stock ms | mended ms | " + " | ".join(columns.values()) + " | kept for backward |",
        "| --- | --- |" + " ---: |" * (len(columns) + 4),
    ]
    for result in results:
        rows = _timed(result)
        ratios = [_both_ratios(rows, path) for path in columns]
        times = _whole_ms(rows, "stock"), _whole_ms(rows, "stock-mended")
        kept = _kept_share(rows, "enabled")
        lines.append(_line(_name(result, batch), *_conditions(result), *times, *ratios, kept))
    return "\n".join(lines)


def _gpu_table(results: Sequence[Mapping[str, Any]], where: str) -> str:
    columns = {
        "sequence": "sequence, dense input",
        "sequence-events": "sequence, event input",
        "graph": "CUDA graph, event input",
        "loop": "your loop, dense input",
        "loop-events": "your loop, event input",
    }
    batch = results[0]["case"]["batch"]
    stock = f" {OF_REBUILT}" if any(result["case"]["framework"] == REBUILT for result in results) else ""
    lines = [
        "One training step on a GPU against stock snnTorch / against a fused dense time loop, a graph against that "
        "loop's graph, at b_th 0.2 and "
        f"fast_sigmoid(slope=100), batch {batch} unless the case says otherwise. {where}. {_OF_CONDITIONS}{stock}",
        "",
        f"| case | {_CONDITIONS} | stock ms | fused ms | "
        + " | ".join(columns.values())
        + " | kept for backward | peak |",
        "| --- | --- |" + " ---: |" * (len(columns) + 5),
    ]
    for result in results:
        rows = _timed(result)
        fused = {path: "fused-dense-graph" if path == "graph" else "fused-dense" for path in columns}
        ratios = [_both_ratios(rows, path, ("stock", fused[path])) for path in columns]
        times = _whole_ms(rows, "stock"), _whole_ms(rows, "fused-dense", 2)
        peak = rows.get("sequence", {}).get("peak_share")
        shares = _kept_share(rows, "sequence"), "–" if peak is None else f"{100 * peak:.1f} %"
        lines.append(_line(_name(result, batch), *_conditions(result), *times, *ratios, *shares))
    return "\n".join(lines)


_Table = Callable[[Sequence[Mapping[str, Any]], str], str]
_ON_CPU: tuple[tuple[tuple[str, ...], _Table], ...] = ((("snntorch",), _leaky_table), (("norse",), _norse_table))
_ON_GPU: tuple[tuple[tuple[str, ...], _Table], ...] = ((("snntorch", REBUILT), _gpu_table),)


def _timed(result: Mapping[str, Any]) -> dict[str, Any]:
    return {row["path"]: row for row in result["rows"] if "ms" in row}


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _name(result: Mapping[str, Any], batch: int) -> str:
    case = result["case"]
    parts = [f"{case['name']}: {result['sizes']}", f"T {case['steps']}"]
    if case["batch"] != batch:
        parts.append(f"batch {case['batch']}")
    if case["b_th"] == "auto":
        parts.append(_b_th(result))
    return ", ".join(parts)


_CONDITIONS = "input, events a sample | active %"
_OF_CONDITIONS = (
    "*Active* is the share of the hidden layers' entries within b_th of the threshold after the case's short training; "
    "the more are active, the less there is to gain. *Drawn* input has the size and the number of events of the data "
    "set that the case is named after, not its images or sounds."
)


def _conditions(result: Mapping[str, Any]) -> tuple[str, str]:
    """What decides a case's speed: its input, and how much of its hidden layers is active."""
    return f"{result['input']}, {result['input_events']:.0f}", _percent(result["active_pct"])


def _whole_ms(rows: Mapping[str, Any], path: str, digits: int = 0) -> str:
    return f"{rows[path]['ms']['whole']['median']:.{digits}f}" if path in rows else "–"


def _both_ratios(rows: Mapping[str, Any], path: str, to: tuple[str, str] = ("stock", "stock-mended")) -> str:
    if path not in rows:
        return "–"
    ours = rows[path]["ms"]["whole"]["median"]
    return " / ".join(f"{rows[stock]['ms']['whole']['median'] / ours:.1f}×" for stock in to if stock in rows)


def _kept_share(rows: Mapping[str, Any], path: str) -> str:
    return f"{100 * rows[path]['kept_share']:.1f} %" if path in rows else "–"


def with_summary(readme: str, contents: Sequence[Mapping[str, Any]]) -> str:
    """The README with the table between its markers. Raises ValueError if it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}, got none")
    return f"{before}{begin}\n{summary(contents)}\n{end}{after}"
