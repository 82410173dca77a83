"""The functional core: `init`, `observe`, `report`. It knows no optax and no model.

A `Config` says what to measure; the state is a NamedTuple of arrays. The transformation `track_spectral_edge` is a
thin caller of these three functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sedjax import _gram, sketch
from sedjax._paths import tracked_leaves
from sedjax._phase import init_phase
from sedjax._spectrum import Rows, WindowState, report_window
from sedjax._types import VECTOR_FIELDS, Report, Status

_LABEL_WORDS = 16
_INT_MAX = np.iinfo(np.int32).max


def _is_int(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Config:
  """What a tracker measures; see `track_spectral_edge` for the meaning and the rules of each field."""

  window: int | tuple[int, ...] = 10
  every: int = 1
  k_max: int | None = None
  sketch: Any = None
  groups: Callable[[str], Hashable | None] | None = None
  source: str = "updates"
  momentum: float = 0.0
  history: int = 0

  def __post_init__(self) -> None:
    windows = self.window if isinstance(self.window, tuple | list) else (self.window,)
    if not windows or not all(_is_int(w) and w >= 3 for w in windows) or len(set(windows)) < len(windows):
      raise ValueError(
        f"track_spectral_edge: window must be an int >= 3 or a tuple of different ints >= 3, got {self.window!r}. "
        "Inside optax.inject_hyperparams, list it in static_args."
      )
    object.__setattr__(self, "window", tuple(sorted(int(w) for w in windows)))
    for name, least in (("every", 1), ("history", 0)):
      value = getattr(self, name)
      if not _is_int(value) or value < least:
        raise ValueError(
          f"track_spectral_edge: {name} must be an int >= {least}, got {value!r}. "
          "Inside optax.inject_hyperparams, list it in static_args."
        )
    if self.k_max is not None and (not _is_int(self.k_max) or not 1 <= self.k_max <= min(self.windows) - 1):
      raise ValueError(
        f"track_spectral_edge: k_max must be None or an int in 1…{min(self.windows) - 1} (the smallest window less "
        f"one), got {self.k_max!r}."
      )
    if self.sketch is None:
      object.__setattr__(self, "sketch", sketch.count())
    if not isinstance(self.sketch, sketch.Count | sketch.Gaussian | sketch.Exact):
      raise ValueError(
        f"track_spectral_edge: sketch must be sedjax.sketch.count(…), gaussian(…) or exact(), got {self.sketch!r}."
      )
    if not self.exact and self.sketch.dim < 2 * max(self.windows):
      raise ValueError(
        f"track_spectral_edge: sketch dim must be at least twice the window, got dim={self.sketch.dim} for window "
        f"{max(self.windows)}; use dim >= {10 * max(self.windows)}."
      )
    if self.groups is not None and not callable(self.groups):
      raise ValueError(
        f"track_spectral_edge: groups must be None or a function from a path string to a label, got {self.groups!r}."
      )
    if self.source not in ("updates", "params"):
      raise ValueError(f"track_spectral_edge: source must be 'updates' or 'params', got {self.source!r}.")
    momentum = self.momentum
    if isinstance(momentum, bool) or not isinstance(momentum, int | float | np.floating) or not 0 <= momentum < 1:
      raise ValueError(
        f"track_spectral_edge: momentum must be a float in [0, 1), the optimizer's β₁, got {momentum!r}."
      )

  @property
  def windows(self) -> tuple[int, ...]:
    """Window sizes, ascending."""
    return self.window  # pyright: ignore[reportReturnType]

  @property
  def slots(self) -> int:
    """Rows kept: one more than the largest window, so that consecutive windows can be compared."""
    return max(self.windows) + 1

  @property
  def exact(self) -> bool:
    return isinstance(self.sketch, sketch.Exact)


class TrackerState(NamedTuple):
  """Arrays only; n = W + 1 slots, G groups (the whole model first, then the labels in tree order).

  The slot under the cursor holds the row that is being summed up; it enters the window when it is complete.
  """

  rows: Any  # float32[n, labels, dim]; for exact sketches a tree of float32[n, *leaf.shape]
  base: Any  # source="params": the row of the parameters last read, twice (coarse and fine part); else ()
  facts: Rows  # Gram matrix, scales, effective dimensions and step counts by slot
  cursor: jax.Array  # int32[], slot being filled
  pushed: jax.Array  # int32[], rows taken into the window
  elapsed: jax.Array  # int32[], calls since the last row was pushed
  nonfinite: jax.Array  # int32[], steps left out
  zero: jax.Array  # int32[], steps of exactly zero update
  flags: jax.Array  # int32[], status bits that hold for all reports
  windows: tuple[WindowState, ...]  # by window, ascending
  reports: tuple[Report, ...]  # by window, fields [G, …]
  history: tuple[Report, ...]  # by window, fields [history, G, …], a ring by count
  labels: jax.Array  # int32[labels, 16], the groups' names in UTF-8
  sketch_id: jax.Array  # int32[4]


class _Layout(NamedTuple):
  """Which leaves are tracked, and where they belong."""

  paths: tuple[str, ...]
  leaves: tuple[Any, ...]
  group: tuple[int, ...]  # by leaf: index of its label
  labels: tuple[Hashable, ...]
  untracked: int


def _layout(config: Config, tree: Any) -> _Layout:
  found = tracked_leaves(tree)
  if config.groups is None:
    return _Layout(found.paths, found.values, (0,) * len(found.paths), ("",), found.others)
  labels: dict[Hashable, int] = {}
  kept = []
  for path, leaf in zip(found.paths, found.values, strict=True):
    try:
      label = config.groups(path)
    except Exception as error:
      raise ValueError(f"track_spectral_edge: groups({path!r}) raised {error!r}; return a label or None.") from error
    if label is None:
      continue
    try:
      index = labels.setdefault(label, len(labels))
    except TypeError as error:
      raise ValueError(
        f"track_spectral_edge: groups({path!r}) returned {label!r}, which is not hashable; return a string."
      ) from error
    kept.append((path, leaf, index))
  paths, leaves, group = zip(*kept, strict=True) if kept else ((), (), ())
  others = found.others + len(found.paths) - len(kept)
  return _Layout(paths, leaves, group, tuple(labels), others)


def encode_label(label: Hashable) -> np.ndarray:
  """int32[16]: the first 64 bytes of a label's text."""
  text = (label if isinstance(label, str) else repr(label)).encode()
  return np.frombuffer(text[: 4 * _LABEL_WORDS].ljust(4 * _LABEL_WORDS, b"\0"), "<i4").astype(np.int32)


