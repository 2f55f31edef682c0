"""Build of memkernels: packages, and the native code through CMake and Ninja (CMakeLists.txt describes it)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NAME = "memkernels._host"
KERNELS = "memkernels.triton_kernels"


class CMakeBuild(build_ext):
    """Configure, build and install into the package: ``_host`` and ``_lib/libmemkernels_cpu.so``.

    With MEMKERNELS_CUDA=1 in the environment, and nvcc, also ``_lib/libmemkernels_cuda.so``.
    """

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cmake = _tool("cmake")
        configure = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
        configure.append(f"-DMEMKERNELS_CUDA={'ON' if os.environ.get('MEMKERNELS_CUDA') == '1' else 'OFF'}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "-S", ROOT, "-B", build, *configure], check=True)
        subprocess.run([cmake, "--build", build, "--parallel", jobs], check=True)
        subprocess.run([cmake, "--install", build, "--prefix", package], check=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # The operator library is no Python extension, so setuptools does not know of it.
        built = Path(self.build_lib) / "memkernels" / "_lib"
        target = ROOT / "memkernels" / "_lib"
        shutil.rmtree(target, ignore_errors=True)  # a library that a process has loaded must not change under it
        shutil.copytree(built, target)


def _tool(name: str) -> str:
    """The build tool of this interpreter's environment, before one that lies elsewhere on the path."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"memkernels: {name} is needed to build the native code; pip install {name}")
    return found


def version() -> str:
    for line in (ROOT / "memkernels" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise SystemExit("memkernels: no __version__ in memkernels/__init__.py")


setup(
    version=version(),
    packages=[*find_packages(include=["memkernels", "memkernels.*"]), KERNELS],
    package_dir={KERNELS: "triton_kernels"},  # the bare name is taken by another package
    package_data={"memkernels": ["fastest.json", "py.typed"], KERNELS: ["configs.json"]},
    ext_modules=[Extension(NAME, sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
