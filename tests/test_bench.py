"""The benchmark: what it counts is right, its gate refuses what is wrong, and it runs from command line to document."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from sparse_backend import EventTensor
from sparse_backend.bench import cases, for_norse, main, measure, paths, render, rss, timing, training
from sparse_backend.bench.gate import Gate, flips
from sparse_backend.bench.inputs import Inputs
from sparse_backend.bench.memory import kept_bytes
from sparse_backend.bench.models import Output, build, framework_of, loss_of
from sparse_backend.functional import linear_leaky
from sparse_backend.surrogate import derivative

REGISTRY = dict(cases.CASES)  # which tests replace
TINY = cases.Case(
    "tiny", 30, (16, 12), 4, steps=10, events=12, coding="latency", aim=5.0, batch=16, train_steps=4
)  # fmt: skip
RECORDING = dataclasses.replace(TINY, name="recording", coding="recording", events=20)
BUSY = dataclasses.replace(TINY, aim=15.0, aim_at="spikes")  # every layer spikes
NORSE = dataclasses.replace(
    BUSY, name="norse", framework="norse", surrogate="super_alpha", paths=cases.CASES["norse-fmnist"].paths
)  # fmt: skip
NORSE_CASES = (
    NORSE,
    dataclasses.replace(NORSE, surrogate="super", b_th="auto"),
    dataclasses.replace(NORSE, net="recurrent", hidden=(16,)),
)
FORCED = dataclasses.replace(BUSY, net="forced", paths=cases.CASES["forced"].paths)
CONV = dataclasses.replace(cases.CASES["conv"], steps=4, batch=4, train_steps=0)
SEQUENCES = (cases.STOCK, cases.SEQUENCE, cases.SEQUENCE_EVENTS)
SETTINGS = measure.Settings(repeats=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    """The registry of cases and targets in small."""
    registry = {case.name: case for case in (TINY, RECORDING)}
    monkeypatch.setattr(cases, "CASES", registry)
    targets = (
        cases.Target("tiny", cases.SEQUENCE, "whole", 1e-6),
        cases.Target("tiny", cases.SEQUENCE_EVENTS, "kept", 1e-6),
    )
    monkeypatch.setattr(measure, "TARGETS", targets)
    return registry


# Memory.


def test_kept_bytes_of_a_hand_made_graph():
    a, b = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    assert kept_bytes(lambda: (a * b).sum(), exclude=[a, b]) == 0
    assert kept_bytes(lambda: (a * b).sum()) == 800
    assert kept_bytes(lambda: a.exp().sum(), exclude=[a]) == 400  # exp keeps its result
    assert kept_bytes(lambda: (a + b).sum()) == 0
    # a storage counts once, and whole
    assert kept_bytes(lambda: (lambda e: e[:10].square().sum() + e[50:].square().sum())(a.exp())) == 400


def test_kept_bytes_counts_what_is_alive_at_the_end_alone():
    a = torch.randn(100, requires_grad=True)

    def forward():
        a.exp()  # its graph is gone at once
        return a.sum()

    assert kept_bytes(forward) == 0


def test_kept_bytes_sees_what_our_ops_hold():
    torch.manual_seed(0)
    x = EventTensor.from_dense((torch.rand(6, 50, 80) < 0.1).float())
    weight = torch.randn(20, 80, requires_grad=True)

    def forward():
        spikes, _ = linear_leaky(x, weight, beta=0.9, spike_grad=_soft_step, b_th=0.5, reset="none")
        forward.active = spikes.active_indices.numel()
        return spikes.handle.sum()

    kept = kept_bytes(forward, exclude=[weight, x.row_ptr, x.indices])
    least = 4 * forward.active + 4 * (6 * 50 + 1)  # where the active entries are
    assert least <= kept <= 6 * least
    assert kept_bytes(forward, exclude=[weight]) == kept + x.row_ptr.nbytes + x.indices.nbytes


def _soft_step(x):
    soft = x / (1 + 10 * x.abs())
    return (x > 0).to(x.dtype) + (soft - soft.detach())


def test_peak_memory_of_a_child_process_follows_the_work():
    case = dataclasses.replace(TINY, steps=20, hidden=(64, 64), batch=512)
    inputs = Inputs(case, 0)
    torch.manual_seed(0)
    peak = rss.peak_bytes(case, build(case), inputs.batch(case.batch), cases.STOCK)
    one = 4 * case.steps * case.batch * 64
    assert 2 * one < peak < 40 * one


def test_peak_memory_says_what_the_child_said():
    with pytest.raises(RuntimeError, match="nonsense"):
        rss.peak_bytes(TINY, build(TINY), Inputs(TINY, 0).batch(2), "nonsense")


# Input and activity.


@pytest.mark.parametrize("case", [TINY, RECORDING, dataclasses.replace(RECORDING, steps=40, inputs=200, events=300)])
def test_input_has_the_stated_events(case):
    inputs = Inputs(case, 1)
    batch = inputs.batch(64)
    assert batch.events_per_sample == pytest.approx(case.events, rel=0.1)
    dense = batch.dense()
    assert dense.shape == (case.steps, 64, case.inputs)
    assert torch.equal(torch.unique(dense), torch.tensor([0.0, 1.0]))
    assert dense.count_nonzero() == batch.events.nnz
    EventTensor(batch.events.shape, batch.events.row_ptr, batch.events.indices)  # its parts fit together
    assert not torch.equal(inputs.batch(64).dense(), dense)
    assert torch.equal(Inputs(case, 1).batch(64).dense(), dense)
    assert int(batch.labels.max()) < case.classes


def test_training_ends_at_the_stated_activity():
    case = dataclasses.replace(RECORDING, steps=50, inputs=60, events=150, hidden=(50, 50), batch=64, train_steps=20)
    inputs = Inputs(case, 0)
    trained = training.train(case, inputs, seed=0)
    activity = training.measure_activity(trained.net, case, inputs.batch(64))
    assert activity.active == pytest.approx((case.aim, case.aim), rel=0.3)
    assert all(0 < spikes < 20 for spikes in activity.spikes)
    assert trained.last_loss < trained.first_loss


# The gate.


def _gate(case=TINY):
    inputs = Inputs(case, 0)
    torch.manual_seed(0)
    net = build(case)
    training.calibrate(net, case, inputs.batch(16))
    batch = inputs.batch(case.batch)
    return Gate(case, net, inputs.batch(8), batch, batch.dense())


def _path(change=None, output=None, name="changed"):
    """The sequence path with the gradient of the first weight, or the output, changed."""

    def prepare(net, b_th):
        forward = paths.PATHS[cases.SEQUENCE].prepare(net, b_th)
        if change is not None:
            net.linears[0].weight.register_hook(change)
        return forward if output is None else lambda x: output(forward(x))

    return paths.Path(name, name, "dense", prepare)


@pytest.mark.parametrize("b_th", [0.2, math.inf, "auto"])
@pytest.mark.parametrize("name", SEQUENCES[1:])
def test_gate_passes_what_is_right(b_th, name):
    gate = _gate(dataclasses.replace(TINY, b_th=b_th))
    verdict = gate.judge(paths.PATHS[name])
    assert verdict.problem is None
    assert verdict.numbers["gradient_cosine"] > 0.999
    assert gate.judge(_path()).problem is None


def test_gate_refuses_a_wrong_gradient():
    gate = _gate()
    problem = gate.judge(_path(lambda grad: grad * 1.0001)).problem
    assert problem is not None and "gradient of linears.0.weight" in problem and "float64" in problem
    # and one that is wrong in float32 alone, as a kernel may be
    problem = gate.judge(_path(lambda grad: grad if grad.dtype == torch.float64 else grad.flip(0))).problem
    assert problem is not None and "cosine" in problem and "float32" in problem


def test_gate_refuses_the_unmasked_gradient():
    """Ordinary back-propagation is not what b_th = 0.2 is defined to be."""
    stock = dataclasses.replace(paths.PATHS[cases.STOCK], name="unmasked", masked=True)
    problem = _gate(dataclasses.replace(TINY, aim=20.0)).judge(stock).problem
    assert problem is not None and "gradient" in problem


def _disturbed(samples):
    """The sequence path, which in float32 sees no event of the first samples of a batch."""

    def prepare(net, b_th):
        forward = paths.PATHS[cases.SEQUENCE].prepare(net, b_th)

        def disturbed(x):
            if x.dtype == torch.float64:
                return forward(x)
            keep = (torch.arange(x.shape[1]) >= samples).to(x.dtype)
            return forward(x * keep[:, None])

        return disturbed

    return paths.Path("disturbed", "disturbed", "dense", prepare)


def test_gate_leaves_samples_with_a_flipped_spike_out(monkeypatch):
    """One sample of 32 spikes elsewhere: what is compared is the other 31, loss and gradients included."""
    case = dataclasses.replace(BUSY, batch=32)
    verdict = _gate(case).judge(_disturbed(1))
    assert verdict.problem is None
    assert verdict.numbers["samples_left_out"] == 1 / 32
    assert verdict.numbers["loss_error"] < 1e-5 and verdict.numbers["gradient_cosine"] > 1 - 1e-6
    # it is the leaving out that makes them agree
    monkeypatch.setattr("sparse_backend.bench.gate.flips", lambda ours, stock: torch.zeros(32, dtype=torch.bool))
    assert _gate(case).judge(_disturbed(1)).problem is not None


def test_gate_refuses_many_flips():
    problem = _gate(dataclasses.replace(BUSY, batch=32)).judge(_disturbed(3)).problem
    assert problem is not None and "at most 5 % of the samples may have a flipped spike, got 9.38 %" in problem


def test_flips_are_found_by_sample_in_any_layer_at_any_step():
    layers = [torch.zeros(5, 4, 3, dtype=torch.bool), torch.zeros(5, 4, 2, 2, dtype=torch.bool)]
    other = [layer.clone() for layer in layers]
    assert flips(layers, other).tolist() == [False] * 4
    other[0][4, 1, 2] = other[1][0, 3, 0, 1] = True
    assert flips(layers, other).tolist() == flips(other, layers).tolist() == [False, True, False, True]


def test_loss_of_some_samples():
    mem, labels = torch.randn(3, 4, 5), torch.tensor([0, 1, 2, 3])
    samples = torch.tensor([1, 3])
    expected = loss_of(Output(None, mem[:, samples]), labels[samples])
    assert torch.equal(loss_of(Output(None, mem), labels, samples), expected)


@pytest.mark.parametrize("name", [cases.SEQUENCE, cases.LOOP, cases.STEP])
def test_hidden_spikes_are_those_of_stock(name):
    batch, net = Inputs(BUSY, 0).batch(8), build(BUSY)
    training.calibrate(net, BUSY, batch)
    stock = paths.Run(paths.PATHS[cases.STOCK], net, 0.2, batch).hidden()
    run = paths.Run(paths.PATHS[name], net, 0.2, batch)
    assert [list(layer.shape) for layer in stock] == [[10, 8, 16], [10, 8, 12]]
    assert all(layer.any() for layer in stock)
    assert all(torch.equal(a, b) for a, b in zip(run.hidden(), stock, strict=True))
    assert not run.forward(run.input).hidden  # what is timed gives none back


def test_gate_refuses_a_wrong_output_and_what_raises():
    gate = _gate()
    assert "membrane" in str(gate.judge(_path(output=lambda out: Output(out.spikes, out.mem * 1.001))).problem)
    assert "shape" in str(gate.judge(_path(output=lambda out: Output(out.spikes, out.mem[1:]))).problem)
    assert "nan" in str(gate.judge(_path(lambda grad: grad * math.nan)).problem)

    def fail(_):
        raise TypeError("no such thing")

    assert "TypeError: no such thing" in str(gate.judge(_path(output=fail)).problem)


def test_what_is_refused_is_not_timed(monkeypatch):
    monkeypatch.setitem(paths.PATHS, "changed", _path(lambda grad: -grad))
    case = dataclasses.replace(TINY, paths=(*SEQUENCES, "changed"))
    rows = {row["path"]: row for row in measure.measure(case, SETTINGS)["rows"]}
    assert "ms" not in rows["changed"] and "kept_bytes" not in rows["changed"]
    assert "gradient of linears.0.weight" in rows["changed"]["refused"]
    assert "ms" in rows[cases.SEQUENCE]


def test_a_path_that_cannot_run_is_left_out_visibly(monkeypatch):
    def prepare(net, b_th):
        raise paths.Unavailable("nobody has built it")

    monkeypatch.setitem(paths.PATHS, "absent", paths.Path("absent", "absent", "dense", prepare))
    result = measure.measure(dataclasses.replace(TINY, paths=(cases.STOCK, "absent")), SETTINGS)
    assert result["rows"][1] == {"path": "absent", "label": "absent", "left_out": "nobody has built it"}
    assert "absent: LEFT OUT, nobody has built it" in render.text_table(result)


# Norse, and other networks.


def _measured(case):
    result = measure.measure(case, SETTINGS)
    rows = {row["path"]: row for row in result["rows"]}
    assert list(rows) == list(case.paths)
    assert all("ms" in row for row in rows.values()), [row.get("refused") for row in rows.values()]
    return result, rows


@pytest.mark.parametrize("case", NORSE_CASES, ids=["feedforward", "as installed", "recurrent"])
def test_norse_is_checked_and_measured(case):
    result, rows = _measured(case)
    assert all(0 < spikes < 50 for spikes in result["spikes_pct_by_layer"])
    for name in (cases.ENABLED, cases.ENABLED_EVENTS, cases.CELLS, cases.CELLS_EVENTS):
        assert rows[name]["check"]["gradient_cosine"] > 0.999
        assert rows[name]["kept_bytes"] > 0
    assert f"b_th {case.b_th}" in render.case_title(result)


def test_norse_gate_refuses_the_unmasked_gradient():
    with framework_of(NORSE).given(NORSE):
        gate = _gate(NORSE)
        assert gate.judge(paths.PATHS[cases.MENDED]).problem is None
        mended = dataclasses.replace(paths.PATHS[cases.MENDED], masked=True)
        problem = gate.judge(mended).problem
    assert problem is not None and "gradient" in problem


def test_norse_honours_alpha_within_the_case_alone():
    net = build(NORSE)
    x = torch.full((1,), 0.1, dtype=torch.float64)

    def g():
        return float(derivative(for_norse.surrogate_of(net), x))

    before = g()
    assert for_norse.honours_alpha() == (before == pytest.approx(1 / 121))
    with framework_of(NORSE).given(NORSE):
        assert g() == pytest.approx(1 / 121)
        assert training.band(net, dataclasses.replace(NORSE, b_th="auto")) == pytest.approx(0.19, rel=0.01)
    assert g() == before


def _nodes(output, name):
    """How many nodes of this name the graph has."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [before for before, _ in node.next_functions]
    return sum(name in node.name() for node in seen)


