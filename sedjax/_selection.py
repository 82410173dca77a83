"""Which tensors of a checkpoint are parameters, under which paths, and which are left out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import re
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sedjax import core
from sedjax._dataset import WHOLE, storable
from sedjax._layout import decode_label, encode_label, layout_of
from sedjax._reader import Reader, ReadError, TensorInfo
from sedjax._readers import open_checkpoint
from sedjax._series import CheckpointError, Entry, about, error_at
from sedjax._training import model_names
from sedjax._words import counted

Groups = Mapping[str, str | None] | Callable[[str], Hashable | None]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_REST = "rest"
_STATISTICS = "running statistics"
_SPECTRAL = "a vector of spectral normalization"
# By what follows in a path: why a tensor is a buffer.
_BUFFERS = {
  r"(running|moving)_(mean|var|variance)$|num_batches_tracked$|(^|/)batch_stats/": _STATISTICS,
  r"(^|/)(_?(ema_)?cluster_size|_?ema_w|embed_avg)$": _STATISTICS,  # of quantized codebooks
  r"(^|/)weight_u$|(^|/)parametrizations/[^/]+/\d+/_[uv]$": _SPECTRAL,
  r"inv_freq$|(cos|sin)_cached$|freqs_(cis|cos|sin)$|(rope|rotary)[^/]*/(cos|sin|freqs|cache)$": "a rotary table",
  r"(attn|attention)/(masked_bias|mask)$|(^|/)(causal|attn|attention)_mask$|(^|/)tril$": "a causal mask",
}
_NNX = {"mean", "var", "scale", "bias"}  # of a flax.nnx.BatchNorm: without a collection, but with nothing beside them
_MASK = re.compile(r"(attn|attention|attn/attention)/bias$")  # with two axes or more; with one it is a parameter
_EMBEDDING = re.compile(r"wte|emb|tok", re.IGNORECASE)
_SAMPLE = 1024  # numbers by which tensors are compared before they are compared whole
_CHUNK = 2**22  # numbers compared at a time


class Leaf(NamedTuple):
  """A tensor that is tracked."""

  path: str
  info: TensorInfo
  axes: tuple[int, ...] | None  # its axes as the model's layout has them, where that differs from the file's
  label: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.info.shape if self.axes is None else tuple(self.info.shape[axis] for axis in self.axes)

  @property
  def columns(self) -> int:
    """Length of the last axis."""
    return self.shape[-1] if self.shape else 1

  @property
  def dtype(self) -> np.dtype:
    assert self.info.dtype is not None
    return self.info.dtype


@dataclasses.dataclass(frozen=True)
class Selection:
  """What is read of every checkpoint."""

  leaves: tuple[Leaf, ...]
  left_out: dict[str, tuple[tuple[int, ...], str]]  # by path: shape, why
  labels: tuple[str, ...]  # names of the labels, in the state's order
  config: core.Config
  tree: dict[str, jax.ShapeDtypeStruct]  # of all parameters, tracked or not, but of tied ones the first alone
  no_parameters: frozenset[str]  # paths of what the first checkpoint holds besides
  rename: tuple[tuple[str, str], ...]

  @property
  def groups(self) -> tuple[str, ...]:
    """Names of the record's groups."""
    return (WHOLE,) if self.config.groups is None else (WHOLE, *self.labels)

  @property
  def sizes(self) -> np.ndarray:
    """float64[G]: how many numbers the rows of each group have; a complex one is two."""
    sizes = np.zeros(len(self.labels))
    for leaf in self.leaves:
      sizes[leaf.label] += leaf.info.size * (1 + (leaf.dtype.kind == "c"))
    return sizes if self.config.groups is None else np.append(sizes.sum(), sizes)

  @property
  def bytes(self) -> int:
    return sum(leaf.info.size * leaf.dtype.itemsize for leaf in self.leaves)


def _components(name: str) -> tuple[str, ...]:
  """What a tensor's name consists of, less what wrappers add."""
  parts = tuple(name.split("/") if "/" in name else name.split("."))
  return tuple(part for part in parts if part not in _WRAPPERS) or parts


