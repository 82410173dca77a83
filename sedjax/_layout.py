"""The leaves of a tree of updates: their paths, their groups, and how they are split over a mesh."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sedjax import _placement
from sedjax._paths import normalised_paths
from sedjax._placement import Spec

LABEL_WORDS = 16


class Layout(NamedTuple):
  """The leaves of a tree, and where each belongs."""

  paths: tuple[str, ...]
  leaves: tuple[Any, ...]
  group: tuple[int | None, ...]  # by leaf: index of its label, or None where it is not tracked
  labels: tuple[Hashable, ...]  # a single "" where there are no groups
  shapes: tuple[tuple[int, ...], ...]  # by leaf: its shape, or that of the leaf of which it is a block
  specs: tuple[Spec, ...]  # by leaf: how it is split over mesh axes
  mesh: Any  # the abstract mesh of explicit axes; None where leaves are not sharded, or blocks inside a shard_map
  ranks: tuple[int, ...] = ()  # by leaf: see `Piece`; empty for the leaves' own order

  @property
  def axes(self) -> tuple[str, ...]:
    """The mesh axes over which any tracked leaf is split."""
    tracked = (spec for spec, group in zip(self.specs, self.group, strict=True) if group is not None)
    return tuple(dict.fromkeys(name for spec in tracked for names in spec for name in names))


def is_inexact(leaf: Any) -> bool:
  """Whether a leaf holds floats or complex floats (integers, booleans, float0 and PRNG keys do not)."""
  dtype = getattr(leaf, "dtype", None)
  return jnp.issubdtype(dtype if dtype is not None else np.result_type(leaf), jnp.inexact)


def shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
  """Shapes of a tree's leaves by their normalised paths."""
  with_paths = jax.tree_util.tree_leaves_with_path(tree)
  paths = normalised_paths([path for path, _ in with_paths])
  return {path: np.shape(leaf) for path, (_, leaf) in zip(paths, with_paths, strict=True)}


def layout_of(
  tree: Any, groups: Callable[[str], Hashable | None] | None, specs: Mapping[str, Spec] | None = None
) -> Layout:
  """Finds paths, groups and shardings of a tree's leaves.

  Args:
    tree: any tree of arrays.
    groups: from path to label, or None.
    specs: inside a `jax.shard_map`, how the leaves are split, by path; those of other paths are not.

  Raises:
    ValueError: `groups` raises, returns something unhashable or None for all leaves, two labels read the same, two
      leaves share a path, or with `specs` a leaf is split over explicit axes, too.
  """
  with_paths = jax.tree_util.tree_leaves_with_path(tree)
  paths = normalised_paths([path for path, _ in with_paths])
  leaves = tuple(jnp.asarray(leaf) if isinstance(leaf, float | complex) else leaf for _, leaf in with_paths)
  placed = [_placement.explicit_spec(leaf) if is_inexact(leaf) else ((), None) for leaf in leaves]
  if specs is None:
    splits, meshes = tuple(spec for spec, _ in placed), [mesh for _, mesh in placed if mesh is not None]
    mesh, shapes = (meshes[0] if meshes else None), tuple(np.shape(leaf) for leaf in leaves)
  else:
    for path, (spec, _) in zip(paths, placed, strict=True):
      if any(spec):
        raise ValueError(
          f"track_spectral_edge: inside the shard_map that axis_name speaks of, leaf {path!r} is split over an "
          f"explicit axis besides, {spec}; let the shard_map have that axis, too, or make it an automatic one."
        )
    splits, mesh = tuple(specs.get(path, ()) for path in paths), None
    shapes = tuple(_placement.whole_shape(np.shape(leaf), spec) for leaf, spec in zip(leaves, splits, strict=True))
  where = (shapes, splits, mesh)
  if groups is None:
    return Layout(paths, leaves, tuple(0 if is_inexact(leaf) else None for leaf in leaves), ("",), *where)
  labels: dict[Hashable, int] = {}
  group: list[int | None] = []
  for path, leaf in zip(paths, leaves, strict=True):
    if not is_inexact(leaf):
      group.append(None)
      continue
    try:
      label = groups(path)
    except Exception as error:
      raise ValueError(f"track_spectral_edge: groups({path!r}) raised {error!r}; return a label or None.") from error
    try:
      group.append(None if label is None else labels.setdefault(label, len(labels)))
    except TypeError as error:
      raise ValueError(
        f"track_spectral_edge: groups({path!r}) returned {label!r}, which is not hashable; return a string."
      ) from error
  encoded: dict[tuple[int, ...], Hashable] = {}
  for label in labels:
    other = encoded.setdefault(tuple(encode_label(label)), label)
    if other is not label:
      raise ValueError(
        f"track_spectral_edge: groups returned labels whose text agrees, {other!r} and {label!r}; return labels that "
        "read differently."
      )
  if not labels and any(map(is_inexact, leaves)):
    raise ValueError(
      f"track_spectral_edge: groups returned None for every leaf, such as {paths[0]!r}, so that none is tracked; "
      "return a label for some of them."
    )
  return Layout(paths, leaves, tuple(group), tuple(labels), *where)


def tracked_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
  """The shapes of tracked leaves, by their paths."""
  leaves = zip(layout.paths, layout.shapes, layout.group, strict=True)
  return {path: tuple(shape) for path, shape, group in leaves if group is not None}


def tree_id(layout: Layout) -> int:
  """An int in [0, 2**31) that tells trees apart whose tracked leaves differ in path, shape or group."""
  parts = [
    (path, shape, group)
    for path, shape, group in zip(layout.paths, layout.shapes, layout.group, strict=True)
    if group is not None
  ]
  return zlib.crc32(repr(parts).encode()) & 0x7FFFFFFF


def encode_label(label: Hashable) -> np.ndarray:
  """int32[16]: a label's text in 64 bytes; of a longer one the beginning, and a checksum of all of it."""
  label = label.item() if isinstance(label, np.generic) else label
  text = (label if isinstance(label, str) else repr(label)).encode(errors="backslashreplace")
  size = 4 * LABEL_WORDS
  if len(text) > size:
    end = f"…{zlib.crc32(text):08x}".encode()
    text = text[: size - len(end)].decode(errors="ignore").encode() + end
  return np.frombuffer(text.ljust(size, b"\0"), "<i4").astype(np.int32)


def decode_label(words: Any) -> str:
  """The text that `encode_label` stored."""
  return np.asarray(words, "<i4").tobytes().rstrip(b"\0").decode(errors="replace")
