"""`python -m tests.emulated_cann [--variant NAME ...] -m MODULE ...` runs a module over the emulated CANN."""

import argparse
import os
import runpy
import sys

from . import build


def main() -> None:
    """Prepare the environment, start again in it, start the device, run the module."""
    parser = argparse.ArgumentParser(prog="tests.emulated_cann", description="run a module over the emulated CANN")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME", help="a way in which CANN may differ")
    parser.add_argument(
        "-m", dest="command", nargs=argparse.REMAINDER, required=True, metavar="MODULE", help="and its arguments"
    )
    options = parser.parse_args()
    if "EMULATED_CANN" not in os.environ:
        folder = build.torch_npu_path()
        reason = build.why_not(folder)
        if reason:
            sys.exit(f"cannot emulate CANN: {reason}")
        os.execve(sys.executable, [sys.executable, "-m", __package__, *sys.argv[1:]], os.environ | build.environment(folder))
    if options.variant:
        os.environ["EMULATED_CANN_VARIANTS"] = ",".join(options.variant)
    from . import device  # imports torch

    device.start()
    sys.argv = options.command
    runpy.run_module(options.command[0], run_name="__main__", alter_sys=True)


main()
