"""Builds the native CPU kernels; everything else is said in pyproject.toml.

They become a plain shared library that ctypes loads, tied to no release of Python or torch, so one wheel serves them all. Where
there is no C++ compiler the package installs without it: the reason is kept beside it, and told at the first use.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("mindspeed_nsa/ops/cpu/csrc")
# No -march: each instruction set has functions of its own, and the processor is asked at run time.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


class BuildKernels(build_ext):
    """Compile with the C++ compiler that is there, or write down why not."""

    def get_ext_filename(self, fullname: str) -> str:
        """A name without Python's tag."""
        *folders, name = fullname.split(".")
        return os.path.join(*folders, f"lib{name}.so")

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources side by side, then link them."""
        library = Path(self.get_ext_fullpath(ext.name))
        here = Path(self.get_finalized_command("build_py").get_package_dir("mindspeed_nsa.ops.cpu"))
        folders = {library.parent, here} if self.editable_mode else {library.parent}
        reason = compile_kernels([Path(source) for source in ext.sources], library, Path(self.build_temp))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "not_built.txt").unlink(missing_ok=True)
            if reason:
                (folder / library.name).unlink(missing_ok=True)
                (folder / "not_built.txt").write_text(reason + "\n")
        if reason:
            self.warn(f"no native CPU kernels: {reason}; the operators will run on the reference, which is slow")


def compile_kernels(sources: list[Path], library: Path, temporary: Path) -> str:
    """Build the library; returns why that was not possible, or nothing."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return f"there was no C++ compiler ({', '.join(names)}) when the project was installed"
    temporary.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    objects = [temporary / f"{source.stem}.o" for source in sources]

    def run(*arguments: object) -> None:
        subprocess.run([compiler, *map(str, arguments)], check=True, capture_output=True, text=True)

    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source, target: run(*FLAGS, "-c", source, "-o", target), sources, objects))
        run(*FLAGS, "-shared", *objects, "-o", library)
    except subprocess.CalledProcessError as error:
        print(error.stderr)
        errors = [line for line in error.stderr.splitlines() if "error" in line]
        return f"{compiler} failed when the project was installed: {(errors or ['no message'])[0].strip()}"
    return ""


class AnyPython(bdist_wheel):
    """The wheel has machine code, but none that knows of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3 on this platform."""
        return "py3", "none", super().get_tag()[2]


kernels = Extension(
    "mindspeed_nsa.ops.cpu.kernels",
    sources=sorted(map(str, SOURCES.glob("*.cpp"))),
    depends=sorted(map(str, SOURCES.glob("*.h"))),
    optional=True,
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPython})