def decode_label(words: Any) -> str:
  return np.asarray(words, "<i4").tobytes().rstrip(b"\0").decode(errors="replace")


def _row(config: Config, layout: _Layout) -> Any:
  """The row of one tree: float32[labels, dim], or the tracked leaves themselves."""
  if config.exact:
    return tuple(sketch.as_real(leaf).astype(jnp.float32) for leaf in layout.leaves)
  rows = [jnp.zeros((config.sketch.dim,), jnp.float32) for _ in layout.labels]
  for path, leaf, group in zip(layout.paths, layout.leaves, layout.group, strict=True):
    rows[group] = rows[group] + config.sketch.apply(path, sketch.as_real(leaf))
  return jnp.stack(rows) if rows else jnp.zeros((0, config.sketch.dim), jnp.float32)


def _empty_row(config: Config, layout: _Layout) -> Any:
  if not config.exact:
    return jax.ShapeDtypeStruct((len(layout.labels), config.sketch.dim), jnp.float32)
  return tuple(jax.eval_shape(lambda x: sketch.as_real(x).astype(jnp.float32), leaf) for leaf in layout.leaves)


def _group_count(config: Config, layout: _Layout) -> int:
  return 1 if config.groups is None else 1 + len(layout.labels)


def _zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
  return jnp.zeros(shape, dtype)


def _empty_report(window: int, lead: tuple[int, ...]) -> Report:
  vectors = {"singular_values": window, "ratios": window - 1}
  integers = ("k_star", "k95", "phase", "count", "row_steps", "skipped_nonfinite", "skipped_zero", "status")
  fields = {}
  for name in Report._fields:
    shape = (*lead, vectors[name]) if name in VECTOR_FIELDS else lead
    dtype = jnp.int32 if name in integers else jnp.bool_ if name == "edge_ambiguous" else jnp.float32
    fields[name] = _zeros(shape, dtype)
  return Report(**fields)._replace(status=jnp.full(lead, int(Status.WINDOW_FILLING), jnp.int32))


