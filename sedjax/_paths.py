"""Leaves of a tree of updates, with paths that read the same in linen, nnx and plain dicts."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Leaves(NamedTuple):
  """The float and complex leaves of a tree, in tree order."""

  paths: tuple[str, ...]
  values: tuple[Any, ...]
  others: int  # leaves that hold no real or complex floats, which are not tracked


def _key_name(key: Any) -> str:
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def _is_variable_value(key: Any) -> bool:
  # nnx shows a variable's content as attribute `value`; a dict entry of that name is a DictKey.
  return isinstance(key, jax.tree_util.GetAttrKey) and key.name in ("value", "raw_value")


def normalised_paths(key_paths: list[tuple[Any, ...]]) -> tuple[str, ...]:
  """Joins key paths with '/', without linen's common first 'params' and nnx's last '.value'.

  Raises:
    ValueError: two leaves would have one path, which would give them the same random signs.
  """
  names = []
  for keys in key_paths:
    if keys and _is_variable_value(keys[-1]):
      keys = keys[:-1]
    names.append(tuple(_key_name(key) for key in keys))
  if names and all(len(name) > 1 and name[0] == "params" for name in names):
    names = [name[1:] for name in names]
  paths = tuple("/".join(name) for name in names)
  if len(set(paths)) < len(paths):
    twice = sorted({path for path in paths if paths.count(path) > 1})
    raise ValueError(f"sedjax: two leaves have the same path {twice[0]!r}; rename one, since paths select the sketch.")
  return paths


def tracked_leaves(tree: Any) -> Leaves:
  """Splits a tree into its float or complex leaves, and the number of all others (integers, float0, keys)."""
  with_paths = jax.tree_util.tree_leaves_with_path(tree)
  paths = normalised_paths([path for path, _ in with_paths])
  kept = [
    (path, leaf)
    for path, (_, leaf) in zip(paths, with_paths, strict=True)
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  ]
  return Leaves(tuple(p for p, _ in kept), tuple(leaf for _, leaf in kept), len(with_paths) - len(kept))


def fingerprint(paths: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> int:
  """An int in [0, 2**31) that tells trees of other paths or shapes apart."""
  return zlib.crc32(repr((paths, shapes)).encode()) & 0x7FFFFFFF
