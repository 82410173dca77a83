"""Reports from saved checkpoints, read one tensor at a time (extra `checkpoints`; `torch` for PyTorch's files).

A row is the change of the parameters from one checkpoint to the next, seen through the same sketch as in a live tracker
with `source="params"`: both agree up to rounding of the parameters where names and layouts are the same.

Names. A tensor's path has its components joined by "/"; a name without "/" ("h.0.attn.c_attn.weight") has its dots
turned into slashes. What wrappers add is dropped: `_orig_mod` and the like anywhere, `module` (and, as in live trackers,
`params`) where every path begins with it. `rename` and `transpose` do the rest: what PyTorch calls
`fc.weight` [out, in] is in flax `fc/kernel` [in, out], so `transpose=r"fc/weight"` and `rename={"weight$": "kernel"}`
give the sketch that a flax model has.

Tensors. Integers, booleans, buffers (causal masks, rotary tables, running statistics) and everything outside of the
model in a training state are left out, and said. Tied tensors count once: those that share memory in a PyTorch file,
and matrices that are equal in the first and in the last checkpoint.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import glob
import importlib.metadata
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sedjax import core
from sedjax._layout import layout_of
from sedjax._readers import Reader, ReadError, TensorInfo, checkpoint_file, open_checkpoint
from sedjax._rows import LOSSY, read_leaf
from sedjax._types import Report
from sedjax.record import WHOLE, to_dataset

if TYPE_CHECKING:
  import xarray as xr

Path = str | os.PathLike[str]
Groups = Mapping[str, str | None] | Callable[[str], Hashable | None]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_REST = "rest"
# By what follows in a path: why a tensor is a buffer.
_BUFFERS = {
  r"running_(mean|var)$|num_batches_tracked$|^batch_stats/|/batch_stats/": "running statistics",
  r"inv_freq$|rotary.*/(cos|sin)_cached$|(cos|sin)_cached$|freqs_(cis|cos|sin)$": "a rotary table",
  r"(attn|attention)/masked_bias$": "a causal mask",
}
_MASK = re.compile(r"(attn|attention|attn/attention)/bias$")  # with two axes or more; with one it is a parameter
_EMBEDDING = re.compile(r"wte|emb|tok", re.IGNORECASE)
_SAMPLE = 1024  # numbers by which tensors are compared before they are compared whole
_CHUNK = 2**22  # numbers compared at a time
_EXACT_BYTES = 2**27  # differences held at a time in exact mode
_OPEN_FILES = 64


class CheckpointError(ValueError):
  """A series of checkpoints cannot be analysed, or not to its end; the message names file, step and tensor."""


class _Entry(NamedTuple):
  """One checkpoint of the series."""

  file: str
  step: int


class _Leaf(NamedTuple):
  """A tensor that is tracked."""

  path: str
  info: TensorInfo
  axes: tuple[int, ...] | None  # its axes as the model's layout has them, where that differs from the file's
  label: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.info.shape if self.axes is None else tuple(self.info.shape[axis] for axis in self.axes)

  @property
  def dtype(self) -> np.dtype:
    assert self.info.dtype is not None
    return self.info.dtype


@dataclasses.dataclass(frozen=True)
class _Selection:
  """What is read of every checkpoint."""

  leaves: tuple[_Leaf, ...]
  left_out: dict[str, tuple[tuple[int, ...], str]]  # by path: shape, why
  labels: tuple[str, ...]  # names of the labels, in the state's order
  config: core.Config
  tree: dict[str, jax.ShapeDtypeStruct]
  rename: tuple[tuple[str, str], ...]

  @property
  def groups(self) -> tuple[str, ...]:
    """Names of the record's groups."""
    return (WHOLE,) if self.config.groups is None else (WHOLE, *self.labels)

  @property
  def bytes(self) -> int:
    return sum(leaf.info.size * leaf.dtype.itemsize for leaf in self.leaves)


# ---- the series ----