def init(config: Config, params: Any) -> TrackerState:
  """The state before the first update.

  Args:
    config: what to measure.
    params: tree of arrays or of `jax.ShapeDtypeStruct`; only paths, shapes and dtypes are used.

  Returns:
    A `TrackerState` of zeros.

  Raises:
    ValueError: `config.groups` fails on a path, or two leaves share a path.
  """
  layout = _layout(config, params)
  slots, groups = config.slots, _group_count(config, layout)
  row = _empty_row(config, layout)

  def zeros_like(lead: tuple[int, ...]) -> Any:
    return jax.tree.map(lambda r: _zeros((*lead, *r.shape)), row)

  return TrackerState(
    rows=zeros_like((slots,)),
    base=zeros_like((1 if config.exact else 2,)) if config.source == "params" else (),
    facts=Rows(
      _zeros((2 if config.exact else 1, groups, slots, slots)),
      _zeros((groups, slots)),
      _zeros((groups, slots)),
      _zeros((slots,), jnp.int32),
    ),
    cursor=_zeros((), jnp.int32),
    pushed=_zeros((), jnp.int32),
    elapsed=_zeros((), jnp.int32),
    nonfinite=_zeros((), jnp.int32),
    zero=_zeros((), jnp.int32),
    flags=jnp.full((), int(Status.UNTRACKED) if layout.untracked else 0, jnp.int32),
    windows=tuple(WindowState(init_phase(groups), _zeros((groups, slots))) for _ in config.windows),
    reports=tuple(_empty_report(w, (groups,)) for w in config.windows),
    history=tuple(_empty_report(w, (config.history, groups)) for w in config.windows if config.history),
    labels=jnp.asarray(
      np.stack([encode_label(label) for label in layout.labels])
      if config.groups is not None and layout.labels
      else np.zeros((0, _LABEL_WORDS), np.int32)
    ),
    sketch_id=jnp.asarray(config.sketch.sketch_id, jnp.int32),
  )


def _fold(operation: Callable[..., Any], parts: list[Any], start: Any) -> Any:
  for part in parts:
    start = operation(start, part)
  return start


def _largest(row: Any) -> jax.Array:
  leaves = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(row)]
  return _fold(jnp.maximum, leaves, jnp.float32(0))


def _column(config: Config, layout: _Layout, rows: Any, slot: jax.Array, scales: jax.Array) -> tuple[Any, Any, Any]:
  """Gram column of the row in `slot`: float32[parts, G, n], its scales [G] and its effective dimensions [G]."""
  if config.exact:
    return _exact_column(config, layout, rows, slot, scales)
  if config.groups is not None:
    rows = jnp.concatenate([rows.sum(1, keepdims=True), rows], 1)
  row = rows[slot]
  scale = _gram.power_of_two(jnp.max(jnp.abs(row), -1, initial=0))
  scales = scales.at[:, slot].set(scale)
  unit = jnp.where(scales > 0, scales, 1)
  scaled = jnp.where(scales.T[:, :, None] > 0, rows / unit.T[:, :, None], 0)
  new = scaled[slot]
  squares = new * new
  dims = 3 * squares.sum(-1) ** 2 / jnp.maximum((squares * squares).sum(-1), 1e-30)
  return _gram.plain_dot(scaled, new)[None], scale, dims


