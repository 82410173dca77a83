"""Reads orbax's folders."""

from __future__ import annotations

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from sedjax._reader import Reader, ReadError, TensorInfo, new_name, told_as
from sedjax._training import flatten, is_list, model_keys, within


class OrbaxReader(Reader):
  """A folder that orbax wrote: a tree of arrays, or a step of a CheckpointManager with one item."""

  def __init__(self, path: pathlib.Path):
    with told_as("orbax checkpoint"):
      import orbax.checkpoint as ocp

      if not (path / "_METADATA").exists():
        items = sorted(item.parent for item in path.glob("*/_METADATA"))
        if len(items) > 1:
          names = ", ".join(item.name for item in items)
          raise ReadError(f"it has several items ({names}); give the folder of the one with the parameters")
        path = items[0]
      self._path, self._ocp, self._handler = path.absolute(), ocp, ocp.PyTreeCheckpointer()
      found: Any = self._handler.metadata(self._path)
      found = getattr(found, "item_metadata", found)
      self._tree: Any = getattr(found, "tree", found)
      if self._tree is None:  # orbax logs why, and goes on
        raise ReadError("it is a damaged orbax checkpoint, whose metadata cannot be read")
      inside = model_keys(self._tree, lambda value: hasattr(value, "shape"), anywhere=False)
      self._in_lists = _has_lists(self._tree)
      self.tensors, self._keys = {}, {}
      for keys, value in flatten(self._tree):
        shape = getattr(value, "shape", None)
        if shape is None or getattr(value, "dtype", None) is None:
          continue
        names, why_not = within(keys, inside)
        name = new_name("/".join(names), self.tensors)
        if type(value).__name__ == "ScalarMetadata":
          why_not = why_not or "it is a Python number"
        self.tensors[name] = TensorInfo(tuple(shape), np.dtype(value.dtype), why_not)
        self._keys[name] = keys
    self._last: tuple[str, np.ndarray] | None = None

  def read(self, name: str, start: int, out: np.ndarray) -> None:
    with told_as("orbax checkpoint"):
      if self._last is None or self._last[0] != name:  # parts of one tensor are asked for in a row
        self._last = None
        self._last = (name, self._restore(name))
      flat = self._last[1].reshape(-1)
      out[:] = flat[start : start + out.size]
      if start + out.size == flat.size:
        self._last = None

  def _restore(self, name: str) -> np.ndarray:
    ocp, keys = self._ocp, self._keys[name]
    args = ocp.args.PyTreeRestore(
      item=_only(self._tree, keys, np.zeros(()), self._in_lists),
      restore_args=_only(self._tree, keys, ocp.RestoreArgs(restore_type=np.ndarray), self._in_lists),
      partial_restore=not self._in_lists,
    )
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      found: Any = self._handler.restore(self._path, args=args)
    for key in keys:
      found = found[int(key) if isinstance(found, list | tuple) else key]
    array, info = np.asarray(found), self.tensors[name]
    if array.shape != info.shape or array.dtype != info.dtype:
      raise ReadError(f"it has shape {array.shape} and dtype {array.dtype}, not those of the checkpoint's metadata")
    return array

  def close(self) -> None:
    self._handler.close()


def _only(tree: Any, keys: tuple[str, ...], leaf: Any, whole: bool) -> Any:
  """The part of a tree that leads to one leaf, or the whole tree with placeholders for all others.

  Orbax wants the whole where there are lists, and takes longer over it.
  """
  if not keys:
    return leaf
  if isinstance(tree, Mapping):
    own = next(key for key in tree if str(key) == keys[0])
    others = {key: _placeholders(value) for key, value in tree.items()} if whole else {}
    return others | {own: _only(tree[own], keys[1:], leaf, whole)}
  return [_only(x, keys[1:], leaf, whole) if str(i) == keys[0] else _placeholders(x) for i, x in enumerate(tree)]


def _placeholders(tree: Any) -> Any:
  """The tree with orbax's placeholder for each leaf."""
  if isinstance(tree, Mapping):
    return {key: _placeholders(value) for key, value in tree.items()}
  return [_placeholders(value) for value in tree] if is_list(tree) else ...


def _has_lists(tree: Any) -> bool:
  return is_list(tree) or (isinstance(tree, Mapping) and any(map(_has_lists, tree.values())))
