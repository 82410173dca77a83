"""From a series of checkpoints to reports, one tensor at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np

from sedjax import core
from sedjax._count import WIDE, Hashes, Piece, vector_signs
from sedjax._selection import Leaf, Reading, Selection, aligned
from sedjax._series import Entry, error_at
from sedjax._store import Store, signature_of
from sedjax._types import Report
from sedjax.sketch import Count, as_real

# NumPy's BLAS makes smaller products in one thread. Its threads spin while they wait for each other, and on a machine
# that does something else, too, a product took 200 times as long with two of them.
_ONE_THREAD = 2**18
_CACHED = 2**13  # differences made at a time, that stay in a cache
_EXACT_BYTES = 2**27  # differences held at a time in exact mode
_OPEN_FILES = 64


# ---- reading ahead ----


def _ahead(items: Generator[Any]) -> Generator[Any]:
  """The same items, each made by a thread while the one before it is worked on."""
  end = object()
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    try:
      future = pool.submit(next, items, end)
      while (item := future.result()) is not end:
        future = pool.submit(next, items, end)
        yield item
    finally:
      pool.shutdown()
      items.close()


class _Buffers:
  """Two buffers in turn: one is filled while the other is worked on."""

  def __init__(self, size: int):
    self._buffers = [aligned(size, np.dtype(np.uint8)) for _ in range(2)]

  def next(self, size: int, dtype: np.dtype) -> np.ndarray:
    self._buffers.reverse()
    return self._buffers[0][: size * dtype.itemsize].view(dtype)


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


_COMPILERS = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="sedjax-compiler")


@functools.lru_cache(maxsize=512)
def _compiled_row(sketch: Any, axes: Any, shape: tuple[int, ...], dtype: np.dtype) -> concurrent.futures.Future[Any]:
  """The function that sketches tensors of one shape, in float64 and by their hashes, being compiled by a thread.

  In float64 neither the sums of a sketch nor the differences of two lose what parameters in float32 hold.
  """

  def row(leaf: jax.Array, hashes: Hashes) -> jax.Array:
    leaf = as_real(leaf if axes is None else leaf.transpose(axes))
    return sketch.rows([Piece("", leaf, hashes=hashes)], [0], 1, WIDE)[0]

  def compiled() -> Any:
    with jax.enable_x64(True):
      turned = shape if axes is None else tuple(shape[axis] for axis in axes)
      hashes = sketch.hashes("", (2, *turned) if dtype.kind == "c" else turned)
      return jax.jit(row).lower(jax.ShapeDtypeStruct(shape, dtype), hashes).compile()

  return _COMPILERS.submit(compiled)


# XLA's CPU compiler takes seconds over the many small operations of a report, which take no time to run.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _quick() -> dict[str, Any] | None:
  return _QUICK if jax.default_backend() == "cpu" else None


@functools.lru_cache(maxsize=8)
def _compiled_push(config: core.Config, like: tuple[Any, ...]) -> concurrent.futures.Future[Any]:
  """The function that takes in a row and reports, being compiled by a thread.

  Args:
    config: what to measure, with any groups.
    like: the state's tree, then shape and dtype of each of its arrays.
  """
  structure, *leaves = like
  state = structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])

  def push(state: core.TrackerState, row: jax.Array, steps: Any, lossy: Any) -> tuple[core.TrackerState, Report]:
    state = core.push_row(config, state, row, steps, lossy)
    return state, core.reports(state)

  row = jax.ShapeDtypeStruct(state.rows.shape[1:], np.float32)
  lowered = jax.jit(push, donate_argnums=0).lower(state, row, np.int32(0), np.bool_(False))
  return _COMPILERS.submit(lowered.compile, _quick())


def _grouped(path: str) -> str:
  """Stands for any groups, which differ from call to call, in what is compiled."""
  return path


def _first_state(config: core.Config, tree: Any) -> core.TrackerState:
  return jax.jit(lambda: core.init(config, tree)).lower().compile(_quick())()


class _Tracker:
  """A tracker's state, and what takes it on."""

  def __init__(self, selection: Selection):
    config = selection.config
    self.state = _first_state(config, selection.tree)
    self.blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(core.reports, self.state))
    leaves, structure = jax.tree.flatten(self.state)
    config = dataclasses.replace(config, groups=None if config.groups is None else _grouped)
    self._push = _compiled_push(config, (structure, *((leaf.shape, leaf.dtype) for leaf in leaves)))

  def push(self, row: np.ndarray, steps: int, lossy: bool) -> Report:
    self.state, report = self._push.result()(self.state, row, np.int32(steps), np.bool_(lossy))
    return report


_SMALL = 2**18  # columns of tensors whose hashes are kept from checkpoint to checkpoint


@functools.lru_cache(maxsize=4096)
def _hashes(sketch: Any, path: str, shape: tuple[int, ...]) -> Hashes:
  return sketch.hashes(path, shape)


@functools.lru_cache(maxsize=4096)
def _vector_signs(sketch: Any, path: str, shape: tuple[int, ...]) -> np.ndarray:
  return vector_signs(sketch.hashes(path, shape))


def _is_vector(sketch: Any, leaf: Leaf) -> bool:
  """Whether NumPy sketches a leaf, in less time than it takes to call a compiled function."""
  return isinstance(sketch, Count) and leaf.dtype.kind == "f" and leaf.info.size == max((1, *leaf.shape[-1:]))


def _compile_all(selection: Selection) -> None:
  """Begins to compile what the leaves need."""
  sketch = selection.config.sketch
  for leaf in selection.leaves:
    if not _is_vector(sketch, leaf):
      _compiled_row(sketch, leaf.axes, leaf.info.shape, leaf.dtype)


