"""From a series of checkpoints to reports, one tensor at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg  # noqa: F401 - which JAX would import in the middle of compiling an eigensolver for a CPU

from sedjax import core
from sedjax._leaves import COMPILERS, QUICK, Part, Sketcher, known
from sedjax._selection import Leaf, Reading, Selection, aligned
from sedjax._series import CheckpointError, Entry, error_at
from sedjax._store import Store, signature_of
from sedjax._types import Report

# NumPy's BLAS makes smaller products in one thread. Its threads spin while they wait for each other, and on a machine
# that does something else, too, a product took 200 times as long with two of them.
_ONE_THREAD = 2**18
_CACHED = 2**13  # differences made at a time, that stay in a cache
_EXACT_BYTES = 2**27  # differences held at a time in exact mode
_OPEN_FILES = 64
_SAVE_SECONDS = 0.5  # from one save of the state to the next, at least
_WORKING = 2  # leaves that compiled functions may be at work on while the next one is handed to them
_RING = 2**24  # bytes read ahead, which stay in a cache where tensors are read in parts
_ALIGNED = 64  # bytes, for arrays that JAX on a CPU works on where they are


# ---- reading ahead ----


class _Closed(Exception):
  """What was read is not wanted any more."""


class _Ring:
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


class _Ahead:
  """Items that a thread makes ahead of the work; each holds an array of the ring, which the caller gives back.

  Who waits for the next item has to have given back all others: the thread may wait for room.
  """

  def __init__(self, items: Generator[Any], ring: _Ring):
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


class _Progress:
  """A bar with rate and time left, on a terminal and where rich is installed."""

  def __init__(self, show: bool, total: int, done: int):
    self._bar = None
    if not show or not sys.stderr.isatty():
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

  def __enter__(self) -> _Progress:
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *_: Any) -> None:
    if self._bar is not None:
      self._bar.stop()

  def add(self, count: int, what: str) -> None:
    if self._bar is not None:
      self._bar.update(self._task, advance=count, description=what)


# ---- sketches ----


# XLA's CPU compiler takes seconds over the many small operations of a report, which take no time to run.
_QUICK = {**QUICK, "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _lowered_init(config: core.Config, tree: Any) -> Any:
  return jax.jit(lambda: core.init(config, tree)).lower()


@functools.lru_cache(maxsize=8)
def _compiled_push(config: core.Config, like: tuple[Any, ...]) -> tuple[concurrent.futures.Future[Any], Report]:
  """The function that takes in a row and reports, being compiled by a thread, and a report of zeros.

  Args:
    config: what to measure, with any groups.
    like: the state's tree, then shape and dtype of each of its arrays.
  """

  def push(state: core.TrackerState, row: jax.Array, steps: Any, lossy: Any) -> tuple[core.TrackerState, Report]:
    state = core.push_row(config, state, row, steps, lossy)
    return state, core.reports(state)

  structure, *leaves = like
  state = structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
  row = jax.ShapeDtypeStruct(state.rows.shape[1:], np.float32)
  # Traced here: two threads that trace and sketch at once would wait for Python's lock most of the time.
  lowered = jax.jit(push, donate_argnums=0).lower(state, row, np.int32(0), np.bool_(False))
  blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), lowered.out_info[1])
  return COMPILERS.submit(lambda: lowered.compile(known(**_QUICK))), blank


def _grouped(path: str) -> str:
  """Stands for any groups, which differ from call to call, in what is compiled."""
  return path


class _Tracker:
  """A tracker's state, and what takes it on, which are being compiled."""

  def __init__(self, selection: Selection):
    config = selection.config
    first = _lowered_init(config, selection.tree)
    self._first = COMPILERS.submit(lambda: first.compile(known(**_QUICK))())
    leaves, self._structure = jax.tree.flatten(first.out_info)
    config = dataclasses.replace(config, groups=None if config.groups is None else _grouped)
    like = (self._structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    self._push, self.blank = _compiled_push(config, like)
    self._state: Any = None

  @property
  def state(self) -> core.TrackerState:
    return self._first.result() if self._state is None else self._state

  def ready(self) -> bool:
    """Whether nothing has to wait for the compiler."""
    return self._push.done() and self._first.done()

  def push(self, row: np.ndarray, steps: int, lossy: bool) -> Report:
    self._state, report = self._push.result()(self.state, row, np.int32(steps), np.bool_(lossy))
    return report

  def save(self) -> dict[str, np.ndarray]:
    return {f"state{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))}

  def restore(self, saved: Mapping[str, np.ndarray]) -> None:
    leaves = [jax.numpy.asarray(saved[f"state{i}"]) for i in range(self._structure.num_leaves)]
    self._state = self._structure.unflatten(leaves)


class _Item(NamedTuple):
  """A tensor of a checkpoint, or a part of it."""

  i: int  # number of the checkpoint
  leaf: Leaf
  parts: list[Part]
  array: np.ndarray
  last: bool  # of the checkpoint

  def start(self, sketcher: Sketcher) -> list[Callable[[np.ndarray], None]]:
    """Begins to sketch it."""
    if len(self.parts) == 1:
      return [sketcher.start(self.leaf, self.parts[0], self.array)]
    rows = self.array.reshape(-1, self.leaf.shape[-1])
    return [sketcher.start(self.leaf, part, rows[part.start : part.start + part.rows]) for part in self.parts]


def _read_leaves(
  series: list[Entry], selection: Selection, sketcher: Sketcher, start: int, ring: _Ring
) -> Generator[_Item]:
  """All tracked tensors of the checkpoints from number `start` on."""
  for i in range(start, len(series)):
    reading = Reading(series[i], selection.rename)
    try:
      reading.check(selection, series[0])
      for leaf in selection.leaves:
        parts = sketcher.parts(leaf)
        for some in [[part] for part in parts] if reading.in_parts else [parts]:
          whole = len(some) == len(parts)
          columns = leaf.shape[-1] if leaf.shape else 1
          array = ring.next(leaf.info.size if whole else some[0].rows * columns, leaf.dtype)
          reading.read(leaf.path, 0 if whole else some[0].start * columns, array)
          yield _Item(i, leaf, some, array, leaf is selection.leaves[-1] and some[-1] is parts[-1])
    finally:
      reading.close()


class _Sketched(NamedTuple):
  """What a checkpoint came to."""

  i: int  # its number
  change: np.ndarray | None  # float32[labels, dim], since the base before it; None for the first
  steps: int  # since then
  lossy: bool  # rounding may exceed 1 % of the change
  base: np.ndarray  # float64[labels, dim], from which the next change is reckoned
  base_step: int


def _sketches(
  series: list[Entry],
  selection: Selection,
  sketcher: Sketcher,
  start: int,
  base: np.ndarray | None,
  base_step: int,
  progress: bool,
) -> Iterator[_Sketched]:
  """Sketches of the checkpoints from number `start` on."""
  rows = np.zeros((len(selection.labels), selection.config.sketch.dim))
  ring = _Ring()
  working: collections.deque[tuple[_Item, list[Callable[[np.ndarray], None]]]] = collections.deque()
  with (
    _Progress(progress, selection.bytes * len(series), selection.bytes * start) as bar,
    contextlib.closing(_Ahead(_read_leaves(series, selection, sketcher, start, ring), ring)) as items,
  ):
    for item in items:
      i = item.i
      working.append((item, item.start(sketcher)))
      while working and (item.last or len(working) > _WORKING or not items.ready()):
        done, finishes = working.popleft()
        row = rows[done.leaf.label]
        for finish in finishes:
          finish(row)
        ring.give_back()
        if not np.isfinite(row).all():
          raise error_at(series[i], done.leaf.path, "it holds NaN or infinite numbers")
        bar.add(done.array.nbytes, f"step {series[i].step}")
      if not item.last:
        continue
      change, steps, lossy = None, series[i].step - base_step, False
      if base is not None:
        change = (rows - base).astype(np.float32)
        lossy = _norm(rows) * 2.0**-50 > 0.01 * _norm(change)
      if base is None or np.any(change):
        base, base_step = rows, series[i].step
      yield _Sketched(i, change, steps, lossy, base, base_step)
      rows = np.zeros_like(rows)


def sketch_series(
  series: list[Entry], selection: Selection, store: Store, progress: bool
) -> Iterator[tuple[int, Report]]:
  """The reports so far, and then one after each checkpoint; the state is saved before it is handed out."""
  sketcher = Sketcher(selection)  # which begins to compile what comes first
  tracker = _Tracker(selection)
  done, base, base_step = 0, None, 0
  saved = store.load()
  if saved is not None:
    # Checkpoints that were read must still be there; later ones may have come.
    read = json.loads(saved["read"].tobytes())
    if read == [signature_of(entry) for entry in series[: len(read)]]:
      tracker.restore(saved)
      done, base, base_step = len(read), saved["base"], int(saved["base_step"])
      print(f"going on after step {series[done - 1].step}", file=sys.stderr)
    else:
      print(f"{store.folder}: the checkpoints that were read have changed; beginning anew", file=sys.stderr)
  if done:
    size = len(_to_bytes(tracker.blank))
    stored = store.reports((done - 1) * size)
    for i in range(1, done):
      yield i, _from_bytes(stored[(i - 1) * size : i * size], tracker.blank)
  signatures = [signature_of(entry) for entry in series[:done]]
  waiting: collections.deque[_Sketched] = collections.deque()

  saved_at = time.monotonic()

  def reported() -> Iterator[tuple[int, Report]]:
    """Takes in the rows that wait, and saves the state once."""
    nonlocal saved_at
    found: list[tuple[int, bytes]] = []
    newest = waiting[-1] if waiting else None
    while waiting:
      one = waiting.popleft()
      signatures.append(signature_of(series[one.i]))
      if one.change is not None:
        found.append((one.i, _to_bytes(tracker.push(one.change, one.steps, one.lossy))))
    if newest is not None:
      read = np.frombuffer(json.dumps(signatures).encode(), np.uint8)
      arrays = {**tracker.save(), "base": newest.base, "base_step": newest.base_step, "read": read}
      store.save(arrays, [report for _, report in found], found[0][0] if found else 1)
      saved_at = time.monotonic()
    for i, report in found:
      yield i, _from_bytes(report, tracker.blank)

  try:
    for one in _sketches(series, selection, sketcher, done, base, base_step, progress):
      waiting.append(one)
      # Until the compiler is done the next checkpoints are read; small ones are taken in several at a time.
      if tracker.ready() and time.monotonic() - saved_at >= _SAVE_SECONDS:
        yield from reported()
  except (CheckpointError, KeyboardInterrupt):
    yield from reported()
    raise
  yield from reported()


def _norm(x: np.ndarray) -> float:
  return float(np.sqrt(np.square(x, dtype=np.float64).sum()))


def _to_bytes(report: Report) -> bytes:
  return b"".join(np.asarray(field).tobytes() for field in report)


def _from_bytes(content: bytes, like: Report) -> Report:
  fields, at = [], 0
  for field in like:
    fields.append(np.frombuffer(content[at : at + field.nbytes], field.dtype).reshape(field.shape))
    at += field.nbytes
  return Report(*fields)  # pyright: ignore[reportArgumentType] - in NumPy


# ---- exact ----


class _OpenFiles:
  """Readers of the series, as many as may be open at a time."""

  def __init__(self, series: list[Entry], selection: Selection):
    self._series, self._selection = series, selection
    self._open: collections.OrderedDict[int, Reading] = collections.OrderedDict()

  def __getitem__(self, i: int) -> Reading:
    if i not in self._open:
      if len(self._open) >= _OPEN_FILES:
        self._open.popitem(last=False)[1].close()
      self._open[i] = Reading(self._series[i], self._selection.rename)
      self._open[i].check(self._selection, self._series[0])
    self._open.move_to_end(i)
    return self._open[i]

  def close(self) -> None:
    for reading in self._open.values():
      reading.close()


def _read_chunks(
  series: list[Entry], selection: Selection, start: int, size: int, ring: _Ring
) -> Generator[tuple[Leaf, int, int, np.ndarray]]:
  """Of each tracked tensor from number `start` on, chunk by chunk: that chunk of all checkpoints."""
  with contextlib.closing(_OpenFiles(series, selection)) as files:
    for leaf in selection.leaves[start:]:
      for first in range(0, leaf.info.size, size):
        for i in range(len(series)):
          array = ring.next(min(size, leaf.info.size - first), leaf.dtype)
          files[i].read(leaf.path, first, array)
          yield leaf, first, i, array


class _Band:
  """Inner products of consecutive differences that are close to each other, summed over chunks of numbers."""

  def __init__(self, rows: int, reach: int, size: int):
    self.reach = reach  # products of a row with itself and reach - 1 rows before it
    self.gram = np.zeros((rows, reach))
    self.fourth = np.zeros(rows)  # sums of fourth powers
    self._block = np.zeros((2 * reach, size))
    self._values = np.zeros((2, size))
    self._inner = max(32, _ONE_THREAD // (2 * reach * reach))
    self._squares = np.zeros(min(size, _CACHED))

  def add(self, i: int, array: np.ndarray, last: bool) -> bool:
    """Takes a chunk of checkpoint i; returns whether it is finite."""
    if array.dtype.kind == "c":
      array = array.view(f"f{array.itemsize // 2}")
    size, reach, row = array.size, self.reach, i - 1
    now, before = self._values[i % 2, :size], self._values[(i + 1) % 2, :size]
    at, block = reach + row % reach, self._block[:, :size]
    for first in range(0, size, _CACHED):
      part = slice(first, first + _CACHED)
      np.copyto(now[part], array[part], casting="unsafe")
      if i:
        difference = np.subtract(now[part], before[part], out=block[at, part])
        squares = np.square(difference, out=self._squares[: difference.size])
        self.fourth[row] += squares @ squares
    if (i == 0 or not np.isfinite(self.fourth[row])) and not np.all(np.isfinite(now)):
      return False
    if i == 0:
      return True
    if at == 2 * reach - 1 or last:
      first = reach if row < reach else 0  # the first block has none before it
      products = np.zeros((at + 1 - reach, at + 1 - first))
      for start in range(0, size, self._inner):
        part = slice(start, start + self._inner)
        products += block[reach : at + 1, part] @ block[first : at + 1, part].T
      for place in range(at + 1 - reach):
        near = products[place, : reach + place + 1 - first][::-1][:reach]
        self.gram[row - (at - reach) + place, : near.size] += near
      block[:reach] = block[reach:]
    return True


def exact_series(
  series: list[Entry], selection: Selection, store: Store, progress: bool
) -> Iterator[tuple[int, Report]]:
  """The reports, after all inner products are known; they are saved after each tensor."""
  config = selection.config
  # Identical checkpoints are left out of the window, so that more rows than fit into it may be needed.
  rows, reach = len(series) - 1, 2 * config.slots
  size = max(1, min(max(leaf.info.size for leaf in selection.leaves), _EXACT_BYTES // (8 * (2 * reach + 3))))
  gram, fourth = np.zeros((len(selection.labels), rows, reach)), np.zeros((len(selection.labels), rows))
  done, saved = 0, store.load()
  if saved is not None:
    done, gram, fourth = int(saved["done"]), saved["gram"], saved["fourth"]
    print(f"going on after {done} of {len(selection.leaves)} tensors", file=sys.stderr)
  read = sum(leaf.info.size * leaf.dtype.itemsize for leaf in selection.leaves[:done])
  ring = _Ring()
  with (
    _Progress(progress, selection.bytes * len(series), read * len(series)) as bar,
    contextlib.closing(_Ahead(_read_chunks(series, selection, done, size, ring), ring)) as items,
  ):
    width = 2 if any(leaf.dtype.kind == "c" for leaf in selection.leaves) else 1
    band = _Band(rows, reach, width * size)
    for leaf, first, i, array in items:
      last = i == rows
      if not band.add(i, array, last):
        raise error_at(series[i], leaf.path, "it holds NaN or infinite numbers")
      bar.add(array.nbytes, leaf.path)
      size_now = array.size
      ring.give_back()
      if last and first + size_now == leaf.info.size:
        gram[leaf.label] += band.gram
        fourth[leaf.label] += band.fourth
        band.gram[:], band.fourth[:] = 0, 0
        done += 1
        store.save({"done": done, "gram": gram, "fourth": fourth})
  yield from _reports_of_gram(series, selection, gram, fourth)


def _reports_of_gram(
  series: list[Entry], selection: Selection, gram: np.ndarray, fourth: np.ndarray
) -> Iterator[tuple[int, Report]]:
  config = selection.config
  if config.groups is not None:
    gram, fourth = (np.concatenate([x.sum(0, keepdims=True), x]) for x in (gram, fourth))
  empty = {path: jax.ShapeDtypeStruct((0,), np.float32) for path in selection.tree}
  state = _lowered_init(selection.config, empty).compile(known(**_QUICK))()
  # What is compiled does not depend on which groups there are.
  config = dataclasses.replace(config, groups=None if config.groups is None else _grouped)
  rows: list[int] = []  # those that are not zero, newest first
  base_step = series[0].step
  for row in range(gram.shape[1]):
    entry = series[row + 1]
    near = [row, *rows][: config.slots]
    if row - near[-1] >= gram.shape[2]:
      raise error_at(entry, None, "too many of those before it are identical to others; leave them out")
    products = np.zeros((gram.shape[0], config.slots))
    products[:, : len(near)] = gram[:, row, [row - other for other in near]]
    energy = gram[:, row, 0]
    dims = np.divide(3 * energy**2, fourth[:, row], out=np.zeros_like(energy), where=fourth[:, row] > 0)
    state = core.push_gram(config, state, products, dims, entry.step - base_step)
    if energy[0] > 0:
      rows, base_step = near, entry.step
    yield row + 1, core.reports(state)
