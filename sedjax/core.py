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
from sedjax._paths import leaves_of
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
  """The leaves of a tree, and where each belongs."""

  paths: tuple[str, ...]
  leaves: tuple[Any, ...]
  group: tuple[int | None, ...]  # by leaf: index of its label, or None where it is not tracked
  labels: tuple[Hashable, ...]


def _layout(config: Config, tree: Any) -> _Layout:
  found = leaves_of(tree)
  if config.groups is None:
    return _Layout(found.paths, found.values, tuple(0 if inexact else None for inexact in found.inexact), ("",))
  labels: dict[Hashable, int] = {}
  group: list[int | None] = []
  for path, inexact in zip(found.paths, found.inexact, strict=True):
    if not inexact:
      group.append(None)
      continue
    try:
      label = config.groups(path)
    except Exception as error:
      raise ValueError(f"track_spectral_edge: groups({path!r}) raised {error!r}; return a label or None.") from error
    try:
      group.append(None if label is None else labels.setdefault(label, len(labels)))
    except TypeError as error:
      raise ValueError(
        f"track_spectral_edge: groups({path!r}) returned {label!r}, which is not hashable; return a string."
      ) from error
  return _Layout(found.paths, found.values, tuple(group), tuple(labels))


def encode_label(label: Hashable) -> np.ndarray:
  """int32[16]: the first 64 bytes of a label's text."""
  text = (label if isinstance(label, str) else repr(label)).encode()
  return np.frombuffer(text[: 4 * _LABEL_WORDS].ljust(4 * _LABEL_WORDS, b"\0"), "<i4").astype(np.int32)


def decode_label(words: Any) -> str:
  return np.asarray(words, "<i4").tobytes().rstrip(b"\0").decode(errors="replace")


def _real(leaf: Any, group: int | None) -> jax.Array:
  """A tracked leaf as a real array of at least float32; an untracked one as no numbers at all."""
  if group is None:
    return jnp.zeros((0,), jnp.float32)
  leaf = sketch.as_real(leaf)
  return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _sketch_row(config: Config, layout: _Layout, leaves: list[jax.Array]) -> jax.Array:
  """float32[labels, dim]: the sketches of the leaves, summed within each group."""
  rows = [jnp.zeros((config.sketch.dim,), jnp.float32) for _ in layout.labels]
  for path, leaf, group in zip(layout.paths, leaves, layout.group, strict=True):
    if group is not None:
      rows[group] = rows[group] + config.sketch.apply(path, leaf)
  return jnp.stack(rows) if rows else jnp.zeros((0, config.sketch.dim), jnp.float32)


def _row(config: Config, layout: _Layout, rows: Any) -> Any:
  """The row of one tree, built like one slot of `rows`: a sketch, or the leaves themselves in float32."""
  leaves = [_real(leaf, group) for leaf, group in zip(layout.leaves, layout.group, strict=True)]
  if not config.exact:
    return _sketch_row(config, layout, leaves)
  structure = jax.tree.structure(rows)
  slots = [leaf.shape[1:] for leaf in jax.tree.leaves(rows)]
  if slots != [leaf.shape for leaf in leaves]:
    raise ValueError(
      "track_spectral_edge: the updates differ in tree or shapes from what init saw; call tx.init again with these "
      "parameters."
    )
  return jax.tree.unflatten(structure, [leaf.astype(jnp.float32) for leaf in leaves])


def _empty_row(config: Config, layout: _Layout, params: Any) -> Any:
  if not config.exact:
    return jax.ShapeDtypeStruct((len(layout.labels), config.sketch.dim), jnp.float32)
  shapes = [
    jax.eval_shape(lambda x, g=g: _real(x, g), x).shape for x, g in zip(layout.leaves, layout.group, strict=True)
  ]
  rows = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.tree.unflatten(jax.tree.structure(params), rows)


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
  row = _empty_row(config, layout, params)

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
    flags=jnp.full((), int(Status.UNTRACKED) if None in layout.group else 0, jnp.int32),
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
  tracked = [
    (leaf, group) for leaf, group in zip(jax.tree.leaves(rows), layout.group, strict=True) if group is not None
  ]
  for leaf, group in tracked:
    largest[group] = jnp.maximum(largest[group], jnp.max(jnp.abs(leaf[slot]), initial=0))
  whole_first = [_fold(jnp.maximum, largest, jnp.float32(0))] + ([] if config.groups is None else largest)
  # Twice the power of two at or below the largest number: scaled rows lie within [-1, 1].
  scale = 2 * _gram.power_of_two(jnp.stack(whole_first))
  scales = scales.at[:, slot].set(scale)
  columns, dims = [], []
  for g in range(scales.shape[0]):
    members = [leaf for leaf, group in tracked if g == 0 or group == g - 1]
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


def _push(config: Config, layout: _Layout, state: TrackerState, steps: jax.Array, extra: Any = 0) -> TrackerState:
  """Takes the row under the cursor, of `steps` steps, into the window and reports (with `extra` status bits)."""
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
    (state.flags | extra)
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
  row = _row(config, layout, state.rows)
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


def _split_parameters(layout: _Layout) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
  """Parameters as coarse + fine parts, and the grid of the coarse ones.

  The coarse parts are multiples of one power of two, so that float32 sums of thousands of them are exact and
  differences of two sketches lose nothing; the fine parts are 2⁻¹⁷ of the largest parameter at most.
  """
  leaves = [_real(leaf, group) for leaf, group in zip(layout.leaves, layout.group, strict=True)]
  grid = _gram.power_of_two(_largest(leaves)) * np.float32(2.0**-16)
  grid = jnp.where(grid > 0, grid, 1)
  coarse = [jnp.round(leaf / grid.astype(leaf.dtype)) * grid.astype(leaf.dtype) for leaf in leaves]
  fine = [(leaf - part).astype(jnp.float32) for leaf, part in zip(leaves, coarse, strict=True)]
  return [part.astype(jnp.float32) for part in coarse], fine, grid


