"""What the paper reports: Perez-Nieves & Goodman, Sparse Spiking Gradient Descent, NeurIPS 2021, arXiv 2105.08810."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "Perez-Nieves & Goodman, *Sparse Spiking Gradient Descent*, NeurIPS 2021, arXiv 2105.08810"

Range = tuple[float, float]


@dataclass(frozen=True)
class Published:
    """Of one experiment; dense before sparse, test accuracy in %."""

    samples: tuple[int, int]  #: training and test set
    accuracy: tuple[float | None, float]
    backward_ms: Range | None = None  #: of the second hidden layer of 200 alone, on their GPU


PUBLISHED: dict[str, Published] = {
    "fmnist": Published((60000, 10000), (81.9, 82.8), (30.1, 4.9)),
    "nmnist": Published((60000, 10000), (88.8, 91.5), (236, 6.6)),
    "shd": Published((8156, 2264), (45.9, 48.5), (644, 14.7)),
    "shd-sum": Published((8156, 2264), (None, 75.0)),
}
"""By the name of our preset."""

BACKWARD: Range = (6, 44)  #: times faster, one layer's backward pass
BACKWARD_MOST = 150.0  #: the headline, "up to"
WHOLE: Range = (1.5, 8)  #: times faster, the whole training step
MEMORY_LESS = 85.0  #: %, at most
ACTIVE: Range = (0.5, 5)  #: % of neurons that are active
GRADIENT_ERROR = 10.6  #: %, at most, of a weight gradient
