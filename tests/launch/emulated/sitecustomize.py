"""Every Python of a launch runs over the emulated CANN, ranks included; that of pybind11 may print nothing but its flags."""

import sys

if "pybind11" not in sys.orig_argv:
    from emulated_cann import device

    device.start()
