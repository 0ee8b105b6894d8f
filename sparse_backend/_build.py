"""How the native extensions are built: one description each, shared by setup.py and the build at first use.

There are two, one for the CPU and one for CUDA, plain C++ and CUDA against torch's stable ABI. They only implement
operators; the schemas are declared in Python, so the result is a shared library for `torch.ops.load_library`, not a
Python module. torch is imported by the functions that need it, never by this module: setup.py and the doctor use it
where torch may be missing or broken.

Environment:
    SPARSE_BACKEND_BUILD     none | cpu | cuda: insist on one way; unset: kernels where they build, else the reference
    SPARSE_BACKEND_ISA       avx512 | avx2 | scalar: an instruction set of this CPU; unset: its best
    SPARSE_BACKEND_CACHE     directory for built libraries (default: sparse_backend/ in the user's XDG cache)
    SPARSE_BACKEND_DEBUG     1: unoptimised, index ranges checked in kernels, compiler warnings are errors
    SPARSE_BACKEND_SANITIZE  address and/or undefined, comma-separated: compile with these sanitizers
    CXX, MAX_JOBS            the compiler, and the number of compile jobs, as everywhere
    CUDA_HOME                the CUDA toolkit, where nvcc is not on PATH
    TORCH_CUDA_ARCH_LIST     at install time: compute capabilities to build CUDA kernels for, as torch reads it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not POSIX: the atomic publication alone keeps concurrent builds apart
    fcntl = None  # type: ignore[assignment]

LIBRARY_NAME = "sparse_backend_native"
CUDA_LIBRARY_NAME = "sparse_backend_cuda"
CUDA_OLDEST = (8, 0)  # compute capability
TORCH_TARGET = (2, 11)  # oldest torch whose stable ABI the extension needs; it also runs on every newer one
MODES = ("none", "cpu", "cuda")
SANITIZERS = ("address", "undefined")
HEADER_SUFFIXES = (".h", ".hpp", ".inl", ".cuh")
# One library holds one instruction set, chosen when it is loaded. Best first; no -mfma, because results must not depend
# on the machine.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"),
    ),
    "avx2": ("-mavx2", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"),
    "scalar": (),
}
_BASE = {"avx2", "bmi1", "bmi2", "popcnt", "abm"}  # as /proc/cpuinfo names them; abm is lzcnt
ISA_NEEDS: dict[str, set[str]] = {
    "avx512": _BASE | {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": _BASE,
    "scalar": set(),
}
GIB_PER_JOB = 1.5  # what one compile job may need; more jobs than memory holds get a build killed
DOCTOR = "python -m sparse_backend doctor"

_PACKAGE = Path(__file__).resolve().parent
_log = logging.getLogger("sparse_backend")
_environment_lock = threading.Lock()


class BuildError(RuntimeError):
    """The native extension could not be built; the message names the cause, the command and the cure."""

    def __init__(self, cause: str, *, command: str = "", output: str = "", cure: str = "") -> None:
        self.cause, self.command, self.output, self.cure = cause, command, output, cure
        lines = [cause]
        if command:
            lines.append(f"  command: {command}")
        if output:
            lines.append("  last lines of the compiler:")
            lines.extend(f"    {line}" for line in output.splitlines())
        if cure:
            lines.append(f"  cure: {cure}")
        lines.append(f"  `{DOCTOR}` lists everything the build needs and what is missing")
        super().__init__("\n".join(lines))


# --- what is built --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """Everything that decides what the library contains, apart from torch, compiler and machine."""

    name: str
    root: Path  # sources and headers are named relative to it, so that a moved tree keeps its cached build
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()
    include_dirs: tuple[Path, ...] = ()
    cflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()
    isa: str = "scalar"  # its flags are among cflags; "cuda" for the CUDA kernels
    archs: tuple[str, ...] = ()  # what nvcc makes: sm_XX machine code, compute_XX for the driver to translate
    nvcc_flags: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        return f"{self.name}.so"

    def fingerprint(self) -> str:
        """Hash of the contents of all sources and headers."""
        digest = hashlib.sha256()
        for path in sorted({*self.sources, *self.headers}):
            content = path.read_bytes()
            digest.update(f"{os.path.relpath(path, self.root)}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()


def csrc_dir() -> Path:
    """The directory of the C++ sources: inside an installed package, beside the package in a checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def extend_path(package_path: list[str]) -> None:
    """Let `sparse_backend.adapters` be imported from a checkout, where adapters/ lies beside the package.

    An installed package contains it and nothing is changed.
    """
    beside = _PACKAGE.parent
    if not (_PACKAGE / "adapters").is_dir() and (beside / "adapters" / "__init__.py").is_file():
        package_path.append(str(beside))


