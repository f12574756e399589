"""Every Python of a launch runs over the emulated CANN, ranks included; pybind11's is asked for flags and may print nothing else."""

import sys

if "pybind11" not in sys.orig_argv:
    from emulated_cann import device

    device.start()
