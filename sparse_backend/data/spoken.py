"""Spoken digits as spikes on 700 channels: a stand-in for the Spiking Heidelberg Digits, made from sound files.

The recordings are those of the Free Spoken Digit Dataset: digits 0 to 9 in English, six speakers, 8 kHz. The ear is a
simple one. The power of 32 ms windows, one every step of 2 ms, goes through 700 Gaussian filters whose centres are
evenly spaced on the ERB scale between 60 and 3800 Hz and whose widths are one equivalent rectangular bandwidth
(Glasberg & Moore 1990). In each channel the level, in dB below the recording's loudest, drives a leaky neuron of 10 ms
from 0 at −60 dB to twice the mean threshold at 0 dB; it is reset to 0 where it spikes. Thresholds differ from channel
to channel by up to a quarter, drawn from the seed, so that neighbours do not spike together.
"""

from __future__ import annotations

import io
import math
import re
import wave
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from .files import AGAIN, directory_of, members
from .recordings import EventSet, Recordings

CHANNELS, CLASSES = 700, 10
RATE = 8000  # samples a second
HOP = 16  # samples a step, so 2 ms
WINDOW, BINS = 256, 512
LOWEST, HIGHEST = 60.0, 3800.0  # Hz
RANGE = 60.0  # dB
DRIVE, SPREAD, TAU = 2.0, 0.25, 10.0  # of the mean threshold; of the thresholds; ms
TEST_INDICES = 5  # of each speaker and digit
NOTE = "spoken digits through a simple filter bank, a stand-in for SHD"
_NAME = re.compile(r"(?:.*/)?(\d)_(\w+)_(\d+)\.wav")
_AT_ONCE = 64


def load_spoken(directory: str | Path, steps: int = 500, seed: int = 0) -> EventSet:
    """`recordings.zip` or the folder `recordings` in `directory`, with files `{digit}_{speaker}_{index}.wav`.

    Indices 0 to 4 of each speaker and digit are the test set. All 3,000 recordings take about half a minute.

    steps: T, of 2 ms each; what is said later is left out; seed: of the channels' thresholds.
    Raises FileNotFoundError if the folder, the archive or its recordings are not there, ValueError if a file is
    damaged, is named otherwise, or is not 8 kHz, 16 bit, mono.
    Source: the recordings are the Free Spoken Digit Dataset's, the filter bank is described in the module.
    """
    root = directory_of(directory)
    generator = torch.Generator().manual_seed(seed)
    threshold = 1 + SPREAD * (2 * torch.rand(CHANNELS, generator=generator) - 1)
    bank = filters()
    samples: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    labels: dict[bool, list[int]] = {False: [], True: []}
    files = members(root, "recordings", ".wav")
    while chunk := list(islice(files, _AT_ONCE)):
        names = [_named(path) for path, _ in chunk]
        for named, events in zip(names, _spikes(chunk, bank, threshold, steps), strict=True):
            test = int(named[3]) < TEST_INDICES
            samples[test].append(events)
            labels[test].append(int(named[1]))
    train, test = (Recordings.from_samples(samples[part], labels[part], steps, CHANNELS) for part in (False, True))
    return EventSet("spoken digits", train, test, CLASSES, NOTE)


def _named(path: str) -> re.Match[str]:
    named = _NAME.fullmatch(path)
    if named is None:
        raise ValueError(f"{path}: a name like 7_jackson_32.wav expected, digit_speaker_index")
    return named


def filters() -> Tensor:
    """Weights of the power spectrum's bins in each channel, [257, 700] float32; those of a channel add up to 1."""
    ends = torch.tensor([LOWEST, HIGHEST], dtype=torch.float64)
    low, high = (21.4 * torch.log10(1 + 0.00437 * ends)).tolist()  # the ERB scale
    centre = (10 ** (torch.linspace(low, high, CHANNELS, dtype=torch.float64) / 21.4) - 1) / 0.00437
    width = 24.7 * (1 + 0.00437 * centre)
    frequency = torch.arange(BINS // 2 + 1, dtype=torch.float64) * RATE / BINS
    gain = torch.exp(-math.pi * ((frequency[:, None] - centre) / width) ** 2)
    return (gain / gain.sum(0)).float()


def _spikes(
    files: list[tuple[str, bytes]], bank: Tensor, threshold: Tensor, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps and channels of each recording's spikes."""
    levels = [_level(_sound(path, content)[: steps * HOP], bank)[:steps] for path, content in files]
    drive = torch.nn.utils.rnn.pad_sequence(levels)  # [T, B, channels], silence at the end
    decay = math.exp(-HOP * 1e3 / RATE / TAU)
    mem = torch.zeros(drive.shape[1:])
    spikes = torch.empty(drive.shape, dtype=torch.bool)
    for step in range(len(drive)):
        mem.mul_(decay).add_(drive[step], alpha=DRIVE * (1 - decay))
        torch.gt(mem, threshold, out=spikes[step])
        mem.masked_fill_(spikes[step], 0)
    for sample in range(len(files)):
        step, channel = spikes[:, sample].nonzero().unbind(1)
        yield step.short(), channel.short()  # narrow: all samples are held at once


def _level(sound: Tensor, bank: Tensor) -> Tensor:
    """[frames, channels], 1 at the recording's loudest, 0 at `RANGE` dB below it and under."""
    frames = torch.stft(
        sound, BINS, HOP, WINDOW, torch.hann_window(WINDOW), center=True, pad_mode="constant", return_complex=True
    )
    power = (frames.real**2 + frames.imag**2).T @ bank
    decibel = 10 * torch.log10(power / power.max().clamp(min=1e-20) + 1e-12)
    return (1 + decibel / RANGE).clamp(min=0)


def _sound(path: str, content: bytes) -> Tensor:
    """Samples in -1..1."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            got = (file.getframerate(), 8 * file.getsampwidth(), file.getnchannels())
            frames, expected = file.readframes(file.getnframes()), file.getnframes()
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: a wav file expected ({error}): {AGAIN}") from error
    if got != (RATE, 16, 1):
        raise ValueError(f"{path}: {RATE} Hz, 16 bit, mono expected, got {got[0]} Hz, {got[1]} bit, {got[2]} channels")
    if not frames or len(frames) != 2 * expected:
        raise ValueError(f"{path}: {expected} samples expected, got {len(frames) // 2}: {AGAIN}")
    return torch.frombuffer(bytearray(frames), dtype=torch.int16).float() / 2**15