@pytest.mark.parametrize("net", ["feedforward", "recurrent"])
def test_mended_norse_indexes_no_sequence_that_learns(net):
    case = dataclasses.replace(NORSE, net=net)
    batch, own = Inputs(case, 0).batch(4), build(case)
    stock = paths.Run(paths.PATHS[cases.STOCK], own, 0.2, batch)
    mended = paths.Run(paths.PATHS[cases.MENDED], own, 0.2, batch)
    assert _nodes(stock.loss(), "SelectBackward") >= case.steps
    assert _nodes(mended.loss(), "SelectBackward") == 0
    assert torch.equal(stock.evaluate().mem, mended.evaluate().mem)


def test_cells_share_the_parameters():
    run = paths.Run(paths.PATHS[cases.CELLS], build(NORSE), 0.2, Inputs(NORSE, 0).batch(2))
    assert {id(p) for p in run.forward.parameters()} == {id(p) for p in run.net.parameters()}


def test_a_forced_loop_is_measured():
    _, rows = _measured(FORCED)
    assert rows[cases.LOOP]["check"]["gradient_cosine"] > 0.999


def test_a_convolutional_net_is_measured_with_and_without_gradients():
    result, rows = _measured(CONV)
    for name in (cases.STOCK_NO_GRAD, cases.LOOP_NO_GRAD):
        assert set(rows[name]["ms"]) == set(rows[name]["ratio"]) == {"forward"} and "kept_bytes" not in rows[name]
    forward = [rows[name]["ms"]["forward"]["median"] for name in (cases.STOCK_NO_GRAD, cases.LOOP_NO_GRAD)]
    assert rows[cases.LOOP_NO_GRAD]["ratio"]["forward"] == pytest.approx(forward[0] / forward[1])
    assert rows[cases.LOOP_NO_GRAD]["check"]["membrane_error"] < 1e-3
    text = render.text_table(result)
    assert "28x28 - 12C5" in text and "stock, no_grad" in text