def _add_leaf(sketch: Any, leaf: Leaf, array: np.ndarray, rows: np.ndarray) -> bool:
  """Adds a leaf's sketch to its label's row; returns whether it is finite."""
  row, offset = rows[leaf.label], sketch.offset(leaf.path)
  if _is_vector(sketch, leaf):
    small = leaf.info.size <= _SMALL
    signs = (_vector_signs if small else _vector_signs.__wrapped__)(sketch, leaf.path, leaf.shape)
    sums = np.multiply(signs, array, dtype=np.float64)
  else:
    shape = (2, *leaf.shape) if leaf.dtype.kind == "c" else leaf.shape
    hashes = (_hashes if shape[-1:] <= (_SMALL,) else _hashes.__wrapped__)(sketch, leaf.path, shape)
    call = _compiled_row(sketch, leaf.axes, leaf.info.shape, leaf.dtype).result()
    with jax.enable_x64(True):
      sums = np.asarray(call(jax.device_put(array.reshape(leaf.info.shape)), hashes))
  for at in range(0, sums.size, row.size):
    lap = sums[at : at + row.size]
    end = min(lap.size, row.size - offset)
    row[offset : offset + end] += lap[:end]
    row[: lap.size - end] += lap[end:]
  return bool(np.isfinite(sums).all())


def _read_leaves(series: list[Entry], selection: Selection, start: int) -> Generator[tuple[int, Leaf, np.ndarray]]:
  """All tracked tensors of the checkpoints from number `start` on."""
  buffers = _Buffers(max(leaf.info.size * leaf.dtype.itemsize for leaf in selection.leaves))
  for i in range(start, len(series)):
    reading = Reading(series[i], selection.rename)
    try:
      reading.check(selection, series[0])
      for leaf in selection.leaves:
        array = buffers.next(leaf.info.size, leaf.dtype)
        reading.read(leaf.path, 0, array)
        yield i, leaf, array
    finally:
      reading.close()


def sketch_series(
  series: list[Entry], selection: Selection, store: Store, progress: bool
) -> Iterator[tuple[int, Report]]:
  """The reports so far, and then one after each checkpoint; the state is saved before it is handed out."""
  config = selection.config
  _compile_all(selection)
  tracker = _Tracker(selection)
  leaves, structure = jax.tree.flatten(tracker.state)
  blank = tracker.blank
  done, base, base_step = 0, None, 0
  saved = store.load()
  if saved is not None:
    # Checkpoints that were read must still be there; later ones may have come.
    read = json.loads(saved["read"].tobytes())
    if read == [signature_of(entry) for entry in series[: len(read)]]:
      tracker.state = structure.unflatten([jax.numpy.asarray(saved[f"state{i}"]) for i in range(len(leaves))])
      done, base, base_step = len(read), saved["base"], int(saved["base_step"])
      print(f"going on after step {series[done - 1].step}", file=sys.stderr)
    else:
      print(f"{store.folder}: the checkpoints that were read have changed; beginning anew", file=sys.stderr)
  size = len(_to_bytes(blank))
  stored = store.reports(max(done - 1, 0) * size)
  for i in range(1, done):
    yield i, _from_bytes(stored[(i - 1) * size : i * size], blank)
  signatures = [signature_of(entry) for entry in series[:done]]
  rows = np.zeros((len(selection.labels), config.sketch.dim))
  with (
    _Progress(progress, selection.bytes * len(series), selection.bytes * done) as bar,
    contextlib.closing(_ahead(_read_leaves(series, selection, done))) as items,
  ):
    for i, leaf, array in items:
      if not _add_leaf(config.sketch, leaf, array, rows):
        raise error_at(series[i], leaf.path, "it holds NaN or infinite numbers")
      bar.add(array.nbytes, f"step {series[i].step}")
      if leaf is not selection.leaves[-1]:
        continue
      report = b""
      signatures.append(signature_of(series[i]))
      if base is None:
        base, base_step = rows, series[i].step
      else:
        row = (rows - base).astype(np.float32)
        lossy = _norm(rows) * 2.0**-50 > 0.01 * _norm(row)
        report = _to_bytes(tracker.push(row, series[i].step - base_step, bool(lossy)))
        if np.any(row):
          base, base_step = rows, series[i].step
      arrays = {f"state{n}": np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(tracker.state))}
      read = np.frombuffer(json.dumps(signatures).encode(), np.uint8)
      store.save({**arrays, "base": base, "base_step": base_step, "read": read}, report, i)
      rows = np.zeros_like(rows)
      if report:
        yield i, _from_bytes(report, blank)


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
  series: list[Entry], selection: Selection, start: int, size: int
) -> Generator[tuple[Leaf, int, int, np.ndarray]]:
  """Of each tracked tensor from number `start` on, chunk by chunk: that chunk of all checkpoints."""
  buffers = _Buffers(size * max(leaf.dtype.itemsize for leaf in selection.leaves))
  with contextlib.closing(_OpenFiles(series, selection)) as files:
    for leaf in selection.leaves[start:]:
      for first in range(0, leaf.info.size, size):
        for i in range(len(series)):
          array = buffers.next(min(size, leaf.info.size - first), leaf.dtype)
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
  with (
    _Progress(progress, selection.bytes * len(series), read * len(series)) as bar,
    contextlib.closing(_ahead(_read_chunks(series, selection, done, size))) as items,
  ):
    width = 2 if any(leaf.dtype.kind == "c" for leaf in selection.leaves) else 1
    band = _Band(rows, reach, width * size)
    for leaf, first, i, array in items:
      last = i == rows
      if not band.add(i, array, last):
        raise error_at(series[i], leaf.path, "it holds NaN or infinite numbers")
      bar.add(array.nbytes, leaf.path)
      if last and first + array.size == leaf.info.size:
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
  state = _first_state(selection.config, empty)
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