def prebuilt_dir() -> Path:
    """Where setup.py puts the libraries built at install time, one directory per instruction set."""
    return _PACKAGE / "_prebuilt"


def describe(root: Path | None = None, isa: str | None = None) -> Description:
    """The description of the CPU extension for one instruction set, with the flags that the environment asks for."""
    isa = choose_isa() if isa is None else isa
    root = csrc_dir() if root is None else root
    sources = sorted([*root.glob("*.cpp"), *(root / "cpu").glob("*.cpp")])
    cflags, ldflags = flags()
    cflags = (*cflags, *ISA_FLAGS[isa])
    return Description(
        LIBRARY_NAME, root, tuple(sources), _headers(root, "cpu"), (root / "include",), cflags, ldflags, isa
    )


def _headers(root: Path, device: str) -> tuple[Path, ...]:
    """All that the sources of one device may include: a change to the other's is no reason to compile again."""
    folders = (root, root / "include", root / device)
    paths = {path for folder in folders for path in folder.glob("*" if folder == root else "**/*")}
    return tuple(sorted(path for path in paths if path.suffix in HEADER_SUFFIXES))


def flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compiler and linker flags. No -std (torch adds its own) and no -march: a library holds one set of ISA_FLAGS."""
    debug = os.environ.get("SPARSE_BACKEND_DEBUG", "") not in ("", "0")
    cflags = [
        *(["-O1", "-g", "-DSPARSE_BACKEND_CHECK_INDICES=1", "-Werror"] if debug else ["-O3"]),
        "-ffp-contract=off",  # every instruction set and any compiler round alike
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror=return-type",
        f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000",
    ]
    ldflags: list[str] = []
    asked = [word for word in os.environ.get("SPARSE_BACKEND_SANITIZE", "").split(",") if word]
    if asked:
        unknown = [word for word in asked if word not in SANITIZERS]
        if unknown:
            raise ValueError(f"SPARSE_BACKEND_SANITIZE must be of {', '.join(SANITIZERS)}, got {unknown[0]!r}")
        cflags += [f"-fsanitize={','.join(asked)}", "-fno-omit-frame-pointer"]
        ldflags += [f"-fsanitize={','.join(asked)}"]
    return tuple(cflags), tuple(ldflags)


def mode() -> str | None:
    """SPARSE_BACKEND_BUILD, or None where the user leaves the choice to us."""
    value = os.environ.get("SPARSE_BACKEND_BUILD", "")
    if value and value not in MODES:
        raise ValueError(f"SPARSE_BACKEND_BUILD must be one of {', '.join(MODES)} or unset, got {value!r}")
    return value or None


# --- what it is built with ------------------------------------------------------------------------------------------


def find_compiler() -> str | None:
    """The C++ compiler as a command: CXX if set, else the first of the usual names on PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return candidate
    return None


def compiler_version(command: str) -> str:
    """First line of `command --version`, or "" where it does not answer."""
    try:
        words = [*shlex.split(command), "--version"]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.partition("\n")[0].strip()


def find_ninja() -> str | None:
    """The ninja command, also where a virtual environment is used without having been activated."""
    if found := shutil.which("ninja"):
        return found
    beside = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    return shutil.which("ninja", path=os.pathsep.join(beside))


def harmless_warnings(compiler: str, sanitized: bool) -> list[str]:
    """Flags against warnings that are wrong or of no concern. Not in the cache key: the library is the same."""
    switched_off = [
        "-Wno-psabi",  # vectors wider than the instruction set's are passed inside one library alone
        "-Wno-c++20-extensions",  # template lambdas, where torch's recipe still says C++17
    ]
    if "clang" not in compiler_version(compiler).lower():
        switched_off.append("-Wno-maybe-uninitialized")  # in GCC 12's own AVX-512 intrinsics
        if sanitized:
            switched_off.append("-Wno-uninitialized")  # there too
    return switched_off


def cpu_features() -> set[str] | None:
    """What the CPU can do, as Linux names it; None where nobody tells."""
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        if found := re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE):
            return set(found[1].split())
    return None