# Timing.


def test_repeats_are_interleaved_and_counted(monkeypatch):
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # slow in a process as large as pytest's
    calls = []

    class Run:
        def __init__(self, name):
            self.name = name

        def step(self):
            calls.append(self.name)
            return paths.Times(1e-3, 2e-3, 4e-3)

    times = timing.interleave({name: Run(name) for name in "abc"}, 4, 0.0, seed=0)
    assert [len(times[name]) for name in "abc"] == [4] * 3
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 5 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds[1:]}) > 1
    assert timing.summary(times["a"])["whole"] == {"median": 4.0, "low": 4.0, "high": 4.0}
    assert len(timing.interleave({"a": Run("a")}, None, 0.0, seed=0)["a"]) == timing.FEWEST
    assert len(timing.interleave({"a": Run("a")}, None, 1e9, seed=0)["a"]) == timing.MOST


def test_a_slow_run_is_timed_once_and_not_warmed_up(monkeypatch):
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    calls = []

    class Run:
        def __init__(self, name):
            self.name = name

        def step(self):
            calls.append(self.name)
            return paths.Times(1e-3)

    times = timing.interleave({name: Run(name) for name in ("slow", "fast")}, 3, 0.0, seed=0, once=("slow",))
    assert {name: len(found) for name, found in times.items()} == {"slow": 1, "fast": 3}
    assert calls.count("slow") == 1 and calls[0] == "fast"
    assert timing.summary(times["slow"]) == {"forward": {"median": 1.0, "low": 1.0, "high": 1.0}}


