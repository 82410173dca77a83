"""Files and folders that one process at a time may write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

try:
  import fcntl
except ImportError:  # not on Windows, where two writers are not noticed
  fcntl = None


def locked(path: Path, opened: Callable[[], int]) -> int:
  """The descriptor that `opened` gives of the path, locked until it is closed.

  Raises:
    BlockingIOError: another one has it.
  """
  while True:
    fd = opened()
    try:
      if fcntl:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if os.path.samestat(os.stat(path), os.fstat(fd)):
        return fd
    except FileNotFoundError:
      pass  # as below
    except BaseException:
      os.close(fd)
      raise
    os.close(fd)  # its writer finished, and removed it, between the two calls