def _norm(x: jax.Array) -> jax.Array:
  largest = jnp.max(jnp.abs(x), initial=0)
  unit = jnp.where(largest > 0, largest, 1)
  return jnp.sqrt(jnp.sum((x / unit) ** 2)) * unit


def _read_parameters(config: Config, layout: _Layout, state: TrackerState) -> tuple[Any, Any, jax.Array]:
  """The new base, the row of the change since the old one, and whether rounding may exceed 1 % of that row."""
  if config.exact:
    now = _row(config, layout, state.rows)
    row = jax.tree.map(lambda new, old: new - old[0], now, state.base)
    doubles = any(_real(leaf, g).dtype == jnp.float64 for leaf, g in zip(layout.leaves, layout.group, strict=True))
    # float64 parameters are kept in float32, whose rounding is relative to the parameters.
    lossy = _largest(row) < _largest(now) * np.float32(100 * 2.0**-24) if doubles else jnp.array(False)
    return jax.tree.map(lambda new: new[None], now), row, lossy
  coarse, fine, grid = _split_parameters(layout)
  coarse, fine = _sketch_row(config, layout, coarse), _sketch_row(config, layout, fine)
  row = (coarse - state.base[0]) + (fine - state.base[1])
  # Gaussian weights are no multiples of the grid, and huge sums outgrow it: then float32 rounds the coarse part too.
  rounds = isinstance(config.sketch, sketch.Gaussian) | (_largest(coarse) > grid * np.float32(2.0**23))
  error = _norm(fine) * np.float32(2.0**-22) + jnp.where(rounds, _norm(coarse) * np.float32(2.0**-21), 0)
  return jnp.stack([coarse, fine]), row, error > np.float32(0.01) * _norm(row)


def _observe_params(config: Config, layout: _Layout, state: TrackerState, step: Any) -> TrackerState:
  # `elapsed` is 0 until there is a base, then the number of steps since it was read.
  due = state.elapsed % config.every == 0 if step is None else jnp.asarray(step) % config.every == 0

  def later(state: TrackerState) -> TrackerState:
    return state._replace(elapsed=state.elapsed + (state.elapsed > 0).astype(jnp.int32))

  def read(state: TrackerState) -> TrackerState:
    base, row, lossy = _read_parameters(config, layout, state)
    finite = jnp.isfinite(_largest(base))
    started = state.elapsed > 0
    zero = started & finite & (_largest(row) == 0)
    state = state._replace(
      nonfinite=state.nonfinite + (~finite).astype(jnp.int32), zero=state.zero + zero.astype(jnp.int32)
    )
    accept = started & finite & ~zero
    slot = jax.tree.map(lambda ring: ring[state.cursor], state.rows)
    rows = _write(state.rows, state.cursor, _choose(accept, row, slot))
    extra = jnp.where(lossy, int(Status.CANCELLATION), 0)
    pushed = _push(config, layout, state._replace(rows=rows), state.elapsed, extra)
    small = _choose(accept, pushed._replace(rows=(), base=()), state._replace(rows=(), base=()))
    keep = ~finite | zero
    elapsed = jnp.where(keep, later(state).elapsed, 1).astype(jnp.int32)
    return small._replace(rows=rows, base=_choose(keep, state.base, base), elapsed=elapsed)

  if config.every == 1 and step is None:
    return read(state)
  return jax.lax.cond(due, read, later, state)


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
    return _observe_params(config, _layout(config, params), state, step)
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
  return _pick(state, state.reports[-1 if window is None else sizes.index(window)], group)


def _pick(state: TrackerState, found: Report, group: Hashable | None) -> Report:
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


def reports(state: TrackerState) -> Report:
  """All reports of one state: fields [..., group, window], vectors padded with 0 to the largest window.

  Group 0 is the whole model; the others follow in the order in which the tree's leaves first name them.
  """
  largest = window_sizes(state)[-1]

  def stack(name: str, fields: tuple[jax.Array, ...]) -> jax.Array:
    if name not in VECTOR_FIELDS:
      return jnp.stack(fields, -1)
    length = largest - (name == "ratios")
    return jnp.stack([jnp.pad(f, [(0, 0)] * (f.ndim - 1) + [(0, length - f.shape[-1])]) for f in fields], -2)

  return Report(*(stack(n, f) for n, f in zip(Report._fields, zip(*state.reports, strict=True), strict=True)))


def history(state: TrackerState, *, group: Hashable | None = None, window: int | None = None) -> Report:
  """The last reports, oldest first: fields [..., history]; `count` is 0 where there was none yet.

  Args, Raises: as `report`; ValueError where the tracker keeps no history.
  """
  if not state.history:
    raise ValueError("sedjax: this tracker keeps no history; pass history=… to track_spectral_edge.")
  sizes = window_sizes(state)
  if window is not None and window not in sizes:
    raise ValueError(f"sedjax: there is no window {window!r}; the tracker's windows are {sizes}.")
  ring = _pick(state, state.history[-1 if window is None else sizes.index(window)], group)
  order = jnp.argsort(ring.count, axis=-1)

  def by_age(name: str, field: jax.Array) -> jax.Array:
    if name in VECTOR_FIELDS:
      return jnp.take_along_axis(field, order[..., None], -2)
    return jnp.take_along_axis(field, order, -1)

  return Report(*(by_age(name, field) for name, field in zip(Report._fields, ring, strict=True)))
