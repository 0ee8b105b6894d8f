"""The build of the native extension: key, cache, lock, failures, and what SPARSE_BACKEND_BUILD promises."""

import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from sparse_backend import _build, _native

ROOT = Path(_build.__file__).resolve().parents[2]

needs_compiler = pytest.mark.skipif(_build.tools.find_compiler() is None, reason="no C++ compiler")

STABLE_SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
static int64_t count(torch::stable::Tensor x) { return x.numel(); }
STABLE_TORCH_LIBRARY_IMPL(sparse_backend_build_test, CPU, m) { m.impl("count", TORCH_BOX(&count)); }
"""


def a_description(
    root: Path, source: str = "int f() { return 1; }\n", name: str = "tiny"
) -> _build.sources.Description:
    (root / "include").mkdir(parents=True, exist_ok=True)
    file, header = root / "tiny.cpp", root / "include" / "tiny.h"
    file.write_text(source)
    header.write_text("#pragma once\n")
    cflags, ldflags = _build.settings.flags()
    return _build.sources.Description(name, root, (file,), (header,), (root / "include",), cflags, ldflags)


def without(monkeypatch, *names):
    for name in names:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`_native` as in a new process with an empty cache and nothing prebuilt; the real state comes back afterwards."""
    before = _native._outcome, _native._failure, _native._cuda_waits
    details = dict(_native._details), dict(_native._cuda_details)
    _native._forget()
    monkeypatch.setattr(_build.sources, "prebuilt_dir", lambda: tmp_path / "no-prebuilt")
    monkeypatch.setattr(_build.sources, "describe", lambda: a_description(tmp_path / "csrc"))
    monkeypatch.setenv("SPARSE_BACKEND_CACHE", str(tmp_path / "cache"))
    without(monkeypatch, "SPARSE_BACKEND_BUILD", "SPARSE_BACKEND_ISA")
    yield monkeypatch
    _native._forget()
    _native._outcome, _native._failure, _native._cuda_waits = before
    _native._details.update(details[0])
    _native._cuda_details.update(details[1])


# --- the key --------------------------------------------------------------------------------------------------------


def test_key_depends_on_everything_that_decides_the_library(tmp_path):
    description = a_description(tmp_path)

    def key(description=description, torch="2.13.0+cpu", compiler="g++ 12", cpu="x"):
        return _build.cache.key_of(_build.cache.key_parts(description, torch, compiler, cpu))

    keys = {
        key(),
        key(torch="2.13.0+cu130"),
        key(compiler="g++ 13"),
        key(cpu="y"),
        key(dataclasses.replace(description, cflags=(*description.cflags, "-g"))),
        key(dataclasses.replace(description, ldflags=("-lm",))),
        key(dataclasses.replace(description, isa="avx2")),
    }
    description.sources[0].write_text("int f() { return 2; }\n")
    keys.add(key())
    description.headers[0].write_text("#pragma once\n// changed\n")
    keys.add(key())
    assert len(keys) == 9
    assert key() == key()


def test_key_does_not_depend_on_where_the_sources_lie(tmp_path):
    here, there = a_description(tmp_path / "here"), a_description(tmp_path / "there")
    assert here.fingerprint() == there.fingerprint()


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("SPARSE_BACKEND_DEBUG", "1", "-DSPARSE_BACKEND_CHECK_INDICES=1"),
        ("SPARSE_BACKEND_SANITIZE", "address", "-fsanitize=address"),
    ],
)
def test_development_variables_change_the_flags(monkeypatch, name, value, flag):
    monkeypatch.delenv(name, raising=False)
    assert flag not in _build.settings.flags()[0]
    monkeypatch.setenv(name, value)
    assert flag in _build.settings.flags()[0]


def test_flags_leave_the_language_version_to_torch_and_name_no_machine():
    flags = [*_build.settings.flags()[0], *(flag for flags in _build.cpu.ISA_FLAGS.values() for flag in flags)]
    assert not [flag for flag in flags if flag.startswith(("-std", "-march", "-mtune"))]
    assert "-mfma" not in flags, "fused arithmetic would make results depend on the machine"


