"""Loaders against files written here, damaged ones included; latency coding against its formula."""

from __future__ import annotations

import gzip
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_backend.data import (
    ImageSet,
    latency,
    latency_events,
    latency_spikes,
    load_digits,
    load_fashion_mnist,
    read_idx,
)

IDX_TYPES = [
    (0x08, "B", torch.uint8),
    (0x09, "b", torch.int8),
    (0x0B, "h", torch.int16),
    (0x0C, "i", torch.int32),
    (0x0D, "f", torch.float32),
    (0x0E, "d", torch.float64),
]


def idx_bytes(shape, values, kind=0x08, code="B"):
    header = bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return header + struct.pack(f">{len(values)}{code}", *values)


def write_fashion_mnist(folder, train=6, test=4, rows=3, columns=5, zipped=("train-images",)):
    """A data set in the official names; returns its raw training images and labels."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for part, count in (("train", train), ("t10k", test)):
        images = torch.randint(0, 256, (count, rows, columns), generator=generator)
        labels = torch.arange(count) % 10
        for name, tensor in ((f"{part}-images", images), (f"{part}-labels", labels)):
            raw = idx_bytes(list(tensor.shape), tensor.flatten().tolist())
            file = f"{name}-idx{tensor.dim()}-ubyte"
            if name in zipped:
                (folder / f"{file}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / file).write_bytes(raw)
        made[part] = (images, labels)
    return made["train"]


@pytest.mark.parametrize(("kind", "code", "dtype"), IDX_TYPES)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_reads_every_type(tmp_path, kind, code, dtype, zipped):
    values = [0, 1, 2, 3, 100, 127]
    raw = idx_bytes([2, 3], values, kind, code)
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(raw) if zipped else raw)
    got = read_idx(path)
    assert got.dtype == dtype
    assert torch.equal(got, torch.tensor(values, dtype=dtype).view(2, 3))


@pytest.mark.parametrize("shape", [[0], [0, 28, 28], [1, 1, 1]])
def test_idx_small_shapes(tmp_path, shape):
    path = tmp_path / "values"
    path.write_bytes(idx_bytes(shape, [7] * math.prod(shape)))
    assert list(read_idx(path).shape) == shape


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file.*not an idx file"),
        (b"\x00\x00\x08", "not an idx file"),
        (b"<html>404</html>", "not an idx file"),
        (b"\x00\x00\x07\x01\x00\x00\x00\x00", "got 0x07"),
        (b"\x00\x00\x08\x03\x00\x00\x00\x01", "16 bytes, got 8.*fetch the file again"),
        (idx_bytes([3], [1, 2]), "11 bytes expected for shape \\[3\\], got 10.*fetch the file again"),
        (idx_bytes([2], [1, 2, 3]), "10 bytes expected .* got 11: this is not the file"),
        (gzip.compress(idx_bytes([3], [1, 2, 3]))[:-9], "a whole gzip file expected"),
        (b"\x1f\x8b" + b"rubbish", "a whole gzip file expected"),
    ],
    # named here: gzip writes the clock into its bytes, and every worker must collect one name
    ids=[
        "empty",
        "cut in the magic number",
        "a web page",
        "an unknown dtype",
        "cut in the header",
        "cut in the values",
        "too long",
        "gzip cut short",
        "not gzip behind its magic number",
    ],
)
def test_idx_damaged_files(tmp_path, content, message):
    path = tmp_path / "broken-idx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)broken-idx.*{message}"):
        read_idx(path)


def test_idx_corrupt_gzip(tmp_path):
    raw = bytearray(gzip.compress(idx_bytes([1000], [i % 251 for i in range(1000)])))
    raw[len(raw) // 2] ^= 0xFF
    path = tmp_path / "broken-idx.gz"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="a whole gzip file expected"):
        read_idx(path)


def test_idx_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "nothing")


def test_fashion_mnist(tmp_path):
    images, labels = write_fashion_mnist(tmp_path)
    got = load_fashion_mnist(tmp_path)
    assert (got.name, got.pixels, got.classes) == ("Fashion-MNIST", 15, 10)
    assert torch.equal(got.train_images, images.flatten(1).float() / 255)
    assert torch.equal(got.train_labels, labels)
    assert got.test_images.shape == (4, 15)


def test_fashion_mnist_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_fashion_mnist(tmp_path / "nowhere")
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte or .*\.gz expected.*four official files"):
        load_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-labels-idx1-ubyte", idx_bytes([5], range(5)), "6 labels expected.*got 5"),
        ("train-labels-idx1-ubyte", idx_bytes([6], [0, 1, 2, 3, 4, 46]), "0..9, got 46"),
        ("train-labels-idx1-ubyte", idx_bytes([6, 1, 1], range(6)), r"labels must be uint8 of shape \[n\]"),
        ("t10k-images-idx3-ubyte", idx_bytes([4], range(4)), r"images must be uint8 of shape \[n, rows, columns\]"),
        ("t10k-images-idx3-ubyte", idx_bytes([4, 1, 1], range(4)), "same number of pixels, got 15 and 1"),
    ],
)
def test_fashion_mnist_wrong_content(tmp_path, name, content, message):
    write_fashion_mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist(tmp_path)


def test_digits_split():
    digits = load_digits(seed=3)
    assert (digits.pixels, digits.classes) == (64, 10)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.train_images.min() == 0 and digits.train_images.max() == 1
    share = torch.bincount(digits.test_labels) / torch.bincount(torch.cat([digits.test_labels, digits.train_labels]))
    assert (share - 0.2).abs().max() < 0.01
    again, other = load_digits(seed=3), load_digits(seed=4)
    assert torch.equal(digits.test_images, again.test_images)
    assert not torch.equal(digits.test_images, other.test_images)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, math.nan])
def test_digits_bad_fraction(fraction):
    with pytest.raises(ValueError, match="test_fraction"):
        load_digits(test_fraction=fraction)


def test_image_set_checks():
    good = (torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(1, 3), torch.tensor([0]))
    ImageSet("ok", *good, classes=2)
    with pytest.raises(ValueError, match=r"train_images must be float32 of shape \[n, N\]"):
        ImageSet("bad", torch.zeros(2, 3, 1), *good[1:], classes=2)
    with pytest.raises(ValueError, match=r"test_labels must be int64 of shape \[1\]"):
        ImageSet("bad", *good[:3], torch.tensor([0, 1]), classes=2)
    with pytest.raises(ValueError, match=r"train_labels must lie in 0..0, got 0..1"):
        ImageSet("bad", *good, classes=1)


@given(
    values=st.lists(st.floats(-2, 4, width=32), min_size=1, max_size=40),
    tau=st.floats(0.5, 50),
    theta=st.floats(0.015625, 1, width=32),
)
@settings(deadline=None)
def test_latency_is_the_formula(values, tau, theta):
    times = latency(torch.tensor(values, dtype=torch.float64), tau, theta)
    for x, time in zip(values, times.tolist(), strict=True):
        if x > theta:
            assert math.isfinite(time)
            assert time == pytest.approx(tau * math.log(x / (x - theta)), rel=1e-12)
        else:
            assert time == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latency_falls_and_is_finite_only_above_theta(dtype):
    theta = torch.tensor(0.2, dtype=dtype)
    just_above = torch.nextafter(theta, torch.tensor(1.0, dtype=dtype))
    x = torch.cat([theta.view(1), just_above.view(1), torch.linspace(0.21, 50, 500, dtype=dtype)])
    times = latency(x, 20.0, theta.item())
    assert times[0] == math.inf
    assert torch.isfinite(times[1:]).all()
    assert (times[1:].diff() < 0).all()
    assert (times >= 0).all() and times.dtype == dtype


@given(batch=st.integers(0, 4), inputs=st.integers(0, 6), steps=st.integers(1, 30), seed=st.integers(0, 2**31 - 1))
@settings(deadline=None)
def test_events_and_spikes_agree(batch, inputs, steps, seed):
    values = torch.rand(batch, inputs, generator=torch.Generator().manual_seed(seed))
    times = latency(values)
    events = latency_events(values, steps)
    spikes = latency_spikes(values, steps)
    assert spikes.shape == (steps, batch, inputs) and spikes.dtype == torch.float32
    assert torch.equal(torch.nonzero(spikes), torch.stack(events, dim=1))  # nonzero lists in our order: t, b, n
    assert torch.equal(spikes.sum(0), (times < steps).float())
    where = times < steps
    assert torch.equal(spikes.argmax(0)[where], times[where].long())


def test_events_are_one_per_value_in_the_window():
    events = latency_events(torch.tensor([[1.0, 0.2, 0.25], [0.0, 0.201, 0.5]]), steps=100)
    # 20 log 1.25 = 4.46, 20 log 5 = 32.2, 20 log 201 = 106 is late, 20 log(5/3) = 10.2
    assert events.time.tolist() == [4, 10, 32]
    assert events.sample.tolist() == [0, 1, 0]
    assert events.unit.tolist() == [0, 2, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_latency_refuses_values_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="values must be finite"):
        latency(torch.tensor([1.0, bad]))


def test_latency_refuses_bad_arguments():
    x = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"floating point, got torch.uint8.*/ 255"):
        latency(x.to(torch.uint8))
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tau_eff must be a positive number"):
            latency(x, tau_eff=wrong)
        with pytest.raises(ValueError, match="theta must be a positive number"):
            latency(x, theta=wrong)
    with pytest.raises(ValueError, match=r"shape \[B, N\], got \[2, 3, 1\]"):
        latency_spikes(x.unsqueeze(2), 10)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        latency_events(x, 0)