def _series(files: Path | Iterable[Path], steps: Sequence[int] | None) -> list[_Entry]:
  """The checkpoints by ascending step."""
  patterns = [os.fspath(file) for file in ([files] if isinstance(files, str | os.PathLike) else files)]
  found: list[str] = []
  for pattern in patterns:
    matching = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not matching:
      what = "no file matches" if glob.has_magic(pattern) else "there is no file"
      raise CheckpointError(f"sedjax analyze: {what} {pattern!r}; quote the pattern and check the folder.")
    found += matching
  if steps is None:
    numbers = _steps_from_names(found)
  else:
    numbers = [int(step) for step in steps]
    if len(numbers) != len(found):
      raise CheckpointError(f"sedjax analyze: {len(numbers)} steps were given for {len(found)} checkpoints.")
    for (file, step), (later, other) in zip(_pairs(found, numbers), _pairs(found, numbers)[1:], strict=False):
      if other <= step:
        raise CheckpointError(
          f"sedjax analyze: the given steps do not ascend: {file} has step {step}, {later} after it step {other}."
        )
  series = sorted((_Entry(file, step) for file, step in _pairs(found, numbers)), key=lambda entry: entry.step)
  for one, two in zip(series, series[1:], strict=False):
    if one.step == two.step:
      raise CheckpointError(f"sedjax analyze: {one.file} and {two.file} have the same step {one.step}; leave one out.")
    if two.step - one.step >= 2**31:
      raise CheckpointError(f"sedjax analyze: from {one.file} to {two.file} there are {two.step - one.step} steps.")
  return series


def _pairs(files: list[str], steps: list[int]) -> list[tuple[str, int]]:
  return list(zip(files, steps, strict=True))


def _steps_from_names(files: list[str]) -> list[int]:
  """The number that varies over the names."""
  if len(files) == 1:
    numbers = re.findall(r"\d+", files[0])
    return [int(numbers[-1]) if numbers else 0]
  parts = [re.split(r"(\d+)", file) for file in files]
  other = next((i for i, part in enumerate(parts) if part[::2] != parts[0][::2]), None)
  if other is not None:
    raise CheckpointError(
      f"sedjax analyze: {files[0]} and {files[other]} differ in more than a number, so their steps are not known; "
      "narrow the pattern or give steps."
    )
  columns = {column for column in zip(*(tuple(map(int, part[1::2])) for part in parts), strict=True)}
  varying = [column for column in columns if len(set(column)) > 1]
  if not varying:
    raise CheckpointError(f"sedjax analyze: {files[0]} and {files[1]} have the same step; leave one out or give steps.")
  if len(varying) > 1:
    example = next(i for i in range(1, len(files)) if sum(column[i] != column[0] for column in varying) > 1 or i == 1)
    raise CheckpointError(
      f"sedjax analyze: several numbers vary over the names (as from {files[0]} to {files[example]}), so steps are not "
      "known; narrow the pattern, give the index or the folder of sharded checkpoints, or give steps."
    )
  return list(varying[0])


# ---- names and what is tracked ----


def _paths(tensors: Iterable[str], rename: tuple[tuple[str, str], ...]) -> dict[str, str]:
  """The tensors' names in the file by their paths."""
  names = list(tensors)
  split = [name.split("/") if "/" in name else name.split(".") for name in names]
  split = [[part for part in parts if part not in _WRAPPERS] or parts for parts in split]
  for common in ("module", "params"):
    while split and all(len(parts) > 1 and parts[0] == common for parts in split):
      split = [parts[1:] for parts in split]
  if split and all(len(parts) > 1 and parts[-1] == "value" for parts in split):  # of nnx variables
    split = [parts[:-1] for parts in split]
  paths: dict[str, str] = {}
  for name, parts in zip(names, split, strict=True):
    path = "/".join(parts)
    for pattern, replacement in rename:
      path = re.sub(pattern, replacement, path)
    if path in paths:
      raise ReadError(f"tensors {paths[path]!r} and {name!r} both have the path {path!r}; check rename")
    paths[path] = name
  return paths


