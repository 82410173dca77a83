"""From a series of checkpoints to reports by sketches, one tensor or part of a tensor at a time."""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sedjax import core
from sedjax._ahead import Buffers, Progress, in_order
from sedjax._compile import REPORT_OPTIONS, as_usual, compiling, known, lowered_init, with_any_groups
from sedjax._leaves import Part, Sketcher
from sedjax._push import push_row
from sedjax._rows import most_dims
from sedjax._selection import Leaf, Reading, Selection
from sedjax._series import LARGEST_NORM, CheckpointError, Entry, error_at, steps_since, too_large
from sedjax._store import Store, check_unchanged, signature_of
from sedjax._types import Report

_SAVE_SECONDS = 0.5  # from one save of the state to the next, at least
# Threads that read and sketch: what one has read is in its core's cache. Two are faster than any disk.
_WORKERS = 2
# Bytes of a task, at least, and rows of the sketch as long: each task has one, and smaller tensors share a task.
_TASK_BYTES, _TASK_ROWS = 3 * 2**21, 16


@functools.lru_cache(maxsize=8)
def _compiled_push(config: core.Config, like: tuple[Any, ...]) -> tuple[Any, Report]:
  """The function that takes in a row and reports, compiled, and a report of zeros.

  Args:
    config: what to measure, with any groups.
    like: the state's tree, then shape and dtype of each of its arrays.
  """

  def push(
    state: core.TrackerState, row: jax.Array, most: Any, steps: Any, lossy: Any
  ) -> tuple[core.TrackerState, Report]:
    state = push_row(config, state, row, most, steps, lossy)
    return state, core.reports(state)

  structure, *leaves = like
  state = structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
  row = jax.ShapeDtypeStruct(state.rows.shape[1:], np.float32)
  most = jax.ShapeDtypeStruct(state.facts.shape[:1], np.float32)
  lowered = jax.jit(push, donate_argnums=0).lower(state, row, most, np.int32(0), np.bool_(False))
  blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), lowered.out_info[1])
  return lowered.compile(known(**REPORT_OPTIONS)), blank


class _Programs(NamedTuple):
  """What a tracker's state is taken on by."""

  structure: Any  # of the state
  first: core.TrackerState
  push: Any
  blank: Report  # of zeros

  @classmethod
  def made(cls, selection: Selection) -> _Programs:
    config = selection.config
    lowered = lowered_init(config, selection.tree)
    leaves, structure = jax.tree.flatten(lowered.out_info)
    first = lowered.compile(known(**REPORT_OPTIONS))()
    like = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    return cls(structure, first, *_compiled_push(with_any_groups(config), like))


