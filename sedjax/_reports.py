"""Reading a state: its reports, their history, and what tells whose they are."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sedjax._layout import decode_label, encode_label
from sedjax._primitives import with_promotion
from sedjax._state import (
  Parts,
  TrackerState,
  expect_state,
  map_id_of,
  of_one_seed,
  unpack,
  unpack_report,
  unpack_reports,
  window_sizes,
  without_rows,
)
from sedjax._types import VECTOR_FIELDS, Report, Status


def with_counters(state: Parts, report: Report) -> Report:
  """A report with what has been left out up to now, also where no row was pushed since."""
  nonfinite, zero, flags = (x[..., None] for x in (state.nonfinite, state.zero, state.flags))
  flags = flags | jnp.where(nonfinite > 0, int(Status.NONFINITE_SKIPPED), 0)
  flags = flags | jnp.where(zero > 0, int(Status.ZERO_SKIPPED), 0)
  return report._replace(
    skipped_nonfinite=jnp.broadcast_to(nonfinite, report.count.shape),
    skipped_zero=jnp.broadcast_to(zero, report.count.shape),
    status=report.status | flags,
  )


def _window_index(state: TrackerState, window: int | None) -> int:
  sizes = window_sizes(state)
  if window is not None and window not in sizes:
    raise ValueError(f"sedjax: there is no window {window!r}; the tracker's windows are {sizes}.")
  return len(sizes) - 1 if window is None else sizes.index(window)


def _group_index(state: TrackerState, group: Hashable | None) -> Any:
  index = _place_of(state, group)
  # Outside of jit the transfer is made in so many words, since `jax.transfer_guard` may forbid others.
  return index if isinstance(state.labels, Tracer) else jax.device_put(np.int32(index))


def _place_of(state: TrackerState, group: Hashable | None) -> int | jax.Array:
  if group is None:
    return 0
  traced, wanted = isinstance(state.labels, Tracer), encode_label(group)
  if traced and state.labels.shape[-2] > 1:
    same = jnp.all(state.labels == wanted, -1)
    same = jnp.any(same, tuple(range(same.ndim - 1)))  # seeds, which agree, may lie on several devices
    same &= np.arange(same.size) > 0
    return jnp.where(jnp.any(same), jnp.argmax(same), -1)
  known = []
  if not traced:
    known = [tuple(words) for words in of_one_seed(state.labels, 2)[1:]]
  if tuple(wanted) not in known:
    names = ", ".join(repr(decode_label(words)) for words in known) or "none, since the tracker has no `groups`"
    raise ValueError(f"sedjax: there is no group {group!r}; groups: {names}.")
  return 1 + known.index(tuple(wanted))


@with_promotion
def report(state: TrackerState, *, group: Hashable | None = None, window: int | None = None) -> Report:
  """Finds the last report of one group and window in the state.

  Args:
    state: a tracker's state; leading axes (vmapped seeds) are kept.
    group: a label that `groups` returned, or None for the whole model.
    window: one of the tracker's window sizes, or None for the largest.

  Returns:
    A `Report` of scalars and vectors.

  Raises:
    ValueError: an unknown window or group. (Inside jit, where names are not known, an unknown group gives NaN,
      k_star -1 and the status bit UNKNOWN_GROUP instead.)

  Cost: none to speak of; reports are made when a row is pushed.

  Example:
    >>> import jax.numpy as jnp, sedjax
    >>> state = sedjax.core.init(sedjax.core.Config(window=(3, 5)), {"w": jnp.ones(3)})
    >>> sedjax.core.report(state, window=3).ratios.shape
    (2,)
  """
  return _report(without_rows(state), _window_index(state, window), _group_index(state, group))


# Compiled as a whole: outside of jit, the fifty small operations take 0.1 s on eight devices.
@functools.partial(jax.jit, static_argnums=1)
def _report(state: TrackerState, window: int, group: Any) -> Report:
  return _pick(with_counters(unpack(state), unpack_reports(state)[window]), group)


def _pick(found: Report, group: jax.Array) -> Report:
  known = group >= 0

  def pick(name: str, field: jax.Array) -> jax.Array:
    picked = jnp.take(field, jnp.maximum(group, 0), axis=-2 if name in VECTOR_FIELDS else -1)
    if field.dtype == jnp.bool_:
      return picked & known
    void = jnp.nan if field.dtype == jnp.float32 else int(Status.UNKNOWN_GROUP) if name == "status" else -1
    return jnp.where(known, picked, jnp.asarray(void, field.dtype))

  return Report(*(pick(name, field) for name, field in zip(Report._fields, found, strict=True)))


@with_promotion
def reports(state: TrackerState) -> Report:
  """All reports of one state.

  Args:
    state: a tracker's state; leading axes (vmapped seeds) are kept.

  Returns:
    A `Report` of fields [..., group, window], vectors padded with 0 to the largest window. Group 0 is the whole model;
    the others follow in the order in which the tree's leaves first name them.

  Example:
    >>> import jax.numpy as jnp, sedjax
    >>> config = sedjax.core.Config(window=(3, 5), groups=lambda path: path.split("/")[0])
    >>> state = sedjax.core.init(config, {"head": {"w": jnp.ones(3)}, "body": {"w": jnp.ones(3)}})
    >>> found = sedjax.core.reports(state)
    >>> found.k_star.shape, found.singular_values.shape
    ((3, 2), (3, 2, 5))
  """
  return _reports(without_rows(state))


@jax.jit
def _reports(state: TrackerState) -> Report:
  largest = window_sizes(state)[-1]

  def stack(name: str, fields: tuple[jax.Array, ...]) -> jax.Array:
    if name not in VECTOR_FIELDS:
      return jnp.stack(fields, -1)
    length = largest - (name == "ratios")
    return jnp.stack([jnp.pad(f, [(0, 0)] * (f.ndim - 1) + [(0, length - f.shape[-1])]) for f in fields], -2)

  parts = unpack(state)
  found = (with_counters(parts, report) for report in unpack_reports(state))
  return Report(*(stack(n, f) for n, f in zip(Report._fields, zip(*found, strict=True), strict=True)))


@with_promotion
def history(state: TrackerState, *, group: Hashable | None = None, window: int | None = None) -> Report:
  """The last reports of one group and window, oldest first.

  Args:
    state, group, window: as for `report`.

  Returns:
    A `Report` of fields [..., history]; `count` is 0 where there was none yet.

  Raises:
    ValueError: as `report`, or the tracker keeps no history.

  Example:
    >>> import jax.numpy as jnp, sedjax
    >>> config, params = sedjax.core.Config(window=3, history=2), {"w": jnp.ones(3)}
    >>> state = sedjax.core.observe(config, sedjax.core.init(config, params), params)
    >>> sedjax.core.history(state).count.tolist()
    [0, 1]
  """
  expect_state(state)
  if not state.history:
    raise ValueError("sedjax: this tracker keeps no history; pass history=… to track_spectral_edge.")
  return _history(without_rows(state), _window_index(state, window), _group_index(state, group))


@functools.partial(jax.jit, static_argnums=1)
def _history(state: TrackerState, window: int, group: Any) -> Report:
  ring = _pick(unpack_report(state.history[window], window_sizes(state)[window]), group)
  order = jnp.argsort(ring.count, axis=-1)

  def by_age(name: str, field: jax.Array) -> jax.Array:
    if name in VECTOR_FIELDS:
      return jnp.take_along_axis(field, order[..., None], -2)
    return jnp.take_along_axis(field, order, -1)

  return Report(*(by_age(name, field) for name, field in zip(Report._fields, ring, strict=True)))


def identity(state: TrackerState) -> tuple[jax.Array, jax.Array]:
  """The groups' names (int32[..., G, 16], see `group_names`) and the map's id (int32[..., 5]), in new arrays.

  The state's own may be donated to the next step.
  """
  return _identity(without_rows(state))


@jax.jit
def _identity(state: TrackerState) -> tuple[jax.Array, jax.Array]:
  return jnp.copy(state.labels), jnp.copy(map_id_of(state))


def group_names(labels: Any) -> tuple[str, ...]:
  """The text of the groups' names; "" is the whole model."""
  return tuple(decode_label(words) for words in of_one_seed(labels, 2))