def _exact_column(
  config: Config, layout: _Layout, rows: Any, slot: jax.Array, scales: jax.Array
) -> tuple[Any, Any, Any]:
  groups = range(len(layout.labels))
  zero = jnp.zeros((config.slots,), jnp.float32)
  largest = [jnp.float32(0) for _ in groups]
  for leaf, group in zip(rows, layout.group, strict=True):
    largest[group] = jnp.maximum(largest[group], jnp.max(jnp.abs(leaf[slot]), initial=0))
  whole_first = [_fold(jnp.maximum, largest, jnp.float32(0))] + ([] if config.groups is None else largest)
  # Twice the power of two at or below the largest number: scaled rows lie within [-1, 1].
  scale = 2 * _gram.power_of_two(jnp.stack(whole_first))
  scales = scales.at[:, slot].set(scale)
  columns, dims = [], []
  for g in range(scales.shape[0]):
    members = [leaf for leaf, group in zip(rows, layout.group, strict=True) if g == 0 or group == g - 1]
    unit = jnp.where(scales[g] > 0, scales[g], 1)
    pair, square, fourth = (zero, zero), jnp.float32(0), jnp.float32(0)
    for leaf in members:
      axes = tuple(range(1, leaf.ndim))
      lead = (slice(None), *(None for _ in axes))
      scaled = jnp.where(scales[g][lead] > 0, leaf / unit[lead], 0)
      new = scaled[slot][None]
      pair = _gram.add_pairs(pair, _gram.precise_dot(scaled, new, axes))
      square = square + (new * new).sum()
      fourth = fourth + (new**4).sum()
    columns.append(jnp.stack(pair))
    dims.append(3 * square**2 / jnp.maximum(fourth, 1e-30))
  return jnp.stack(columns, 1), scale, jnp.stack(dims)


def _push(config: Config, layout: _Layout, state: TrackerState, steps: jax.Array) -> TrackerState:
  """Takes the row under the cursor, of `steps` steps, into the window and reports."""
  slot = state.cursor
  facts = state.facts
  column, scale, dims = _column(config, layout, state.rows, slot, facts.scale)
  gram = facts.gram.at[:, :, slot, :].set(column).at[:, :, :, slot].set(column)
  facts = Rows(
    gram,
    facts.scale.at[:, slot].set(scale),
    facts.dims.at[:, slot].set(dims),
    facts.steps.at[slot].set(steps),
  )
  count = jnp.minimum(state.pushed, _INT_MAX - 1) + 1
  order = (slot - jnp.arange(config.slots, dtype=jnp.int32)) % config.slots
  flags = (
    state.flags
    + jnp.where(state.nonfinite > 0, int(Status.NONFINITE_SKIPPED), 0)
    + jnp.where(state.zero > 0, int(Status.ZERO_SKIPPED), 0)
  )
  windows, reports = [], []
  for window, window_state in zip(config.windows, state.windows, strict=True):
    report, window_state = report_window(
      facts,
      window_state,
      order,
      count,
      window=window,
      k_max=config.k_max or window // 2,
      momentum=float(config.momentum),
      every=config.every,
      exact=config.exact,
    )
    shape = report.count.shape
    reports.append(
      report._replace(
        skipped_nonfinite=jnp.broadcast_to(state.nonfinite, shape),
        skipped_zero=jnp.broadcast_to(state.zero, shape),
        status=report.status | flags,
      )
    )
    windows.append(window_state)
  history = tuple(
    jax.tree.map(lambda ring, new: ring.at[state.pushed % config.history].set(new), ring, report)
    for ring, report in zip(state.history, reports, strict=bool(state.history))
  )
  return state._replace(
    facts=facts,
    cursor=(slot + 1) % config.slots,
    pushed=count,
    elapsed=jnp.zeros_like(state.elapsed),
    windows=tuple(windows),
    reports=tuple(reports),
    history=history,
  )


def _write(rows: Any, slot: jax.Array, row: Any) -> Any:
  return jax.tree.map(lambda ring, new: jax.lax.dynamic_update_index_in_dim(ring, new, slot, 0), rows, row)


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _observe_updates(config: Config, layout: _Layout, state: TrackerState, step: Any) -> TrackerState:
  row = _row(config, layout)
  size = _largest(row)
  finite, zero = jnp.isfinite(size), size == 0
  first = state.elapsed == 0
  current = jax.tree.map(lambda ring: ring[state.cursor], state.rows)
  start = jax.tree.map(lambda r: jnp.where(first, 0, r), current)
  total = jax.tree.map(lambda a, b: a + jnp.where(finite, b, 0), start, row)
  steps = jnp.where(first, 0, state.facts.steps[state.cursor]) + (finite & ~zero)
  # A zero step leaves an untouched slot untouched; otherwise it adds nothing and does not count.
  rows = _write(state.rows, state.cursor, _choose(first & zero, current, total))
  steps = jnp.where(first & zero, state.facts.steps[state.cursor], steps).astype(jnp.int32)
  elapsed = state.elapsed + jnp.where(zero, 0, 1).astype(jnp.int32)
  state = state._replace(
    rows=rows,
    facts=state.facts._replace(steps=state.facts.steps.at[state.cursor].set(steps)),
    elapsed=elapsed,
    nonfinite=state.nonfinite + (~finite).astype(jnp.int32),
    zero=state.zero + zero.astype(jnp.int32),
  )
  if step is None:
    due = elapsed >= config.every
    due = due & ~zero
  else:
    due = (jnp.asarray(step) + 1) % config.every == 0

  def close(state: TrackerState) -> TrackerState:
    steps = state.facts.steps[state.cursor]
    has_row = (state.elapsed > 0) & (steps > 0)
    pushed = _push(config, layout, state, steps)
    # All steps of the row were left out: start the row afresh.
    kept = state._replace(elapsed=jnp.zeros_like(state.elapsed))
    # The rows are the same in both, and a select would copy them.
    return _choose(has_row, pushed._replace(rows=()), kept._replace(rows=()))._replace(rows=state.rows)

  if config.every == 1 and step is None:
    closed = close(state)._replace(rows=())
    return _choose(due, closed, state._replace(rows=()))._replace(rows=state.rows)
  small = jax.lax.cond(due, lambda s: close(s)._replace(rows=()), lambda s: s._replace(rows=()), state)
  return small._replace(rows=state.rows)


