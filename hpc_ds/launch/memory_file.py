"""A file without a name, for a program that reads its hosts from a file: nothing of it is left anywhere."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def memory_file(text: str) -> Iterator[int]:
    """The descriptor of a file in memory, which a program that gets it opens as ``/dev/fd/N``."""
    descriptor = os.memfd_create("hosts")
    try:
        rest = memoryview(text.encode())
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        yield descriptor
    finally:
        os.close(descriptor)