def test_a_step_changes_the_weights_versions_and_nothing_else():
    batch = Inputs(TINY, 0).batch(4)
    run = paths.Run(paths.PATHS[cases.SEQUENCE_EVENTS], build(TINY), 0.2, batch)
    weight = run.net.linears[0].weight
    before, version = weight.detach().clone(), weight._version
    times = run.step()
    assert torch.equal(weight, before) and weight._version > version
    assert times.whole >= times.forward + times.backward > 0


# The registry.


def test_registry_is_consistent():
    for name, case in cases.CASES.items():
        assert case.name == name
        assert case.paths[0] == cases.STOCK
        assert set(case.paths) <= set(paths.PATHS)
        assert cases.Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case
        assert any(target.case == name for target in cases.TARGETS)
        assert set(case.once) <= set(case.paths)
        assert {paths.PATHS[path].against for path in case.paths} <= set(case.paths)
        assert case.surrogate in framework_of(case).SURROGATES and case.net in framework_of(case).NETS
        assert not case.image or math.prod(case.image) == case.inputs
    every = {**cases.CASES, **cases.GPU_CASES}
    for target in cases.TARGETS:
        assert {target.path, target.against} <= set(every[target.case].paths)
    assert len(set(cases.TARGETS)) == len(cases.TARGETS)


