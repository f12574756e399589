"""How the C library keeps the memory of tensors."""

import ctypes
import mmap
import os
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt
_HUGE_PAGE = 2 << 20  # bytes; aarch64 with pages of 64 KiB has 512 MiB, too much to clear for a small block
_HUGE_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def prepare_heap() -> None:
    """Have this process keep large blocks that it frees for its next tensors, in huge pages where the kernel has them.

    glibc gives freed blocks back to the kernel, which clears every page anew at the next use: in a training step, whose tensors
    have the same sizes each time, about a tenth of what the forward kernels take. And in small pages a stream of reads begins
    anew every 4 KiB: another tenth. What the process has allocated before stays where it is, so call this early. Another C
    library is left as it is.
    """
    libc = ctypes.CDLL(None)
    adjust = getattr(libc, "mallopt", None)
    if adjust is None:
        return
    adjust(_MMAP_MAX, 0)  # from the heap, not from mappings of their own
    adjust(_TRIM_THRESHOLD, -1)  # never, however much it is
    # Where the kernel counts addresses as memory (2), what one rank reserves the others lack.
    if _number(_HUGE_PAGE_SIZE) == _HUGE_PAGE and _number(_OVERCOMMIT) != 2:
        _grow_in_huge_pages(libc)


def _number(setting: Path) -> int | None:
    return int(setting.read_text()) if setting.exists() else None


def _grow_in_huge_pages(libc: ctypes.CDLL) -> None:
    """Reserve half of the machine's memory for the heap, as addresses alone, and ask for huge pages when it is touched."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    start = libc.malloc(size)
    if start is None:  # a limit on addresses: the heap grows as it does
        return
    whole = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(whole, start + size - whole, mmap.MADV_HUGEPAGE)  # refused where huge pages are off: nothing is lost
    libc.free(start)
