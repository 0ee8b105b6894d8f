"""What pyproject.toml cannot say: where packages lie, and the optional native build at install time.

Installing needs no torch and no compiler: then the kernels are compiled at first use. With `--no-build-isolation`,
where torch is importable, they are compiled now, by the same code and from the same description, once for every
instruction set of this kind of machine: the CPU they will run on chooses when it loads them. With TORCH_CUDA_ARCH_LIST
and a CUDA build of torch, so are the CUDA kernels, in one library for all that the list names.
"""

import importlib.util
import os
import sys
import unittest.mock
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC_PATTERNS = [f"**/*{suffix}" for suffix in (".cpp", ".h", ".cu", ".cuh")]


def load_build_module():
    """sparse_backend/_build by path: the package itself is not installed yet."""
    folder = ROOT / "sparse_backend" / "_build"
    spec = importlib.util.spec_from_file_location(
        "_sparse_backend_build", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_build_module()


class BuildNative(build_ext):
    """Puts each compiled library and the note of what it was built from into sparse_backend/_prebuilt/<isa>."""

    def run(self):
        if self.inplace or self.editable_mode:  # sources in a checkout change: first use keeps up with them
            return
        try:
            for isa in build.cpu.machine_isas():
                self._compile(build.sources.describe(ROOT / "csrc", isa))
            if (archs := os.environ.get("TORCH_CUDA_ARCH_LIST")) and build.settings.mode() != "cpu":
                build.nvidia.checked_nvcc()
                self._compile(build.sources.describe_cuda(build.nvidia.listed_archs(archs), ROOT / "csrc"))
        except build.errors.BuildError as error:
            if build.settings.mode() is not None:
                raise
            print(
                f"sparse_backend: not all kernels are prebuilt, they will be compiled at first use.\n{error}",
                file=sys.stderr,
            )

    def _compile(self, description):
        tools = build.tools
        compiler = tools.find_compiler()
        parts = build.cache.key_parts(description, tools.torch_version(), tools.compiler_version(compiler or ""))
        workspace = Path(self.build_temp).resolve() / "native" / description.isa
        workspace.mkdir(parents=True, exist_ok=True)
        import torch

        with unittest.mock.patch.object(torch.ops, "load_library"):  # this CPU may not have the instruction set
            made = build.compilation.compile_and_load(description, workspace, compiler)
        build.cache.publish(made, self._prebuilt() / description.isa / description.library, {"parts": parts})

    def _prebuilt(self):
        return Path(self.build_lib).resolve() / "sparse_backend" / "_prebuilt"

    def get_outputs(self):
        if self.inplace or self.editable_mode:
            return []
        return [str(path) for path in sorted(self._prebuilt().glob("*/*")) if path.is_file()]

    def get_output_mapping(self):
        return {}


def prebuild():
    """Build at install time? Only where it can work, so that the wheel is a pure one elsewhere."""
    if build.settings.mode() == "none" or os.name != "posix":
        return False
    return importlib.util.find_spec("torch") is not None and build.tools.find_compiler() is not None


adapters = [f"sparse_backend.adapters.{name}" for name in find_packages("adapters")]
setup(
    packages=[
        *find_packages(include=["sparse_backend", "sparse_backend.*"]),
        "sparse_backend.adapters",
        *adapters,
        "sparse_backend.csrc",  # no package to import: the sources, so that an installation can compile them
    ],
    package_dir={"sparse_backend.adapters": "adapters", "sparse_backend.csrc": "csrc"},
    package_data={"sparse_backend": ["py.typed"], "sparse_backend.csrc": CSRC_PATTERNS},
    ext_modules=[Extension(f"sparse_backend.{build.sources.LIBRARY_NAME}", sources=[])] if prebuild() else [],
    cmdclass={"build_ext": BuildNative},
)