def test_targets_know_their_direction():
    at_least, at_most = cases.Target("c", "p", "whole", 6), cases.Target("c", "p", "kept", 0.03)
    assert at_least.reached(6) and not at_least.reached(5.99)
    assert at_most.reached(0.03) and not at_most.reached(0.031)
    assert at_least.text == "whole ≥ 6×" and at_most.text == "kept ≤ 3 %"
    of_step = cases.Target("c", "p", "whole", 8, cases.MENDED)
    assert of_step.text == "whole ≥ 8× against mended stock"
    recording = cases.Target("c", cases.LOOP, "recording", 4, cases.SEQUENCE)
    assert recording.reached(4) and recording.reached(-1) and not recording.reached(4.1)
    assert recording.text == "whole ≤ 115 % of the sequence form + 4 µs per recorded call"


def test_targets_are_held_against_their_own_path():
    """10 steps of 3 layers are 60 calls: 1.15 * 10 ms + 60 * 4 µs is 11.74 ms."""

    def row(path, whole, kept=100):
        ms = {"forward": {"median": whole / 2}, "whole": {"median": whole}}
        return {"path": path, "ms": ms, "kept_bytes": kept}

    rows = {cases.STOCK: row(cases.STOCK, 100.0), cases.SEQUENCE: row(cases.SEQUENCE, 10.0, 40)}
    assert cases.recorded_calls(TINY) == 60

    def got(target, ours):
        return measure._got(TINY, target, ours, rows[target.against])

    recording = cases.Target("tiny", cases.LOOP, "recording", 4, cases.SEQUENCE)
    assert got(recording, row(cases.LOOP, 11.74)) == pytest.approx(4)
    assert got(recording, row(cases.LOOP, 11.5)) == pytest.approx(0)
    assert got(cases.Target("tiny", cases.LOOP, "whole", 1), row(cases.LOOP, 20.0)) == 5
    assert got(cases.Target("tiny", cases.LOOP, "whole", 1, cases.SEQUENCE), row(cases.LOOP, 20.0)) == 0.5
    assert got(cases.Target("tiny", cases.LOOP, "kept", 1, cases.SEQUENCE), row(cases.LOOP, 1.0, 20)) == 0.5


