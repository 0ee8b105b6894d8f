"""Loaders and codings for real data. Nothing here downloads anything."""

from .coding import SpikeEvents, latency, latency_events, latency_spikes
from .digits import load_digits
from .idx import load_fashion_mnist, read_idx
from .images import ImageSet
from .nmnist import load_nmnist
from .recordings import EventSet, Recordings, latency_set
from .shd import load_shd
from .spoken import load_spoken

__all__ = [
    "EventSet",
    "ImageSet",
    "Recordings",
    "SpikeEvents",
    "latency",
    "latency_events",
    "latency_set",
    "latency_spikes",
    "load_digits",
    "load_fashion_mnist",
    "load_nmnist",
    "load_shd",
    "load_spoken",
    "read_idx",
]