class _Tracker:
  """A tracker's state, and what takes it on, which a thread compiles."""

  def __init__(self, selection: Selection):
    self._most = most_dims(selection.sizes).astype(np.float32)
    self._made = compiling(_Programs.made, selection)
    self._state: Any = None

  @property
  def state(self) -> core.TrackerState:
    return self._made.result().first if self._state is None else self._state

  @property
  def blank(self) -> Report:
    return self._made.result().blank

  def ready(self) -> bool:
    """Whether nothing has to wait for the compiler."""
    return self._made.done()

  def push(self, row: np.ndarray, steps: int, lossy: bool) -> Report:
    self._state, report = self._made.result().push(self.state, row, self._most, np.int32(steps), np.bool_(lossy))
    return report

  def save(self) -> dict[str, np.ndarray]:
    return {f"state{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self.state))}

  def restore(self, saved: Mapping[str, np.ndarray]) -> None:
    structure = self._made.result().structure
    self._state = structure.unflatten([jax.numpy.asarray(saved[f"state{i}"]) for i in range(structure.num_leaves)])


class _Piece(NamedTuple):
  """A tensor, or a part of it, that is read at once."""

  leaf: Leaf
  parts: list[Part]
  whole: bool

  @property
  def start(self) -> int:
    """Its first number in the tensor."""
    return 0 if self.whole else self.parts[0].start * self.leaf.columns

  @property
  def bytes(self) -> int:
    size = self.leaf.info.size if self.whole else self.parts[0].rows * self.leaf.columns
    return size * self.leaf.dtype.itemsize

  def add(self, sketcher: Sketcher, array: np.ndarray, row: np.ndarray) -> None:
    """Adds the sketch of what was read to a row."""
    if len(self.parts) == 1:
      sketcher.add(self.leaf, self.parts[0], array, row)
    else:
      rows = array.reshape(-1, self.leaf.columns)
      for part in self.parts:
        sketcher.add(self.leaf, part, rows[part.start : part.start + part.rows], row)


class _Task(NamedTuple):
  """What one thread reads and sketches at a time: some pieces of a checkpoint."""

  i: int  # number of the checkpoint
  reading: Reading
  signature: list[Any]  # of the checkpoint, before it was opened
  pieces: list[_Piece]
  bytes: int
  last: bool  # of the checkpoint


def _tasks(
  series: list[Entry], selection: Selection, sketcher: Sketcher, start: int, opened: collections.deque[Reading]
) -> Iterator[_Task]:
  """All tracked tensors of the checkpoints from number `start` on, which are opened; the caller closes them."""
  enough = max(_TASK_BYTES, _TASK_ROWS * 8 * selection.config.sketch.dim)
  for i in range(start, len(series)):
    signature = signature_of(series[i])
    reading = Reading(series[i], selection.rename)
    opened.append(reading)
    reading.check(selection, series[0])
    task = _Task(i, reading, signature, [], 0, False)
    for leaf in selection.leaves:
      parts = sketcher.parts(leaf)
      for some in [[part] for part in parts] if reading.in_parts else [parts]:
        piece = _Piece(leaf, some, len(some) == len(parts))
        task.pieces.append(piece)
        task = task._replace(bytes=task.bytes + piece.bytes)
        last = leaf is selection.leaves[-1] and some[-1] is parts[-1]
        if last or task.bytes >= enough:
          yield task._replace(last=last)
          task = task._replace(pieces=[], bytes=0)


class _Rows(NamedTuple):
  """What a task adds to a checkpoint's sketch."""

  task: _Task
  rows: dict[int, np.ndarray]  # float64[dim], by label
  large: str | None  # the first tensor with too large numbers


def _sketch(task: _Task, sketcher: Sketcher, dim: int, buffers: Buffers, spare: Buffers, entry: Entry) -> _Rows:
  """Reads and sketches; the rows are of the spare ones, to which they have to be given back.

  Raises:
    CheckpointError: a tensor cannot be read, or is not finite.
  """
  rows: dict[int, np.ndarray] = {}
  for piece in task.pieces:
    leaf = piece.leaf
    if leaf.label not in rows:
      rows[leaf.label] = spare.take(8 * dim).view(np.float64)
      rows[leaf.label].fill(0)
    memory = buffers.take(piece.bytes)
    try:
      array = memory[: piece.bytes].view(leaf.dtype)
      task.reading.read(leaf.path, piece.start, array)
      piece.add(sketcher, array, rows[leaf.label])
    finally:
      buffers.give_back(memory)
  # NaN where there is one. Without absolute values, since an array of a row's size is mapped and unmapped each time.
  greatest = np.max([[row.max(), -row.min()] for row in rows.values()])
  if greatest <= LARGEST_NORM / dim:
    return _Rows(task, rows, None)
  if len(task.pieces) > 1:  # one by one, to know which it was
    each = [_sketch(task._replace(pieces=[piece]), sketcher, dim, buffers, Buffers(), entry) for piece in task.pieces]
    return _Rows(task, rows, next((one.large for one in each if one.large is not None), None))
  name = task.reading.names[task.pieces[0].leaf.path]
  if not np.isfinite(greatest):
    raise error_at(entry, name, "it holds NaN or infinite numbers")
  return _Rows(task, rows, name)


class _Sketched(NamedTuple):
  """What a checkpoint came to."""

  i: int  # its number
  change: np.ndarray | None  # float32[labels, dim], since the base before it; None for the first
  steps: int  # since then
  lossy: bool  # rounding may exceed 1 % of the change
  base: np.ndarray  # float64[labels, dim], from which the next change is reckoned
  base_step: int
  signature: list[Any]  # see `signature_of`


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
  large, large_before = None, None  # the first tensor with too large numbers, in this checkpoint and the one before
  buffers, spare, opened = Buffers(), Buffers(), collections.deque[Reading]()

  @as_usual
  def sketched(task: _Task) -> _Rows:
    return _sketch(task, sketcher, rows.shape[1], buffers, spare, series[task.i])

  tasks = _tasks(series, selection, sketcher, start, opened)
  with contextlib.ExitStack() as stack:
    stack.callback(lambda: [reading.close() for reading in opened])
    bar = stack.enter_context(Progress(progress, selection.bytes * len(series), selection.bytes * start))
    for task, added, found in stack.enter_context(
      contextlib.closing(in_order(sketched, tasks, _WORKERS, 2 * _WORKERS))
    ):
      i = task.i
      for label, row in added.items():
        rows[label] += row
        spare.give_back(row.view(np.uint8))
      large = large or found
      bar.add(task.bytes, f"step {series[i].step}")
      if not task.last:
        continue
      opened.popleft().close()
      check_unchanged(series[i], task.signature)
      change, steps, lossy = None, 0 if base is None else steps_since(series[i], base_step), False
      if base is not None:
        norm = _norm(rows - base)
        if not norm < LARGEST_NORM:
          raise too_large(series[i], large or large_before, f"step {base_step}")
        change = (rows - base).astype(np.float32)
        lossy = _norm(rows) * 2.0**-50 > 0.01 * norm
      if base is None or np.any(change):
        base, base_step = rows, series[i].step
      yield _Sketched(i, change, steps, lossy, base, base_step, task.signature)
      rows, large, large_before = np.zeros_like(rows), None, large


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
      signatures.append(one.signature)
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
  with np.errstate(over="ignore"):
    return float(np.sqrt(np.square(x, dtype=np.float64).sum()))


def _to_bytes(report: Report) -> bytes:
  return b"".join(np.asarray(field).tobytes() for field in report)


def _from_bytes(content: bytes, like: Report) -> Report:
  fields, at = [], 0
  for field in like:
    fields.append(np.frombuffer(content[at : at + field.nbytes], field.dtype).reshape(field.shape))
    at += field.nbytes
  return Report(*fields)  # pyright: ignore[reportArgumentType] - in NumPy
