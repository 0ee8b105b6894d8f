"""Data sets of events: Recordings, N-MNIST, Spiking Heidelberg Digits and spoken digits, from files the tests write."""

from __future__ import annotations

import gzip
import io
import math
import struct
import sys
import wave
import zipfile

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sparse_backend import EventTensor, collate
from sparse_backend.data import (
    EventSet,
    ImageSet,
    Recordings,
    latency_set,
    latency_spikes,
    load_nmnist,
    load_shd,
    load_spoken,
    spoken,
)

# --- recordings ----------------------------------------------------------------------------------------------------


def drawn(samples: int, steps: int, units: int, density: float, seed: int) -> tuple[Recordings, torch.Tensor]:
    """Recordings and the same as a dense tensor [T, n, N]."""
    random = torch.Generator().manual_seed(seed)
    dense = (torch.rand(steps, samples, units, generator=random) < density).float()
    pairs = []
    for i in range(samples):
        step, unit = dense[:, i].nonzero().unbind(1)
        shuffled = torch.randperm(len(step), generator=random)
        again = shuffled[: len(shuffled) // 2]  # what comes twice counts once
        pairs.append((step[torch.cat([shuffled, again])], unit[torch.cat([shuffled, again])]))
    labels = torch.randint(4, (samples,), generator=random)
    return Recordings.from_samples(pairs, labels, steps, units), dense


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 9), st.sampled_from([0.0, 0.05, 0.4, 1.0]), st.data())
def test_a_batch_is_its_samples_side_by_side(samples, steps, units, density, data):
    recordings, dense = drawn(samples, steps, units, density, data.draw(st.integers(0, 99)))
    chosen = data.draw(st.lists(st.integers(0, samples - 1), max_size=6))
    x, labels = recordings.batch(chosen)
    x._check()
    assert torch.equal(x.to_dense(), dense[:, chosen]) and torch.equal(labels, recordings.labels[chosen])
    for i in chosen:
        one, label = recordings[i]
        one._check()
        assert torch.equal(one.to_dense(), dense[:, i]) and label == int(recordings.labels[i])


def test_a_batch_is_what_collate_makes_of_samples():
    recordings, _ = drawn(7, 20, 30, 0.1, 0)
    chosen = [3, 0, 3, 6]
    x, labels = recordings.batch(chosen)
    other, other_labels = collate([recordings[i] for i in chosen])
    assert torch.equal(x.row_ptr, other.row_ptr) and torch.equal(x.indices, other.indices)
    assert x.shape == other.shape and torch.equal(labels, other_labels)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_hand_out_events(context):
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {context} processes")
    recordings, dense = drawn(6, 11, 5, 0.3, 1)
    loader = DataLoader(recordings, batch_size=4, num_workers=1, collate_fn=collate, multiprocessing_context=context)
    got = list(loader)
    assert all(type(x) is EventTensor for x, _ in got)
    assert torch.equal(torch.cat([x.to_dense() for x, _ in got], dim=1), dense)
    assert torch.equal(torch.cat([labels for _, labels in got]), recordings.labels)


def test_events_past_the_end_are_left_out():
    recordings = Recordings.from_samples([([0, 4, 5, 9], [1, 0, 1, 1])], [2], steps=5, n_units=2)
    assert recordings[0][0].to_dense().nonzero().tolist() == [[0, 1], [4, 0]]
    assert recordings.events_per_sample == 2


def test_many_units():
    recordings = Recordings.from_samples([([0, 1], [40_000, 69_999])], [0], steps=2, n_units=70_000)
    assert recordings[0][0].to_dense().nonzero().tolist() == [[0, 40_000], [1, 69_999]]


@pytest.mark.parametrize(("count", "chosen"), [(0, []), (2, [0, 3]), (4, [0, 1, 3, 4]), (99, [0, 1, 2, 3, 4, 5])])
def test_samples_spread_over_all(count, chosen):
    recordings, dense = drawn(6, 11, 5, 0.3, 1)
    part = recordings.spread(count)
    assert torch.equal(part.labels, recordings.labels[chosen])
    assert len(chosen) == len(part) and torch.equal(part.batch(range(len(part)))[0].to_dense(), dense[:, chosen])


