"""`python -m sparse_backend paper`: presets, runs that go on, gradients and sweeps, on tiny data."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch

from sparse_backend.data import EventSet, Recordings
from sparse_backend.paper import gradients, main, options, sweep
from sparse_backend.paper.activity import activity
from sparse_backend.paper.models import build
from sparse_backend.paper.presets import PRESETS, Preset
from sparse_backend.paper.train import Experiment, Trainer, train

CLASSES = 3


def recordings(samples: int, steps: int, units: int, seed: int) -> Recordings:
    """Each class has units of its own that spike more."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    drawn = []
    for label in labels.tolist():
        count = 6 * units
        unit = torch.randint(units, (count,), generator=random)
        unit[::2] = unit[::2] // CLASSES * CLASSES + label
        drawn.append((torch.randint(steps, (count,), generator=random), unit.clamp(max=units - 1)))
    return Recordings.from_samples(drawn, labels, steps, units)


def tiny(preset: Preset, units: int = 36) -> EventSet:
    steps = preset.steps
    return EventSet("tiny", recordings(24, steps, units, 0), recordings(9, steps, units, 1), CLASSES)


SMALL = dataclasses.replace(PRESETS["digits"], steps=30, hidden=(20, 15), batch=10, epochs=2, lr=5e-3)


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    batches = trainer.batches(trainer.data.train, torch.arange(len(trainer.data.train)))
    return [trainer.step(x, labels)[0] for (x, labels), _ in zip(batches, range(steps), strict=False)]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_the_same_stock_and_with_dense_gradients(name):
    preset = dataclasses.replace(PRESETS[name], batch=8, b_th=math.inf)
    data = tiny(preset)
    got = losses_of(Trainer(Experiment(name, preset, 1), data), 3)
    expected = losses_of(Trainer(Experiment(name, preset, 1, stock=True), data), 3)
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    assert got == pytest.approx(expected, rel=2e-2)  # float32, and Adam divides by the size of a gradient
    assert len(set(got)) == 3


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_with_its_own_band(name):
    preset = dataclasses.replace(PRESETS[name], batch=8)
    trainer = Trainer(Experiment(name, preset, 1), tiny(preset))
    before = {key: value.clone() for key, value in trainer.net.state_dict().items()}
    assert all(math.isfinite(loss) for loss in losses_of(trainer, 2))
    changed = {key for key, value in trainer.net.state_dict().items() if not torch.equal(value, before[key])}
    assert {"output.weight"} <= changed
    for neuron in trainer.net.neurons:
        assert neuron.beta == pytest.approx(math.exp(-1 / 10))
    assert float(trainer.net.readout.threshold) == 1.0 and trainer.net.readout.reset_mechanism == "none"


def test_regularisers_change_what_is_learnt():
    quiet = dataclasses.replace(SMALL, upper=(0.0, 5.0))
    plain, held = (Trainer(Experiment("digits", preset, 0), tiny(SMALL)) for preset in (SMALL, quiet))
    assert losses_of(held, 1)[0] > losses_of(plain, 1)[0]
    lower = Trainer(Experiment("digits", dataclasses.replace(SMALL, lower=(1000.0, 1e-3)), 0), tiny(SMALL))
    assert losses_of(lower, 1)[0] > losses_of(held, 1)[0]


def test_normal_initialisation_has_the_papers_deviation():
    torch.manual_seed(0)
    weight = build(784, 10, PRESETS["fmnist"]).linears[0].weight
    assert float(weight.detach().std()) == pytest.approx(20 * (1 - math.exp(-0.1)) / 28, rel=0.01)


def stripped(history):
    return [{k: v for k, v in entry.items() if k not in ("seconds", "step_ms")} for entry in history]


@pytest.mark.parametrize("stock", [False, True])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, stock):
    data = tiny(SMALL)
    short = Experiment("digits", dataclasses.replace(SMALL, epochs=1), 3, stock)
    whole = Experiment("digits", SMALL, 3, stock)
    train(short, data, tmp_path / "a", "c")
    torch.rand(7)  # whatever else draws numbers in between
    resumed, result = train(whole, data, tmp_path / "a", "c")
    straight, expected = train(whole, data, tmp_path / "b", "c")
    assert stripped(result["history"]) == stripped(expected["history"])
    assert [entry["epoch"] for entry in result["history"]] == [0, 1, 2]
    for key, value in straight.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[key]), key