def _in_model(tensors: Mapping[str, TensorInfo]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
  """The names of the model's tensors with their components within it, and of all others why they are none."""
  outside = {name: info.why_not for name, info in tensors.items() if info.why_not.startswith("outside of")}
  split = {name: _components(name) for name in tensors if name not in outside}
  inside, others = model_names(split.values(), joined=any("/" in name for name in split))
  outside |= {name: others[parts] for name, parts in split.items() if parts in others}
  return {name: parts[len(inside) :] for name, parts in split.items() if name not in outside}, outside


def _paths(names: Mapping[str, tuple[str, ...]], rename: tuple[tuple[str, str], ...]) -> dict[str, str]:
  """The tensors' names in the file by their paths."""
  split = list(names.values())
  for common in ("module", "params"):
    while split and all(len(parts) > 1 and parts[0] == common for parts in split):
      split = [parts[1:] for parts in split]
  if split and all(len(parts) > 1 and parts[-1] == "value" for parts in split):  # of nnx variables
    split = [parts[:-1] for parts in split]
  paths: dict[str, str] = {}
  for name, parts in zip(names, split, strict=True):
    path = "/".join(parts)
    for pattern, replacement in rename:
      try:
        path = re.sub(pattern, replacement, path)
      except (re.error, IndexError) as error:
        raise CheckpointError(f"sedjax analyze: rename cannot put {replacement!r} for {pattern!r} ({error}).") from None
    if storable(path) != path:
      raise ReadError(f"the name of tensor {name!r} has NUL or half of a character in it; rename it")
    if path in paths:
      raise ReadError(f"tensors {paths[path]!r} and {name!r} both have the path {path!r}; check rename")
    paths[path] = name
  return paths


def _why_not(path: str, infos: Mapping[str, TensorInfo]) -> str:
  """Why a tensor is not a parameter; empty where it is."""
  info = infos[path]
  if info.why_not:
    return info.why_not
  if info.dtype is None or not jax.numpy.issubdtype(info.dtype, jax.numpy.inexact):
    return f"it holds no floats but {info.dtype}"
  if not info.size:
    return "it is empty"
  if _MASK.search(path) and len(info.shape) > 1:
    return "a causal mask"
  if _is_statistic(path, infos):
    return _STATISTICS
  if path.endswith("weight_v") and f"{path[:-1]}u" in infos:  # alone it is a parameter, of weight normalization
    return _SPECTRAL
  return next((why for pattern, why in _BUFFERS.items() if re.search(pattern, path)), "")


def _is_statistic(path: str, infos: Mapping[str, TensorInfo]) -> bool:
  """Whether a tensor is a mean or variance that a flax.nnx.BatchNorm keeps beside its parameters."""
  module, _, name = path.rpartition("/")
  if name not in ("mean", "var") or len(infos[path].shape) != 1 or not module:
    return False
  own = {other.removeprefix(f"{module}/") for other in infos if other.startswith(f"{module}/")}
  return {"mean", "var"} <= own <= _NNX


def group_function(groups: Groups | None) -> Callable[[str], Hashable | None] | None:
  """The function that `groups` is, or that its regular expressions make."""
  if groups is None or callable(groups):
    return groups
  try:
    patterns = [(re.compile(pattern), name) for pattern, name in groups.items()]
  except (re.error, AttributeError, TypeError) as error:
    raise ValueError(f"sedjax analyze: groups must map regular expressions to names ({error}).") from None
  return lambda path: next((name for pattern, name in patterns if pattern.search(path)), _REST)


def _transposed(path: str, info: TensorInfo, transpose: str | None) -> tuple[int, ...] | None:
  if transpose is None or len(info.shape) < 2 or not re.search(transpose, path):
    return None
  return (*range(2, len(info.shape)), 1, 0)


class Reading:
  """A checkpoint that is open, by paths."""

  def __init__(self, entry: Entry, rename: tuple[tuple[str, str], ...]):
    self.entry = entry
    with about(entry):
      self._reader: Reader = open_checkpoint(pathlib.Path(entry.file))
    self.in_parts = self._reader.in_parts
    self._alone: Any = contextlib.nullcontext() if self.in_parts else threading.Lock()
    try:
      with about(entry):
        inside, outside = _in_model(self._reader.tensors)
        self.names = _paths(inside, rename)
      self.infos = {path: self._reader.tensors[name] for path, name in self.names.items()}
      self.outside = {name: self._reader.tensors[name]._replace(why_not=why) for name, why in outside.items()}
    except BaseException:
      self.close()
      raise

  def read(self, path: str, start: int, out: np.ndarray) -> None:
    with self._alone, about(self.entry, self.names[path]):
      self._reader.read(self.names[path], start, out)

  def check(self, selection: Selection, first: Entry) -> None:
    """Refuses a checkpoint whose parameters are not those of the first one."""
    for leaf in selection.leaves:
      info = self.infos.get(leaf.path)
      if info is None:
        raise error_at(self.entry, None, f"it lacks tensor {leaf.path!r}, which the first checkpoint {first.file} has")
      name = self.names[leaf.path]
      if info.shape != leaf.info.shape:
        raise error_at(self.entry, name, f"its shape is {info.shape}, in the first checkpoint it is {leaf.info.shape}")
      if info.dtype != leaf.info.dtype:
        now = f"its dtype is {info.dtype}" if info.dtype is not None else info.why_not
        raise error_at(self.entry, name, f"{now}, in the first checkpoint its dtype is {leaf.info.dtype}")
    known = selection.left_out.keys() | selection.tree.keys()
    usual = known - selection.no_parameters
    for path in self.infos:
      if path in usual or _why_not(path, self.infos):
        continue
      why = f"the first checkpoint {first.file} has no such tensor"
      if path in known:
        why = f"it is a parameter, but not in the first checkpoint {first.file} ({selection.left_out[path][1]})"
      raise error_at(self.entry, self.names[path], why)

  def close(self) -> None:
    self._reader.close()


def aligned(size: int, dtype: np.dtype) -> np.ndarray:
  """An array on a boundary of 64 bytes, which JAX on a CPU works on where it is."""
  raw = np.empty(size * dtype.itemsize + 64, np.uint8)
  at = -raw.ctypes.data % 64
  return raw[at : at + size * dtype.itemsize].view(dtype)


def _tied(first: Reading, last: Reading, paths: list[str]) -> dict[str, str]:
  """Tensors that are others under a second name: by path, the path that is kept."""
  alike: dict[Any, list[str]] = collections.defaultdict(list)
  for path in paths:
    info = first.infos[path]
    if info.storage is not None and path in last.infos:
      alike["storage", info.storage, last.infos[path].storage].append(path)
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
      sample = aligned(min(size, _SAMPLE), first.infos[path].dtype or np.dtype("u1"))
      last.read(path, (size - sample.size) // 2, sample)
      if sample.tobytes() != sample[:1].tobytes() * sample.size:  # zeros and ones are equal without being tied
        samples[sample.tobytes()].append(path)
    for same in samples.values():
      for path in same[1:]:
        if all(_equal(reading, same[0], path) for reading in (last, first)):
          tied[path] = same[0]
  return tied


def _equal(reading: Reading, one: str, two: str) -> bool:
  size, dtype = reading.infos[one].size, reading.infos[one].dtype or np.dtype("u1")
  a, b = (aligned(min(size, _CHUNK), dtype) for _ in range(2))
  for start in range(0, size, _CHUNK):
    count = min(_CHUNK, size - start)
    reading.read(one, start, a[:count])
    reading.read(two, start, b[:count])
    if not np.array_equal(a[:count].view(np.uint8), b[:count].view(np.uint8)):
      return False
  return True


def select(
  series: list[Entry], config: core.Config, rename: tuple[tuple[str, str], ...], transpose: str | None
) -> Selection:
  """What the first checkpoint holds and what of it is tracked."""
  with contextlib.closing(Reading(series[0], rename)) as first:
    left_out = {path: (info.shape, _why_not(path, first.infos)) for path, info in first.infos.items()}
    paths = sorted((path for path, (_, why) in left_out.items() if not why), key=lambda path: path.split("/"))
    tied: dict[str, str] = {}
    for entry in reversed(series):  # the last one that is whole: one that is damaged is told when it is reached
      with contextlib.suppress(*([CheckpointError] if entry != series[0] else [])):
        with contextlib.closing(Reading(entry, rename)) as last:
          tied = _tied(first, last, paths)
        break
  left_out = {path: what for path, what in left_out.items() if what[1]}
  no_parameters = frozenset(left_out)
  left_out |= {path: (first.infos[path].shape, f"tied to {kept}") for path, kept in tied.items()}
  left_out |= {name: (info.shape, info.why_not) for name, info in first.outside.items()}
  leaves = [
    Leaf(path, first.infos[path], _transposed(path, first.infos[path], transpose), 0)
    for path in paths
    if path not in tied
  ]
  tree = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for leaf in leaves}
  layout = layout_of(tree, config.groups)
  group_of = dict(zip(layout.paths, layout.group, strict=True))
  left_out |= {leaf.path: (leaf.shape, "groups leaves it out") for leaf in leaves if group_of[leaf.path] is None}
  kept = tuple(leaf._replace(label=group_of[leaf.path] or 0) for leaf in leaves if group_of[leaf.path] is not None)
  labels = tuple(decode_label(encode_label(label)) for label in layout.labels)  # as live records have them
  if not kept:
    raise error_at(series[0], None, f"none of its tensors ({len(first.infos)}) is a parameter to be tracked")
  if config.groups is not None and WHOLE in labels:
    raise CheckpointError(f"sedjax analyze: a group cannot be named {WHOLE!r}, which is the whole model.")
  return Selection(kept, left_out, labels, config, tree, no_parameters, rename)


def _summary(lines: Iterable[tuple[str, tuple[int, ...], str]]) -> list[str]:
  """One line for tensors that differ in the numbers of their paths only."""
  alike: dict[Any, list[str]] = collections.defaultdict(list)
  for path, shape, why in lines:
    alike[re.sub(r"\d+", "*", path), shape, why].append(path)
  return [
    f"{pattern if paths[1:] else paths[0]} {list(shape)}{f' × {len(paths)}' if paths[1:] else ''}{why and f': {why}'}"
    for (pattern, shape, why), paths in alike.items()
  ]


def taken_lines(selection: Selection) -> list[str]:
  """The tracked tensors, one line for those of one kind."""
  named = selection.config.groups is not None
  return _summary(
    (leaf.path, leaf.shape, f"group {selection.labels[leaf.label]}" if named else "") for leaf in selection.leaves
  )


def left_out_lines(selection: Selection) -> list[str]:
  """The other tensors, likewise, and why they are left out."""
  return _summary((path, shape, why) for path, (shape, why) in selection.left_out.items())


def say_what_is_read(series: list[Entry], selection: Selection, patterns: Iterable[str]) -> None:
  """Prints what is taken and what is left out, which the user has to see, and patterns that fit no tensor."""
  numbers = sum(leaf.info.size for leaf in selection.leaves)
  lines = [
    f"{len(series)} checkpoints, steps {series[0].step} to {series[-1].step}",
    f"taken: {counted(len(selection.leaves), 'tensor')}, {counted(numbers, 'parameter')}",
    *(f"  {line}" for line in taken_lines(selection)),
    f"left out: {len(selection.left_out) or 'nothing'}",
    *(f"  {line}" for line in left_out_lines(selection)),
  ]
  paths = [*selection.tree, *selection.left_out]
  lines += [f"no tensor fits {pattern!r}" for pattern in patterns if not any(re.search(pattern, x) for x in paths)]
  print("\n".join(lines), file=sys.stderr)
