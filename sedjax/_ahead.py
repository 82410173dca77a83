"""Reading ahead of the work, in memory that is used again, and how far it is."""

from __future__ import annotations

import collections
import queue
import sys
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from sedjax._selection import aligned

_RING = 2**24  # bytes read ahead, which stay in a cache where tensors are read in parts
_ALIGNED = 64  # bytes, for arrays that JAX on a CPU works on where they are


class _Closed(Exception):
  """What was read is not wanted any more."""


class Ring:
  """Memory for at least two of the largest array, in which reading runs ahead of the work."""

  def __init__(self):
    self._memory = aligned(_RING, np.dtype(np.uint8))
    self._held: collections.deque[tuple[int, int]] = collections.deque()  # start and end, oldest first
    self._changed = threading.Condition()
    self._closed = False

  def next(self, size: int, dtype: np.dtype) -> np.ndarray:
    """An array of `size` numbers, once there is room for it."""
    length = max(1, -(-size * dtype.itemsize // _ALIGNED)) * _ALIGNED
    with self._changed:
      while (start := self._place(length)) is None and not self._closed:
        self._changed.wait()
      if self._closed or start is None:
        raise _Closed
      self._held.append((start, start + length))
      return self._memory[start : start + size * dtype.itemsize].view(dtype)

  def _place(self, length: int) -> int | None:
    if not self._held:
      if 2 * length > self._memory.size:
        self._memory = aligned(2 * length, np.dtype(np.uint8))
      return 0
    if 2 * length > self._memory.size:
      return None
    first, last = self._held[0][0], self._held[-1][1]
    if first < last:
      if last + length <= self._memory.size:
        return last
      last = 0
    return last if last + length <= first else None

  def give_back(self) -> None:
    """The oldest array's place may be used again."""
    with self._changed:
      self._held.popleft()
      self._changed.notify()

  def close(self) -> None:
    """Ends whoever waits for room."""
    with self._changed:
      self._closed = True
      self._changed.notify()


class Ahead:
  """Items that a thread makes ahead of the work; each holds an array of the ring, which the caller gives back.

  Who waits for the next item has to have given back all others: the thread may wait for room.
  """

  def __init__(self, items: Generator[Any], ring: Ring):
    self._items, self._ring = items, ring
    self._made: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._make, name="sedjax reader", daemon=True)
    self._thread.start()

  def _make(self) -> None:
    try:
      for item in self._items:
        self._made.put((True, item))
      self._made.put((False, None))
    except BaseException as error:
      self._made.put((False, error))

  def ready(self) -> bool:
    """Whether there is an item, or an end, to be had without waiting."""
    return not self._made.empty()

  def __iter__(self) -> Iterator[Any]:
    while True:
      more, item = self._made.get()
      if more:
        yield item
      elif item is None:
        return
      else:
        raise item

  def close(self) -> None:
    """Ends the thread."""
    self._ring.close()
    self._thread.join()
    self._items.close()


class Progress:
  """A bar with rate and time left, on a terminal and where rich is installed."""

  def __init__(self, show: bool, total: int, done: int):
    self._bar = None
    if not show or sys.stderr is None or not sys.stderr.isatty():
      return
    try:
      from rich import console, progress
    except ImportError:
      return
    columns = (
      progress.TextColumn("{task.description}"),
      progress.BarColumn(),
      progress.DownloadColumn(),
      progress.TransferSpeedColumn(),
      progress.TimeRemainingColumn(),
    )
    self._bar = progress.Progress(*columns, console=console.Console(stderr=True), transient=True)
    self._task = self._bar.add_task("reading", total=total, completed=done)

  def __enter__(self) -> Progress:
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._bar is not None:
      self._bar.stop()

  def add(self, count: int, what: str) -> None:
    if self._bar is not None:
      self._bar.update(self._task, advance=count, description=what)