def machine_isas() -> list[str]:
    """Instruction sets for this kind of machine, best first, whether or not this very CPU has them."""
    return list(ISA_FLAGS) if platform.machine().lower() in ("x86_64", "amd64") else ["scalar"]


def cpu_isas() -> list[str]:
    """Instruction sets this CPU has, best first. `scalar` is any CPU's."""
    features = cpu_features() or set()
    return [name for name in machine_isas() if ISA_NEEDS[name] <= features]


def choose_isa() -> str:
    """SPARSE_BACKEND_ISA if this CPU has it, else the CPU's best instruction set."""
    asked, has = os.environ.get("SPARSE_BACKEND_ISA", ""), cpu_isas()
    if not asked:
        return has[0]
    if asked not in ISA_FLAGS:
        raise ValueError(f"SPARSE_BACKEND_ISA must be one of {', '.join(ISA_FLAGS)} or unset, got {asked!r}")
    if asked not in has:
        raise ValueError(
            f"SPARSE_BACKEND_ISA: expected an instruction set of this CPU ({cpu_model()}: {', '.join(has)}), "
            f"got {asked}. Unset it"
        )
    return asked


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def max_jobs(n_sources: int) -> int:
    """Compile jobs: MAX_JOBS where the user set it, else no more than cores, memory and sources allow."""
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = _available_gib()
    by_memory = cores if memory is None else int(memory / GIB_PER_JOB)
    return max(1, min(cores, by_memory, n_sources))


def _available_gib() -> float | None:
    """Memory a build may use: what the machine has free, and no more than the container's limit."""
    limits = []
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            limits.append(int(found[1]) / 2**20)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30)
    return min(limits, default=None)


def torch_version() -> str:
    """Version of the installed torch with its local tag; BuildError where it is missing or too old."""
    cure = f"pip install 'torch>={TORCH_TARGET[0]}.{TORCH_TARGET[1]}'"
    try:
        import torch
    except Exception as error:
        raise BuildError(f"torch does not import: {type(error).__name__}: {error}", cure=cure) from error
    version = str(torch.__version__)
    if not torch_is_recent(version):
        raise BuildError(f"torch must be {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or newer, got {version}", cure=cure)
    return version


