"""Importing this module imports torch, also where a torch_npu is installed that does not load.

torch imports the device backends that are installed, and fails with them: a torch_npu without CANN would take the CPU away
too. Here torch comes first, alone, and each backend after it. Nothing is done where torch is imported already, where there is
no torch_npu, or where `TORCH_DEVICE_BACKEND_AUTOLOAD` turns the backends off.
"""

import importlib.util
import logging
import os
import sys
from importlib.metadata import entry_points

VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"

failures: dict[str, str] = {}
"""The backends that did not load, by the name of their entry point, and why."""


def _import_torch() -> None:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "0"
    import torch  # noqa: F401

    for backend in entry_points(group="torch.backends"):
        try:
            backend.load()()
        except Exception as error:  # whatever a backend raises, the CPU is still there
            failures[backend.name] = " ".join(str(error).split()) or type(error).__name__
            logging.getLogger(__name__).warning("%s does not load and is not used: %s", backend.name, failures[backend.name])
    if failures:
        return  # still turned off: in child processes `import torch` would fail
    if before is None:
        del os.environ[VARIABLE]
    else:
        os.environ[VARIABLE] = before


_enabled = os.environ.get(VARIABLE, "1") == "1"  # as torch reads it
if _enabled and "torch" not in sys.modules and importlib.util.find_spec("torch_npu"):
    _import_torch()
