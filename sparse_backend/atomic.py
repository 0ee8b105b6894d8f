"""Files that are whole at every moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """All that `save` writes to the file it is given, or nothing: what is there already stays when this is
    interrupted."""
    new = path.with_name(path.name + ".new")
    save(new)
    os.replace(new, path)


def write_text(path: Path, text: str) -> None:
    """The same of a text."""
    write(path, lambda new: new.write_text(text, encoding="utf-8"))
