"""Makes the CANN libraries that a torch_npu wheel links against, from what the wheel itself asks for.

Neither torch nor torch_npu is imported here. A function of CANN that `runtime.c` does not define becomes one that fails and
says its name; an aclnn operator that `signatures.py` does not list is not there, which torch_npu reports by name.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from .signatures import C_TYPES, SIGNATURES, Parameter

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_MAIN = "libascendcl.so"
_OPTIONAL = "libop_plugin_atb.so"  # loaded on demand, over a C++ library


class Unsupported(Exception):
    """This torch_npu needs something of CANN that is not emulated."""


class Wheel(NamedTuple):
    """What a torch_npu wheel asks of CANN.

    Attributes:
        release: its version.
        symbols: functions that it links against.
        libraries: names of the libraries that it links against.
        mentions: names of acl functions that it links against or looks up when it needs them.
    """

    release: str
    symbols: frozenset[str]
    libraries: frozenset[str]
    mentions: frozenset[str]


def torch_npu_path() -> Path:
    """The folder that torch_npu is installed in, alone: `TORCH_NPU_PATH`, else `.torch_npu` in the repository."""
    return Path(os.environ.get("TORCH_NPU_PATH") or ROOT / ".torch_npu").absolute()


def why_not(folder: Path) -> str | None:
    """The reason why nothing can be emulated here with the torch_npu in `folder`, None if it can."""
    release = _release(folder)
    if release is None:
        return f"no torch_npu in {folder} (launch/test.sh puts it there; TORCH_NPU_PATH names another folder)"
    installed = importlib.metadata.version("torch").split("+")[0]
    if release.split(".post")[0] != installed:
        return f"torch_npu {release} in {folder} does not go with the installed torch {installed}"
    absent = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    return f"no {', '.join(absent)} to build the emulated CANN with" if absent else None


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process that runs torch_npu from `folder` over the emulated CANN, which is built if need be.

    Raises:
        Unsupported: the torch_npu in `folder` needs more than is emulated.
    """
    before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        "EMULATED_CANN": str(build(folder)),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(build(folder)), os.environ.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), *before]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "TASK_QUEUE_ENABLE": "0",  # an operator runs in the thread that calls it
        "PYTORCH_NO_NPU_MEMORY_CACHING": "1",  # all memory is fresh, hence NaN
    }


def build(folder: Path) -> Path:
    """The folder with the libraries that the torch_npu in `folder` needs; built once for a wheel and these sources.

    Raises:
        Unsupported: the torch_npu in `folder` needs more than is emulated.
    """
    built = Path(tempfile.gettempdir()) / f"emulated_cann-{os.getuid()}-{_fingerprint(folder)}"
    if not built.exists():
        wheel = read_wheel(folder)
        check(wheel)
        partial = Path(tempfile.mkdtemp(prefix=built.name))
        _compile(wheel, partial)
        try:
            partial.rename(built)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return built


def read_wheel(folder: Path) -> Wheel:
    """Read from the ELF files of the wheel what it asks of CANN."""
    files = [*folder.glob("torch_npu/*.so"), *folder.glob("torch_npu/lib/*.so*")]
    files = [file for file in files if file.name != _OPTIONAL]
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    of_torch = list((Path(spec.origin).parent / "lib").glob("*.so*"))
    provided = {symbol for file in files + of_torch for _, symbol in _symbols(file, "--defined-only")}
    wanted = {symbol for file in files for kind, symbol in _symbols(file, "--undefined-only") if kind == "U"}
    process = ctypes.CDLL(None)
    symbols = {s for s in wanted - provided if "@" not in s and not hasattr(process, s)}
    sonames = {name for file in files for name in re.findall(r"NEEDED.*\[(.+)]", _run("readelf", "-d", str(file)))}
    # A library of the system has its version behind `.so`.
    libraries = {name for name in sonames if name.endswith(".so")} - {file.name for file in files + of_torch}
    text = (folder / "torch_npu/lib/libtorch_npu.so").read_bytes()
    mentions = {name.decode() for name in re.findall(rb"\0(acl[a-zA-Z0-9]+)(?=\0)", text)}
    return Wheel(_release(folder) or "?", frozenset(symbols), frozenset(libraries), frozenset(mentions) | symbols)