@pytest.mark.parametrize(
    ("samples", "labels", "message"),
    [
        ([([0], [1, 2])], [0], r"sample 0: steps and units must be arrays of one length, got \[1\] and \[2\]"),
        ([([0], [1]), ([-1], [0])], [0, 0], "sample 1: steps must be at least 0, got -1"),
        ([([0], [3])], [0], r"sample 0: units must lie in 0..2, got 3..3"),
        ([([0], [1])], [0, 1], "labels must be one for each of 1 samples, got 2"),
        ([([0.5], [1])], [0], "sample 0: steps must be integers, got torch.float32: round them first"),
        ([([0], [1]), ([0], [math.nan])], [0, 0], "sample 1: units must be integers"),
    ],
)
def test_samples_that_cannot_be(samples, labels, message):
    with pytest.raises(ValueError, match=message):
        Recordings.from_samples(samples, labels, steps=4, n_units=3)


def test_a_set_of_two_kinds_is_refused():
    one, other = drawn(2, 5, 3, 0.5, 0)[0], drawn(2, 6, 3, 0.5, 0)[0]
    with pytest.raises(ValueError, match=r"one \(steps, n_units\), got \(5, 3\) and \(6, 3\)"):
        EventSet("mixed", one, other, 4)
    with pytest.raises(ValueError, match=r"train labels must lie in 0..0"):
        EventSet("labels", one, one, 1)
    with pytest.raises(IndexError, match=r"0..1, got 2"):
        one[2]
    with pytest.raises(ValueError, match="steps must lie in"):
        Recordings(one.times, one.units, one.ptr, one.labels, 0, 3)
    with pytest.raises(ValueError, match="ptr must have one entry more"):
        Recordings(one.times, one.units, one.ptr[1:], one.labels, 5, 3)


def test_images_as_latencies():
    pixels = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)
    got = latency_set(ImageSet("drawn", pixels[:3], labels[:3], pixels[3:], labels[3:], 5), steps=40, tau_eff=8.0)
    assert torch.equal(got.train.batch([0, 1, 2])[0].to_dense(), latency_spikes(pixels[:3], 40, tau_eff=8.0))
    assert torch.equal(got.test.batch([0, 1])[0].to_dense(), latency_spikes(pixels[3:], 40, tau_eff=8.0))
    assert got.classes == 5 and got.name == "drawn"