def test_a_finished_run_is_left_as_it_is(tmp_path):
    data, experiment = tiny(SMALL), Experiment("digits", SMALL, 0)
    train(experiment, data, tmp_path, "first")
    path = tmp_path / f"{experiment.id}.json"
    before = path.read_bytes()
    _, result = train(experiment, data, tmp_path, "second")
    assert path.read_bytes() == before and result["command"] == "first" and result["status"] == "finished"


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    data, experiment = tiny(SMALL), Experiment("digits", SMALL, 0)
    train(experiment, data, tmp_path, "c")
    other = Experiment("digits", dataclasses.replace(SMALL, lr=1.0), 0)
    with pytest.raises(ValueError, match=r"checkpoint must be of .*'lr': 1\.0.*got .*'lr': 0\.005"):
        train(other, data, tmp_path, "c")
    (tmp_path / f"{experiment.id}.ckpt").unlink()
    with pytest.raises(FileExistsError, match="not its checkpoint"):
        train(experiment, data, tmp_path, "c")


def test_divergence_and_death_are_told(tmp_path):
    data = tiny(SMALL)
    for _ in range(2):  # and again, as when the command is given once more
        trainer, result = train(Experiment("digits", dataclasses.replace(SMALL, lr=1e37), 0), data, tmp_path, "c")
        assert result["status"] == "diverged" and len(result["history"]) == 1
        assert all(parameter.isfinite().all() for parameter in trainer.net.parameters())  # those before that epoch
    silent = dataclasses.replace(data, train=still(data.train), test=still(data.test))
    _, result = train(Experiment("digits", SMALL, 1), silent, tmp_path, "c")
    assert result["status"] == "dead" and result["history"][-1]["spikes_pct"] == [0, 0]


def still(part: Recordings) -> Recordings:
    none = part.times[:0]
    return Recordings(none, none, torch.zeros_like(part.ptr), part.labels, part.steps, part.n_units)


def test_weights_that_are_not_finite_are_divergence():
    trainer = Trainer(Experiment("digits", dataclasses.replace(SMALL, batch=24), 0), tiny(SMALL))
    trainer.optimizer.param_groups[0]["lr"] = math.inf  # its one step spoils the weights after the last loss
    assert math.isnan(trainer.epoch(lambda _: None)["loss"])


def test_a_run_is_not_mixed_with_another(tmp_path):
    data, experiment = tiny(SMALL), Experiment("digits", SMALL, 0)
    train(Experiment("digits", dataclasses.replace(SMALL, epochs=1), 0), data, tmp_path, "c")
    fewer = dataclasses.replace(data, train=data.train.spread(5))
    with pytest.raises(ValueError, match=r"must be of .*'train': 5.*got .*'train': 24.*choose another --out"):
        train(experiment, fewer, tmp_path, "c")
    checkpoint = tmp_path / f"{experiment.id}.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"seed0\.ckpt must be a whole checkpoint, got a damaged file .*: delete it"):
        train(experiment, data, tmp_path, "c")


def test_a_run_stopped_before_its_last_result_was_written_is_finished(tmp_path):
    data, experiment = tiny(SMALL), Experiment("digits", SMALL, 0)
    path = tmp_path / f"{experiment.id}.json"
    train(experiment, data, tmp_path, "c")
    expected = json.loads(path.read_text())
    path.write_text(json.dumps({**expected, "status": "running", "history": expected["history"][:-1]}))
    train(experiment, data, tmp_path, "c")
    assert json.loads(path.read_text()) == expected


def test_activity_is_the_same_stock_and_enabled():
    preset = dataclasses.replace(SMALL, batch=24)
    enabled, stock = (Trainer(Experiment("digits", preset, 0, stock), tiny(SMALL)) for stock in (False, True))
    one, other = enabled.activity(), stock.activity()
    assert one.spikes == pytest.approx(other.spikes, abs=0.02) and one.active == pytest.approx(other.active, abs=0.02)
    assert 0 < one.spikes[0] < 100 and 0 < one.active[0] < 100
    x, _ = next(stock.batches(stock.data.test, torch.arange(5)))
    everything = dataclasses.replace(stock.experiment, preset=dataclasses.replace(preset, b_th=math.inf))
    assert activity(stock.net, x, everything).active == [100, 100]


# --- gradients -----------------------------------------------------------------------------------------------------


