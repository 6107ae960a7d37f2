"""The resident process's memory allocator."""

import contextlib
import ctypes

_M_ARENA_MAX = -8  # mallopt(3)


def share_one_heap() -> None:
    """Let all threads use one heap of glibc's; nothing on another C library.

    With a heap for each thread, as it comes, what a thread once needed is kept for that thread, and the resident
    memory of a process that runs for years creeps up. To be called before other threads are started.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return free pages to the operating system (malloc_trim(3)): glibc by itself does so at the heap's end alone."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
