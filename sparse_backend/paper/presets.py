"""What is trained on what: the paper's networks and experiments as named presets (its appendix E, Table 3).

The paper's, for all its data sets: two hidden layers of 200, steps of 1 ms, membranes of 10 ms, the surrogate
1 / (100 |V − θ| + 1)², B_th = 0.2, batches of 256, Adam; T = 100, 300 and 500 for Fashion-MNIST, N-MNIST and SHD.
Learning rates, and everything of data sets that the paper does not have, are this project's choice; `chosen` lists it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

BTh = float | Literal["auto"]


@dataclass(frozen=True)
class Preset:
    """One experiment; times in ms."""

    dataset: str  #: a key of `datasets.DATASETS`
    steps: int  #: T
    epochs: int
    lr: float
    hidden: tuple[int, ...] = (200, 200)  #: () with `net` "conv"
    net: Literal["feedforward", "conv"] = "feedforward"
    dt: float = 1.0
    tau: float = 10.0
    slope: float = 100.0  #: of fast_sigmoid; 0 means atan(alpha=2), snnTorch's default
    b_th: BTh = 0.2
    batch: int = 256
    initial: Literal["uniform", "normal"] = "uniform"
    pool: Literal["max", "sum"] = "max"  #: over time, of the readout's membrane
    lower: tuple[float, float] = (0.0, 0.0)  #: threshold and strength of `losses.lower_activity`, on hidden layers
    upper: tuple[float, float] = (0.0, 0.0)  #: the same of `losses.upper_activity`
    chosen: tuple[str, ...] = ("lr",)  #: fields that do not come from the paper

    @property
    def beta(self) -> float:
        """Decay of the membrane per step."""
        return math.exp(-self.dt / self.tau)

    @property
    def surrogate(self) -> str:
        return f"fast_sigmoid(slope={self.slope:g})" if self.slope else "atan(alpha=2)"

    @property
    def short_surrogate(self) -> str:
        """The same in the names of files."""
        return f"slope{self.slope:g}" if self.slope else "atan"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, infinity as text; `from_dict` takes it back."""
        return {**dataclasses.asdict(self), "b_th": "inf" if self.b_th == math.inf else self.b_th}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preset:
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**{**given, "b_th": given["b_th"] if given["b_th"] == "auto" else float(given["b_th"])})


_FMNIST = Preset("fmnist", steps=100, epochs=100, lr=2e-4, initial="normal")
_NMNIST = Preset("nmnist", steps=300, epochs=100, lr=2e-4)
_SHD = Preset("shd", steps=500, epochs=200, lr=1e-3, pool="max")
_ALL = ("steps", "lr", "epochs", "hidden", "batch", "initial", "pool")

PRESETS: dict[str, Preset] = {
    "fmnist": _FMNIST,
    "fmnist-deep": dataclasses.replace(_FMNIST, hidden=(300,) * 5),
    "fmnist-conv": dataclasses.replace(_FMNIST, hidden=(), net="conv", chosen=("lr", "initial")),
    "fmnist-calm": dataclasses.replace(  # at most one spike a neuron and sample, to see what activity costs
        _FMNIST, epochs=20, upper=(1.0, 1.0), chosen=("lr", "epochs", "upper")
    ),
    "nmnist": _NMNIST,
    "nmnist-part": dataclasses.replace(  # few recordings: more steps of a larger rate
        _NMNIST, epochs=40, lr=1e-3, batch=64, chosen=("lr", "epochs", "batch")
    ),
    "shd": _SHD,
    "shd-sum": dataclasses.replace(_SHD, hidden=(400, 400), pool="sum"),
    "digits": Preset("digits", steps=100, epochs=40, lr=2e-3, initial="normal", chosen=_ALL),
    "spoken": dataclasses.replace(_SHD, dataset="spoken", epochs=30, batch=128, pool="sum", chosen=_ALL),
}
