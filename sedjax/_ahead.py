"""Reading ahead of the work, in memory that is used again, and how far it is."""

from __future__ import annotations

import collections
import concurrent.futures
import sys
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

from sedjax._selection import aligned


class Buffers:
  """Memory that is used again; threads share it."""

  def __init__(self):
    self._free: list[np.ndarray] = []

  def take(self, length: int) -> np.ndarray:
    """uint8[at least `length`], on a boundary that lets JAX on a CPU work on it where it is."""
    try:
      found = self._free.pop()
    except IndexError:
      found = aligned(0, np.dtype(np.uint8))
    return found if found.size >= length else aligned(length, np.dtype(np.uint8))

  def give_back(self, memory: np.ndarray) -> None:
    self._free.append(memory)


def in_order(work: Callable[[Any], Any], tasks: Iterable[Any], workers: int, ahead: int) -> Generator[Any]:
  """What `work` makes of each task, in their order; so many threads are at most `ahead` tasks ahead of the caller.

  An error, also one of the tasks themselves, is raised after what came before it.
  """
  remaining, error = iter(tasks), None
  waiting: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="sedjax reader") as pool:
    try:
      while True:
        try:
          while error is None and len(waiting) < ahead:
            waiting.append(pool.submit(work, next(remaining)))
        except Exception as raised:  # of which the last one is StopIteration
          error = raised
        if not waiting:
          break
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()
  if not isinstance(error, StopIteration) and error is not None:
    raise error


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
