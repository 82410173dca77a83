"""What reads a checkpoint file, whatever its format: any part of one tensor at a time.

A reader knows the names, shapes and dtypes of a file's tensors when it is opened, and copies their numbers straight
into a buffer that the caller owns. Files are not mapped into memory, or not for long, so that a process holds what it
asked for and no more. Whatever is wrong with a file becomes a `ReadError`, which says so in one clause.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class ReadError(Exception):
  """What is wrong with a file, in a clause without a full stop."""


class TensorInfo(NamedTuple):
  """What is known of a tensor before it is read."""

  shape: tuple[int, ...]
  dtype: np.dtype | None  # None where it cannot be read
  why_not: str = ""  # why it does not belong to the model, or cannot be read
  storage: Hashable = None  # tensors that share one are one; None where a format does not tell

  @property
  def size(self) -> int:
    return math.prod(self.shape)


class Reader:
  """A checkpoint that is open."""

  tensors: dict[str, TensorInfo]  # by name, as in the file
  # Whether parts of tensors are read at no more cost than the whole, and by several threads at a time.
  in_parts = False

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    """Fills `out` [n] with the numbers start … start + n - 1 of a tensor in row-major order.

    Raises:
      ReadError: the file is damaged or ends too early.
    """
    raise NotImplementedError

  def close(self) -> None:
    """Closes the files."""


# What the system says of its disks, rights and limits, and not because a file is damaged.
_NOT_THE_FILES = {
  errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV
}  # fmt: skip


@contextlib.contextmanager
def told_as(what: str) -> Iterator[None]:
  """Turns whatever a library raises over a damaged file into a ReadError."""
  try:
    yield
  except ReadError:
    raise
  except FileNotFoundError as error:
    raise ReadError(f"{error.filename or 'the file'} does not exist") from error
  except OSError as error:
    if error.errno in _NOT_THE_FILES:
      raise ReadError(f"it cannot be read: {error.strerror}") from error
    raise _damaged(what, error) from error
  except ImportError as error:
    extra = "torch" if error.name == "torch" else "checkpoints"
    raise ReadError(
      f"reading {what} needs the package {error.name!r}, which is not installed; pip install 'sedjax[{extra}]'"
    ) from error
  except MemoryError as error:
    raise ReadError(f"it asks for more memory than there is, and is no valid {what}") from error
  except Exception as error:
    raise _damaged(what, error) from error


def _damaged(what: str, error: Exception) -> ReadError:
  lines = str(error).strip().splitlines()
  return ReadError(f"it is damaged or no {what} ({type(error).__name__}: {lines[0][:200] if lines else 'no message'})")


def fill(file: Any, out: np.ndarray, at: int | None = None) -> None:
  """Fills an array from the place where a file is, or from an offset, as several threads may at a time."""
  view: Any = memoryview(out.view(np.uint8))  # pyright: ignore[reportArgumentType]
  done = 0
  while done < len(view):
    rest = view[done:]
    count = file.readinto(rest) if at is None else os.preadv(file.fileno(), [rest], at + done)
    if not count:
      raise ReadError("the file ends in the middle of the tensor")
    done += count


def is_size(value: Any) -> bool:
  """Whether a number in a header can be a size."""
  return type(value) is int and 0 <= value < 2**63


def new_name(name: str, known: Mapping[str, Any]) -> str:
  """The name, which no other tensor may have."""
  if name in known:
    raise ReadError(f"two tensors are named {name!r}, by names within names; rename one")
  return name