def _in_model(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
  return {name: info for name, info in tensors.items() if not info.why_not.startswith("outside of")}


def _why_not(path: str, info: TensorInfo) -> str:
  """Why a tensor is not a parameter; empty where it is."""
  if info.why_not:
    return info.why_not
  if info.dtype is None or not jax.numpy.issubdtype(info.dtype, jax.numpy.inexact):
    return f"it holds no floats but {info.dtype}"
  if not info.size:
    return "it is empty"
  if _MASK.search(path) and len(info.shape) > 1:
    return "a causal mask"
  return next((why for pattern, why in _BUFFERS.items() if re.search(pattern, path)), "")


def _group_function(groups: Groups | None) -> Callable[[str], Hashable | None] | None:
  if groups is None or callable(groups):
    return groups
  try:
    patterns = [(re.compile(pattern), name) for pattern, name in groups.items()]
  except (re.error, AttributeError, TypeError) as error:
    raise ValueError(
      f"sedjax analyze: groups must map regular expressions to names, got {groups!r} ({error})."
    ) from None
  return lambda path: next((name for pattern, name in patterns if pattern.search(path)), _REST)


def _transposed(path: str, info: TensorInfo, transpose: str | None) -> tuple[int, ...] | None:
  if transpose is None or len(info.shape) < 2 or not re.search(transpose, path):
    return None
  return (*range(2, len(info.shape)), 1, 0)


class _Reading:
  """A checkpoint that is open, by paths."""

  def __init__(self, entry: _Entry, rename: tuple[tuple[str, str], ...]):
    self.entry = entry
    with _about(entry):
      self._reader: Reader = open_checkpoint(pathlib.Path(entry.file))
    try:
      with _about(entry):
        self.names = _paths(_in_model(self._reader.tensors), rename)
        outside = self._reader.tensors.keys() - self.names.values()
      self.infos = {path: self._reader.tensors[name] for path, name in self.names.items()}
      self.outside = {name: self._reader.tensors[name] for name in self._reader.tensors if name in outside}
    except BaseException:
      self.close()
      raise

  def read(self, path: str, start: int, out: np.ndarray) -> None:
    with _about(self.entry, self.names[path]):
      self._reader.read(self.names[path], start, out)

  def check(self, selection: _Selection, first: _Entry) -> None:
    """Refuses a checkpoint whose parameters are not those of the first one."""
    for leaf in selection.leaves:
      info = self.infos.get(leaf.path)
      if info is None:
        raise _error(self.entry, None, f"it lacks tensor {leaf.path!r}, which the first checkpoint {first.file} has")
      name = self.names[leaf.path]
      if info.shape != leaf.info.shape:
        raise _error(self.entry, name, f"its shape is {info.shape}, in the first checkpoint it is {leaf.info.shape}")
      if info.dtype != leaf.info.dtype:
        raise _error(self.entry, name, f"its dtype is {info.dtype}, in the first checkpoint it is {leaf.info.dtype}")
    known = {leaf.path for leaf in selection.leaves} | selection.left_out.keys() | selection.tree.keys()
    for path, info in self.infos.items():
      if path not in known and not _why_not(path, info):
        raise _error(self.entry, self.names[path], f"the first checkpoint {first.file} has no such tensor")

  def close(self) -> None:
    self._reader.close()


def _error(entry: _Entry, tensor: str | None, why: str) -> CheckpointError:
  where = f", tensor {tensor!r}" if tensor is not None else ""
  return CheckpointError(f"sedjax analyze: {entry.file} (step {entry.step}){where}: {why}.")


@contextlib.contextmanager
def _about(entry: _Entry, tensor: str | None = None) -> Iterator[None]:
  try:
    yield
  except ReadError as error:
    raise _error(entry, tensor, str(error)) from error
  except OSError as error:
    raise _error(entry, tensor, f"it cannot be read: {error.strerror or error}") from error


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
  """An array on a boundary of 64 bytes, which JAX on a CPU works on where it is."""
  raw = np.empty(size * dtype.itemsize + 64, np.uint8)
  at = -raw.ctypes.data % 64
  return raw[at : at + size * dtype.itemsize].view(dtype)


def _tied(first: _Reading, last: _Reading, paths: list[str]) -> dict[str, str]:
  """Tensors that are others under a second name: by path, the path that is kept."""
  alike: dict[Any, list[str]] = collections.defaultdict(list)
  for path in paths:
    info = first.infos[path]
    if info.storage is not None:
      alike["storage", info.storage].append(path)
    if len(info.shape) > 1 and last.infos.get(path, info)[:2] == info[:2] and path in last.infos:
      alike["shape", info.shape, info.dtype].append(path)
  tied: dict[str, str] = {}
  for kind, members in sorted(alike.items(), key=lambda item: item[0][0], reverse=True):  # storages first
    members = sorted(
      (path for path in members if path not in tied), key=lambda path: (not _EMBEDDING.search(path), path)
    )
    if len(members) < 2:
      continue
    if kind[0] == "storage":
      tied |= dict.fromkeys(members[1:], members[0])
      continue
    samples: dict[bytes, list[str]] = collections.defaultdict(list)
    size = first.infos[members[0]].size
    for path in members:
      sample = _aligned(min(size, _SAMPLE), first.infos[path].dtype or np.dtype("u1"))
      last.read(path, (size - sample.size) // 2, sample)
      if sample.tobytes() != sample[:1].tobytes() * sample.size:  # zeros and ones are equal without being tied
        samples[sample.tobytes()].append(path)
    for same in samples.values():
      for path in same[1:]:
        if all(_equal(reading, same[0], path) for reading in (last, first)):
          tied[path] = same[0]
  return tied


def _equal(reading: _Reading, one: str, two: str) -> bool:
  size, dtype = reading.infos[one].size, reading.infos[one].dtype or np.dtype("u1")
  a, b = (_aligned(min(size, _CHUNK), dtype) for _ in range(2))
  for start in range(0, size, _CHUNK):
    count = min(_CHUNK, size - start)
    reading.read(one, start, a[:count])
    reading.read(two, start, b[:count])
    if not np.array_equal(a[:count].view(np.uint8), b[:count].view(np.uint8)):
      return False
  return True


def _select(
  series: list[_Entry], config: core.Config, rename: tuple[tuple[str, str], ...], transpose: str | None
) -> _Selection:
  """What the first checkpoint holds and what of it is tracked."""
  with contextlib.ExitStack() as stack:
    first, last = (_Reading(entry, rename) for entry in (series[0], series[-1]))
    stack.callback(first.close)
    stack.callback(last.close)
    left_out = {path: (info.shape, _why_not(path, info)) for path, info in first.infos.items()}
    paths = sorted((path for path, (_, why) in left_out.items() if not why), key=lambda path: path.split("/"))
    tied = _tied(first, last, paths)
  left_out = {path: what for path, what in left_out.items() if what[1]}
  left_out |= {path: (first.infos[path].shape, f"tied to {kept}") for path, kept in tied.items()}
  left_out |= {name: (info.shape, info.why_not) for name, info in first.outside.items()}
  leaves = [
    _Leaf(path, first.infos[path], _transposed(path, first.infos[path], transpose), 0)
    for path in paths
    if path not in tied
  ]
  tree = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for leaf in leaves}
  layout = layout_of(tree, config.groups)
  group_of = dict(zip(layout.paths, layout.group, strict=True))
  left_out |= {leaf.path: (leaf.shape, "groups leaves it out") for leaf in leaves if group_of[leaf.path] is None}
  kept = tuple(leaf._replace(label=group_of[leaf.path] or 0) for leaf in leaves if group_of[leaf.path] is not None)
  labels = tuple(label if isinstance(label, str) else repr(label) for label in layout.labels)
  if not kept:
    raise _error(series[0], None, f"none of its {len(first.infos)} tensors is a parameter to be tracked")
  if config.groups is not None and WHOLE in labels:
    raise CheckpointError(f"sedjax analyze: a group cannot be named {WHOLE!r}, which is the whole model.")
  return _Selection(kept, left_out, labels, config, tree, rename)


def _summary(lines: Iterable[tuple[str, tuple[int, ...], str]]) -> list[str]:
  """One line for tensors that differ in the numbers of their paths only."""
  counts = collections.Counter((re.sub(r"\d+", "*", path), shape, why) for path, shape, why in lines)
  return [
    f"{path} {list(shape)}{f' × {count}' if count > 1 else ''}{f': {why}' if why else ''}"
    for (path, shape, why), count in counts.items()
  ]


def _taken(selection: _Selection) -> list[str]:
  named = selection.config.groups is not None
  return _summary(
    (leaf.path, leaf.shape, f"group {selection.labels[leaf.label]}" if named else "") for leaf in selection.leaves
  )


def _left_out(selection: _Selection) -> list[str]:
  return _summary((path, shape, why) for path, (shape, why) in selection.left_out.items())


def _say_what_is_read(series: list[_Entry], selection: _Selection) -> None:
  numbers = sum(leaf.info.size for leaf in selection.leaves)
  lines = [
    f"{len(series)} checkpoints, steps {series[0].step} to {series[-1].step}",
    f"taken: {len(selection.leaves)} tensors, {numbers:,} parameters",
    *(f"  {line}" for line in _taken(selection)),
    f"left out: {len(selection.left_out) or 'nothing'}",
    *(f"  {line}" for line in _left_out(selection)),
  ]
  print("\n".join(lines), file=sys.stderr)


# ---- what is kept of an unfinished analysis ----


class _Store:
  """The unfinished analysis beside the record that it will become: its state, and the reports so far."""

  def __init__(self, out: Path | None, identity: str):
    self.folder = None if out is None else pathlib.Path(f"{os.fspath(out)}.part")
    self._identity = identity
    self._reports = b""  # where there is no folder

  def load(self) -> dict[str, np.ndarray] | None:
    """What was saved last by an analysis with the same identity."""
    if self.folder is None or not (self.folder / "state.npz").exists():
      return None
    try:
      with np.load(self.folder / "state.npz") as file:
        saved = dict(file)
      same = saved.pop("identity").tobytes().decode() == self._identity
    except Exception:  # whatever a damaged file raises
      same, saved = False, {}
    if not same:
      print(f"{self.folder} belongs to another analysis, or is damaged: beginning anew", file=sys.stderr)
      shutil.rmtree(self.folder)
      return None
    return saved

  def save(self, arrays: Mapping[str, Any], report: bytes = b"", done: int = 0) -> None:
    """Replaces the state in one stroke; `report` is number `done`, counted from 1, of the reports."""
    if self.folder is None:
      self._reports += report
      return
    with _writing(self.folder):
      self.folder.mkdir(parents=True, exist_ok=True)
      if report:
        with open(self.folder / "reports.bin", "ab") as file:
          file.truncate((done - 1) * len(report))
          file.write(report)
          _flush(file)
      packed = io.BytesIO()
      np.savez(packed, identity=np.frombuffer(self._identity.encode(), np.uint8), **arrays)
      _replace(self.folder / "state.npz", packed.getvalue())

  def reports(self, size: int) -> bytes:
    """The first `size` bytes of reports."""
    if self.folder is None:
      return self._reports[:size]
    return (self.folder / "reports.bin").read_bytes()[:size] if size else b""

  def remove(self) -> None:
    if self.folder is not None:
      shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:  # HDF5 has exceptions of its own for a full disk
    reason = (isinstance(error, OSError) and error.strerror) or str(error).splitlines()[0]
    raise CheckpointError(
      f"sedjax analyze: {os.fspath(path)} cannot be written ({reason}); what was saved before is kept: make room and "
      "run the same command again to go on."
    ) from error


def _flush(file: Any) -> None:
  file.flush()
  os.fsync(file.fileno())


def _replace(path: pathlib.Path, content: bytes) -> None:
  new = path.with_name(path.name + ".new")
  try:
    with open(new, "wb") as file:
      file.write(content)
      _flush(file)
    os.replace(new, path)
  finally:
    new.unlink(missing_ok=True)


def _write_record(record: xr.Dataset, out: Path) -> None:
  path = pathlib.Path(out)
  new = path.with_name(path.name + ".new")
  with _writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      record.to_netcdf(new, engine="h5netcdf")
      os.replace(new, path)
    finally:
      new.unlink(missing_ok=True)


def _identity(series: list[_Entry], selection: _Selection, all_files: bool) -> str:
  config = selection.config
  facts = {
    "windows": config.windows,
    "every": config.every,
    "k_max": config.k_max,
    "momentum": config.momentum,
    "sketch": config.sketch.sketch_id,
    "groups": selection.groups,
    "leaves": [(leaf.path, leaf.shape, str(leaf.dtype), leaf.axes, leaf.label) for leaf in selection.leaves],
    "series": [_signature(entry) for entry in series] if all_files else None,
  }
  return json.dumps(facts)


def _signature(entry: _Entry) -> list[Any]:
  """What tells whether a checkpoint is still the one that was read."""
  found = os.stat(checkpoint_file(pathlib.Path(entry.file)))
  return [os.path.abspath(entry.file), entry.step, found.st_size, found.st_mtime_ns]


# ---- reading ahead ----


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
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
      items.close()  # pyright: ignore[reportAttributeAccessIssue] - they are generators


class _Buffers:
  """Two buffers in turn: one is filled while the other is worked on."""

  def __init__(self, size: int):
    self._buffers = [_aligned(size, np.dtype(np.uint8)) for _ in range(2)]

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _leaf_row(config: core.Config, axes: tuple[int, ...] | None, leaf: jax.Array, hashes: Any) -> Any:
  return read_leaf(config, leaf if axes is None else leaf.transpose(axes), hashes)


_push_row = jax.jit(core.push_row, static_argnums=0, donate_argnums=1)


class _Sketched(NamedTuple):
  """Sketches of a checkpoint."""

  rows: np.ndarray  # float64[labels, dim]
  error: float  # of rounding


def _add_leaf(config: core.Config, leaf: _Leaf, array: np.ndarray, rows: np.ndarray) -> tuple[float, bool]:
  """Adds a leaf's sketch to its label's row; returns its rounding error, and whether it is finite."""
  shape = (2, *leaf.shape) if leaf.dtype.kind == "c" else leaf.shape
  hashes = config.sketch.hashes(leaf.path, shape)
  wide = leaf.dtype in (np.float64, np.complex128)
  with jax.enable_x64(True) if wide else contextlib.nullcontext():
    parts, error, peak = _leaf_row(config, leaf.axes, jax.device_put(array.reshape(leaf.info.shape)), hashes)
  coarse, fine = np.asarray(parts)
  row = np.add(coarse, fine, dtype=np.float64)
  offset = config.sketch.offset(leaf.path)
  rows[leaf.label, offset:] += row[: row.size - offset]
  rows[leaf.label, :offset] += row[row.size - offset :]
  return float(error), bool(np.isfinite(peak))


def _read_leaves(series: list[_Entry], selection: _Selection, start: int) -> Iterator[tuple[int, _Leaf, np.ndarray]]:
  """All tracked tensors of the checkpoints from number `start` on."""
  buffers = _Buffers(max(leaf.info.size * leaf.dtype.itemsize for leaf in selection.leaves))
  for i in range(start, len(series)):
    reading = _Reading(series[i], selection.rename)
    try:
      reading.check(selection, series[0])
      for leaf in selection.leaves:
        array = buffers.next(leaf.info.size, leaf.dtype)
        reading.read(leaf.path, 0, array)
        yield i, leaf, array
    finally:
      reading.close()


def _sketch_series(
  series: list[_Entry], selection: _Selection, store: _Store, progress: bool
) -> Iterator[tuple[int, Report]]:
  """The reports so far, and then one after each checkpoint; the state is saved before it is handed out."""
  config = selection.config
  state = core.init(config, selection.tree)
  leaves, structure = jax.tree.flatten(state)
  blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), core.reports(state))
  done, base, base_step = 0, None, 0
  saved = store.load()
  if saved is not None:
    # Checkpoints that were read must still be there; later ones may have come.
    read = json.loads(saved["read"].tobytes())
    if read == [_signature(entry) for entry in series[: len(read)]]:
      state = structure.unflatten([saved[f"state{i}"] for i in range(len(leaves))])
      done, base, base_step = len(read), saved["base"], int(saved["base_step"])
      print(f"going on after step {series[done - 1].step}", file=sys.stderr)
    else:
      print(f"{store.folder}: the checkpoints that were read have changed; beginning anew", file=sys.stderr)
  size = len(_to_bytes(blank))
  stored = store.reports(max(done - 1, 0) * size)
  for i in range(1, done):
    yield i, _from_bytes(stored[(i - 1) * size : i * size], blank)
  signatures = [_signature(entry) for entry in series[:done]]
  rows, squared_error = np.zeros((len(selection.labels), config.sketch.dim)), 0.0
  with (
    _Progress(progress, selection.bytes * len(series), selection.bytes * done) as bar,
    contextlib.closing(_ahead(_read_leaves(series, selection, done))) as items,
  ):
    for i, leaf, array in items:
      error, finite = _add_leaf(config, leaf, array, rows)
      if not finite:
        raise _error(series[i], leaf.path, "it holds NaN or infinite numbers")
      squared_error += error**2
      bar.add(array.nbytes, f"step {series[i].step}")
      if leaf is not selection.leaves[-1]:
        continue
      report = b""
      signatures.append(_signature(series[i]))
      if base is None:
        base, base_step = rows, series[i].step
      else:
        row = (rows - base).astype(np.float32)
        lossy = np.sqrt(squared_error) > LOSSY * np.linalg.norm(row)
        state = _push_row(config, state, row, np.int32(series[i].step - base_step), bool(lossy))
        report = _to_bytes(core.reports(state))
        if np.any(row):
          base, base_step = rows, series[i].step
      arrays = {f"state{n}": np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(state))}
      read = np.frombuffer(json.dumps(signatures).encode(), np.uint8)
      store.save({**arrays, "base": base, "base_step": base_step, "read": read}, report, i)
      rows, squared_error = np.zeros_like(rows), 0.0
      if report:
        yield i, _from_bytes(report, blank)


