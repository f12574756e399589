"""Megatron-LM and MindSpeed on this machine: where they are and which options they have, found without importing them."""

import ast
import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

MEGATRON_LM_PATH, MINDSPEED_PATH = "MEGATRON_LM_PATH", "MINDSPEED_PATH"


def megatron_lm() -> Path:
    """The Megatron-LM that `MEGATRON_LM_PATH` names.

    Raises:
        ValueError: it is not set, or names something else.
    """
    path = os.environ.get(MEGATRON_LM_PATH)
    if not path:
        raise ValueError(f"{MEGATRON_LM_PATH}: not set; it names a clone of Megatron-LM, core_v0.12.1 for today's MindSpeed")
    if not (Path(path) / "megatron" / "training" / "arguments.py").is_file():
        raise ValueError(f"{MEGATRON_LM_PATH}: {path}: no Megatron-LM there (megatron/training/arguments.py)")
    return Path(path)


def mindspeed() -> Path:
    """The folder of the MindSpeed that `MINDSPEED_PATH` names, or that is installed.

    Raises:
        ValueError: there is none.
    """
    path = os.environ.get(MINDSPEED_PATH)
    if path:
        if not (Path(path) / "mindspeed" / "megatron_adaptor.py").is_file():
            raise ValueError(f"{MINDSPEED_PATH}: {path}: no MindSpeed there (mindspeed/megatron_adaptor.py)")
        return Path(path)
    found = importlib.util.find_spec("mindspeed")
    if found is None or found.origin is None:
        raise ValueError(f"MindSpeed is not installed, and {MINDSPEED_PATH} is not set; it names a clone of MindSpeed")
    return Path(found.origin).parents[1]


def megatron_version() -> tuple[int, int]:
    """Major and minor version of Megatron-core in `MEGATRON_LM_PATH`.

    Raises:
        ValueError: as `megatron_lm`, or the version is not where it should be.
    """
    source = megatron_lm() / "megatron" / "core" / "package_info.py"
    numbers = (
        re.findall(r"^(?:MAJOR|MINOR) = (\d+)$", source.read_text(encoding="utf-8"), re.MULTILINE) if source.is_file() else []
    )
    if len(numbers) != 2:
        raise ValueError(f"{source}: does not say the version of Megatron-core")
    return int(numbers[0]), int(numbers[1])


def check_options(names: Iterable[str]) -> None:
    """Check that Megatron-LM or MindSpeed has these options.

    Args:
        names: of the `megatron:` section, with underscores.

    Raises:
        ValueError: neither has one; one line that names it and what is near.
    """
    names = list(names)
    if not names:
        return
    known = {option.replace("-", "_").strip("_") for option in _options()}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"megatron.{name}: neither Megatron-LM nor MindSpeed here has that argument{hint}")


def _options() -> Iterator[str]:
    """Every option that the sources add to a parser: `--name`."""
    sources = [megatron_lm() / "megatron" / "training" / "arguments.py"]
    root = mindspeed() / "mindspeed"
    sources += [root / "arguments.py", *sorted((root / "features_manager").rglob("*.py"))]
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                yield from (
                    word.value
                    for word in node.args
                    if isinstance(word, ast.Constant) and isinstance(word.value, str) and word.value.startswith("--")
                )
