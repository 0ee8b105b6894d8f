"""The idx format, plain or gzip, and Fashion-MNIST in its official files.

An idx file is a big-endian header and then the values: two zero bytes, one byte for the type, one byte for the number
of dimensions, one unsigned 32-bit size per dimension.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .images import ImageSet

_TYPES = {
    0x08: torch.uint8,
    0x09: torch.int8,
    0x0B: torch.int16,
    0x0C: torch.int32,
    0x0D: torch.float32,
    0x0E: torch.float64,
}

_AGAIN = "the download is probably incomplete or damaged: fetch the file again"


def read_idx(path: str | Path) -> Tensor:
    """Read one idx file, gzip or not, whatever its name ends in.

    Args:
        path: the file.

    Returns:
        A tensor of the shape and type that the file's header states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, longer than its header says, or no idx file at all.
    """
    path = Path(path)
    data = _content(path)
    if len(data) < 4 or data[0] != 0 or data[1] != 0:
        raise ValueError(
            f"{path}: an idx file must begin with two zero bytes, a type and a number of dimensions, "
            f"got {data[:4].hex(' ') or 'an empty file'}: this is not an idx file"
        )
    kind, dims = data[2], data[3]
    if kind not in _TYPES:
        known = ", ".join(f"0x{k:02x}" for k in _TYPES)
        raise ValueError(f"{path}: idx type must be one of {known}, got 0x{kind:02x}: this is not an idx file")
    header = 4 + 4 * dims
    if len(data) < header:
        raise ValueError(f"{path}: an idx header of {dims} dimensions has {header} bytes, got {len(data)}: {_AGAIN}")
    shape = [int.from_bytes(data[4 + 4 * d : 8 + 4 * d], "big") for d in range(dims)]
    dtype = _TYPES[kind]
    count = math.prod(shape)
    expected = header + count * dtype.itemsize
    if len(data) != expected:
        cure = _AGAIN if len(data) < expected else "this is not the file its header says"
        raise ValueError(f"{path}: {expected} bytes expected for shape {shape}, got {len(data)}: {cure}")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    raw = torch.frombuffer(data, dtype=torch.uint8, offset=header)
    if dtype.itemsize > 1:  # stored big-endian
        raw = raw.view(count, dtype.itemsize).flip(1).contiguous().view(-1)
    return raw.view(dtype).view(shape)


def load_fashion_mnist(directory: str | Path) -> ImageSet:
    """Fashion-MNIST from the four official idx files, each plain or with `.gz`: images [n, rows · columns], pixels
    divided by 255.

    Any data set in MNIST's file names and layout is read as well.

    directory: with `train-images-idx3-ubyte[.gz]`, `train-labels-idx1-ubyte[.gz]` and the two `t10k-` files.
    Raises FileNotFoundError if the folder or a file is not there, ValueError if a file is damaged, or holds something
    else than its name says.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"data directory {str(directory)!r} does not exist or is not a folder")
    parts = {}
    for part in ("train", "t10k"):
        images_path = _find(directory, f"{part}-images-idx3-ubyte")
        labels_path = _find(directory, f"{part}-labels-idx1-ubyte")
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.dim() != 3 or images.dtype != torch.uint8:
            raise ValueError(
                f"{images_path}: images must be uint8 of shape [n, rows, columns], "
                f"got {images.dtype} of shape {list(images.shape)}: is this file another one, renamed?"
            )
        if labels.dim() != 1 or labels.dtype != torch.uint8:
            raise ValueError(
                f"{labels_path}: labels must be uint8 of shape [n], "
                f"got {labels.dtype} of shape {list(labels.shape)}: is this file another one, renamed?"
            )
        if len(images) != len(labels):
            raise ValueError(
                f"{labels_path}: {len(images)} labels expected, one for each image of {images_path.name}, "
                f"got {len(labels)}: the two files belong to different sets"
            )
        if labels.numel() and int(labels.max()) > 9:
            raise ValueError(f"{labels_path}: labels must lie in 0..9, got {int(labels.max())}: not Fashion-MNIST")
        parts[part] = (images.flatten(1).float().div_(255), labels.long())
    train, test = parts["train"], parts["t10k"]
    return ImageSet("Fashion-MNIST", train[0], train[1], test[0], test[1], classes=10)


def _find(directory: Path, name: str) -> Path:
    for candidate in (directory / name, directory / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{name} or {name}.gz expected in {directory}, found {there}: "
        "point to a folder with the four official files of Fashion-MNIST"
    )


def _content(path: Path) -> bytearray:
    with path.open("rb") as file:
        data = file.read()
    if data[:2] != b"\x1f\x8b":  # gzip's own mark; the name may have lost or kept its .gz
        return bytearray(data)
    try:
        return bytearray(gzip.decompress(data))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: a whole gzip file expected, got {len(data)} bytes ({error}): {_AGAIN}") from error