def test_gradients_without_a_band_are_the_dense_ones():
    trainer = Trainer(Experiment("digits", dataclasses.replace(SMALL, b_th=math.inf), 0), tiny(SMALL))
    got = gradients.gradients(trainer)
    assert {entry["name"] for entry in got["gradients"]} == {name for name, _ in trainer.net.named_parameters()}
    assert all(entry["relative_error"] < 1e-5 for entry in got["gradients"])
    assert [picture["name"] for picture in got["pictures"]] == ["linears.1.weight", "spikes of layer 1"]
    for picture in got["pictures"]:
        assert picture["relative_error"] < 1e-5
        assert len(picture["dense"]) == len(picture["sparse"]) and len(picture["dense"][0]) == len(picture["sparse"][0])


def test_gradients_with_a_band_have_zeros_and_a_small_error():
    trainer = Trainer(Experiment("digits", SMALL, 0), tiny(SMALL))
    losses_of(trainer, 3)
    got = gradients.gradients(trainer)
    first = next(entry for entry in got["gradients"] if entry["name"] == "linears.0.weight")
    assert 1e-4 < first["relative_error"] < 0.5 and first["cosine"] > 0.9
    spikes = got["pictures"][1]
    assert sum(value == 0 for row in spikes["sparse"] for value in row) > sum(
        value == 0 for row in spikes["dense"] for value in row
    )
    json.dumps(got, allow_nan=False)


def test_samples_whose_spikes_differ_are_left_out(monkeypatch):
    trainer = Trainer(Experiment("digits", SMALL, 0), tiny(SMALL))
    kept = torch.arange(9) % 3 > 0
    monkeypatch.setattr(gradients, "agreeing", lambda *_: kept)
    assert gradients.gradients(trainer)["samples"] == 6
    monkeypatch.undo()
    x, _ = trainer.data.test.batch(torch.arange(9))
    assert gradients.agreeing(trainer, x).all()
    other = trainer.stock()
    with torch.no_grad():
        other.output.weight += 0.1
    monkeypatch.setattr(trainer, "stock", lambda: other)
    assert not gradients.agreeing(trainer, x).any()


def test_mask_cuts_the_surrogate_at_its_band():
    net = build(5, 3, SMALL)
    gradients.mask(net, 0.2)
    x = torch.tensor([-0.3, -0.1, 0.0, 0.15, 0.25], requires_grad=True)
    net.neurons[0].spike_grad(x).sum().backward()
    inside = 1 / (1 + SMALL.slope * x.detach().abs()) ** 2
    assert torch.allclose(x.grad, inside * torch.tensor([0.0, 1, 1, 1, 0]))


# --- sweeps --------------------------------------------------------------------------------------------------------


def test_presets_along_a_sweep():
    preset = PRESETS["fmnist"]
    assert sweep.preset_at(preset, "hidden", 400).hidden == (400, 400)
    assert sweep.preset_at(preset, "depth", 3).hidden == (200, 200, 200)
    assert sweep.preset_at(preset, "b-th", math.inf).b_th == math.inf
    with pytest.raises(ValueError, match=r"--values must be whole numbers of at least 1 over hidden, got 1.5"):
        sweep.preset_at(preset, "hidden", 1.5)
    with pytest.raises(ValueError, match=r"whole numbers of at least 1 over depth, got inf"):
        sweep.preset_at(preset, "depth", math.inf)
    with pytest.raises(ValueError, match=r"--values must be above 0 over b-th, got -1"):
        sweep.preset_at(preset, "b-th", -1.0)
    with pytest.raises(ValueError, match="fully connected"):
        sweep.preset_at(PRESETS["fmnist-conv"], "depth", 2)


def test_a_comparison_measures_both_sides():
    trainer = Trainer(Experiment("digits", SMALL, 0), tiny(SMALL))
    got = sweep.compare(trainer)
    for side in ("stock", "enabled"):
        assert set(got[side]["ms"]) == {"forward", "backward", "whole"}
        assert all(part["median"] > 0 for part in got[side]["ms"].values())
    assert 0 < got["enabled"]["kept_bytes"] < got["stock"]["kept_bytes"]
    assert len(got["gradient_error"]) == 3 and got["gradient_error"][2] < 1e-5 < got["gradient_error"][0]
    assert got["mass_pct"] == pytest.approx(100 * 20 / 21, abs=0.01)


