"""Training on real data: what `enable` trains is as good as what stock snnTorch trains."""

from __future__ import annotations

import json
import math
import statistics

import pytest

pytest.importorskip("snntorch")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SEEDS = range(5)


@pytest.mark.slow
def test_digits_reach_stock_accuracy_over_five_seeds(tmp_path):
    """Handwritten digits, latency-coded, from the same weights and batches: on average over seeds, enabled reaches
    no less than stock but for two standard errors and one point."""
    from sparse_backend.demo import main

    differences = []
    for seed in SEEDS:
        numbers = tmp_path / "numbers.json"
        options = ["--hidden", "100", "--steps", "50", "--batch", "128", "--epochs", "25", "--seed", str(seed)]
        assert main([*options, "--quiet", "--out", str(tmp_path / "plot.png"), "--json", str(numbers)]) == 0
        result = json.loads(numbers.read_text(encoding="utf-8"))
        accuracy = {name: result[name]["accuracy_pct"] for name in ("stock", "enabled")}
        assert min(accuracy.values()) > 80, f"seed {seed} did not learn: {accuracy}"
        differences.append(accuracy["enabled"] - accuracy["stock"])
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    print(f"enabled - stock: {mean:+.2f} points, standard error {error:.2f}, {differences}")
    assert mean > -(2 * error + 1), f"{differences}"
