"""An inert `torchair`: torch_npu's graph compiler, over C++ of CANN. MindSpeed imports it; nothing is compiled here."""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

# One for all names: MindSpeed asks every module for every name that it patches.
_ANYTHING = MagicMock(name="torchair")


class _Inert(ModuleType):
    """Has every attribute, and every submodule."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _ANYTHING


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if _is_torchair(fullname) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Inert(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Take the place of the torchair inside torch_npu, which fails when it is used."""
    for name in filter(_is_torchair, list(sys.modules)):
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder())


def _is_torchair(name: str) -> bool:
    return name.partition(".")[0] == "torchair"
