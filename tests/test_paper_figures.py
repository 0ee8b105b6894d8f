"""Figures and pages of the paper's results: drawn from JSON alone, the same every time, true to docs/results."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparse_backend.paper import figures, main
from sparse_backend.paper import page as pages
from sparse_backend.paper.presets import PRESETS
from sparse_backend.paper.results import load

DOCS = Path(__file__).resolve().parent.parent / "docs"

WHERE = {
    "machine": {
        "cpu": "A CPU", "architecture": "x86_64", "cores": 2, "threads": 1, "memory_gb": 24, "features": [],
        "system": "Linux",
    },
    "versions": {"sparse_backend": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "snntorch": "1.0.0", "norse": None},
    "kernels": {"state": "loaded", "origin": "built"},
    "commit": "0123456789ab",
}  # fmt: skip
DATA = {
    dataset: {"name": name, "note": note, "train": train, "test": test, "events_per_sample": events}
    for dataset, name, note, train, test, events in (
        ("fmnist", "Fashion-MNIST", "", 60000, 10000, 330.7),
        ("nmnist", "N-MNIST", "the first of each set", 1000, 100, 4200.0),
        ("spoken", "Spoken digits", "a stand-in for SHD", 2700, 300, 350.0),
    )
}


def experiment(name, seed=0, stock=False, **changed):
    return {"name": name, "preset": {**PRESETS[name].to_dict(), **changed}, "seed": seed, "stock": stock}


def training(name="fmnist", b_th=0.2, seed=0, epochs=6, status="finished", final=82.0, stock=False, **changed):
    """A run whose accuracy nears `final`; its numbers are drawn from its seed."""
    draw = random.Random(f"{name} {b_th} {seed} {stock} {changed}")
    of = experiment(name, seed, stock, b_th=b_th, epochs=epochs, **changed)
    layers = max(1, len(of["preset"]["hidden"]))
    history = [{"epoch": 0, "spikes_pct": [0.25] * layers, "active_pct": [0.4] * layers}]
    shift = draw.gauss(0, 0.4)
    for epoch in range(1, epochs + 1):
        near = 1 - math.exp(-epoch / 4)
        active = [100.0 if b_th == "inf" else (7.0 - 3 * i / layers) * near for i in range(layers)]
        history.append(
            {
                "epoch": epoch,
                "loss": 0.3 + 1.2 * math.exp(-epoch / 3) + draw.uniform(0, 0.02),
                "train_accuracy": 20 + (final - 15) * near,
                "test_accuracy": round(20 + (final - 20) * near + shift + draw.gauss(0, 0.15), 2),
                "seconds": 11.0,
                "step_ms": 31.5,
                "spikes_pct": [2.1] * layers,
                "active_pct": active,
            }
        )
    data = dict(DATA[of["preset"]["dataset"]])
    command = f"python -m sparse_backend paper train --dataset {name} --data DATA --seeds 0 1 2"
    return {"experiment": of, "data": data, "status": status, "history": history, "command": command, **WHERE}


def gradients(name="fmnist", seed=0, rows=20, columns=30):
    draw = random.Random(seed)

    def block():
        return [[float(f"{draw.gauss(0, 1e-3) * draw.random() ** 3:.3g}") for _ in range(columns)] for _ in range(rows)]

    def kept(dense):
        return [[value if abs(value) > 1e-4 else 0.0 for value in row] for row in dense]

    dense = [block(), block()]
    pictures = [
        {"name": title, "axes": axes, "dense": one, "sparse": kept(one), "relative_error": 0.072}
        for title, axes, one in (
            ("linears.1.weight", ["output neuron", "input neuron"], dense[0]),
            ("spikes of layer 1", ["step", "neuron"], dense[1]),
        )
    ]
    parameters = [
        {"name": f"linears.{i}.{kind}", "relative_error": 0.05 + 0.02 * i, "cosine": 0.998, "zeros_sparse_pct": 41.0,
         "zeros_dense_pct": 3.0}
        for i in range(2) for kind in ("weight", "bias")
    ]  # fmt: skip
    return {
        "experiment": experiment(name, seed), "epoch": 6, "samples": 256,
        "gradients": parameters, "pictures": pictures,
        "command": f"python -m sparse_backend paper train --dataset {name} --data DATA", **WHERE,
    }  # fmt: skip


def sweep(over, values, name="fmnist", seed=0, mass=lambda b: 95.0, **changed):
    draw = random.Random(f"{over} {seed} {changed}")
    rows = []
    for value in values:
        size = math.log2(value / 50) if over == "hidden" else 2.0
        width = value if over == "b-th" else 0.2
        dense = width == math.inf
        times = {part: {"median": ms, "low": 0.9 * ms, "high": 1.1 * ms} for part, ms in zip(
            ("forward", "backward", "whole"), (60 * size, 90 * size, 150 * size), strict=True)}  # fmt: skip
        faster = 2.0 if dense else 6 + size + draw.random() - 2 * math.log10(width)
        ours = {
            part: {k: v / (faster * (1.7 if part == "backward" else 1)) for k, v in ms.items()}
            for part, ms in times.items()
        }
        layers = int(value) if over == "depth" else 2
        rows.append(
            {
                "value": "inf" if dense else value,
                "epochs": 5,
                "status": "finished",
                "test_accuracy": 82.5 - (0.05 / width if not dense else 0) + draw.gauss(0, 0.2),
                "loss": 0.4,
                "spikes_pct": [2.0] * layers,
                "active_pct": [6.0 - size - i / 2 for i in range(layers)],
                "seconds": 60.0,
                "mass_pct": mass(value),
                "stock": {"ms": times, "kept_bytes": 100_000_000},
                "enabled": {"ms": ours, "kept_bytes": 58_000_000 if dense else int(6e6 * (1 + width))},
                "gradient_error": [0.0 if dense else 0.02 / width, 0.0 if dense else 0.015 / width, 0.0],
            }
        )
    return {
        "over": over, "experiment": experiment(name, seed, **changed), "data": DATA[name], "rows": rows,
        "command": f"python -m sparse_backend paper sweep --dataset {name} --data DATA --over {over}", **WHERE,
    }  # fmt: skip


WIDTHS = (0.05, 0.1, 0.2, 0.4, 0.8, math.inf)


def sweep_b_th(slope, **more):
    def mass(b):
        if b == math.inf:
            return 100.0
        return 100 * slope * b / (1 + slope * b) if slope else 200 / math.pi * math.atan(math.pi * b)

    return sweep("b-th", WIDTHS, mass=mass, slope=slope, **more)


def everything():
    """One of each kind of file; runs that died, diverged, or are under way are among them."""
    files = {
        f"fmnist_{b}_{seed}": training(b_th=b, seed=seed, epochs=epochs, final=final)
        for b, epochs, final in ((0.2, 12, 82.9), ("inf", 5, 82.0))
        for seed in range(3)
    }
    files |= {f"fmnist_stock_{seed}": training(seed=seed, stock=True, epochs=5) for seed in (0,)}
    files |= {f"nmnist_{seed}": training("nmnist", seed=seed, final=90.0) for seed in range(2)}
    files |= {f"nmnist_inf_{seed}": training("nmnist", "inf", seed, final=89.0) for seed in range(2)}
    files["nmnist_2"] = training("nmnist", seed=2, epochs=2, status="diverged")
    files["nmnist_3"] = training("nmnist", seed=3, epochs=0, status="diverged")
    files["spoken_0"] = training("spoken", status="running", epochs=3, final=90.0)
    files["spoken_inf_0"] = training("spoken", "inf", status="dead", epochs=4, final=88.0)
    files |= {f"fmnist_{n}": training(hidden=[n, n], epochs=5) for n in (100, 400)}
    files |= {f"fmnist_{seed}.gradients": gradients(seed=seed) for seed in (0, 1)}
    files |= {f"sweep_hidden_{name}": sweep("hidden", (100, 200, 400, 1000), name) for name in ("fmnist", "spoken")}
    files["sweep_depth"] = sweep("depth", (1, 2, 3, 4, 5))
    files |= {
        f"sweep_b_{slope}_{seed}": sweep_b_th(slope, seed=seed) for slope in (100.0, 25.0, 0.0) for seed in (0, 1)
    }
    return files


def put(folder: Path, files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


# --- figures -------------------------------------------------------------------------------------------------------


def drawn(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.svg")}


def test_every_figure_is_drawn_the_same_every_time(tmp_path, capsys):
    results = put(tmp_path / "results", everything())
    figures.draw(results, tmp_path / "one")
    assert "left out" not in capsys.readouterr().out
    figures.draw(results, tmp_path / "two")
    one = drawn(tmp_path / "one")
    assert one == drawn(tmp_path / "two")
    curves = {"accuracy", "accuracy-training", "loss", "activity", "activity-hidden"}
    expected = {*curves, "activity-size", "hidden", "depth", "b_th", "gradients-fmnist"}
    assert set(one) == {f"{name}.svg" for name in expected}
    for name, text in one.items():
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg", name
        assert len(text) < 150_000 and figures.DIGEST.search(text), name


def test_a_figure_follows_its_numbers(tmp_path):
    files = everything()
    figures.draw(put(tmp_path / "a", files), tmp_path / "before")
    files["fmnist_0.2_0"]["history"][-1]["test_accuracy"] = 12.0
    figures.draw(put(tmp_path / "a", files), tmp_path / "after")
    before, after = drawn(tmp_path / "before"), drawn(tmp_path / "after")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"accuracy.svg", "accuracy-training.svg"}
    assert digests(before) != digests(after)


def digests(texts: dict[str, str]) -> dict[str, str]:
    return {name: figures.DIGEST.search(text)[1] for name, text in texts.items()}


def test_a_digest_is_of_what_is_seen():
    """Versions of matplotlib name colours, and lines without a name, in different ways."""
    plots = pytest.importorskip("sparse_backend.paper.plots")

    def digest(**style: str) -> str:
        figure = plots.Figure()
        figure.subplots().plot([0, 1], [2, 3], **style)
        return plots.digest(figure)

    assert digest(color="C0") == digest(color="#1f77b4", label="_unnamed") != digest(color="C1")
    assert digest(label="a") != digest(label="b")


def test_what_there_is_no_result_for_is_left_out_and_told(tmp_path, capsys):
    results = put(tmp_path / "results", {"one": training()})
    out = tmp_path / "out"
    put(out, {})
    figures.draw(put(tmp_path / "all", everything()), out)
    (out / "by-hand.svg").write_text("<svg/>")
    capsys.readouterr()
    figures.draw(results, out, tmp_path / "page.md")
    told = capsys.readouterr().out
    assert "hidden.svg: left out, no results for it; run paper sweep --over hidden" in told
    assert "hidden.svg: removed" in told and (out / "by-hand.svg").exists()
    assert set(drawn(out)) == {"accuracy.svg", "accuracy-training.svg", "loss.svg", "activity.svg", "by-hand.svg"}
    assert "left out: it needs" in (tmp_path / "page.md").read_text(encoding="utf-8")


def test_figures_need_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["figures", "--results", str(put(tmp_path, {"one": training()})), "--out", str(tmp_path / "out")]) == 1
    assert "figures need matplotlib, which is not installed: pip install matplotlib" in capsys.readouterr().err


# --- pages ---------------------------------------------------------------------------------------------------------


def page_of(tmp_path, files) -> str:
    figures.draw(put(tmp_path / "results", files), tmp_path / "out", tmp_path / "page.md")
    return (tmp_path / "page.md").read_text(encoding="utf-8")


def test_the_page_says_what_the_results_say(tmp_path):
    files = {f"s{seed}": training(seed=seed, epochs=4) for seed in range(3)}
    files |= {f"d{seed}": training(b_th="inf", seed=seed, epochs=2) for seed in range(2)}
    for seed in range(3):
        for epoch, accuracy in ((2, 80.0 + seed), (4, 82.0 + seed)):
            files[f"s{seed}"]["history"][epoch]["test_accuracy"] = accuracy
    for seed in range(2):
        files[f"d{seed}"]["history"][2]["test_accuracy"] = 80.5 + 2 * seed
    text = page_of(tmp_path, files)
    assert "81.9 % → 82.8 %" in text
    assert "81.50 ± 1.00 % (2 epochs, 2 seeds) | 81.00 ± 0.58 % (2 epochs, 3 seeds)" in text
    assert "83.00 ± 0.58 % (4 epochs, 3 seeds)" in text
    assert "sparse b_th 0.4" not in text
    wider = page_of(tmp_path / "wider", files | {"w0": training(b_th=0.4, seed=0, epochs=4)})
    assert "- Fashion-MNIST: sparse b_th 0.4 − dense (b_th = inf) after 2 epochs, 1 seed in pairs: " in wider
    # pairs: 80 - 80.5 and 81 - 82.5
    assert "after 2 epochs, 2 seeds in pairs: -1.00 ± 0.50 points, 95 % interval -7.36 to +5.36: these seeds" in text
    assert "at most 4 epochs here, the paper trains 100" in text and "`fmnist` lr" in text
    assert "| 82.00 | 44 s |" in text and "Measured on:\n\n- A CPU; 2 cores" in text
    assert "--seeds 0 1 2" in text and "Not run here: " in text and "`shd`" in text


def test_every_section_has_its_commands_and_the_papers_times(tmp_path):
    files = {
        "s0": training(),
        "g0": gradients(),
        "h0": sweep("hidden", (100, 200)),
        "d0": sweep("depth", (1, 2), "spoken"),
    }
    point = files["h0"]["rows"][1]
    point["stock"]["ms"]["backward"]["median"], point["enabled"]["ms"]["backward"]["median"] = 120.0, 5.0
    text = page_of(tmp_path, files)
    assert "| Fashion-MNIST | 30.1 → 4.9 (6.1×) | 120 → 5 (24.0×) |" in text
    assert "| SHD | 644 → 14.7 (43.8×) | not measured |" in text
    assert "| Spoken digits (a stand-in for SHD) | – |" in text and "trained for 5 epochs" in text
    trained, speed = text.split("## Activity")[0], text.split("## Speed and memory")[1]
    assert "paper train --dataset fmnist" in trained and "paper sweep" not in trained
    assert "paper sweep --dataset fmnist --data DATA --over hidden" in speed.split("## Every run")[0]


def test_activity_above_the_papers_is_told(tmp_path):
    files = {"s0": training(epochs=4)}
    for entry, active in zip(files["s0"]["history"], (0.5, 2.0, 4.9, 5.1, 7.0), strict=True):
        entry["active_pct"] = [1.0, active]
    files["s0"]["history"][2]["test_accuracy"] = 81.25
    text = page_of(tmp_path, files)
    assert "- Fashion-MNIST: no layer above 5 % up to epoch 2, at 81.25 % test accuracy; the runs go on." in text
    files["s0"]["history"][1]["active_pct"] = [1.0, 6.0]
    assert "- Fashion-MNIST: above 5 % from the first epoch on." in page_of(tmp_path, files)


def test_runs_of_other_lengths_are_not_averaged(tmp_path):
    files = {f"s{seed}": training(seed=seed, epochs=4) for seed in range(3)}
    files |= {f"d{seed}": training(b_th="inf", seed=seed, epochs=4 - 2 * (seed == 2)) for seed in range(3)}
    files["s1"]["status"], files["s1"]["history"] = "running", files["s1"]["history"][:4]
    files["s2"]["status"], files["s2"]["history"] = "diverged", files["s2"]["history"][:4]
    for seed in range(3):
        files[f"s{seed}"]["history"][-1]["test_accuracy"] = 80.0 + seed
        files[f"d{seed}"]["history"][-1]["test_accuracy"] = 70.0 + 2 * seed
    text = page_of(tmp_path, files)
    assert "71.00 ± 1.00 % (4 epochs, 2 seeds, 1 shorter)" in text
    assert "81.00 ± 1.00 % (4 epochs, 2 seeds, 1 not finished, 1 shorter)" in text  # what diverged counts
    assert "after 4 epochs, 1 seed in pairs: +10.00 points; one seed tells nothing." in text


def test_the_page_drops_no_run(tmp_path):
    text = page_of(tmp_path, everything())
    for status in ("diverged", "dead", "running"):
        assert f"| {status} |" in text
    assert "the loss or a weight was not finite in epoch 3" in text and "a hidden layer spikes no more" in text
    assert "2 not finished" in text
    assert text.count("a stand-in for SHD") >= text.count("Spoken digits")
    for line in text.splitlines():
        assert "nan" not in line and "None" not in line, line


def test_sweeps_on_their_page(tmp_path):
    page = tmp_path / "choosing.md"
    page.write_text(f"before\n\n{pages.BEGIN}\nold\n{pages.END}\n\nafter\n", encoding="utf-8")
    files = {"one": sweep_b_th(100.0)}
    for row, accuracy in zip(files["one"]["rows"], (78, 79, 81.6, 82, 82, 82), strict=True):
        row["test_accuracy"] = accuracy
    results = put(tmp_path / "results", files)
    figures.draw(results, tmp_path / "out", choosing=page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "the least b_th within half a point of dense, 82.0 %, is 0.2, which keeps 95 % of the mass" in text
    assert "| ∞ (dense) | 100 |" in text and '"auto" would be 0.19' in text
    figures.draw(results, tmp_path / "out", choosing=page)
    assert page.read_text(encoding="utf-8") == text
    assert "What we recommend" not in text  # of one surrogate
    files["two"] = sweep_b_th(25.0)
    for row, accuracy in zip(files["two"]["rows"], (70, 79, 80.2, 80.6, 81, 81), strict=True):
        row["test_accuracy"] = accuracy
    figures.draw(put(tmp_path / "both", files), tmp_path / "out", choosing=page)
    text = page.read_text(encoding="utf-8")
    assert "| 0.05 | 11.0 |" in text and "| 0.2 | 0.8 |" in text and "begin with `b_th=0.2`" in text
    assert "--over b-th\n```" in text
    figures.draw(put(tmp_path / "none", {}), tmp_path / "out", choosing=page)
    assert "Not measured yet" in page.read_text(encoding="utf-8")
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match=r"choosing.md: the markers .* expected"):
        figures.draw(results, tmp_path / "out", choosing=page)


# --- files that are no results -------------------------------------------------------------------------------------


def broken(change):
    content = training()
    change(content)
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ("[1]", "one.json"),
        (json.dumps(training()).replace('"seed": 0', '"seed": NaN'), "must be JSON"),
        (broken(lambda c: c.pop("history")), "history must be there"),
        (broken(lambda c: c.update(status="fine")), "status must be .*'fine'"),
        (broken(lambda c: c.update(more=1)), "more"),
        (broken(lambda c: c["history"][1].update(loss="low")), "loss must be .*'low'"),
        (broken(lambda c: c["experiment"].update(name="mnist")), "mnist"),
        (broken(lambda c: c["experiment"]["preset"].pop("steps")), "steps"),
        (broken(lambda c: c["data"].update(train=-1)), "train must be .*-1"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path, content, message):
    path = tmp_path / "one.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert "one.json" in str(error.value)


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["figures", "--results", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    assert "--results must be a folder of results" in capsys.readouterr().err


# --- what is published ---------------------------------------------------------------------------------------------


def test_published_pages_are_those_of_the_published_results(tmp_path):
    results = load(DOCS / "results")
    all_figures = figures.figures_of(results)
    text = pages.paper(results, all_figures, "figures", DOCS / "paper.md")
    assert text == (DOCS / "paper.md").read_text(encoding="utf-8"), pages.COMMAND
    text = pages.choosing(results, all_figures, "figures", DOCS / "choosing-b_th.md")
    assert text == (DOCS / "choosing-b_th.md").read_text(encoding="utf-8"), pages.COMMAND
    expected = {figure.file: figures.DIGEST.search(figures.drawing(figure))[1] for figure in all_figures if figure.data}
    assert digests(drawn(DOCS / "figures")) == expected, pages.COMMAND