class Tonic:
    """A data set as tonic's: structured events of t in µs, x, y, p, and a label."""

    def __init__(self) -> None:
        kind = np.dtype([("x", "<i2"), ("y", "<i2"), ("t", "<i4"), ("p", "?")])
        self.samples = [
            (np.array([(1, 2, 500, True), (0, 0, 2500, False)], dtype=kind), 1),
            (np.array([], dtype=kind), 0),
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_tonics_data_sets():
    tonic = Tonic()
    samples = [tonic[i] for i in range(len(tonic))]
    got = Recordings.from_samples(
        [(events["t"] // 1000, events["y"] * 4 + events["x"]) for events, _ in samples],
        [label for _, label in samples],
        steps=3,
        n_units=16,
    )
    assert got.batch([0, 1])[0].to_dense().nonzero().tolist() == [[0, 0, 9], [2, 0, 0]]
    assert got.labels.tolist() == [1, 0]


class Torchvision:
    """A data set as torchvision's MNIST: a grey image, or what a transform makes of it, and a label."""

    def __init__(self, transform=None) -> None:
        self.data = torch.randint(256, (5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.targets, self.transform = torch.tensor([2, 0, 1, 1, 2]), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        image = Image.fromarray(self.data[index].numpy())
        return (image if self.transform is None else self.transform(image)), int(self.targets[index])


def to_tensor(image: Image.Image) -> torch.Tensor:
    """As torchvision's ToTensor: [1, rows, columns] in [0, 1]."""
    return torch.from_numpy(np.array(image))[None].float() / 255


@pytest.mark.parametrize("transform", [None, to_tensor])
def test_torchvisions_data_sets(transform):
    images = Torchvision(transform)
    samples = [images[i] for i in range(len(images))]
    pixels = torch.stack([(to_tensor(image) if transform is None else image).flatten() for image, _ in samples])
    labels = torch.tensor([label for _, label in samples])
    got = latency_set(ImageSet("theirs", pixels, labels, pixels[:2], labels[:2], 3), steps=30, tau_eff=6.0)
    expected = latency_spikes(images.data.flatten(1) / 255, 30, tau_eff=6.0)
    assert expected.any() and torch.equal(got.train.batch(range(5))[0].to_dense(), expected)
    assert torch.equal(got.train.labels, images.targets)


# --- N-MNIST -------------------------------------------------------------------------------------------------------


def event(x: int, y: int, polarity: int, time: int) -> bytes:
    return bytes([x, y]) + struct.pack(">I", polarity << 23 | time)[1:]


RECORDING = event(3, 1, 1, 999) + event(33, 33, 0, 1000) + event(3, 1, 0, 999) + event(0, 0, 1, 299_999)
FILES = {"Train/7/00001.bin": RECORDING, "Train/0/00002.bin": event(5, 0, 1, 300_000), "Test/2/00001.bin": RECORDING}


def nmnist(tmp_path, files=FILES, zipped=True):
    for part in ("Train", "Test"):
        mine = {name: content for name, content in files.items() if name.startswith(part)}
        if zipped:
            with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
                for name, content in mine.items():
                    archive.writestr(name, content)
        else:
            for name, content in mine.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("zipped", [True, False])
def test_nmnist(tmp_path, zipped):
    got = load_nmnist(nmnist(tmp_path, zipped=zipped))
    assert (got.train.steps, got.train.n_units, got.classes) == (300, 1156, 10)
    assert got.train.labels.tolist() == [0, 7] and got.test.labels.tolist() == [2]
    assert got.train[0][0].nnz == 0  # at 300 ms
    assert got.train[1][0].to_dense().nonzero().tolist() == [[0, 34 + 3], [1, 33 * 34 + 33], [299, 0]]
    assert got.note == "2 of 60,000 training and 1 of 10,000 test recordings"


def test_nmnist_with_both_polarities_and_other_steps(tmp_path):
    got = load_nmnist(nmnist(tmp_path), steps=100, dt_us=3000.0, polarity="both")
    assert got.train.n_units == 2312
    assert got.train[1][0].to_dense().nonzero().tolist() == [[0, 37], [0, 1155], [0, 1156 + 37], [99, 1156]]


def test_nmnist_whose_clock_ran_over(tmp_path):
    mark = event(77, 240, 1, 5000)
    recording = event(1, 0, 0, 2000) + mark + event(2, 0, 0, 2000) + mark + event(3, 0, 0, 2000)
    got = load_nmnist(nmnist(tmp_path, {"Train/1/1.bin": recording, "Test/1/1.bin": mark}))
    assert got.train[0][0].to_dense().nonzero().tolist() == [[2, 1], [2 + 8, 2], [2 + 16, 3]]
    assert got.test[0][0].nnz == 0


@pytest.mark.parametrize("zipped", [True, False])
def test_what_a_mac_leaves_is_no_recording(tmp_path, zipped):
    junk = (
        {"Train/7/._00001.bin": b"\0" * 7, "Train/__MACOSX/Train/7/1.bin": b"\0" * 7}
        if zipped
        else {"Train/7/._00001.bin": b"\0" * 7}
    )
    got = load_nmnist(nmnist(tmp_path, {**FILES, **junk}, zipped))
    assert got.train.labels.tolist() == [0, 7]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"Train/1/a.bin": RECORDING[:-1]}, "Train/1/a.bin: events of 5 bytes each expected, got 19 bytes"),
        ({"Train/1/a.bin": b""}, "got 0 bytes"),
        ({"Train/1/a.bin": event(34, 0, 0, 0)}, r"x must lie in 0..33, got 34"),
        ({"Train/1/a.bin": event(0, 200, 0, 0)}, r"y must lie in 0..33, got 200"),
        ({"Train/one/a.bin": RECORDING}, "folder named by its digit, 0 to 9, expected, got 'one'"),
    ],
)
def test_damaged_nmnist(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_nmnist(nmnist(tmp_path, {**files, "Test/2/1.bin": RECORDING}))


def test_nmnist_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_nmnist(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"folder Train or Train.zip expected in .*, found x.txt"):
        load_nmnist(tmp_path)
    (tmp_path / "Train").mkdir()
    with pytest.raises(FileNotFoundError, match=r"files ending in .bin expected, found none"):
        load_nmnist(tmp_path)
    with pytest.raises(ValueError, match="polarity must be"):
        load_nmnist(tmp_path, polarity="on")
    with pytest.raises(ValueError, match="dt_us must be above 0"):
        load_nmnist(tmp_path, dt_us=0)


@pytest.mark.parametrize("how", ["cut", "changed", "newer", "text"])
def test_a_damaged_archive(tmp_path, how):
    nmnist(tmp_path, {**FILES, "Train/3/big.bin": RECORDING * 500})
    path = tmp_path / "Train.zip"
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "changed":
        content[5000] ^= 0xFF
    elif how == "newer":
        content[content.index(b"PK\x01\x02") + 6] = 250  # the version of zip that it needs
    else:
        content = bytearray(b"<html>")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Train.zip: .*fetch it again"):
        load_nmnist(tmp_path)


# --- Spiking Heidelberg Digits -------------------------------------------------------------------------------------


def shd(tmp_path, times=([0.0, 0.001, 0.9999], [1.2]), units=([0, 699, 5], [3]), labels=(19, 0), zipped=False, **keys):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, values, kind in (("times", times, "<f2"), ("units", units, "<u2")):
            data = file.create_dataset(f"spikes/{name}", (len(values),), dtype=h5py.vlen_dtype(np.dtype(kind)))
            for i, value in enumerate(values):
                data[i] = np.array(value, dtype=kind)
        file["labels"] = np.array(labels, dtype="<u2")
        for key in keys.get("without", ()):
            del file[key]
        for key in keys.get("groups", ()):
            file.create_group(key)
    for name in ("shd_train.h5", "shd_test.h5"):
        if zipped:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.getvalue()))
        else:
            (tmp_path / name).write_bytes(content.getvalue())
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
def test_shd(tmp_path, zipped):
    got = load_shd(shd(tmp_path, zipped=zipped))
    assert (got.train.steps, got.train.n_units, got.classes) == (500, 700, 20)
    assert got.train.labels.tolist() == [19, 0]
    # half precision holds 0.9999 as 1.0: past the last step
    assert got.train[0][0].to_dense().nonzero().tolist() == [[0, 0], [0, 699]]
    assert got.train[1][0].nnz == 0
    assert got.note == "50 % of the events come after 1000 ms and are left out"
    assert load_shd(tmp_path, steps=700).train[1][0].to_dense().nonzero().tolist() == [[600, 3]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"without": ["labels"]}, "labels expected, got spikes: not SHD"),
        ({"without": ["spikes/units"]}, "spikes/units expected"),
        (
            {"without": ["labels"], "groups": ["labels"]},
            r"shd_train.h5: labels must hold an integer a recording, got <HDF5 group",
        ),
        ({"labels": (1,)}, "must be one for each recording, got 2, 2 and 1"),
        ({"units": ([0, 700, 5], [3])}, r"units must lie in 0..699, got 0..700"),
        ({"units": ([0, 1], [3])}, r"shd_train.h5: sample 0: steps and units must be arrays of one length"),
        (
            {"times": ([0.0, math.nan, 1], [1.2])},
            "shd_train.h5: recording 0: times must be finite and at least 0, got nan",
        ),
        ({"times": ([0.0, -0.5, 1], [1.2])}, "recording 0: times must be finite and at least 0, got -0.5"),
        ({"labels": (20, 0)}, "train labels must lie in 0..19, got 0..20"),
    ],
)
def test_damaged_shd(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        load_shd(shd(tmp_path, **keys))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("spikes/times", [[0.1, 0.2], [0.3, 0.4]]),
        ("spikes/times", ["a", "b"]),
        ("spikes/units", [1, 2]),
        ("labels", [[0], [1]]),
        ("labels", [0.5, 1.0]),
        ("labels", 3),
    ],
)
def test_shd_of_another_layout(tmp_path, key, values):
    shd(tmp_path)
    with h5py.File(tmp_path / "shd_test.h5", "r+") as file:
        del file[key]
        file[key] = values
    with pytest.raises(ValueError, match=rf"shd_test.h5: {key} must hold .* a recording, got <HDF5 dataset.*: not SHD"):
        load_shd(tmp_path)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_truncated_shd_file(tmp_path, zipped):
    path = shd(tmp_path, zipped=zipped) / ("shd_train.h5.gz" if zipped else "shd_train.h5")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"shd_train.h5.*: an HDF5 file expected .*fetch it again"):
        load_shd(tmp_path)


