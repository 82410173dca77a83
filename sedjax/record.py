"""Records: everything that trackers report, as one labelled `xarray.Dataset` (extra `io`).

`Recorder` writes one while a run goes on, `open_record` reads it, `to_dataset` makes one of reports in memory.

A record has the dimensions step, seed, window, group and index. Each field of a `Report` is a variable over them;
`singular_values` and `ratios` also over `index`, the 1-based place k, with NaN where a window has no such place. The
group "all" is the whole model; one that the tracker's user named so is "group all". What the user adds has steps of its
own: a series `name` lies on the dimension `name_step`, and `event` on `event_step`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from sedjax import _journal, _reports, core
from sedjax._dataset import (
  DIMS,
  DTYPES,
  FIELDS,
  RESERVED,
  TOLD,
  VERSION,
  WHOLE,
  arrange,
  empty_dataset,
  needs_io,
  provenance,
  storable,
  to_dataset,
)
from sedjax._record_files import cannot, check_file, existing_layout, journal_of, open_record, rows_of
from sedjax._recordable import check_series, file_attributes, own_copy, seed_names, step_of, windows_and_groups
from sedjax._transform import find_tracker
from sedjax._types import Report
from sedjax._words import counted

__all__ = ["DIMS", "FIELDS", "WHOLE", "Recorder", "open_record", "to_dataset"]

QUEUED = 256  # reports that may wait for the writer thread; then `append` waits for it
# What sinks are told.
SCALARS = (
  "gap_ratio",
  "null_ratio",
  "k_star",
  "edge_ambiguous",
  "phase",
  "pc1_fraction",
  "k95",
  "drift_speed",
  "alignment",
  "turning",
  "last_update_norm",
  "effective_dim",
)


class Recorder:
  """Writes a record while a run goes on.

  A thread of its own fetches from the device and writes, so that training does not wait. Everything goes to a journal
  beside the file, `<path>.journal`; `close` makes the NetCDF file of it, and `open_record` reads both. A process that
  is killed, or a disk that is full, leaves all that was written before readable.

  A record that exists is continued. Where the run goes back to a checkpoint, what was recorded at or after the first
  step that is appended again is replaced: rows, series and events. A series is replaced likewise from the first step at
  which it is logged again. Attributes are those of the newest session; `created` stays.

  Args:
    path: of the file, "run.nc".
    tracker: the keyword arguments that `track_spectral_edge` was given; windows, sketch, `every`, `source`, `momentum`
      and `k_max` are kept as attributes.
    windows: needed only where reports, and not states, are appended, without `tracker`: its windows, ascending.
    groups: needed only where reports of groups are appended: their names, the first the whole model.
    seeds: names of the seeds of a vmapped state, ints or strings; None for 0, 1, …, or for those of a record that is
      continued.
    attrs: further attributes: text, numbers or lists of numbers.
    sinks: each is called in the writer thread as `sink(step, scalars)`, with a dict of floats by name, and
      `sink.close()` at the end; see `sedjax.sinks`. Series come with the steps at which they are logged. One that
      raises is told no more, and a RuntimeWarning says so; the record goes on.
    name: of the tracker, where the state holds several.

  Raises:
    ValueError: the arguments are out of range, or the record is newer than this library, no record, of other windows,
      groups, seeds or another sketch, or being written by another Recorder. What the writer thread finds out is raised
      by the next call as a RuntimeError: a full disk, groups or a sketch that only the state tells.

  Cost: `append` dispatches one small compiled program. A row takes about 100 bytes, and 4·(2·W + 17) for each seed,
    window and group, W being the largest window; up to 256 rows wait in memory. `close` writes the whole record anew.

  Example:
    >>> import jax.numpy as jnp, sedjax, sedjax.record, tempfile
    >>> options = dict(window=3, momentum=0.9)
    >>> tx = sedjax.track_spectral_edge(**options)
    >>> params = {"w": jnp.ones(3)}
    >>> state, path = tx.init(params), tempfile.mkdtemp() + "/run.nc"
    >>> with sedjax.record.Recorder(path, tracker=options) as recorder:
    ...   for step in range(1, 4):
    ...     _, state = tx.update(params, state)
    ...     recorder.append(step, state)
    ...   recorder.log(3, validation_loss=0.5)
    ...   recorder.event(3, "end")
    >>> record = sedjax.record.open_record(path)
    >>> record["count"].values.ravel().tolist(), record.validation_loss.values.tolist()
    ([1, 2, 3], [0.5])
  """

  def __init__(
    self,
    path: str | Path,
    *,
    tracker: Mapping[str, Any] | None = None,
    windows: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
    seeds: Sequence[int] | Sequence[str] | None = None,
    attrs: Mapping[str, Any] | None = None,
    sinks: Iterable[Callable[[int, dict[str, float]], None]] = (),
    name: str | None = None,
  ):
    needs_io()
    self.path = Path(path).absolute()  # wherever the program goes
    self._process = os.getpid()
    try:
      options = dict(tracker or {})
      self._config = core.Config(**{k: v for k, v in options.items() if k not in ("name", "axis_name")})
    except TypeError:
      raise ValueError(
        f"sedjax.record: tracker must be the keyword arguments of track_spectral_edge, got {tracker!r}."
      ) from None
    except ValueError as error:
      raise ValueError(f"sedjax.record: in tracker, {error}") from None
    self._tracked = tracker is not None
    self._name = name if name is not None else options.get("name")
    self._seeds = None if seeds is None else seed_names(seeds)
    if windows is None and groups is not None and self._tracked:
      windows = self._config.windows
    self._given = None if windows is None else windows_and_groups(windows, groups or [WHOLE])
    self._attrs, self._sinks = dict(attrs or {}), list(sinks)
    self._failed: list[Any] = []  # sinks that are told no more
    for key in self._attrs:
      if not isinstance(key, str) or storable(key) != key or not key or key in RESERVED:
        raise ValueError(
          f"sedjax.record: an attribute cannot be named {key!r}; the file has no such names, or uses it."
        )
      if self._tracked and key in TOLD:
        raise ValueError(f"sedjax.record: attribute {key!r} is what tracker= says; give yours another name.")
    check_file(self.path)
    check_file(journal_of(self.path))
    try:
      self._journal = _journal.Journal(journal_of(self.path))
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise cannot("write", self.path, error) from error
    try:
      self._layout = existing_layout(self.path, self._journal.found)  # None until there is one
      known: dict[str, Any] = {"sketch_id": list(self._config.sketch.sketch_id)} if self._tracked else {}
      if self._given is not None:
        known["windows"], known["groups"] = self._given
      elif self._tracked:
        known["windows"] = list(self._config.windows)
      if self._seeds is not None:
        known["seeds"] = self._seeds
      self._must_continue(known)
      before: Mapping[str, Any] = self._layout["attrs"] if self._layout else {}
      for option in ("every", "source") if self._tracked else ():
        if before.get(option, own := getattr(self._config, option)) != own:
          raise ValueError(
            f"sedjax.record: cannot continue {self.path}: its {option}, {before[option]}, is not this run's, {own}; "
            "give this run a new file."
          )
    except BaseException:
      self._journal.abandon()
      raise
    self._begun = self._checked = False  # this session's frame is written; its layout agrees with the record's
    self._held: list[bytes] = []  # what was logged before the first row of a new record
    self._shape: tuple[int, ...] | None = None
    names = self._layout["seeds"] if self._layout else self._seeds
    self._seed_count = None if names is None else len(names)  # None until it is known
    self._last: dict[str, int] = {}  # steps, by kind
    self._error: tuple[str, BaseException] | None = None
    self._closing = self._closed = False
    self._jobs: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue(QUEUED)
    self._thread = threading.Thread(target=self._work, name="sedjax record", daemon=True)
    self._thread.start()
    atexit.register(self.close)

  def append(self, step: int, state: Any) -> None:
    """Records the newest reports, of all groups and windows.

    Args:
      step: the optimizer step; steps ascend.
      state: an optimizer state that holds a tracker, or a tracker's state of the core, vmapped over seeds or not; or a
        `Report` as `get_reports` returns it. Its arrays may be donated afterwards.

    Raises:
      ValueError: steps do not ascend, no tracker in the state, shapes other than before or than the record has that is
        continued, or a traced state.
      TypeError: the step is an array, or no int.
      RuntimeError: an earlier row could not be written.
    """
    step = self._next("append", step)
    identity, windows = None, None
    if isinstance(state, Report):
      if self._given is None and self._tracked and self._config.groups is None:
        self._given = windows_and_groups(self._config.windows, [WHOLE])
      if self._given is None:
        raise ValueError(
          "sedjax.record: to append a Report, pass tracker=… or windows=… to Recorder, and groups=… where it has some."
        )
      report = Report(*map(own_copy, state))
    else:
      tracker = state if isinstance(state, core.TrackerState) else find_tracker(state, self._name)
      report, windows = core.reports(tracker), core.window_sizes(tracker)
      if self._shape is None:
        identity = _reports.identity(tracker)
    if any(isinstance(field, Tracer) for field in report):
      raise ValueError(
        "sedjax.record: append was called inside jit; call it outside, with the state that jit returned."
      )
    self._check_shape(np.shape(report.k_star), windows)
    self._last["append"] = step
    self._put(f"step {step}", functools.partial(self._write_row, step, report, identity, windows))

  def log(self, step: int, **scalars: Any) -> None:
    """Records values of the user's own, each name a series with steps of its own.

    Args:
      step: the optimizer step; those of a series ascend.
      **scalars: numbers or arrays over seeds, on the device or not. Among arrays a number is that of all seeds.

    Raises:
      ValueError: a name that the record uses, steps that do not ascend, or values that are neither.
      RuntimeError: something recorded earlier could not be written.
    """
    for name, value in scalars.items():
      check_series(name, value)
    for name in scalars:
      step = self._next(f"log {name}", step)
    self._check_seeds({name: len(value) for name, value in scalars.items() if np.ndim(value)})
    if scalars:
      self._last |= {f"log {name}": step for name in scalars}
      scalars = {name: own_copy(value) for name, value in scalars.items()}
      self._put(f"the series of step {step}", functools.partial(self._write_series, step, scalars))

  def event(self, step: int, text: str) -> None:
    """Records that something happened, such as a shift of the data; the same text at the same step counts once.

    Raises:
      RuntimeError: something recorded earlier could not be written.
    """
    self._raise()
    payload = _journal.note_payload(step_of(step), {"event": storable(str(text))})
    self._put(f"the event of step {step}", functools.partial(self._write_note, payload))

  def flush(self) -> None:
    """Returns when all that was recorded is on disk (a new record begins with its first row).

    Raises:
      RuntimeError: something could not be written.
    """
    self._raise()
    if self._closed:
      return
    self._jobs.join()
    self._raise()
    try:
      self._journal.sync()
    except OSError as error:
      self._error = ("the newest rows", error)
      self._raise()

  def close(self) -> None:
    """Writes what is left and makes the NetCDF file; the journal is then gone.

    Raises:
      RuntimeError: something could not be written. What was written before stays readable, in the journal.

    Warns:
      RuntimeWarning: series or events were recorded, but never a row, so that there is no record to keep them.
    """
    if self._closed or os.getpid() != self._process:  # a forked process has a copy, and its parent goes on
      return
    if not self._closing:
      self._closing = True
      self._jobs.put(None)
    self._thread.join()  # a Ctrl-C while it waits leaves the rest to the next call, or to the program's exit
    self._closed = True
    atexit.unregister(self.close)
    try:
      if self._error is None:
        self._finish()
        if self._held:
          calls = counted(len(self._held), "call")
          message = f"sedjax.record: {self.path} was not made: {calls} of log and event, but no append."
          warnings.warn(message, RuntimeWarning, stacklevel=2)
    finally:
      self._journal.close()
      with contextlib.ExitStack() as stack:  # which closes all, whatever one of them raises
        for sink in self._failed:
          with contextlib.suppress(Exception):
            getattr(sink, "close", lambda: None)()
        for sink in self._sinks:
          stack.callback(getattr(sink, "close", lambda: None))
    self._raise()

  def __enter__(self) -> Recorder:
    return self

  def __exit__(self, kind: Any, *_: object) -> None:
    with contextlib.suppress(*([Exception] if kind else [])):  # the first error is the one to see
      self.close()

  # ---- on the caller's thread ----

  def _raise(self) -> None:
    if os.getpid() != self._process:
      raise RuntimeError(f"sedjax.record: a forked process cannot record to {self.path}; its parent does.")
    if self._error is not None:
      what, error = self._error
      why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
      raise RuntimeError(
        f"sedjax.record: {what} could not be written to {self.path} ({why}); what was recorded before stays readable."
      ) from error

  def _next(self, kind: str, step: Any) -> int:
    self._raise()
    step = step_of(step)
    if step <= self._last.get(kind, -1):
      raise ValueError(f"sedjax.record: steps must ascend, {kind} got {step} after {self._last[kind]}.")
    return step

  def _check_shape(self, shape: tuple[int, ...], windows: tuple[int, ...] | None) -> None:
    if self._shape is None:
      seeds = shape[0] if len(shape) == 3 else 1
      if len(shape) not in (2, 3):
        raise ValueError(
          f"sedjax.record: reports must be [group, window] or [seed, group, window], got the shape {shape}."
        )
      if self._seeds is not None and len(self._seeds) != seeds:
        raise ValueError(
          f"sedjax.record: the state holds {counted(seeds, 'seed')}, but seeds={self._seeds} names others."
        )
      if self._given is not None and shape[-2:] != (len(self._given[1]), len(self._given[0])):
        raise ValueError(f"sedjax.record: reports of shape {shape} do not fit the groups and windows {self._given}.")
      told: dict[str, tuple[int, ...]] = {"tracker": self._config.windows} if self._tracked else {}
      if self._given is not None:
        told["windows"] = tuple(self._given[0])
      for argument, sizes in told.items():
        if windows is not None and windows != sizes:
          raise ValueError(
            f"sedjax.record: the state's windows are {windows}, {argument}= says {sizes}; pass the arguments that "
            "track_spectral_edge was given."
          )
      if self._layout is None:
        self._check_seeds({"the state": seeds})
      numbers = {"seeds": seeds, "groups": shape[-2], "windows": shape[-1]}
      self._must_continue(numbers if windows is None else {**numbers, "windows": list(windows)})
      self._shape = shape
    if shape != self._shape:
      raise ValueError(f"sedjax.record: the reports' shape was {self._shape} and is now {shape}.")

  def _check_seeds(self, counts: Mapping[str, int]) -> None:
    """Of what is told: the first count that is known holds for all."""
    known = self._seed_count
    for what, count in counts.items():
      known = count if known is None else known
      if count != known:
        raise ValueError(f"sedjax.record: {what} has {counted(count, 'seed')}, the record has {known}.")
    self._seed_count = known

  def _problem(self, new: Mapping[str, int | list[Any] | None]) -> str | None:
    """How a layout, or the length of an axis of it, differs from that of the record to be continued."""
    if self._layout is None:
      return None
    for name, value in new.items():
      old: Any = self._layout[name]
      if isinstance(value, int):
        old = len(old)
      elif name == "sketch_id" and old and value:  # whose last number, of the leaves, is known from states alone
        old, value = old[: len(value)], value[: len(old)]
      if old != value:
        return f"its {name.replace('_', ' ')}, {old}, differ from this run's, {value}; give this run a new file"
    return None

  def _must_continue(self, new: Mapping[str, Any]) -> None:
    if (problem := self._problem(new)) is not None:
      raise ValueError(f"sedjax.record: cannot continue {self.path}: {problem}.")

  def _put(self, what: str, job: Callable[[], None]) -> None:
    if self._closing:
      raise ValueError(f"sedjax.record: the recorder of {self.path} is closed.")
    self._jobs.put((what, job))

  # ---- on the writer thread ----

  def _work(self) -> None:
    while (item := self._jobs.get()) is not None:
      what, job = item
      try:
        if self._error is None:  # after an error what still comes is dropped, so that no one waits
          job()
      except BaseException as error:
        self._error = (what, error)
      finally:
        self._jobs.task_done()
        del item, job

  def _write_row(self, step: int, report: Report, identity: Any, windows: Any) -> None:
    host = jax.device_get(report)
    if not self._checked:
      self._begin(self._new_layout(report, host, jax.device_get(identity), windows), step)
      self._checked = True
    layout = self._layout
    assert layout is not None
    sizes = {"step": 1, **{name: len(layout[f"{name}s"]) for name in ("seed", "window", "group")}}
    arranged = arrange(Report._make(np.asarray(field)[None] for field in host), sizes, layout["windows"])
    fields = [np.asarray(values, DTYPES.get(name, "<f4")).tobytes() for name, values in arranged.items()]
    self._journal.write(_journal.row_frame(step, fields))
    if self._sinks:
      self._tell(step, {tag: x for name in SCALARS for tag, x in _tagged(f"sedjax/{name}", arranged[name][0], layout)})

  def _write_series(self, step: int, scalars: Mapping[str, Any]) -> None:
    values = {name: np.asarray(value, np.float64) for name, value in jax.device_get(dict(scalars)).items()}
    self._write_note(_journal.note_payload(step, {"series": {name: value.tolist() for name, value in values.items()}}))
    if self._sinks:
      names = self._layout or {"seeds": self._seeds or list(range(self._seed_count or 0)), "windows": [], "groups": []}
      self._tell(step, {tag: x for name, value in values.items() for tag, x in _tagged(name, value, names)})

  def _write_note(self, payload: bytes) -> None:
    data = _journal.frame(_journal.NOTE, payload)
    if not self._begun and self._layout is not None:
      self._begin(self._layout | {"attrs": file_attributes(self._attrs)})
    if self._begun:
      self._journal.write(data)
    else:
      self._held.append(data)

  def _tell(self, step: int, scalars: dict[str, float]) -> None:
    for sink in list(self._sinks):
      try:
        sink(step, scalars)
      except Exception as error:
        self._sinks.remove(sink)
        self._failed.append(sink)
        what = f"sedjax.record: the sink {type(sink).__name__} failed at step {step} ({type(error).__name__}: {error})"
        try:
          warnings.warn(f"{what}; it is told no more, and the record goes on.", RuntimeWarning, stacklevel=2)
        except RuntimeWarning as warning:  # where warnings are errors; raised here it would stop the record
          print(warning, file=sys.stderr)

  def _begin(self, layout: dict[str, Any], first_row: int | None = None) -> None:
    """Writes this session's frame, which says what its rows are and at which step they begin, if that is known."""
    session = layout if first_row is None else layout | {"first_row": first_row}
    if self._begun:  # by a note, before a row told the rest
      session = session | {"same": True}
    self._journal.write(_journal.frame(_journal.SESSION, json.dumps(session).encode()))
    self._layout, self._begun = layout, True
    for data in self._held:
      self._journal.write(data)
    self._held.clear()

  def _new_layout(self, report: Report, host: Report, identity: Any, windows: Any) -> dict[str, Any]:
    groups, sketch_id = [], None
    if self._given is not None:
      windows, groups = self._given
    if identity is not None:
      labels, map_id = identity
      names = [storable(text) for text in _reports.group_names(labels)]
      groups = [WHOLE, *(f"group {name}" if name == WHOLE else name for name in names[1:])]
      sketch_id = np.reshape(map_id, (-1, map_id.shape[-1]))[0].tolist()
      told = list(self._config.sketch.sketch_id)
      if self._tracked and sketch_id[: len(told)] != told:
        raise ValueError(
          f"the state's sketch (kind, version, seed, dim) is {sketch_id[: len(told)]}, tracker= says {told}; pass the "
          "arguments that track_spectral_edge was given"
        )
    elif self._tracked:
      sketch_id = list(self._config.sketch.sketch_id)
    shape = np.shape(host.k_star)
    names = self._seeds if self._layout is None else self._layout["seeds"]
    seeds = names if names is not None else list(range(shape[0] if len(shape) == 3 else 1))
    new = {"windows": list(windows), "groups": groups, "seeds": seeds, "sketch_id": sketch_id}
    if (problem := self._problem(new)) is not None:
      raise ValueError(problem)
    devices = report.k_star.devices() if isinstance(report.k_star, jax.Array) else set()
    device = min(devices, key=lambda device: device.id, default=None)
    known = provenance(self._config if self._tracked else None, device)
    own = {"sketch_id": sketch_id} if sketch_id is not None else {}
    attrs = file_attributes({**known, **own, **self._attrs})
    return {"format": _journal.FORMAT, "version": VERSION, **new, "attrs": attrs}

  def _finish(self) -> None:
    path = self._journal.path
    try:
      with open(path, "rb") as file:
        contents = _journal.read(file, check_all=True)
        if contents is not None:
          from sedjax import _netcdf

          if contents.damaged > (self._journal.found or _journal.NOTHING).damaged:  # which was told at the beginning
            _journal.warn_of_damage(path, contents)
          empty = empty_dataset(contents.layout)
          _netcdf.write(self.path, empty, contents, rows_of(file, contents, empty))
      path.unlink()
    except Exception as error:
      raise RuntimeError(
        f"sedjax.record: {self.path} could not be made ({error}); everything recorded stays readable and can be "
        f"continued, in {path}."
      ) from error


def _tagged(name: str, values: np.ndarray, layout: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
  """Scalars of [seed, window, group], [seed] or [], each with a name that says which, as far as there are several."""
  parts = [[f"seed_{seed}" for seed in layout["seeds"]], [f"w{w}" for w in layout["windows"]], layout["groups"]]
  order = (2, 1, 0)  # the group comes first in names
  for place in np.ndindex(values.shape):
    words = {}
    for axis, i in enumerate(place):
      if values.shape[axis] > 1:
        words[axis] = parts[axis][i]
    yield "/".join([name, *(words[axis] for axis in order if axis in words)]), float(values[place])
