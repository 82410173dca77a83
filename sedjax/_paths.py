"""Paths of leaves, which read the same in linen, nnx and plain dicts."""

from __future__ import annotations

from typing import Any

import jax


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