def test_shd_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"shd_train.h5 or shd_train.h5.gz expected in .*, found nothing"):
        load_shd(tmp_path)
    shd(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="read with h5py, which is not installed: pip install"):
        load_shd(tmp_path)


# --- spoken digits -------------------------------------------------------------------------------------------------


def wav(sound: torch.Tensor, rate: int = 8000, width: int = 2, channels: int = 1) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((sound * 20_000).to(torch.int16).numpy().tobytes())
    return content.getvalue()


def tone(hertz: float, seconds: float = 0.2) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(int(8000 * seconds)) / 8000)


def speech(tmp_path, files=None, zipped=True):
    files = files or {"0_a_0.wav": wav(tone(300)), "0_a_5.wav": wav(tone(300)), "9_b_17.wav": wav(tone(3000, 1.5))}
    if zipped:
        with zipfile.ZipFile(tmp_path / "recordings.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        (tmp_path / "recordings").mkdir()
        for name, content in files.items():
            (tmp_path / "recordings" / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("zipped", [True, False])
def test_spoken_digits(tmp_path, zipped):
    got = load_spoken(speech(tmp_path, zipped=zipped))
    assert (got.train.steps, got.train.n_units, got.classes) == (500, 700, 10)
    assert got.train.labels.tolist() == [0, 9] and got.test.labels.tolist() == [0]
    assert "stand-in for SHD" in got.note
    low, high = (got.train[i][0].to_dense() for i in (0, 1))
    assert low[:90].any() and not low[150:].any()  # 0.2 s are 100 steps
    assert high[450:].any()  # and 1.5 s more than there are
    loudest = [int(events.sum(0).argmax()) for events in (low, high)]
    erb = [math.log10(1 + 0.00437 * hertz) for hertz in (spoken.LOWEST, 300, 3000, spoken.HIGHEST)]
    expected = [699 * (erb[i] - erb[0]) / (erb[3] - erb[0]) for i in (1, 2)]
    assert loudest == pytest.approx(expected, abs=40)
    again, other = load_spoken(tmp_path), load_spoken(tmp_path, seed=1)
    assert torch.equal(got.train.units, again.train.units) and not torch.equal(got.train.units, other.train.units)


def test_loudness_does_not_matter():
    bank, threshold = spoken.filters(), torch.ones(spoken.CHANNELS)
    files = [(f"{i}_a_0.wav", wav(tone(800) * volume)) for i, volume in enumerate((1.0, 0.1))]
    (loud, _), (quiet, _) = (pair for pair in spoken._spikes(files, bank, threshold, 500))
    assert len(quiet) == pytest.approx(len(loud), rel=0.1) and len(loud) > 100


def test_a_filter_lets_its_own_frequency_pass():
    bank = spoken.filters()
    assert bank.shape == (257, 700) and torch.allclose(bank.sum(0), torch.ones(700), atol=1e-5)
    peak = bank.argmax(0) * spoken.RATE / spoken.BINS
    assert bool((peak[1:] >= peak[:-1]).all()) and peak[0] < 100 and peak[-1] > 3700


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"0_a_9.wav": wav(tone(300), rate=16_000)},
            "8000 Hz, 16 bit, mono expected, got 16000 Hz, 16 bit, 1 channels",
        ),
        ({"0_a_9.wav": wav(tone(300), width=1)}, "got 8000 Hz, 8 bit"),
        ({"0_a_9.wav": wav(tone(300), channels=2)}, "2 channels"),
        ({"0_a_9.wav": wav(tone(300))[:500]}, "1600 samples expected, got 228"),
        ({"0_a_9.wav": b"RIFF"}, "a wav file expected"),
        ({"zero.wav": wav(tone(300))}, "a name like 7_jackson_32.wav expected"),
        ({"17_jackson_3.wav": wav(tone(300))}, "a name like 7_jackson_32.wav expected"),
    ],
)
def test_damaged_speech(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_spoken(speech(tmp_path, files))


def test_silence_has_no_spikes(tmp_path):
    files = {"3_a_0.wav": wav(torch.zeros(1600)), "3_a_9.wav": wav(torch.zeros(1600))}
    assert load_spoken(speech(tmp_path, files)).train[0][0].nnz == 0
