"""Sphinx configuration. `make docs` builds with -W: a warning is an error."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparse_backend._version import __version__

project = "sparse_backend"
author = "sparse_backend contributors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_inline"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"sparse_backend {__version__}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100


def plain_text(app, what, name, obj, options, lines):
    """Docstrings here are plain text with `code` in backticks, not reStructuredText: |x| is an absolute value."""
    in_example = False
    for i, line in enumerate(lines):
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        if in_example:
            continue
        parts = re.split(r"(`[^`]*`)", line)
        for k, part in enumerate(parts):
            if k % 2:
                parts[k] = f"`{part}`"
            else:
                parts[k] = re.sub(r"([\\|*])", r"\\\1", part)
        lines[i] = "".join(parts)


def setup(app):
    app.connect("autodoc-process-docstring", plain_text)
