"""Exact reports of a series of checkpoints: inner products of their differences, summed chunk by chunk."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator

import jax
import numpy as np

from sedjax import core
from sedjax._ahead import Buffers, Progress, in_order
from sedjax._compile import REPORT_OPTIONS, known, lowered_init, with_any_groups
from sedjax._push import push_gram
from sedjax._rows import exact_dim, most_dims
from sedjax._selection import Leaf, Reading, Selection
from sedjax._series import LARGEST_NORM, Entry, error_at, steps_since, too_large
from sedjax._store import Store, check_unchanged, signature_of
from sedjax._types import Report

# NumPy's BLAS makes smaller products in one thread. Its threads spin while they wait for each other, and on a machine
# that does something else, too, a product took 200 times as long with two of them.
_ONE_THREAD = 2**18
_CACHED = 2**13  # differences made at a time, that stay in a cache
_EXACT_BYTES = 2**27  # differences held at a time
_OPEN_FILES = 64


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


def _chunks(count: int, selection: Selection, start: int, size: int) -> Iterator[tuple[Leaf, int, int, int]]:
  """Of each tracked tensor from number `start` on, chunk by chunk: where it is, its length, and each checkpoint."""
  for leaf in selection.leaves[start:]:
    for first in range(0, leaf.info.size, size):
      for i in range(count):
        yield leaf, first, min(size, leaf.info.size - first), i


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
  large = np.full(rows, -1)  # the tensor with which a row became too long
  signatures = [signature_of(entry) for entry in series]
  done, saved = 0, store.load()
  if saved is not None:
    done, gram, fourth, large = int(saved["done"]), saved["gram"], saved["fourth"], saved["large"]
    print(f"going on after {done} of {len(selection.leaves)} tensors", file=sys.stderr)
  read = len(series) * sum(leaf.info.size * leaf.dtype.itemsize for leaf in selection.leaves[:done])
  width = 2 if any(leaf.dtype.kind == "c" for leaf in selection.leaves) else 1
  band, buffers = _Band(rows, reach, width * size), Buffers()
  chunks = _chunks(len(series), selection, done, size)
  with contextlib.ExitStack() as stack:
    files = stack.enter_context(contextlib.closing(_OpenFiles(series, selection)))

    def read_chunk(chunk: tuple[Leaf, int, int, int]) -> tuple[tuple[Leaf, int, int, int], np.ndarray, str]:
      leaf, first, count, i = chunk
      memory, reading = buffers.take(count * leaf.dtype.itemsize), files[i]
      reading.read(leaf.path, first, memory[: count * leaf.dtype.itemsize].view(leaf.dtype))
      return chunk, memory, reading.names[leaf.path]

    bar = stack.enter_context(Progress(progress, selection.bytes * len(series), read))
    read_ahead = stack.enter_context(contextlib.closing(in_order(read_chunk, chunks, 1, 2)))
    for (leaf, first, count, i), memory, name in read_ahead:
      last, array = i == rows, memory[: count * leaf.dtype.itemsize].view(leaf.dtype)
      if not band.add(i, array, last):
        raise error_at(series[i], name, "it holds NaN or infinite numbers")
      bar.add(array.nbytes, leaf.path)
      buffers.give_back(memory)
      if last and first + count == leaf.info.size:
        gram[leaf.label] += band.gram
        fourth[leaf.label] += band.fourth
        band.gram[:], band.fourth[:] = 0, 0
        large[(large < 0) & ~(gram[:, :, 0].sum(0) < LARGEST_NORM**2)] = done
        done += 1
        store.save({"done": done, "gram": gram, "fourth": fourth, "large": large})
  for entry, signature in zip(series, signatures, strict=True):
    check_unchanged(entry, signature)
  for i, report in _reports_of_gram(series, selection, gram, fourth):
    if large[i - 1] >= 0:
      raise too_large(series[i], selection.leaves[large[i - 1]].path, "the checkpoint before")
    yield i, report


def _reports_of_gram(
  series: list[Entry], selection: Selection, gram: np.ndarray, fourth: np.ndarray
) -> Iterator[tuple[int, Report]]:
  config = selection.config
  if config.groups is not None:
    gram, fourth = (np.concatenate([x.sum(0, keepdims=True), x]) for x in (gram, fourth))
  most = most_dims(selection.sizes)
  empty = {path: jax.ShapeDtypeStruct((0,), np.float32) for path in selection.tree}
  state = lowered_init(selection.config, empty).compile(known(**REPORT_OPTIONS))()
  config = with_any_groups(config)
  rows: list[int] = []  # those that are not zero, newest first
  base_step = series[0].step
  for row in range(gram.shape[1]):
    entry = series[row + 1]
    moved = gram[0, row, 0] > 0
    near = [row, *rows][: config.slots if moved else 1]
    if row - near[-1] >= gram.shape[2]:
      raise error_at(entry, None, "too many of those before it are identical to others; leave them out")
    products = np.zeros((gram.shape[0], config.slots))
    products[:, : len(near)] = gram[:, row, [row - other for other in near]]
    energy = gram[:, row, 0]
    dims = np.minimum(exact_dim(energy, fourth[:, row]), most)
    state = push_gram(config, state, products, dims, steps_since(entry, base_step))
    if moved:
      rows, base_step = near, entry.step
    yield row + 1, core.reports(state)
