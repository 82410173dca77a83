"""From a series of checkpoints to reports by sketches, one tensor or part of a tensor at a time."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sedjax import core
from sedjax._ahead import Ahead, Progress, Ring
from sedjax._compile import COMPILERS, REPORT_OPTIONS, known, lowered_init, with_any_groups
from sedjax._leaves import Part, Sketcher
from sedjax._selection import Leaf, Reading, Selection
from sedjax._series import LARGEST_NORM, CheckpointError, Entry, error_at, too_large
from sedjax._store import Store, signature_of
from sedjax._types import Report

_SAVE_SECONDS = 0.5  # from one save of the state to the next, at least
_WORKING = 2  # tensors or parts that compiled functions may be at work on while the next one is handed to them


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
  return COMPILERS.submit(lambda: lowered.compile(known(**REPORT_OPTIONS))), blank


class _Tracker:
  """A tracker's state, and what takes it on, which are being compiled."""

  def __init__(self, selection: Selection):
    config = selection.config
    first = lowered_init(config, selection.tree)
    self._first = COMPILERS.submit(lambda: first.compile(known(**REPORT_OPTIONS))())
    leaves, self._structure = jax.tree.flatten(first.out_info)
    like = (self._structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
    self._push, self.blank = _compiled_push(with_any_groups(config), like)
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
  series: list[Entry], selection: Selection, sketcher: Sketcher, start: int, ring: Ring
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
  ring = Ring()
  working: collections.deque[tuple[_Item, list[Callable[[np.ndarray], None]]]] = collections.deque()
  with (
    Progress(progress, selection.bytes * len(series), selection.bytes * start) as bar,
    contextlib.closing(Ahead(_read_leaves(series, selection, sketcher, start, ring), ring)) as items,
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
        greatest = np.abs(row).max()  # NaN where there is one
        if not np.isfinite(greatest):
          raise error_at(series[i], done.leaf.path, "it holds NaN or infinite numbers")
        if large is None and greatest > LARGEST_NORM / row.size:
          large = done.leaf.path
        bar.add(done.array.nbytes, f"step {series[i].step}")
      if not item.last:
        continue
      change, steps, lossy = None, series[i].step - base_step, False
      if base is not None:
        norm = _norm(rows - base)
        if not norm < LARGEST_NORM:
          raise too_large(series[i], large or large_before, f"step {base_step}")
        change = (rows - base).astype(np.float32)
        lossy = _norm(rows) * 2.0**-50 > 0.01 * norm
      if base is None or np.any(change):
        base, base_step = rows, series[i].step
      yield _Sketched(i, change, steps, lossy, base, base_step, signature_of(series[i]))
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
