"""Writing files so that a reader never sees half of one."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hetsched.errors import OutputFileError


@contextmanager
def replacing(path: str | Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A file to write to that takes the place of `path` when the block ends without an error.

    If `durable`, the content is on the disk by then, so that not even a power failure leaves half
    of it; what can be made again need not wait for that.

    A link keeps pointing to its file, and what is no regular file, such as a pipe, is written to
    as it stands.

    Raises
    ------
    OutputFileError
        The folder does not take the file, or the disk is full; `path` is as it was.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        try:
            with path.open("wb") as file:
                yield file
        except OSError as error:
            raise OutputFileError(f"cannot write '{path}': {error.strerror or error}") from None
        return
    try:
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise OutputFileError(f"cannot write '{path}': {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, path)
    except OSError as error:
        raise OutputFileError(f"cannot write '{path}': {error.strerror or error}") from None
    finally:
        Path(aside).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`text` as the whole content of `path`, or an OutputFileError and no change."""
    with replacing(path) as file:
        file.write(text.encode())