def test_a_misspelt_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("SPARSE_BACKEND_BUILD", "gpu")
    with pytest.raises(ValueError, match="must be one of none, cpu, cuda or unset, got 'gpu'"):
        _build.settings.mode()
    monkeypatch.setenv("SPARSE_BACKEND_SANITIZE", "adress")
    with pytest.raises(ValueError, match="SPARSE_BACKEND_SANITIZE must be of address, undefined, got 'adress'"):
        _build.settings.flags()


def test_the_real_description_finds_its_sources():
    description = _build.sources.describe()
    assert description.sources, f"no C++ sources in {description.root}"
    assert all(path.is_file() for path in (*description.sources, *description.headers))


@pytest.mark.parametrize(("memory", "asked", "jobs"), [(64.0, "", 2), (2.0, "", 1), (0.1, "", 1), (0.1, "7", 7)])
def test_jobs_are_capped_by_cores_sources_and_memory(monkeypatch, memory, asked, jobs):
    monkeypatch.setattr(_build.tools, "_available_gib", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("MAX_JOBS", asked)
    assert _build.tools.max_jobs(2) == jobs


# --- building -------------------------------------------------------------------------------------------------------


@needs_compiler
def test_build_against_the_stable_abi_then_cached(tmp_path):
    schemas = torch.library.Library("sparse_backend_build_test", "DEF")
    schemas.define("count(Tensor x) -> int")
    description = a_description(tmp_path / "csrc", STABLE_SOURCE, "stable_abi_test")
    environment = dict(os.environ)
    built = _build.cache.build(description, tmp_path / "cache")
    assert built.loaded and built.path.is_file() and built.path.parent.name == built.key
    assert torch.ops.sparse_backend_build_test.count(torch.zeros(3, 4)) == 12
    assert dict(os.environ) == environment

    again = _build.cache.build(description, tmp_path / "cache")
    assert (again.path, again.loaded) == (built.path, False)
    assert [entry["key"] for entry in _build.cache.entries(tmp_path / "cache")] == [built.key]
    assert not list((tmp_path / "cache").glob("*.build")), "the workspace is gone"
    assert str(tmp_path).encode() not in built.path.read_bytes(), "no path of this machine inside"


@needs_compiler
def test_a_failing_source_names_command_compiler_lines_and_doctor(tmp_path):
    description = a_description(tmp_path, "int f() {\n  return undeclared_thing;\n}\n")
    with pytest.raises(_build.errors.BuildError) as caught:
        _build.cache.build(description, tmp_path / "cache")
    text = str(caught.value)
    assert "tiny.cpp" in caught.value.command and "-O3" in caught.value.command
    assert "undeclared_thing" in text and "python -m sparse_backend doctor" in text and "cure:" in text
    assert len(text.splitlines()) < 30
    assert not list((tmp_path / "cache").glob("*/*.so"))


def test_parse_failure_keeps_the_error_above_a_long_tail():
    text = "\n".join(["[1/2] c++ a.cpp", "FAILED: [code=1] a.o ", "c++ a.cpp -o a.o", "a.cpp:1: error: the cause"])
    text += "\n" + "\n".join(f"note {i}" for i in range(40)) + "\nninja: build stopped: subcommand failed.\n"
    command, said = _build.compilation.parse_failure(text)
    assert command == "c++ a.cpp -o a.o"
    assert said.splitlines()[0] == "a.cpp:1: error: the cause" and said.splitlines()[-1] == "note 39"
    assert _build.compilation.parse_failure("something else") == ("", "")


def test_missing_ninja_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(_build.tools, "find_ninja", lambda: None)
    with pytest.raises(_build.errors.BuildError, match="pip install ninja"):
        _build.compilation.compile_and_load(a_description(tmp_path), tmp_path)


@needs_compiler
def test_an_unwritable_cache_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    built = _build.cache.build(a_description(tmp_path / "csrc", name="tiny_uncached"), tmp_path / "file" / "cache")
    assert built.loaded and "set SPARSE_BACKEND_CACHE" in built.note


@needs_compiler
def test_two_processes_make_one_build(tmp_path):
    log, wrapper = tmp_path / "log", tmp_path / "c++"
    # Slow enough that the second process arrives while the first one compiles.
    wrapper.write_text(
        '#!/bin/sh\ncase " $* " in *" -c "*) echo compile >> ' + f"'{log}'; sleep 2;; esac\n"
        f'exec {_build.tools.find_compiler()} "$@"\n'
    )
    wrapper.chmod(0o755)
    a_description(tmp_path / "csrc")
    code = (
        "import sys; from pathlib import Path; from sparse_backend import _build as b; root = Path(sys.argv[1])\n"
        "d = b.sources.Description('tiny', root / 'csrc', (root / 'csrc' / 'tiny.cpp',))\n"
        "print(b.cache.build(d, root / 'cache').loaded)"
    )
    environment = {**os.environ, "CXX": str(wrapper), "TORCH_DONT_CHECK_COMPILER_ABI": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert answers == ["False", "True"]
    assert log.read_text().split() == ["compile"]


# --- the lock -------------------------------------------------------------------------------------------------------

HOLD = (
    "import sys; from pathlib import Path; from sparse_backend import _build\n"
    "with _build.cache.exclusive(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def hold(lock: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], env=environment, stdin=pipe, stdout=pipe, text=True
    )
    assert process.stdout.readline().strip() == "held"
    return process


@pytest.mark.skipif(_build.cache.fcntl is None, reason="no fcntl on this system")
def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    with hold(tmp_path / "lock") as process:
        process.send_signal(signal.SIGKILL)
    start = time.monotonic()
    with _build.cache.exclusive(tmp_path / "lock"):
        assert time.monotonic() - start < 2


@pytest.mark.skipif(_build.cache.fcntl is None, reason="no fcntl on this system")
def test_waiting_for_the_lock_says_for_whom(tmp_path, caplog):
    with hold(tmp_path / "lock") as process:
        threading.Timer(0.5, process.stdin.close).start()
        with _build.cache.exclusive(tmp_path / "lock", patience=0.1):
            pass
    assert [record.getMessage() for record in caplog.records] == [
        f"sparse_backend: waiting for process {process.pid}, which is building the kernels"
    ]


# --- instruction sets -----------------------------------------------------------------------------------------------

AVX2 = {"sse4_2", "avx", "avx2", "bmi1", "bmi2", "popcnt", "abm", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}


@pytest.mark.parametrize(
    ("machine", "features", "isas"),
    [
        ("x86_64", AVX512, ["avx512", "avx2", "scalar"]),
        ("x86_64", AVX512 - {"avx512vl"}, ["avx2", "scalar"]),
        ("AMD64", AVX2, ["avx2", "scalar"]),
        ("x86_64", AVX2 - {"bmi2"}, ["scalar"]),
        ("x86_64", None, ["scalar"]),
        ("aarch64", {"asimd", "sve"}, ["scalar"]),
        ("arm64", None, ["scalar"]),
    ],
)
def test_a_cpu_gets_the_best_set_it_has(monkeypatch, machine, features, isas):
    without(monkeypatch, "SPARSE_BACKEND_ISA")
    monkeypatch.setattr(_build.cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(_build.cpu, "features", lambda: features)
    assert _build.cpu.isas() == isas and _build.cpu.choose_isa() == isas[0]
    description = _build.sources.describe()
    assert description.isa == isas[0]
    assert description.cflags[len(_build.settings.flags()[0]) :] == _build.cpu.ISA_FLAGS[isas[0]]


def test_a_wheel_gets_every_set_of_its_kind_of_machine(monkeypatch):
    monkeypatch.setattr(_build.cpu, "features", lambda: AVX2)
    monkeypatch.setattr(_build.cpu.platform, "machine", lambda: "x86_64")
    assert _build.cpu.machine_isas() == ["avx512", "avx2", "scalar"]
    monkeypatch.setattr(_build.cpu.platform, "machine", lambda: "aarch64")
    assert _build.cpu.machine_isas() == ["scalar"]


def test_the_environment_chooses_among_the_sets_of_this_cpu(monkeypatch):
    monkeypatch.setattr(_build.cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(_build.cpu, "features", lambda: AVX2)
    monkeypatch.setattr(_build.cpu, "model", lambda: "Old CPU")
    monkeypatch.setenv("SPARSE_BACKEND_ISA", "scalar")
    assert _build.cpu.choose_isa() == "scalar"
    monkeypatch.setenv("SPARSE_BACKEND_ISA", "avx512")
    expected = r"SPARSE_BACKEND_ISA: expected an instruction set of this CPU \(Old CPU: avx2, scalar\), got avx512"
    with pytest.raises(ValueError, match=expected):
        _build.cpu.choose_isa()
    monkeypatch.setenv("SPARSE_BACKEND_ISA", "sse")
    with pytest.raises(ValueError, match="must be one of avx512, avx2, scalar or unset, got 'sse'"):
        _build.cpu.choose_isa()


def test_a_wrong_set_is_no_reason_for_the_reference(fresh):
    fresh.setenv("SPARSE_BACKEND_ISA", "sse")
    with pytest.raises(ValueError, match="got 'sse'"):
        _native.load()
    fresh.setenv("SPARSE_BACKEND_BUILD", "none")
    assert _native.load() is False, "without kernels it does not matter"


def test_prebuilt_libraries_are_chosen_by_the_cpu_that_runs_them(tmp_path):
    description, directory = a_description(tmp_path / "csrc"), tmp_path / "prebuilt"
    variants = {isa: dataclasses.replace(description, isa=isa) for isa in _build.cpu.ISA_FLAGS}
    for isa in ("avx512", "scalar"):
        (directory / isa).mkdir(parents=True)
        (directory / isa / description.library).write_bytes(b"")
        parts = _build.cache.key_parts(variants[isa], "2.13.0", "g++", "x")
        (directory / isa / "info.json").write_text(json.dumps({"parts": parts}))
    assert _build.prebuilt.find(variants["avx512"], "2.13.0", directory)[0].parent.name == "avx512"
    assert _build.prebuilt.find(variants["scalar"], "2.13.0", directory)[0].parent.name == "scalar"
    assert _build.prebuilt.find(variants["avx2"], "2.13.0", directory) == (
        None,
        "ignored: built for avx512, scalar alone",
    )


EVERY_OP = """
import sys, torch
from sparse_backend import EventTensor, _native, functional as F

def fast_sigmoid(x, slope=25.0):
    soft = x / (1 + slope * x.abs())
    return (x > 0).to(x.dtype) + (soft - soft.detach())

exact, close = {}, {}
for dtype in (torch.float32, torch.float64):
    for reset in ("subtract", "zero", "none"):
        for b_th in (0.3, float("inf")):
            random = torch.Generator().manual_seed(0)
            def normal(*shape):
                return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
            name = f"{dtype} {reset} {b_th}"
            x = (torch.rand(12, 5, 70, generator=random) < 0.05).to(dtype)
            leaves = [x.requires_grad_(), normal(37, 70), normal(37), normal(5, 37), normal(9, 37)]
            beta, threshold = (torch.full((), value, dtype=dtype, requires_grad=True) for value in (0.9, 0.8))
            options = dict(beta=beta, threshold=threshold, spike_grad=fast_sigmoid, b_th=b_th, reset=reset)
            hidden, _ = F.linear_leaky(*leaves[:3], mem=leaves[3], **options)
            spikes, mem = F.linear_leaky(hidden, leaves[4], reset_delay=False, return_mem=True, **options)
            exact[name] = [hidden.to_dense().detach(), spikes.to_dense().detach(), mem.detach()]
            alone, _ = F.leaky(torch.nn.functional.linear(x, leaves[1]), **options)
            loss = spikes.to_dense().square().sum() + mem.square().sum() + alone.to_dense().sum()
            close[name] = torch.autograd.grad(loss, [*leaves, beta, threshold])

left_alone = {}  # a state and a gradient that are halved until no full mantissa is left for them
for dtype, steps in ((torch.float32, 130), (torch.float64, 1030)):
    for b_th in (0.3, float("inf")):
        start = torch.full((2, 3), 0.5, dtype=dtype, requires_grad=True)
        silence, options = torch.zeros(steps, 2, 3, dtype=dtype), dict(spike_grad=fast_sigmoid, b_th=b_th)
        _, mem = F.leaky(silence, beta=0.5, mem=start, **options)
        v = F.lif(silence, mem_gain=0.5, v=start, **options).v
        for name, last in (("leaky", mem), ("lif", v)):
            left_alone[f"{name} {dtype} {b_th}"] = last.detach(), *torch.autograd.grad(last.sum(), start)
assert _native.available(), _native.status()
torch.save((_native.status()["isa"], exact, close, left_alone), sys.argv[1])
"""


@pytest.fixture(scope="module")
def of_every_isa(tmp_path_factory):
    """What each instruction set of this CPU computes, compiled strictly and in a process of its own."""
    root = tmp_path_factory.mktemp("isas")
    variables = {"SPARSE_BACKEND_BUILD": "cpu", "SPARSE_BACKEND_DEBUG": "1", "MAX_JOBS": "1", "PYTHONPATH": str(ROOT)}
    processes = {
        isa: subprocess.Popen(
            [sys.executable, "-c", EVERY_OP, str(root / isa)],
            env={**os.environ, **variables, "SPARSE_BACKEND_ISA": isa},
            stderr=subprocess.PIPE,
            text=True,
        )
        for isa in _build.cpu.isas()
    }
    told = {isa: process.communicate(timeout=600)[1] for isa, process in processes.items()}
    for isa, process in processes.items():
        assert process.returncode == 0, f"{isa}: {told[isa][-4000:]}"
    return {isa: torch.load(root / isa) for isa in processes}


@needs_compiler
@pytest.mark.kernels
def test_every_instruction_set_compiles_without_a_warning_and_runs(of_every_isa):
    assert {isa: result[0] for isa, result in of_every_isa.items()} == {isa: isa for isa in _build.cpu.isas()}


@needs_compiler
@pytest.mark.kernels
def test_every_instruction_set_computes_the_same(of_every_isa):
    """Forward bit for bit; gradients to rounding, since a dot product is summed in as many parts as a vector has."""
    _, exact, close, _ = of_every_isa["scalar"]
    assert sum(float(spikes.sum()) for spikes, _, _ in exact.values()) > 1000
    for isa, (_, exact_here, close_here, _) in of_every_isa.items():
        for name in exact:
            for ours, scalar in zip(exact_here[name], exact[name], strict=True):
                assert torch.equal(ours, scalar), f"{isa} {name}"
            for ours, scalar in zip(close_here[name], close[name], strict=True):
                scale = float(scalar.abs().max())
                rtol = 1e-5 if ours.dtype == torch.float32 else 1e-12
                torch.testing.assert_close(ours, scalar, rtol=rtol, atol=rtol * scale, msg=f"{isa} {name}")


@needs_compiler
@pytest.mark.kernels
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="such numbers are kept where there is no SSE")
def test_no_number_is_too_small_for_a_full_mantissa(of_every_isa):
    """On a CPU an operation on one of them costs a hundred cycles."""
    for isa, (*_, left_alone) in of_every_isa.items():
        for name, tensors in left_alone.items():
            for tensor in tensors:
                too_small = tensor.bool() & (tensor.abs() < torch.finfo(tensor.dtype).tiny)
                assert not bool(too_small.any()), f"{isa} {name}"


@needs_compiler
def test_warnings_of_a_compiler_about_itself_are_switched_off(monkeypatch):
    monkeypatch.setattr(_build.tools, "compiler_version", lambda command: f"{command} version 14")
    assert "-Wno-maybe-uninitialized" in _build.tools.harmless_warnings("g++", False)
    assert "-Wno-maybe-uninitialized" not in _build.tools.harmless_warnings("clang++", False), "clang does not know it"
    assert "-Wno-uninitialized" in _build.tools.harmless_warnings("g++", True)
    assert "-Wno-uninitialized" not in _build.tools.harmless_warnings("g++", False)


# --- prebuilt -------------------------------------------------------------------------------------------------------


def test_prebuilt_is_taken_when_it_fits_and_else_says_why(tmp_path):
    description, directory = a_description(tmp_path / "csrc"), tmp_path / "prebuilt"
    assert _build.prebuilt.find(description, "2.13.0", directory) == (None, "none in this installation")
    library = directory / "scalar" / description.library
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    assert "info.json" in _build.prebuilt.find(description, "2.13.0", directory)[1]
    library.with_name("info.json").write_text(
        json.dumps({"parts": _build.cache.key_parts(description, "2.13.0", "g++", "x")})
    )

    assert _build.prebuilt.find(description, "2.13.0", directory)[0] == library
    assert _build.prebuilt.find(description, "2.14.1+cu140", directory)[0] is not None, "newer torch: same stable ABI"
    assert "needs torch 2.11 or newer, got 2.9.0" in _build.prebuilt.find(description, "2.9.0", directory)[1]
    other = dataclasses.replace(description, cflags=("-O0",))
    assert _build.prebuilt.find(other, "2.13.0", directory) == (None, "ignored: built for other cflags than here")
    description.sources[0].write_text("int g() { return 3; }\n")
    assert _build.prebuilt.find(description, "2.13.0", directory) == (
        None,
        "ignored: built for other sources than here",
    )


# --- what SPARSE_BACKEND_BUILD promises -----------------------------------------------------------------------------


def test_none_never_builds_and_never_warns(fresh):
    fresh.setenv("SPARSE_BACKEND_BUILD", "none")
    fresh.setattr(_build.cache, "build", lambda *a, **k: pytest.fail("built"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.load() is False
    assert not _native.available() and _native.status()["state"] == "disabled"


def test_cpu_raises_the_same_error_without_trying_again(fresh):
    tries = []

    def fail(*arguments, **options):
        tries.append(1)
        raise _build.errors.BuildError("the cause", cure="the cure")

    fresh.setenv("SPARSE_BACKEND_BUILD", "cpu")
    fresh.setattr(_build.cache, "build", fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the cause(.|\n)*the cure(.|\n)*python -m sparse_backend doctor"):
            _native.load()
    assert len(tries) == 1 and not _native.available()
    assert _native.status()["state"] == "failed"


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_cuda_is_refused_clearly(fresh):
    fresh.setenv("SPARSE_BACKEND_BUILD", "cuda")
    with pytest.raises(RuntimeError, match=r"is built without CUDA(.|\n)*cure: install a CUDA build of torch"):
        _native.load()


def test_without_a_compiler_one_warning_and_the_reference(fresh):
    fresh.setenv("CXX", "/nowhere/c++")
    with pytest.warns(RuntimeWarning) as caught:
        assert _native.load() is False
    text = str(caught[0].message)
    assert len(caught) == 1 and "CXX=/nowhere/c++" in text and "reference" in text and "cure: install one" in text
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _native.load() is False
    assert _native.status()["origin"] == "reference"


@needs_compiler
def test_load_builds_once_for_all_threads(fresh):
    builds, real = [], _build.cache.build

    def counted(*arguments, **options):
        builds.append(1)
        return real(*arguments, **options)

    fresh.setattr(_build.cache, "build", counted)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(_native.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 4 and len(builds) == 1
    status = _native.status()
    assert (status["state"], status["origin"]) == ("loaded", "built") and Path(status["path"]).is_file()
    assert status["isa"] in _build.cpu.ISA_FLAGS


@needs_compiler
def test_a_damaged_library_in_the_cache_is_built_again(fresh, tmp_path):
    built = _build.cache.build(_build.sources.describe(), tmp_path / "cache")
    # Not in place: the file just loaded is mapped into this process.
    built.path.unlink()
    built.path.write_bytes(b"damaged")
    assert _native.load() is True
    assert built.path.stat().st_size > 1000
