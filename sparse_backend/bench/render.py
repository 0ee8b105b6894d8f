"""Results as text and as docs/benchmarks.md. Both come from the JSON alone: no number is written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_backend.bench.cases import CASES

FORMAT = 1

HEADS = (
    "path", "events", "spikes %", "active %", "forward ms", "backward ms", "whole ms", "forward", "backward", "whole",
    "kept MB", "of stock",
)  # fmt: skip
PARTS = ("forward", "backward", "whole")
PEAK_HEADS = ("peak MB", "of stock")

LEGEND = (
    "Times are medians of interleaved repeats in one process. Forward is with the loss; whole is a training step: "
    "zero_grad, forward, loss, backward, SGD. forward, backward and whole with × are stock's median over this path's. "
    "events: input events per sample; spikes and active: % of all (t, b, j) of the hidden layers, after training. "
    "kept: storages alive for the backward pass after the forward, without parameters and the caller's own tensors."
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
    return f"b_th {b_th}" + (f" = {float(result['band']):.3g}" if b_th == "auto" else "")


def case_note(result: Mapping[str, Any]) -> str:
    training = result["training"]
    layers = ", ".join(
        f"{_percent(spikes)} / {_percent(active)}"
        for spikes, active in zip(result["spikes_pct_by_layer"], result["active_pct_by_layer"], strict=True)
    )
    return (
        f"Input: {result['input']}. Trained {training['steps']} steps, loss {training['first_loss']:.3g} → "
        f"{training['last_loss']:.3g}. Spikes / active % by hidden layer: {layers}."
    )


def _rows(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads, and the rows of what was timed."""
    peaks = any("peak_bytes" in row for row in result["rows"])
    rows = []
    for row in result["rows"]:
        if "ms" not in row:
            continue
        ratio = row.get("ratio")
        cells = [row["label"], f"{result['input_events']:.0f}", _percent(result["spikes_pct"])]
        cells.append(_percent(result["active_pct"]))
        cells += [f"{row['ms'][part]['median']:.1f}" if part in row["ms"] else "–" for part in PARTS]
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


def _target(target: Mapping[str, Any]) -> str:
    got = {"kept": f"{100 * target['got']:.2g} %", "recording": f"{target['got']:.1f} µs"}.get(
        target["quantity"], f"{target['got']:.2f}×"
    )
    return f"{target['target']}: {'reached' if target['reached'] else 'MISSED'} ({got})"


def text_table(result: Mapping[str, Any]) -> str:
    """One case for the terminal."""
    heads, rows = _rows(result)
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = [case_title(result), "  " + case_note(result)]
    if rows:
        for row in (heads, *rows):
            first, *others = (
                f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}"
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  " + "  ".join([first, *others]).rstrip())
    return "\n".join([*lines, *("  " + remark for remark in _remarks(result))])