def _to_bytes(report: Report) -> bytes:
  return b"".join(np.asarray(field).tobytes() for field in report)


def _from_bytes(content: bytes, like: Report) -> Report:
  fields, at = [], 0
  for field in like:
    fields.append(np.frombuffer(content[at : at + field.nbytes], field.dtype).reshape(field.shape))
    at += field.nbytes
  return Report(*fields)


# ---- exact ----


class _OpenFiles:
  """Readers of the series, as many as may be open at a time."""

  def __init__(self, series: list[_Entry], selection: _Selection):
    self._series, self._selection = series, selection
    self._open: collections.OrderedDict[int, _Reading] = collections.OrderedDict()

  def __getitem__(self, i: int) -> _Reading:
    if i not in self._open:
      if len(self._open) >= _OPEN_FILES:
        self._open.popitem(last=False)[1].close()
      self._open[i] = _Reading(self._series[i], self._selection.rename)
      self._open[i].check(self._selection, self._series[0])
    self._open.move_to_end(i)
    return self._open[i]

  def close(self) -> None:
    for reading in self._open.values():
      reading.close()


def _read_chunks(
  series: list[_Entry], selection: _Selection, start: int, size: int
) -> Iterator[tuple[_Leaf, int, int, np.ndarray]]:
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
    self._squares = np.zeros(size)

  def add(self, i: int, array: np.ndarray, last: bool) -> bool:
    """Takes a chunk of checkpoint i; returns whether it is finite."""
    if array.dtype.kind == "c":
      array = array.view(array.real.dtype)
    size, reach = array.size, self.reach
    now, before = self._values[i % 2, :size], self._values[(i + 1) % 2, :size]
    np.copyto(now, array, casting="unsafe")
    if not np.all(np.isfinite(now)):
      return False
    if i == 0:
      return True
    row, block = i - 1, self._block[:, :size]
    at = reach + row % reach
    np.subtract(now, before, out=block[at])
    squares = np.square(block[at], out=self._squares[:size])
    self.fourth[row] += squares @ squares
    if at == 2 * reach - 1 or last:
      first = reach if row < reach else 0  # the first block has none before it
      products = block[reach : at + 1] @ block[first : at + 1].T
      for place in range(at + 1 - reach):
        near = products[place, : reach + place + 1 - first][::-1][:reach]
        self.gram[row - (at - reach) + place, : near.size] += near
      block[:reach] = block[reach:]
    return True


