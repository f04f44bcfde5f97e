"""Turns of threads on a device: a lock that Python and the code of a crew both take."""

from ctypes import CDLL, addressof, byref, c_char, c_int, c_void_p, cast
from functools import cache

# At least the memory of a mutex and of its attributes, wherever there is a C library for Linux.
MUTEX_NBYTES = 128
# PTHREAD_MUTEX_RECURSIVE: who has it may take it again, as what Python ends meanwhile does.
RECURSIVE = 1

_library = CDLL(None)
# What `crew.c` calls with the address of a turn.
TAKE, LEAVE = (
    cast(function, c_void_p).value
    for function in (_library.pthread_mutex_lock, _library.pthread_mutex_unlock)
)


class Turn:
    """A lock of this process, entered by `with` or by `TAKE` and `LEAVE` at `address`."""

    def __init__(self) -> None:
        kind = (c_char * MUTEX_NBYTES)()
        self._mutex = (c_char * MUTEX_NBYTES)()
        _library.pthread_mutexattr_init(byref(kind))
        _library.pthread_mutexattr_settype(byref(kind), c_int(RECURSIVE))
        _library.pthread_mutex_init(byref(self._mutex), byref(kind))
        self.address = addressof(self._mutex)
        self._pointer = c_void_p(self.address)

    def __enter__(self) -> None:
        # Meanwhile other threads have Python's lock, so that who has the turn can go on.
        _library.pthread_mutex_lock(self._pointer)

    def __exit__(self, *_raised: object) -> None:
        _library.pthread_mutex_unlock(self._pointer)


@cache
def turn_of(number: int) -> Turn:
    """That of a device by its number in this process, the same each time."""
    return Turn()