def observe(config: Config, state: TrackerState, updates: Any, params: Any = None, step: Any = None) -> TrackerState:
  """Takes in one step.

  Args:
    config: what to measure.
    state: from `init` or the last `observe`.
    updates: tree of arrays of any float dtype; not read where `config.source` is "params".
    params: tree of the parameters *before* this step; needed where `config.source` is "params".
    step: None, or an int32 scalar: how many steps came before this one. It sets the rhythm of `every` instead of the
      state's own counter; unbatched under `vmap`, it lets the work between rows be skipped.

  Returns:
    The new state; its reports are new where a row was completed.

  Raises:
    ValueError: params are needed and absent.

  Cost: one read of the updates, and a Gram column and an eigenproblem of W rows once a row.
  """
  if config.source == "params":
    if params is None:
      raise ValueError(
        "track_spectral_edge: source='params' needs the parameters, got None; call tx.update(updates, state, params)."
      )
    raise NotImplementedError("source='params' is not there yet")
  return _observe_updates(config, _layout(config, updates), state, step)


def _group_index(state: TrackerState, group: Hashable | None) -> Any:
  if group is None:
    return 0
  labels = state.labels.reshape(-1, *state.labels.shape[-2:])[0]
  wanted = encode_label(group)
  if not isinstance(labels, Tracer):
    known = [tuple(words) for words in np.asarray(labels)]
    if tuple(wanted) not in known:
      names = ", ".join(repr(decode_label(words)) for words in known) or "none: the tracker has no `groups`"
      raise ValueError(f"sedjax: there is no group {group!r}; groups: {names}.")
    return 1 + known.index(tuple(wanted))
  if not labels.shape[0]:
    raise ValueError(f"sedjax: there is no group {group!r}; the tracker has no `groups`.")
  same = jnp.all(labels == wanted, -1)
  return jnp.where(jnp.any(same), 1 + jnp.argmax(same), -1)


def window_sizes(state: TrackerState) -> tuple[int, ...]:
  """The tracker's window sizes, ascending."""
  return tuple(report.singular_values.shape[-1] for report in state.reports)


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
  """
  sizes = window_sizes(state)
  if window is not None and window not in sizes:
    raise ValueError(f"sedjax: there is no window {window!r}; the tracker's windows are {sizes}.")
  found = state.reports[-1 if window is None else sizes.index(window)]
  index = _group_index(state, group)
  known = jnp.asarray(index >= 0)

  def pick(name: str, field: jax.Array) -> jax.Array:
    axis = -2 if name in VECTOR_FIELDS else -1
    picked = jnp.take(field, jnp.maximum(index, 0), axis=axis)
    if isinstance(index, int):
      return picked
    if field.dtype == jnp.bool_:
      return picked & known
    void = jnp.nan if field.dtype == jnp.float32 else int(Status.UNKNOWN_GROUP) if name == "status" else -1
    return jnp.where(known, picked, jnp.asarray(void, field.dtype))

  return Report(*(pick(name, field) for name, field in zip(Report._fields, found, strict=True)))