# The command.


def test_main_measures_writes_and_renders(tiny, tmp_path, capsys):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    assert main(["--repeats", "2", "--threads", "1", "--title", "Here", "--json", str(folder / "cpu.json")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    title = "tiny: 30-16-12-4, T 10, B 16, fast_sigmoid(slope=100), b_th 0.2"
    for words in (title, "sequence, event input", "kernels: ", "targets reached: 1 of 2"):
        assert words in out
    assert "whole ≥ 0×: reached" in out and "kept ≤ 0.0001 %: MISSED" in out
    content = json.loads((folder / "cpu.json").read_text())
    assert content["machine"]["threads"] == 1
    assert content["versions"]["torch"] == torch.__version__
    for case in content["cases"]:
        assert case["input_events"] > 0 and 0 < case["active_pct"] <= 100
        for row in case["rows"]:
            if "ms" in row:
                assert row["repeats"] == 2 and row["kept_bytes"] > 0
                assert row["ms"]["whole"]["low"] <= row["ms"]["whole"]["median"] <= row["ms"]["whole"]["high"]
                assert row["ratio"]["whole"] == pytest.approx(
                    case["rows"][0]["ms"]["whole"]["median"] / row["ms"]["whole"]["median"]
                )
    assert main(["--render", str(folder)]) == 0
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "## Here" in text and "### recording: " in text and "| sequence, event input |" in text
    assert render.render(folder)[1] == text


def test_main_quick_is_not_held_against_targets(tiny, capsys):
    assert main(["--quick", "--case", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "targets" in out and "MISSED" not in out and "reached" not in out


def test_main_fails_when_a_check_fails(tiny, monkeypatch, capsys):
    monkeypatch.setitem(paths.PATHS, "changed", _path(lambda grad: -grad))
    monkeypatch.setitem(cases.CASES, "tiny", dataclasses.replace(TINY, paths=(cases.STOCK, "changed")))
    assert main(["--case", "tiny", "--repeats", "1"]) == 1
    assert "changed: REFUSED, not timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--case", "mnist"], "expected one of fmnist, fmnist-wide"),
        (["--data", "nowhere", "--case", "fmnist"], "nowhere"),
        (["--json", "no/such/folder/a.json"], "existing folder"),
        (["--render", "nowhere"], "expected results"),
    ],
)
def test_main_says_what_is_wrong(argv, words, capsys):
    assert main(argv) == 1
    assert words in capsys.readouterr().err


def test_cases_of_a_framework_that_is_not_installed_are_left_out(tiny, monkeypatch, capsys):
    monkeypatch.setitem(tiny, "norse", NORSE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "norse" else object())
    monkeypatch.setattr(measure, "measure", lambda case, *_: {**_result("shd", _MS), "case": case.to_dict()})
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "left out, as norse is not installed: norse\n" in out and "recording: " in out
    assert main(["--case", "norse"]) == 1
    assert 'pip install "sparse_backend[norse]"' in capsys.readouterr().err


