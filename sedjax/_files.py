"""What files need beyond Python's own: locks, replacement as a whole, reading from a place. POSIX alone has them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

UNFINISHED = ".sedjax-unfinished"  # behind a file's name; a user's own file has none like it


def locked(path: Path, opened: Callable[[], int]) -> int:
  """The descriptor that `opened` gives of the path, locked until it is closed.

  Raises:
    BlockingIOError: another one has it.
  """
  while True:
    fd = opened()
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.path.samestat(os.stat(path), os.fstat(fd)):
        return fd
    except FileNotFoundError:
      pass  # as below
    except BaseException:
      os.close(fd)
      raise
    os.close(fd)  # its writer finished, and removed it, between the two calls


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Gives a path beside this one, whose file then takes its place.

  One of both is there whole at any time, also after a crash of the machine. Where an error is raised meanwhile, the old
  one stays.
  """
  new = path.with_name(path.name + UNFINISHED)
  try:
    yield new
    with open(new, "rb") as file:
      os.fsync(file.fileno())
    os.replace(new, path)
  finally:
    with contextlib.suppress(OSError):  # as where it is in no folder
      new.unlink()


def read_into(fd: int, offset: int, out: np.ndarray) -> None:
  """Fills uint8[n] with the bytes from an offset on.

  Raises:
    OSError: the file ends before.
  """
  view, done = memoryview(out), 0  # pyright: ignore[reportArgumentType]
  while done < len(view):
    count = os.preadv(fd, [view[done:]], offset + done)
    if not count:
      raise OSError("the file ends too early")
    done += count


def read_bytes(fd: int, offset: int, length: int) -> bytes:
  """So many bytes at an offset, likewise."""
  out = np.empty(length, np.uint8)
  read_into(fd, offset, out)
  return out.tobytes()