def torch_is_recent(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= TORCH_TARGET


# --- CUDA -----------------------------------------------------------------------------------------------------------


def describe_cuda(archs: Sequence[str], root: Path | None = None) -> Description:
    """The description of the CUDA extension for these targets of nvcc: sm_90, compute_90, ..."""
    root = csrc_dir() if root is None else root
    cuda = root / "cuda"
    sources = sorted([*cuda.glob("*.cu"), *cuda.glob("*.cpp")])
    cflags, ldflags = flags()
    return Description(
        name=CUDA_LIBRARY_NAME,
        root=root,
        sources=tuple(sources),
        headers=_headers(root, "cuda"),
        include_dirs=(root / "include",),
        cflags=(*cflags, "-DUSE_CUDA"),  # torch's own name: it declares the current CUDA stream
        ldflags=ldflags,
        isa="cuda",
        archs=tuple(archs),
        nvcc_flags=(*NVCC_FLAGS, *(gencode(arch) for arch in archs)),
    )


NVCC_FLAGS = (
    "-O3",
    "-fmad=false",  # rounds as the CPU kernels and torch do
    "-Xcompiler=-fvisibility=hidden",
)


def gencode(arch: str) -> str:
    return f"-gencode=arch=compute_{arch.partition('_')[2]},code={arch}"


def find_nvcc() -> str | None:
    """nvcc as a path: of CUDA_HOME or CUDA_PATH if set, else on PATH, else where Linux distributions put it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes[:1]:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(nvcc: str | None) -> str:
    """Its release, such as "13.0"; "" where it does not answer."""
    found = re.search(r"release ([\d.]+)", _ask(nvcc, "--version"))
    return found[1] if found else ""


def nvcc_archs(nvcc: str | None) -> list[int]:
    """What nvcc can compile for, ascending: 80, 90, 120, ..."""
    return sorted({int(number) for number in re.findall(r"compute_(\d+)", _ask(nvcc, "--list-gpu-arch"))})


def nvcc_home(nvcc: str) -> str:
    """The toolkit of this nvcc, as it names it itself: the command on PATH may be a script elsewhere."""
    found = re.search(r"^#\$ TOP=(.+)$", _ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
    return str(Path(found[1].strip()).resolve()) if found else str(Path(nvcc).resolve().parent.parent)


def _ask(command: str | None, *arguments: str) -> str:
    if command is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            [command, *arguments], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        return answer.stdout + answer.stderr
    return ""


def gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of every GPU torch sees. BuildError where it sees none, or one that is too old."""
    torch_version()
    import torch

    if torch.version.cuda is None:
        there = driver_gpus()
        raise BuildError(
            f"torch {torch.__version__} is built without CUDA" + (f", and there is a GPU: {there[0]}" if there else ""),
            cure="install a CUDA build of torch (https://pytorch.org/get-started), or set SPARSE_BACKEND_BUILD=cpu",
        )
    if not torch.cuda.is_available():
        raise BuildError(
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no usable GPU",
            cure="check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES; or set SPARSE_BACKEND_BUILD=cpu",
        )
    found = [
        (torch.cuda.get_device_name(i), tuple(torch.cuda.get_device_capability(i)))
        for i in range(torch.cuda.device_count())
    ]
    for name, capability in found:
        if capability < CUDA_OLDEST:
            raise BuildError(
                f"{name}: expected compute capability {_dotted(CUDA_OLDEST)} or newer, got {_dotted(capability)}",
                cure="hide it with CUDA_VISIBLE_DEVICES, or set SPARSE_BACKEND_BUILD=cpu: CUDA tensors then run the "
                "plain-PyTorch reference",
            )
    return found


def driver_gpus() -> list[str]:
    """GPUs as the driver names them, whether or not torch can use them: "name, driver, memory"."""
    query = ("--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    command = shutil.which("nvidia-smi")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if command is not None:
            answer = subprocess.run([command, *query], capture_output=True, text=True, timeout=30)
            if answer.returncode == 0:
                return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    return []


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def checked_nvcc() -> str:
    """nvcc of the CUDA version torch was built for, or BuildError."""
    import torch

    if torch.version.cuda is None:
        raise BuildError(f"torch {torch.__version__} is built without CUDA", cure="install a CUDA build of torch")
    nvcc, wanted = find_nvcc(), str(torch.version.cuda)
    if nvcc is None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        raise BuildError(
            f"nvcc: expected the CUDA {wanted} compiler in {home}/bin, got none"
            if home
            else f"nvcc: expected the CUDA {wanted} compiler on PATH or in /usr/local/cuda/bin, got none",
            cure=f"install the CUDA {wanted} toolkit (conda install -c nvidia cuda-toolkit={wanted}, or NVIDIA's "
            "packages) and set CUDA_HOME if it lies elsewhere",
        )
    version = nvcc_version(nvcc)
    if version.partition(".")[0] != wanted.partition(".")[0]:
        raise BuildError(
            f"nvcc: expected CUDA {wanted.partition('.')[0]}, which torch {torch.__version__} is built for, got "
            f"{version or 'no answer'} from {nvcc}",
            cure=f"install the CUDA {wanted} toolkit and point CUDA_HOME to it, or a torch built for CUDA {version}",
        )
    return nvcc


def archs_for(capabilities: Sequence[tuple[int, int]], known: Sequence[int]) -> list[str]:
    """Targets of an nvcc that knows `known`, one per GPU: its own machine code, else the nearest older of the same
    generation, which it runs too, else code for the driver to translate."""
    archs = set()
    for major, minor in capabilities:
        wanted = 10 * major + minor
        older = [arch for arch in known if arch <= wanted]
        if not older:
            raise BuildError(
                f"nvcc: expected one that knows compute capability {major}.{minor} or an older one, got "
                f"{', '.join(map(str, known)) or 'none'}",
                cure="install another CUDA toolkit and point CUDA_HOME to it",
            )
        archs.add(f"sm_{older[-1]}" if older[-1] // 10 == major else f"compute_{older[-1]}")
    return sorted(archs, key=lambda arch: (int(arch.partition("_")[2]), arch))


def listed_archs(text: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX", as targets of nvcc. Older GPUs than CUDA_OLDEST are left out, and no
    kernel needs what "9.0a" or "10.0f" add. BuildError where nothing is left, or for what is no number."""
    archs: list[str] = []
    for word in re.split(r"[;\s]+", text.strip("; \t\n")):
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if found is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: expected compute capabilities, such as '8.0;9.0+PTX', got {word!r}",
                cure="name numbers, or unset it: the CUDA kernels are then compiled at first use",
            )
        if (int(found[1]), int(found[2])) < CUDA_OLDEST:
            continue
        number = found[1] + found[2]
        archs += [f"sm_{number}"] + ([f"compute_{number}"] if found[3] else [])
    if not archs:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: expected one of at least {_dotted(CUDA_OLDEST)}, got {text!r}",
            cure="add one, or unset it: older GPUs run the plain-PyTorch reference",
        )
    return list(dict.fromkeys(archs))


def runs_on(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a library of these targets runs on a GPU of this compute capability."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        made_for = divmod(int(number), 10)
        if made_for <= capability and (kind == "compute" or made_for[0] == capability[0]):
            return True
    return False


def find_prebuilt_cuda(capabilities: Sequence[tuple[int, int]], torch: str) -> tuple[Path | None, str]:
    """As `find_prebuilt`, for CUDA kernels made at install time for TORCH_CUDA_ARCH_LIST."""
    try:
        parts = json.loads((prebuilt_dir() / "cuda" / "info.json").read_text())["parts"]
        archs, made_for = [str(arch) for arch in parts["archs"]], str(parts["torch"])
    except OSError:
        return None, "none in this installation"
    except (ValueError, KeyError, TypeError):
        return None, "ignored: its info.json is unreadable"
    unserved = [capability for capability in capabilities if not runs_on(archs, capability)]
    if unserved:
        return None, f"ignored: built for {', '.join(archs)}, not for compute capability {_dotted(unserved[0])}"
    if made_for.partition("+")[2] != torch.partition("+")[2]:
        return None, f"ignored: built for torch {made_for}, whose CUDA is not that of {torch}"
    return find_prebuilt(describe_cuda(archs), torch)


def survey_cuda() -> dict[str, Any]:
    """What loading the CUDA kernels would do now, for the doctor: usable, or the problem and its cure."""
    found: dict[str, Any] = {"usable": False, "problem": None, "cure": None, "archs": [], "key": None, "cached": False}
    try:
        torch = torch_version()
        capabilities = [capability for _, capability in gpus()]
        prebuilt, found["prebuilt"] = find_prebuilt_cuda(capabilities, torch)
        if prebuilt is None:
            found["archs"] = archs_for(capabilities, nvcc_archs(checked_nvcc()))
            description, compiler = describe_cuda(found["archs"]), find_compiler()
            found["key"] = cache_key(key_parts(description, torch, compiler_version(compiler or "")))
            found["cached"] = (cache_dir() / found["key"] / description.library).is_file()
            if compiler is None or find_ninja() is None:
                raise BuildError("nvcc needs a C++ compiler and ninja", cure="named above")
        found["usable"] = mode() in (None, "cuda")
    except BuildError as error:
        found["problem"], found["cure"] = error.cause, error.cure
    return found


# --- the cache ------------------------------------------------------------------------------------------------------


def key_parts(description: Description, torch: str, compiler: str, cpu: str | None = None) -> dict[str, Any]:
    """All that a cached library depends on. `torch` and `compiler` are version strings."""
    return {
        "name": description.name,
        "isa": description.isa,
        "sources": description.fingerprint(),
        "cflags": list(description.cflags),
        "ldflags": list(description.ldflags),
        "torch": torch,
        "compiler": compiler,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": cpu_model() if cpu is None else cpu,
        "archs": list(description.archs),
        "nvcc": [*description.nvcc_flags, nvcc_version(find_nvcc())] if description.archs else [],
    }


def cache_key(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def cache_dir() -> Path:
    if chosen := os.environ.get("SPARSE_BACKEND_CACHE"):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser().absolute() / "sparse_backend"


def list_cache(cache: Path | None = None) -> list[dict[str, Any]]:
    """What lies in the cache, for the doctor: one entry per built library."""
    entries = []
    for note in sorted((cache_dir() if cache is None else cache).glob("*/info.json")):
        with contextlib.suppress(OSError, ValueError):
            entries.append({"key": note.parent.name, **json.loads(note.read_text())})
    return entries


@contextlib.contextmanager
def exclusive(path: Path, patience: float = 5.0) -> Iterator[None]:
    """Hold the lock file `path`. The lock belongs to the process and goes with it, however it ends."""
    if fcntl is None:
        yield
        return
    with open(path, "a+") as file:
        start, told = time.monotonic(), False
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if not told and time.monotonic() - start > patience:
                    told = True
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    _log.warning("sparse_backend: waiting for process %s, which is building the kernels", holder)
                time.sleep(0.05)
            except OSError:  # a file system without locks: two builds may run, each published atomically
                break
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


# --- building -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    path: Path
    key: str
    loaded: bool  # compiled by this call, and with that loaded into this process already
    seconds: float = 0.0
    note: str = ""


def build(description: Description, cache: Path | None = None, *, torch: str | None = None) -> Built:
    """The library from the cache, or compiled into it (and loaded). Safe against other processes doing the same."""
    torch = torch_version() if torch is None else torch
    compiler = find_compiler()
    if compiler is None:
        asked = os.environ.get("CXX")
        raise BuildError(
            f"C++ compiler: expected CXX={asked} to be a command, but it is not found"
            if asked
            else "C++ compiler: expected c++, g++ or clang++ on PATH, got none",
            cure="install one (Debian/Ubuntu: apt install g++; conda: conda install cxx-compiler; macOS: "
            "xcode-select --install) or set CXX to its path",
        )
    parts = key_parts(description, torch, compiler_version(compiler))
    key = cache_key(parts)
    cache = cache_dir() if cache is None else cache
    note = ""
    library = cache / key / description.library
    if library.is_file():
        return Built(library, key, loaded=False)
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        (cache / f"{key}.lock").touch()
    except OSError as error:
        note = f"built again by every process: {cache} is not writable ({error.strerror}); set SPARSE_BACKEND_CACHE"
        cache = Path(tempfile.mkdtemp(prefix="sparse_backend-"))
        library = cache / key / description.library
    with exclusive(cache / f"{key}.lock"):
        if library.is_file():  # another process was faster
            return Built(library, key, loaded=False)
        for left_over in cache.glob(f"{key}.*.build"):  # of a process that was killed: we hold the lock
            shutil.rmtree(left_over, ignore_errors=True)
        workspace = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".build", dir=cache))
        try:
            start = time.monotonic()
            made = compile_and_load(description, workspace, compiler)
            seconds = round(time.monotonic() - start, 2)
            publish(made, library, {"parts": parts, "seconds": seconds})
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    return Built(library, key, loaded=True, seconds=seconds, note=note)


def publish(made: Path, library: Path, info: dict[str, Any]) -> None:
    """Move a finished library into place; the library appears last and whole."""
    library.parent.mkdir(parents=True, exist_ok=True)
    note = made.with_name("info.json")
    note.write_text(json.dumps(info, indent=1) + "\n")
    os.replace(note, library.with_name("info.json"))
    os.replace(made, library)


def compile_and_load(description: Description, workspace: Path, compiler: str | None = None) -> Path:
    """Compile in `workspace` with torch's own recipe and ninja, load the result, return its path."""
    if not description.sources:
        raise BuildError(f"no C++ sources found in {description.root}", cure="reinstall sparse_backend")
    ninja = find_ninja()
    if ninja is None:
        raise BuildError("ninja: expected on PATH or in the Python environment, got none", cure="pip install ninja")
    from torch.utils import cpp_extension

    compiler = compiler or find_compiler() or "c++"
    # No path of the building machine in the library, and none in the cache key.
    remap = () if "-g" in description.cflags else (f"-ffile-prefix-map={description.root}=csrc",)
    quiet = harmless_warnings(compiler, any(flag.startswith("-fsanitize") for flag in description.cflags))
    nvcc = find_nvcc() if description.archs else None
    settings = {
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(ninja).parent)]),
        "MAX_JOBS": str(max_jobs(len(description.sources))),
        "CXX": compiler,
        "LC_ALL": "C",
        "LD_PRELOAD": "",  # a sanitizer preloaded for this process has no business in the compiler
    }
    try:
        with _environment(settings), _cuda_home(cpp_extension, nvcc):
            cpp_extension.load(
                description.name,
                [str(path) for path in description.sources],
                extra_cflags=[*description.cflags, *quiet, *remap],
                extra_cuda_cflags=[*description.nvcc_flags, *host_compiler_of_nvcc(compiler)],
                extra_ldflags=list(description.ldflags),
                extra_include_paths=[str(path) for path in description.include_dirs],
                build_directory=str(workspace),
                with_cuda=bool(description.archs),
                is_python_module=False,
            )
    except Exception as error:
        raise _explain(description, str(error)) from error
    # torch appends a version to the name when one process builds a changed description again.
    made = sorted(workspace.glob(f"{description.name}*.so"))
    if not made:
        raise BuildError(f"the build of {description.name} left no library behind")
    return made[0]


def host_compiler_of_nvcc(compiler: str) -> list[str]:
    """The same compiler for both kinds of sources, where it is a command without arguments; else nvcc's own choice."""
    words = shlex.split(compiler)
    return ["-ccbin", words[0]] if len(words) == 1 else []


@contextlib.contextmanager
def _cuda_home(cpp_extension: Any, nvcc: str | None) -> Iterator[None]:
    """Let torch's recipe use this nvcc's toolkit: it looks for one when it is imported, and mistakes a script on PATH
    for a toolkit's own nvcc."""
    before = cpp_extension.CUDA_HOME
    if nvcc is not None:
        cpp_extension.CUDA_HOME = nvcc_home(nvcc)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    with _environment_lock:
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _explain(description: Description, text: str) -> BuildError:
    """Turn torch's dump of ninja's output into the failing command and what the compiler said of it."""
    command, said = parse_failure(text)
    if command:
        return BuildError(
            f"sparse_backend could not compile {description.name}",
            command=command,
            output=said,
            cure="install a C++20 compiler (g++ 11 or clang 14, or newer), or set SPARSE_BACKEND_BUILD="
            + (
                "cpu to do without the CUDA kernels" if description.archs else "none to run the plain-PyTorch reference"
            ),
        )
    return BuildError(
        f"sparse_backend could not build or load {description.name}",
        output="\n".join(text.splitlines()[-12:]),
        cure="set SPARSE_BACKEND_BUILD=none to run the plain-PyTorch reference meanwhile",
    )


def parse_failure(text: str, keep: int = 12) -> tuple[str, str]:
    """(command, last compiler lines) of the first failed step in ninja's verbose output; ("", "") if none."""
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if line.startswith("FAILED:"):
            command = lines[at + 1].strip() if at + 1 < len(lines) else ""
            said: list[str] = []
            for row in lines[at + 2 :]:
                if row.startswith("ninja: ") or re.match(r"\[\d+/\d+\] ", row):
                    break
                said.append(row)
            errors = [row for row in said if re.search(r"\berror\b|undefined reference|Killed", row)]
            tail = said[-keep:]
            return command, "\n".join([*(row for row in errors[:3] if row not in tail), *tail])
    return "", ""


# --- libraries built at install time ----------------------------------------------------------------------------------


def find_prebuilt(description: Description, torch: str, directory: Path | None = None) -> tuple[Path | None, str]:
    """The library that came with the package if it fits, else None with the reason."""
    everything = prebuilt_dir() if directory is None else directory
    directory = everything / description.isa
    library = directory / description.library
    if not library.is_file():
        others = sorted(path.parent.name for path in everything.glob(f"*/{description.library}"))
        return None, f"ignored: built for {', '.join(others)} alone" if others else "none in this installation"
    try:
        parts = json.loads((directory / "info.json").read_text())["parts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, "ignored: its info.json is missing or unreadable"
    expected: Sequence[tuple[str, Any]] = (
        ("system", platform.system()),
        ("machine", platform.machine()),
        ("sources", description.fingerprint()),
        ("cflags", list(description.cflags)),
        ("ldflags", list(description.ldflags)),
    )
    for name, value in expected:
        if parts.get(name) != value:
            return None, f"ignored: built for other {name} than here"
    if not torch_is_recent(torch):
        return None, f"ignored: it needs torch {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or newer, got {torch}"
    return library, "usable"


def survey() -> dict[str, Any]:
    """What loading would do now, without doing it: for the doctor."""
    description = describe()
    found: dict[str, Any] = {
        "mode": mode(),
        "isa": description.isa,
        "sources": len(description.sources),
        "prebuilt": None,
        "key": None,
        "cached": False,
        "usable": False,
    }
    torch = torch_version()
    prebuilt, found["prebuilt"] = find_prebuilt(description, torch)
    compiler = find_compiler()
    if compiler is not None:
        found["key"] = cache_key(key_parts(description, torch, compiler_version(compiler)))
        found["cached"] = (cache_dir() / found["key"] / description.library).is_file()
    can_build = compiler is not None and find_ninja() is not None and bool(description.sources)
    found["usable"] = mode() != "none" and (prebuilt is not None or found["cached"] or can_build)
    return found
