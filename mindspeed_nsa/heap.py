"""What the C library does with large blocks of memory that are freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Have this process keep large blocks that it frees, for its next tensors.

    glibc gives them back to the kernel, which clears every page anew at the next use: in a training step, whose tensors have
    the same sizes each time, about a tenth of what the forward kernels take. Another C library is left as it is.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_MMAP_MAX, 0)  # from the heap, not from mappings of their own
        adjust(_TRIM_THRESHOLD, -1)  # never, however much it is