def merged(contents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results of one title as one, at the place of the first: their cases in the registry's order, and "where", a
    line for each machine and state of the code with the cases it is of. Raises ValueError if they share a case."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for content in contents:
        groups.setdefault(content["title"], []).append(content)
    return [_merged(title, group) for title, group in groups.items()]


def _merged(title: str, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    order = {name: place for place, name in enumerate(CASES)}
    cases: dict[str, Any] = {}
    where: dict[str, list[str]] = {}
    for content in group:
        for result in content["cases"]:
            name = result["case"]["name"]
            if name in cases:
                raise ValueError(f"{title}: expected each case in one file only, got {name} in two; remove one")
            cases[name] = result
            where.setdefault(where_line(content), []).append(name)
    names = sorted(cases, key=lambda name: order.get(name, len(order)))
    lines = [
        line if len(where) == 1 else f"{', '.join(sorted(of, key=names.index))}: {line}" for line, of in where.items()
    ]
    return {"title": title, "where": lines, "cases": [cases[name] for name in names]}


def tally(results: Sequence[Mapping[str, Any]]) -> str:
    """How many targets there were and how many were reached."""
    targets = [target for result in results for row in result["rows"] for target in row.get("targets", ())]
    return f"targets reached: {sum(target['reached'] for target in targets)} of {len(targets)}"


def where_line(content: Mapping[str, Any]) -> str:
    """Machine, versions, commit in one line."""
    machine, versions = content["machine"], content["versions"]
    parts = [
        machine["cpu"],
        _count(machine["cores"], "core"),
        _count(machine["threads"], "thread"),
        f"{machine['memory_gb']} GB" if machine["memory_gb"] else None,
        ", ".join(machine["features"]) or None,
        machine["system"],
        *(f"{name} {version}" for name, version in versions.items() if version),
        f"kernels: {content['kernels']['origin'] or content['kernels']['state']}",
        f"commit {content['commit']}" if content["commit"] else None,
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
    if any(result["case"].get("surrogate") == "super_alpha" for content in contents for result in content["cases"]):
        lines += ["", OF_ALPHA]
    for content in merged(contents):
        lines += ["", f"## {content['title']}", ""]
        for line in content["where"][:-1]:
            lines += [line + ".", ""]
        lines.append(content["where"][-1] + ". " + tally(content["cases"]).capitalize() + ".")
        for result in content["cases"]:
            heads, rows = _rows(result)
            lines += ["", f"### {case_title(result)}", "", case_note(result), ""]
            if rows:
                lines += [
                    "| " + " | ".join(row) + " |" for row in (heads, ("---", *["---:"] * (len(heads) - 1)), *rows)
                ]
                lines.append("")
            lines += [f"- {remark}" for remark in _remarks(result)]
            while not lines[-1]:
                lines.pop()
    return "\n".join(lines) + "\n"


def render(folder: Path) -> tuple[Path, str]:
    """The file that belongs to a folder of results, and what must stand in it. Raises ValueError if there are none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: expected results *.json, found none; make one with --json {folder / 'cpu.json'}")
    return folder.with_suffix(".md"), markdown([load(file) for file in files])


BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def summary(contents: Sequence[Mapping[str, Any]]) -> str:
    """The README's tables: a line per case of the first title's results, whole training steps and bytes kept."""
    content = merged(contents)[0]
    tables: list[str] = []
    for framework, table in (("snntorch", _leaky_table), ("norse", _norse_table)):
        results = [
            result
            for result in content["cases"]
            if result["case"]["framework"] == framework and sum("ms" in row for row in result["rows"]) > 1
        ]  # docs/benchmarks.md says why a case was refused
        if results:
            tables.append(table(results, "The same machine" if tables else ". ".join(content["where"])))
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
        "*Sequence* is `sparse_backend.functional`, *your loop* the unmodified model after `enable`. All rows, and the "
        "targets missed: [docs/benchmarks.md](docs/benchmarks.md).",
        "",
        "| case | stock ms | " + " | ".join(columns.values()) + " | kept for backward |",
        "| --- |" + " ---: |" * (len(columns) + 2),
    ]
    for result in results:
        rows = _timed(result)
        ratios = [f"{rows[path]['ratio']['whole']:.1f}×" if path in rows else "–" for path in columns]
        lines.append(_line(_name(result, batch), _whole_ms(rows, "stock"), *ratios, _kept_share(rows, "loop")))
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
        "One training step against stock Norse / against stock mended by `unbind`, without which its backward pass is "
        "quadratic in T; at b_th 0.2 and SuperSpike(alpha=100) as Norse documents it unless the case says otherwise, "
        f"batch {batch}. {where}. *Enabled* is the unmodified `SequentialState` after `enable`, *cells in a "
        "loop* an unmodified loop over its steps.",
        "",
        "| case | stock ms | mended ms | " + " | ".join(columns.values()) + " | kept for backward |",
        "| --- |" + " ---: |" * (len(columns) + 3),
    ]
    for result in results:
        rows = _timed(result)
        ratios = [_both_ratios(rows, path) for path in columns]
        times = _whole_ms(rows, "stock"), _whole_ms(rows, "stock-mended")
        lines.append(_line(_name(result, batch), *times, *ratios, _kept_share(rows, "enabled")))
    return "\n".join(lines)


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


def _whole_ms(rows: Mapping[str, Any], path: str) -> str:
    return f"{rows[path]['ms']['whole']['median']:.0f}" if path in rows else "–"


def _both_ratios(rows: Mapping[str, Any], path: str) -> str:
    """To stock and to mended stock."""
    if path not in rows:
        return "–"
    ours = rows[path]["ms"]["whole"]["median"]
    return " / ".join(
        f"{rows[stock]['ms']['whole']['median'] / ours:.1f}×" for stock in ("stock", "stock-mended") if stock in rows
    )


def _kept_share(rows: Mapping[str, Any], path: str) -> str:
    return f"{100 * rows[path]['kept_share']:.1f} %" if path in rows else "–"


def with_summary(readme: str, contents: Sequence[Mapping[str, Any]]) -> str:
    """The README with the table between its markers. Raises ValueError if it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}, got none")
    return f"{before}{begin}\n{summary(contents)}\n{end}{after}"