def test_nothing_is_timed_that_does_not_agree(monkeypatch):
    trainer = Trainer(Experiment("digits", SMALL, 0), tiny(SMALL))
    losses_of(trainer, 3)
    monkeypatch.setattr(sweep, "_timed", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(sweep, "mask", lambda net, b_th: gradients.mask(net, 1e-3))
    with pytest.raises(sweep.Disagreement, match=r"gradients by at most 0.001, got 0.0 % and (0\.|inf)"):
        sweep.compare(trainer)
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "stock", lambda: build(36, CLASSES, SMALL))  # other weights
    with pytest.raises(sweep.Disagreement, match=r"at most 10 % of the samples may differ .* got 100.0 %"):
        sweep.compare(trainer)


# --- command line --------------------------------------------------------------------------------------------------


def test_commands_on_the_digits(tmp_path, capsys):
    common = ["--dataset", "digits", "--epochs", "1", "--limit", "20", "--hidden", "20", "20", "--out", str(tmp_path)]
    assert main(["train", *common, "--seeds", "0", "1"]) == 0
    assert main(["train", *common, "--dense"]) == 0
    assert main(["sweep", *common, "--over", "b-th", "--values", "0.2", "inf"]) == 0
    assert "kept" in capsys.readouterr().out
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len([name for name in results if name.endswith(".gradients.json")]) == 2  # not of dense gradients
    swept = results["sweep_digits_b-th_20-20_slope100_seed0.json"]
    assert [row["value"] for row in swept["rows"]] == [0.2, "inf"] and swept["rows"][1]["mass_pct"] == 100
    stock = results["digits_20-20_slope100_stock_seed0.json"]
    assert stock["experiment"]["stock"] and stock["data"]["train"] == 20
    for name, result in results.items():
        assert result["commit"] is None or len(result["commit"]) >= 12
        assert str(tmp_path) not in json.dumps(result), name
        assert result["command"].startswith("python -m sparse_backend paper ")


def test_a_seed_that_diverges_stops_no_other(tmp_path, capsys):
    common = ["--dataset", "digits", "--epochs", "1", "--limit", "20", "--hidden", "9", "9", "--out", str(tmp_path)]
    common += ["--lr", "1e37"]
    assert main(["train", *common, "--batch", "5", "--seeds", "0", "1"]) == 0
    assert main(["sweep", *common, "--batch", "4", "--seed", "2", "--over", "b-th", "--values", "0.2", "0.4"]) == 0
    assert "seed1: diverged after 0 epochs" in capsys.readouterr().out
    (swept,) = tmp_path.glob("sweep_*.json")
    assert [(row["status"], row["test_accuracy"]) for row in json.loads(swept.read_text())["rows"]] == [
        ("diverged", None)
    ] * 2


def test_snntorch_is_needed(monkeypatch, capsys):
    for module in ("models", "train", "gradients"):
        monkeypatch.delitem(sys.modules, f"sparse_backend.paper.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "snntorch", None)
    assert main(["train", "--dataset", "digits"]) == 1
    assert capsys.readouterr().err.endswith('not installed: pip install "sparse_backend[paper]"\n')


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "fmnist"], "--data must name the folder"),
        (["train", "--dataset", "fmnist", "--data", "nowhere"], "nowhere"),
        (["sweep", "--dataset", "digits", "--over", "depth", "--values", "0"], "whole numbers"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--dataset", "mnist"], ["--dataset", "digits", "--b-th", "-1"], ["--dataset", "digits", "--epochs", "0"],
     ["--dataset", "digits", "--lr", "nan"], ["--dataset", "digits", "--seeds", "-1"]],
)  # fmt: skip
def test_wrong_options_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", *arguments])
    assert exit.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_command_is_shown_without_folders():
    argv = ["train", "--data", "/home/me/fmnist", "--out=/tmp/x", "--dataset", "fmnist"]
    assert options.shown(argv) == "python -m sparse_backend paper train --data DATA --out=OUT --dataset fmnist"


def test_presets_round_trip_through_json():
    for preset in (
        *PRESETS.values(),
        dataclasses.replace(SMALL, b_th=math.inf),
        dataclasses.replace(SMALL, b_th="auto"),
    ):
        assert Preset.from_dict(json.loads(json.dumps(preset.to_dict(), allow_nan=False))) == preset
