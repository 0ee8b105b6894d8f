"""Files of a data set, whether they lie in a folder or in the zip archive they came in."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

AGAIN = "the download is probably incomplete or damaged: fetch it again"
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeDecodeError)


def directory_of(directory: str | Path) -> Path:
    """The folder, which must be there."""
    found = Path(directory)
    if not found.is_dir():
        raise FileNotFoundError(f"data directory {str(directory)!r} does not exist or is not a folder")
    return found


def members(directory: Path, name: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Name within the archive or folder, and content, of every file that ends in `suffix`, in the order of the names.

    Read from the folder `<directory>/<name>` or, where there is none, from `<directory>/<name>.zip`. What macOS puts
    beside the files (`__MACOSX`, names that begin with a dot) is passed over.

    Raises:
        FileNotFoundError: neither is there, or there is no such file in it.
        ValueError: the archive is damaged.
    """
    folder, archive = directory / name, directory / f"{name}.zip"
    if folder.is_dir():
        paths = sorted(path for path in folder.rglob(f"*{suffix}") if not path.name.startswith("."))
        found: Iterator[tuple[str, bytes]] = (
            (path.relative_to(directory).as_posix(), path.read_bytes()) for path in paths
        )
        count = len(paths)
    elif archive.is_file():
        try:
            with zipfile.ZipFile(archive) as opened:
                names = sorted(entry for entry in opened.namelist() if _named(entry, suffix))
        except _UNREADABLE as error:
            raise ValueError(f"{archive}: a zip archive expected ({error}): {AGAIN}") from error
        found, count = _unzipped(archive, names), len(names)
    else:
        there = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"folder {name} or {name}.zip expected in {directory}, found {there}")
    if not count:
        raise FileNotFoundError(
            f"{folder if folder.is_dir() else archive}: files ending in {suffix} expected, found none"
        )
    return found


def _named(entry: str, suffix: str) -> bool:
    *folders, name = entry.split("/")
    return name.endswith(suffix) and not name.startswith(".") and "__MACOSX" not in folders


def _unzipped(archive: Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        for name in names:
            try:
                content = opened.read(name)
            except _UNREADABLE as error:
                raise ValueError(f"{archive}: {name} cannot be read ({error}): {AGAIN}") from error
            yield name, content