def check(wheel: Wheel) -> None:
    """Say what a wheel needs beyond what is emulated.

    Raises:
        Unsupported: names what is missing and where it would go.
    """
    cxx = sorted(symbol for symbol in wheel.symbols if symbol.startswith("_Z"))
    entries = {entry for name in SIGNATURES for entry in (name, f"{name}GetWorkspaceSize")}
    known = {name for name in _defined() if name.startswith("acl")}
    problems = {
        f"the C++ functions {', '.join(cxx[:5])} of CANN": cxx,
        f"another operator than {', '.join(sorted(entries - wheel.mentions))}": entries - wheel.mentions,
        f"another runtime: it no longer knows {', '.join(sorted(known - wheel.mentions))}": known - wheel.mentions,
        f"libraries without {_MAIN} among them": _MAIN not in wheel.libraries,
    }
    for problem, found in problems.items():
        if found:
            raise Unsupported(f"torch_npu {wheel.release} needs {problem}: extend tests/emulated_cann/build.py")


def operators_source(signatures: dict[str, tuple[Parameter, ...]]) -> str:
    """C of libopapi: `opapi.c` and two entries for each operator."""
    most = max(map(len, signatures.values()))
    entries = [_entries(name, parameters) for name, parameters in signatures.items()]
    return "\n".join([f"enum {{ MAX_ARGUMENTS = {most} }};", (HERE / "opapi.c").read_text(), *entries])


def _entries(name: str, parameters: tuple[Parameter, ...]) -> str:
    declared = ", ".join(f"{C_TYPES[p.kind]} {p.name}" for p in parameters)
    member = {"i": "i", "d": "d"}
    packed = ", ".join(f"{{.{member.get(p.kind, 'p')} = {p.name}}}" for p in parameters)
    return f"""int {name}GetWorkspaceSize({declared}, uint64_t *workspace_size, void **executor)
{{
    const Argument arguments[] = {{{packed}}};
    return prepare("{name}", arguments, {len(parameters)}, workspace_size, executor);
}}
int {name}(void *workspace, uint64_t workspace_size, void *executor, void *stream) {{ return run(executor); }}
"""


def _runtime_source(wheel: Wheel) -> str:
    missing = sorted(wheel.symbols - _defined())
    stubs = [f'long {symbol}(void) {{ return emulated_missing("{symbol}"); }}' for symbol in missing]
    return "\n".join([(HERE / "runtime.c").read_text(), *stubs])


def _defined() -> set[str]:
    return set(re.findall(r"^[a-z].*?\b((?:acl|rt|Msprof)\w+)\(", (HERE / "runtime.c").read_text(), re.MULTILINE))


def _compile(wheel: Wheel, folder: Path) -> None:
    _link(folder, _MAIN, _runtime_source(wheel))
    _link(folder, "libopapi.so", operators_source(SIGNATURES))
    for name in sorted(wheel.libraries - {_MAIN}):
        _link(folder, name, "", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", f"-L{folder}", "-lascendcl")


def _link(folder: Path, name: str, source: str, *options: str) -> None:
    file = folder / name.replace(".so", ".c")
    file.write_text(source)
    _run("gcc", "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", "-o", str(folder / name), str(file), *options)


def _symbols(file: Path, which: str) -> list[tuple[str, str]]:
    lines = (line.split() for line in _run("nm", "-D", which, str(file)).splitlines())
    return [(line[-2], line[-1]) for line in lines]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _release(folder: Path) -> str | None:
    found = importlib.metadata.distributions(name="torch_npu", path=[str(folder)])
    return next((distribution.version for distribution in found), None)


def _fingerprint(folder: Path) -> str:
    wheel = folder / "torch_npu/lib/libtorch_npu.so"
    parts = [_release(folder), importlib.metadata.version("torch"), platform.machine(), str(wheel.stat().st_size)]
    sources = [HERE / name for name in ("build.py", "signatures.py", "runtime.c", "opapi.c")]
    return hashlib.sha256(repr([parts, *(source.read_text() for source in sources)]).encode()).hexdigest()[:16]