def _exact_series(
  series: list[_Entry], selection: _Selection, store: _Store, progress: bool
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
        raise _error(series[i], leaf.path, "it holds NaN or infinite numbers")
      bar.add(array.nbytes, leaf.path)
      if last and first + array.size == leaf.info.size:
        gram[leaf.label] += band.gram
        fourth[leaf.label] += band.fourth
        band.gram[:], band.fourth[:] = 0, 0
        done += 1
        store.save({"done": done, "gram": gram, "fourth": fourth})
  yield from _reports_of_gram(series, selection, gram, fourth)


def _reports_of_gram(
  series: list[_Entry], selection: _Selection, gram: np.ndarray, fourth: np.ndarray
) -> Iterator[tuple[int, Report]]:
  config = selection.config
  if config.groups is not None:
    gram, fourth = (np.concatenate([x.sum(0, keepdims=True), x]) for x in (gram, fourth))
  empty = {path: jax.ShapeDtypeStruct((0,), np.float32) for path in selection.tree}
  state = core.init(config, empty)
  rows: list[int] = []  # those that are not zero, newest first
  base_step = series[0].step
  for row in range(gram.shape[1]):
    entry = series[row + 1]
    near = [row, *rows][: config.slots]
    if row - near[-1] >= gram.shape[2]:
      raise _error(
        entry, None, f"more than {config.slots} checkpoints before it are identical to others; leave them out"
      )
    products = np.zeros((gram.shape[0], config.slots))
    products[:, : len(near)] = gram[:, row, [row - other for other in near]]
    energy = gram[:, row, 0]
    dims = np.divide(3 * energy**2, fourth[:, row], out=np.zeros_like(energy), where=fourth[:, row] > 0)
    state = core.push_gram(config, state, products, dims, entry.step - base_step)
    if energy[0] > 0:
      rows, base_step = near, entry.step
    yield row + 1, core.reports(state)


# ---- the whole ----


def analyze(
  files: Path | Iterable[Path],
  *,
  window: int | tuple[int, ...] = 10,
  every: int | None = None,
  k_max: int | None = None,
  sketch: Any = None,
  groups: Groups | None = None,
  momentum: float = 0.0,
  steps: Sequence[int] | None = None,
  rename: Mapping[str, str] | None = None,
  transpose: str | None = None,
  out: Path | None = None,
  progress: bool = True,
) -> xr.Dataset:
  r"""Computes the reports of a tracker from a series of checkpoints.

  What is taken and what is left out of the checkpoints is printed to stderr, and kept in the record's attributes
  `parameters_taken` and `parameters_left_out`. The module's docstring has the rules.

  Args:
    files: a glob pattern, or paths and patterns, of safetensors files, `*.index.json` of sharded ones, folders that
      Hugging Face saved, PyTorch files (a state dict, or a dict that holds one as "model", "state_dict", …), orbax
      folders, or npz files.
    window: int >= 3, rows in the window, or a tuple of ints; a row is the change from one checkpoint to the next.
    every: optimizer steps from one checkpoint to the next, for what noise with this `momentum` shows; None for the most
      frequent distance of steps.
    k_max, sketch, momentum: as for `sedjax.track_spectral_edge`. `sketch.exact()` needs no memory for rows: it sums
      inner products, in float64, over all checkpoints chunk by chunk.
    groups: None, a function from path to label (None: left out), or a mapping of regular expressions to names, of which
      the first that is found in the path counts (None: left out); the others are the group "rest".
    steps: of the files, ascending; None for the number that varies over their names.
    rename: regular expressions and replacements for paths, applied one after the other.
    transpose: a regular expression; tensors whose (renamed) path it is found in have their axes (out, in, …) turned to
      (…, in, out), as flax has the kernels that PyTorch stores as weights.
    out: file for the record (NetCDF). The unfinished analysis lies beside it in the folder `<out>.part`, so that the
      same call goes on where another one ended, after each checkpoint (exact: after each tensor).
    progress: whether to show a bar, on a terminal.

  Returns:
    A record as `sedjax.record.to_dataset` makes it, over the steps of all checkpoints but the first.

  Raises:
    CheckpointError: no files, too few for the window, unknown, repeated or descending steps; a file that is missing,
      damaged, or would run code; a tensor that is missing, new, of another shape or dtype, or not finite; a full disk.
      With `out`, the rows before it are in the record and are not computed again.
    ValueError: an argument is out of its range.

  Cost: one read of the files; the memory of two of the largest tensor, the state of a tracker, and a sketch of the
    parameters in float64. Exact: 128 MiB beside the state; files are read in pieces, orbax arrays and compressed ones as
    often as they have pieces. To find tied tensors some numbers of each matrix are read twice.
  Source: arXiv 2603.15678, whose rows are differences of checkpoints. Departures: those of `track_spectral_edge`.

  Example:
    >>> import numpy as np, tempfile, sedjax.checkpoints
    >>> folder = tempfile.TemporaryDirectory()
    >>> for step in range(0, 60, 10):
    ...   np.savez(f"{folder.name}/step_{step}.npz", w=np.random.default_rng(step).normal(size=(40, 30)))
    >>> record = sedjax.checkpoints.analyze(f"{folder.name}/step_*.npz", window=4)
    >>> record.step.values.tolist(), dict(record.singular_values.sizes)["index"]
    ([10, 20, 30, 40, 50], 4)
    >>> record.attrs["parameters_taken"]
    'w [40, 30]'
  """
  series = _series(files, steps)
  if every is None:
    gaps = collections.Counter(two.step - one.step for one, two in zip(series, series[1:], strict=False))
    every = gaps.most_common(1)[0][0] if gaps else 1
  config = core.Config(window, every, k_max, sketch, _group_function(groups), "updates", momentum)
  if len(series) - 1 < max(config.windows):
    raise CheckpointError(
      f"sedjax analyze: {len(series)} checkpoints ({series[0].file}, step {series[0].step}, to {series[-1].file}) make "
      f"{len(series) - 1} rows, fewer than the window of {max(config.windows)}; give more of them or a smaller window."
    )
  selection = _select(series, config, _compiled(rename, transpose), transpose)
  _say_what_is_read(series, selection)
  store = _Store(out, _identity(series, selection, config.exact))
  found: list[tuple[int, Report]] = []
  try:
    for row in (_exact_series if config.exact else _sketch_series)(series, selection, store, progress):
      found.append(row)
  except CheckpointError as error:
    if out is None or not found:
      raise
    with contextlib.suppress(CheckpointError):  # the first error is the one to tell
      _write_record(_record(series, selection, found), out)
    raise CheckpointError(
      f"{error} The rows up to step {series[found[-1][0]].step} are kept in {os.fspath(out)}; run it again to go on."
    ) from error
  record = _record(series, selection, found)
  if out is not None:
    _write_record(record, out)
    store.remove()
  return record


def _compiled(rename: Mapping[str, str] | None, transpose: str | None) -> tuple[tuple[str, str], ...]:
  pairs = tuple((rename or {}).items())
  for pattern in (*(pattern for pattern, _ in pairs), *([] if transpose is None else [transpose])):
    try:
      re.compile(pattern)
    except (re.error, TypeError) as error:
      raise ValueError(f"sedjax analyze: {pattern!r} is no regular expression ({error}).") from None
  return pairs


def _record(series: list[_Entry], selection: _Selection, found: list[tuple[int, Report]]) -> xr.Dataset:
  config = selection.config
  reports = Report(*(np.stack(fields) for fields in zip(*(report for _, report in found), strict=True)))
  kind = type(config.sketch).__name__.lower()
  attrs = {
    "source": "params",
    "sketch": kind if config.exact else f"{kind}({config.sketch.dim}, seed={config.sketch.seed})",
    "sketch_id": list(config.sketch.sketch_id),
    "every": config.every,
    "windows": list(config.windows),
    "k_max": "half of each window" if config.k_max is None else config.k_max,
    "momentum": float(config.momentum),
    "versions": json.dumps({name: importlib.metadata.version(name) for name in ("sedjax", "jax", "numpy")}),
    "device": jax.devices()[0].device_kind,
    "command": shlex.join(sys.argv),
    "checkpoints": f"{series[0].file} … {series[found[-1][0]].file}",
    "parameters_taken": "\n".join(_taken(selection)),
    "parameters_left_out": "\n".join(_left_out(selection)),
  }
  return to_dataset(
    reports,
    steps=[series[i].step for i, _ in found],
    windows=config.windows,
    groups=selection.groups,
    attrs=attrs,
  )
