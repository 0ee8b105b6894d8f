"""`python -m sparse_backend <command>`: each command is imported only when asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from sparse_backend._version import __version__

COMMANDS = {
    "doctor": ("sparse_backend.doctor", "what is installed, what is built, what is missing and how to cure it"),
    "bench": ("sparse_backend.bench", "measure stock training against sparse gradients on this machine"),
    "paper": ("sparse_backend.paper", "the experiments of the paper, on its data sets"),
    "demo": ("sparse_backend.demo", "train a small network on real data, stock and enabled, and compare"),
}

USAGE = "\n".join(
    [
        "usage: python -m sparse_backend COMMAND [options]",
        "",
        "commands:",
        *(f"  {name:<8} {purpose}" for name, (_, purpose) in COMMANDS.items()),
        "",
        "options:",
        "  -h, --help     this text; after a command, the command's own options",
        "  --version      the version of sparse_backend",
    ]
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"sparse_backend {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"sparse_backend: expected a command ({known}), got {arguments[0]!r}; see --help", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    return int(module.main(arguments[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main())
