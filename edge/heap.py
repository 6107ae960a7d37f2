"""The resident process's memory allocator."""

import contextlib
import ctypes

# Parameters of mallopt(3), and bytes.
_M_TRIM_THRESHOLD, _M_ARENA_MAX = -1, -8
_TRIM = 128 * 1024


def share_one_heap() -> None:
    """Let all threads use one heap of glibc's; nothing on another C library.

    With a heap for each thread, as it comes, what a thread once needed is kept for that thread, and the resident
    memory of a process that runs for years creeps up. What is free at the heap's end goes back at glibc's own first
    threshold, which would grow with the largest block that was ever freed. To be called before other threads are
    started.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM)


def give_back() -> None:
    """Return free pages to the operating system (malloc_trim(3)): glibc by itself does so at the heap's end alone."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
