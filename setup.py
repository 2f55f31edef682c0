"""Build of memkernels: packages, and the native code through CMake and Ninja (CMakeLists.txt describes it)."""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "build_backend"))
import memkernels_build as native  # noqa: E402

NAME = "memkernels._host"
KERNELS = "memkernels.triton_kernels"
STAMP = runpy.run_path(str(ROOT / "memkernels" / "_stamp.py"))


class CMakeBuild(build_ext):
    """Configure, build and install into the package: ``_lib/libmemkernels_cpu.so``, in place also ``_host``.

    With MEMKERNELS_CUDA=1 in the environment, and nvcc, also ``_lib/libmemkernels_cuda.so``.
    """

    def run(self) -> None:
        native.check()
        self.in_place = self.inplace  # the base class resets its own while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cmake = native.tool("cmake")
        configure = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}", f"-DTORCH_DIR={native.torch()}"]
        configure.append(f"-DCMAKE_MAKE_PROGRAM={native.tool('ninja')}")
        configure.append(f"-DMEMKERNELS_CUDA={'ON' if os.environ.get('MEMKERNELS_CUDA') == '1' else 'OFF'}")
        # The module serves one version of Python, a wheel all of them.
        configure.append(f"-DMEMKERNELS_HOST={'ON' if self.in_place else 'OFF'}")
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        native.run([cmake, "-S", ROOT, "-B", build, *configure])
        native.compile([cmake, "--build", build, "--parallel", str(jobs)], jobs)
        native.run([cmake, "--install", build, "--prefix", package])
        (package / "_lib" / STAMP["FILE"]).write_text(STAMP["stamp"](ROOT))

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # The operator library is no Python extension, so setuptools does not know of it.
        built = Path(self.build_lib) / "memkernels" / "_lib"
        target = ROOT / "memkernels" / "_lib"
        shutil.rmtree(target, ignore_errors=True)  # a library that a process has loaded must not change under it
        shutil.copytree(built, target)


class Wheel(bdist_wheel):
    """One wheel for every Python: nothing in it is compiled against Python."""

    def run(self) -> None:
        # A wheel takes all files of that folder, also those that an earlier build left there.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


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
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