def test_render_refuses_foreign_files(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert main(["--render", str(tmp_path)]) == 1
    assert "format 1, got None" in capsys.readouterr().err


def test_render_refuses_a_quick_run(tiny, tmp_path, capsys):
    assert main(["--quick", "--case", "tiny", "--json", str(tmp_path / "a.json")]) == 0
    assert main(["--render", str(tmp_path)]) == 1
    assert "--quick" in capsys.readouterr().err


# The documents.


def _content(title, *results, commit="abc"):
    machine = {"cpu": "A", "cores": 2, "threads": 2, "memory_gb": 1, "features": [], "system": "Linux"}
    where = {"machine": machine, "versions": {"torch": "2"}, "kernels": {"state": "loaded", "origin": "built"}}
    return render.document(results, {"title": title, **where, "commit": commit, "quick": False})


def _result(name, ms):
    case = REGISTRY[name]

    def row(path, whole):
        parts = {part: {"median": whole} for part in render.PARTS}
        ratio = dict.fromkeys(render.PARTS, ms[cases.STOCK] / whole)
        label = paths.PATHS[path].label
        return {"path": path, "label": label, "ms": parts, "ratio": ratio, "kept_bytes": 10, "kept_share": 0.5}

    return {
        "case": case.to_dict(), "sizes": case.sizes, "surrogate": "S", "band": 19.0, "input": "drawn",
        "input_events": 1.0, "spikes_pct": 1.0, "active_pct": 1.0, "spikes_pct_by_layer": [1.0],
        "active_pct_by_layer": [1.0], "training": {"steps": 1, "first_loss": 2.0, "last_loss": 1.0},
        "rows": [row(path, whole) for path, whole in ms.items()],
    }  # fmt: skip


_MS = {cases.STOCK: 100.0, cases.LOOP: 10.0}
_NORSE_MS = {cases.STOCK: 1000.0, cases.MENDED: 100.0, cases.ENABLED: 10.0}


def test_results_of_one_title_are_merged():
    shd = _content("Here", _result("shd", _MS), commit="one")
    fmnist = _content("Here", _result("conv", _MS), _result("fmnist", _MS), commit="two")
    there = _content("There", _result("shd", _MS))
    here, other = render.merged([shd, there, fmnist])
    assert [result["case"]["name"] for result in here["cases"]] == ["fmnist", "shd", "conv"]
    assert other["title"] == "There" and len(other["where"]) == 1
    assert len(here["where"]) == 1  # one machine, at two commits
    assert here["where"][0].endswith("; commit one: shd; commit two: fmnist, conv")
    elsewhere = {**fmnist, "machine": {**fmnist["machine"], "cores": 99}}
    (two,) = render.merged([shd, elsewhere])
    assert [line.partition(":")[0] for line in two["where"]] == ["shd", "fmnist, conv"]
    assert two["where"][0].endswith("; commit one") and two["where"][1].endswith("; commit two")
    text = render.markdown([shd, there, fmnist])
    assert text.count("## Here") == 1 and text.index("### fmnist") < text.index("### shd")
    with pytest.raises(ValueError, match="got shd in two"):
        render.merged([shd, _content("Here", _result("shd", _MS))])


def test_cases_measured_one_by_one_are_rendered_together(tiny, tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in tiny:
        assert main(["--case", name, "--repeats", "1", "--json", str(folder / f"{name}.json")]) == 0
    assert main(["--render", str(folder)]) == 0
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text.count("## CPU") == 1 and "### tiny: " in text and "### recording: " in text


def test_readme_has_a_table_for_each_framework():
    results = [
        _result("shd", _MS),
        _result("conv", _MS),
        _result("norse-shd", _NORSE_MS),
        _result("norse-shd-auto", _NORSE_MS),
    ]
    leaky, norse = render.summary([_content("Here", *results)]).split("\n\nOne training step against stock Norse")
    assert "| shd: 700-200-200-20, T 500 | drawn, 1 | 1.00 | 100 | – | – | 10.0× | – | 50.0 % |" in leaky
    assert "MP2 - 10, T 50, batch 128 | drawn, 1 | 1.00 | 100 |" in leaky and "norse" not in leaky
    assert (
        "| norse-shd: 700-200-200-20, T 500 | drawn, 1 | 1.00 | 1000 | 100 | 100.0× / 10.0× | – | – | – | 50.0 % |"
        in norse
    )
    assert "T 500, b_th auto = 19 |" in norse
    assert "mended by `unbind`" in norse
    alone = render.summary([_content("Here", results[2])])
    assert "commit abc" in alone and "stock snnTorch" not in alone


def test_document_says_what_norse_was_given_and_what_was_left_out():
    result = _result("norse-shd", _NORSE_MS)
    result["rows"][2]["check"] = {"samples_left_out": 1 / 256}
    text = render.markdown([_content("Here", result)])
    assert "Norse 1.1.0's SuperSpike ignores `alpha`" in text
    assert "enabled, dense input: checked without the 0.39 % of the samples in which a spike flipped" in text
    assert "ignores `alpha`" not in render.markdown([_content("Here", _result("shd", _MS))])


def test_list(capsys):
    assert main(["--list"]) == 0
    assert "784-1000-1000-10" in capsys.readouterr().out


def test_the_document_in_the_repository_agrees_with_its_results():
    folder = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
    if not folder.is_dir():
        pytest.skip("nothing has been measured yet: docs/benchmarks holds no results")
    file, text = render.render(folder)
    assert file.read_text(encoding="utf-8") == text, "run python -m sparse_backend bench --render"
    readme = folder.parents[1] / "README.md"
    text = readme.read_text(encoding="utf-8")
    assert render.with_summary(text, [render.load(path) for path in sorted(folder.glob("*.json"))]) == text
