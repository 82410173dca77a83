"""Records: what is appended is read back, whatever happens in between."""

import copy
import errno
import functools
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import threading
import types

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr

import sedjax
import sedjax.sinks
from sedjax import _journal, _netcdf, _recordable
from sedjax.record import FIELDS, Recorder, open_record, to_dataset

ROOT = pathlib.Path(__file__).parents[1]
OPTIONS = {"window": (3, 5), "momentum": 0.9, "groups": lambda path: path.split("/")[0], "every": 1}
WINDOWS, GROUPS = (3, 5), ("all", "body", "head")
PARAMS = {"body": {"w": jnp.ones((4, 3))}, "head": {"w": jnp.ones(3)}}


@functools.cache
def run(seeds=None, steps=8):
  """States after each step, and their reports stacked; of random updates."""
  tx = optax.chain(optax.sgd(0.1), sedjax.track_spectral_edge(**OPTIONS))

  def one(key, state):
    keys = jax.random.split(key, 2)
    updates = {name: {"w": jax.random.normal(k, PARAMS[name]["w"].shape)} for name, k in zip(PARAMS, keys, strict=True)}
    return tx.update(updates, state)[1]

  step, state = one, tx.init(PARAMS)
  if seeds:
    step, state = jax.vmap(one), jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(seeds))
  step, states = jax.jit(step), []
  for i in range(steps):
    key = jax.random.key(i)
    state = step(jax.random.split(key, seeds) if seeds else key, state)
    states.append(state)
  reports = jax.tree.map(lambda *x: np.stack(x), *map(sedjax.get_reports, states))
  return states, reports


def report_of(step):
  """All numbers are the step; two groups, windows of 3 and 5."""
  shapes = {"singular_values": (2, 2, 5), "ratios": (2, 2, 4)}
  return sedjax.Report(**{name: np.full(shapes.get(name, (2, 2)), step, np.float32) for name in FIELDS})


def recorder_of(path, **options):
  return Recorder(path, windows=(3, 5), groups=("all", "head"), **options)


def record_numbers(path, steps, **series):
  with recorder_of(path) as recorder:
    for step in steps:
      recorder.append(step, report_of(step))
      if series:
        recorder.log(step, **{name: value * step for name, value in series.items()})


def journal_of(path):
  return path.with_name(path.name + ".journal")


def leave_journal(path, steps, **series):
  """What a killed process leaves: a journal that was never taken into the file."""
  recorder = recorder_of(path)
  for step in steps:
    recorder.append(step, report_of(step))
    if series:
      recorder.log(step, **{name: value * step for name, value in series.items()})
  recorder.flush()
  kept = path.with_name("kept")
  shutil.copyfile(journal_of(path), kept)
  before = path.read_bytes() if path.exists() else None
  recorder.close()
  path.unlink() if before is None else path.write_bytes(before)
  os.replace(kept, journal_of(path))


def steps_of(path):
  with open_record(path) as record:
    steps = record.step.values.tolist()
    for name in FIELDS:
      for step, values in zip(steps, record[name].values.reshape(len(steps), -1), strict=True):
        wanted = bool(step) if name == "edge_ambiguous" else step
        assert np.all((values == wanted) | np.isnan(values)), (name, step)
    return steps


def assert_same_record(a, b):
  xr.testing.assert_identical(a.drop_attrs(deep=False).load(), b.drop_attrs(deep=False).load())


# ---- what is written is read ----


@pytest.mark.parametrize("seeds", [None, 3])
@pytest.mark.parametrize("finished", [True, False])
def test_round_trip(tmp_path, seeds, finished):
  states, reports = run(seeds)
  path = tmp_path / "run.nc"
  names = {"seeds": [7, 8, 9]} if seeds else {}
  recorder = Recorder(path, tracker=OPTIONS, attrs={"model": "tiny", "lr": 0.1, "sizes": (1, 2)}, **names)
  for i, state in enumerate(states):
    recorder.append(10 * i, state)
  recorder.flush()
  if finished:
    recorder.close()
    assert os.listdir(tmp_path) == ["run.nc"]
  record = open_record(path)
  shape = {"seeds": names.get("seeds", [0]), "windows": WINDOWS, "groups": GROUPS}
  assert_same_record(record, to_dataset(reports, steps=range(0, 80, 10), **shape))
  attrs = record.attrs
  assert attrs["record_version"] == 1
  assert (attrs["model"], attrs["lr"], list(attrs["sizes"])) == ("tiny", 0.1, [1, 2])
  assert (attrs["every"], attrs["source"], attrs["momentum"]) == (1, "updates", 0.9)
  assert attrs["sketch"] == "count, dim 16384, seed 0"
  assert list(attrs["windows"]) == list(WINDOWS)
  counters = np.asarray(states[0][1].trackers["spectral_edge"].counters)  # of all seeds
  assert np.all(counters[..., -5:] == attrs["sketch_id"])
  assert {"sedjax_version", "jax_version", "jaxlib_version", "numpy_version", "optax_version"} <= set(attrs)
  assert {"device", "command", "created"} <= set(attrs)
  recorder.close()


@pytest.mark.parametrize("kept", [0, 4, 10])
def test_reading_is_lazy_and_takes_any_index(tmp_path, kept):
  """Of a file and a journal, joined; rows are read only where they are used."""
  path, plain = tmp_path / "run.nc", tmp_path / "plain.nc"
  record_numbers(path, range(6))
  leave_journal(path, range(kept, 10 + kept)) if kept != 4 else leave_journal(path, range(4, 10))
  record_numbers(plain, [*range(min(kept, 6)), *range(kept, 10 if kept == 4 else 10 + kept)])
  record, wanted = open_record(path), open_record(plain).load()
  for key in (
    {"step": 3},
    {"step": -1},
    {"step": slice(2, 9, 3)},
    {"step": slice(None, None, -1)},
    {"step": [5, 1, 4, 4]},
    {"step": []},
    {"window": 1, "group": [1, 0]},
    {"step": slice(3, 7), "seed": 0, "window": [1]},
  ):
    for name in ("gap_ratio", "ratios", "edge_ambiguous"):
      xr.testing.assert_identical(record[name].isel(key).load(), wanted[name].isel(key))
  assert not record._variables["ratios"]._in_memory


def test_series_and_events(tmp_path):
  path = tmp_path / "run.nc"
  states, _ = run(2)
  with Recorder(path, tracker=OPTIONS) as recorder:
    recorder.log(0, loss=jnp.asarray([3.0, 4.0]))  # before the first row
    recorder.event(0, "began")
    for i, state in enumerate(states):
      recorder.append(i, state)
    recorder.log(3, loss=np.asarray([1.0, np.nan]), rate=0.1)
    recorder.event(5, "the data shifted")
    recorder.event(5, "again")
    recorder.log(7, rate=jnp.float32(0.5))
    recorder.log(8, loss=np.ma.masked_equal([5, 6], 5), rate=np.ma.masked)
    recorder.flush()
    live = open_record(path).load()
  record = open_record(path)
  assert_same_record(live, record)
  assert record.loss.dims == ("loss_step", "seed")
  np.testing.assert_array_equal(record.loss, [[3, 4], [1, np.nan], [np.nan, 6]])
  assert record.loss_step.values.tolist() == [0, 3, 8]
  np.testing.assert_array_equal(record.rate, [0.1, 0.5, np.nan])
  assert record.rate_step.values.tolist() == [3, 7, 8]
  assert record.event.values.tolist() == ["began", "the data shifted", "again"]
  assert record.event_step.values.tolist() == [0, 5, 5]


def test_donated_states_and_no_sync(tmp_path, monkeypatch):
  """Nothing is fetched on the caller's thread, and buffers may be donated at once."""
  fetched, device_get = [], jax.device_get

  def spy(x):
    fetched.append(threading.current_thread().name)
    return device_get(x)

  tx = sedjax.track_spectral_edge(3)
  state = tx.init(PARAMS)
  step = jax.jit(lambda s, scale: tx.update(jax.tree.map(lambda x: x * scale, PARAMS), s)[1], donate_argnums=0)
  monkeypatch.setattr(jax, "device_get", spy)
  kept = []
  with Recorder(tmp_path / "run.nc") as recorder:
    for i in range(5):
      state = step(state, jnp.float32(i + 1))
      kept.append(sedjax.get_reports(state).last_update_norm)
      with jax.transfer_guard_device_to_host("disallow"):
        recorder.append(i, state)
        recorder.log(i, loss=kept[-1][0, 0])
  assert len(fetched) >= 10
  assert set(fetched) == {"sedjax record"}
  record = open_record(tmp_path / "run.nc")
  np.testing.assert_array_equal(record.last_update_norm.values.ravel(), np.ravel(kept))
  np.testing.assert_array_equal(record.loss.values, np.ravel(kept))


def test_a_state_of_the_core(tmp_path):
  with Recorder(tmp_path / "run.nc", tracker=OPTIONS) as recorder:
    recorder.append(0, run()[0][-1][1].trackers["spectral_edge"])
  assert open_record(tmp_path / "run.nc").group.values.tolist() == list(GROUPS)


def test_a_record_that_no_one_closed_is_finished_at_the_programs_end(tmp_path):
  """Also after an error, and of two recorders each its own."""
  code = """
import sys, jax.numpy as jnp, sedjax, sedjax.record
state = sedjax.track_spectral_edge(3).init({"w": jnp.ones(3)})
for path in sys.argv[1:]:
  recorder = sedjax.record.Recorder(path)
  for step in range(5):
    recorder.append(step, state)
  recorder.log(3, loss=0.5)
raise KeyError("mine")
"""
  paths = [tmp_path / "a.nc", tmp_path / "b.nc"]
  done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=200, check=False)
  assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "KeyError: 'mine'")
  assert sorted(os.listdir(tmp_path)) == ["a.nc", "b.nc"]
  for path in paths:
    with open_record(path) as record:
      assert record.step.values.tolist() == list(range(5))
      assert record.loss.values.tolist() == [0.5]


# ---- going on ----


@pytest.mark.parametrize("killed", [False, True])
def test_goes_on(tmp_path, killed):
  path = tmp_path / "run.nc"
  (leave_journal if killed else record_numbers)(path, range(5), loss=1.0)
  created = open_record(path).attrs["created"]
  with recorder_of(path, attrs={"again": 1}) as recorder:
    recorder.append(7, report_of(7))
  assert steps_of(path) == [0, 1, 2, 3, 4, 7]
  record = open_record(path)
  assert record.loss_step.values.tolist() == [0, 1, 2, 3, 4]
  assert (record.attrs["again"], record.attrs["created"]) == (1, created)


def test_goes_on_by_reports_of_a_tracker(tmp_path):
  """The tracker's arguments and its states name one sketch, though states alone know the leaves."""
  path, (states, _) = tmp_path / "run.nc", run()
  for i, state in enumerate(states):
    with Recorder(path, tracker=OPTIONS) as recorder:
      recorder.append(i, state)
  assert open_record(path).step.values.tolist() == list(range(len(states)))
  with pytest.raises(ValueError, match="its sketch id"):
    Recorder(path, tracker={**OPTIONS, "sketch": sedjax.sketch.count(64)})
  with pytest.raises(ValueError, match="its windows"):
    Recorder(path, tracker={**OPTIONS, "window": 9})


@pytest.mark.parametrize("killed", [False, True])
def test_what_comes_before_the_first_row_of_a_session_stays(tmp_path, killed):
  """Series and events of a step are recorded before its row, in a record that goes on, too."""
  path = tmp_path / "run.nc"
  for steps in (range(1, 4), range(4, 7)):
    recorder = recorder_of(path, attrs={f"from_{steps[0]}": 1})
    for step in steps:
      recorder.log(step, loss=float(step))
      recorder.event(step + 1, f"after {step}")
      recorder.append(step, report_of(step))
    recorder.flush()
    if not killed or steps[0] == 1:
      recorder.close()
  record = open_record(path).load()
  assert record.step.values.tolist() == record.loss.values.tolist() == [1, 2, 3, 4, 5, 6]
  assert record.event.values.tolist() == ["after 1", "after 2", *(f"after {step}" for step in range(4, 7))]
  assert record.attrs["from_1"] == record.attrs["from_4"] == 1
  recorder.close()
  assert_same_record(open_record(path), record)


def test_what_is_recorded_may_be_overwritten_at_once(tmp_path):
  path, buffer = tmp_path / "run.nc", np.zeros(())
  donate = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
  with recorder_of(path) as recorder:
    for step in range(1, 7):
      buffer[...] = step
      recorder.log(step, loss=buffer)
      report = report_of(step)
      if step % 2:
        report = jax.tree.map(jnp.asarray, report)
        recorder.append(step, report)
        donate(report)
      else:
        recorder.append(step, report)
        report.gap_ratio[:] = 0
  assert open_record(path).loss.values.tolist() == steps_of(path) == [1, 2, 3, 4, 5, 6]


def test_a_link_stays(tmp_path):
  path, link = tmp_path / "disk" / "run.nc", tmp_path / "run.nc"
  path.parent.mkdir()
  link.symlink_to(path)
  for steps in (range(3), range(3, 5)):
    record_numbers(link, steps)
    assert link.is_symlink()
  assert steps_of(link) == steps_of(path) == [0, 1, 2, 3, 4]


def test_one_recorder_at_a_time_through_links_too(tmp_path):
  (tmp_path / "real").mkdir()
  real, link = tmp_path / "real" / "run.nc", tmp_path / "run.nc"
  link.symlink_to(real)
  with recorder_of(real) as recorder:
    recorder.append(0, report_of(0))
    recorder.flush()
    with pytest.raises(ValueError, match="another recorder is writing it"):
      recorder_of(link)
    assert steps_of(link) == [0]
  with recorder_of(link) as recorder:
    recorder.append(1, report_of(1))
    recorder.flush()
    assert steps_of(real) == [0, 1]


def test_a_record_that_xarray_saved_is_continued(tmp_path):
  """`Dataset.to_netcdf` gives the steps a fixed length unless it is told otherwise."""
  reports = jax.tree.map(lambda *x: np.stack(x), report_of(0), report_of(1))
  record = to_dataset(reports, steps=[0, 1], windows=(3, 5), groups=("all", "head"))
  record["loss"] = ("loss_step", [0.5])
  record.assign_coords(loss_step=[1]).to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
  with recorder_of(tmp_path / "run.nc") as recorder:
    recorder.append(2, report_of(2))
    recorder.log(2, loss=0.25)
  assert steps_of(tmp_path / "run.nc") == [0, 1, 2]
  with open_record(tmp_path / "run.nc") as record:
    assert record.loss.values.tolist() == [0.5, 0.25]


def test_an_interrupted_close_can_be_called_again(tmp_path, monkeypatch):
  recorder = recorder_of(tmp_path / "run.nc")
  recorder.append(0, report_of(0))

  def interrupted():
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(recorder._thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
      recorder.close()
  with pytest.raises(ValueError, match=r"the recorder .* is closed"):
    recorder.append(1, report_of(1))
  recorder.close()
  assert os.listdir(tmp_path) == ["run.nc"]
  assert steps_of(tmp_path / "run.nc") == [0]


def test_a_forked_process_leaves_the_record_alone(tmp_path):
  """Its copies of the recorder and of the program's exit would take the journal from its parent."""
  code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_record import recorder_of, report_of
recorder = recorder_of({str(tmp_path / "run.nc")!r})
recorder.append(0, report_of(0))
recorder.flush()
for end in (recorder.close, lambda: recorder.append(5, report_of(5)), recorder.flush):  # its exit closes, too
  if not (child := os.fork()):
    try:
      end()
    except RuntimeError as error:
      os._exit(9 * ("a forked process cannot record" in str(error)))
    os._exit(8)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
recorder.append(1, report_of(1))
recorder.close()
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ["8", "9", "9"]
  assert steps_of(tmp_path / "run.nc") == [0, 1]


def test_another_working_directory(tmp_path, monkeypatch):
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path)
  recorder = recorder_of("run.nc")
  monkeypatch.chdir(tmp_path / "elsewhere")
  recorder.append(0, report_of(0))
  recorder.close()
  assert steps_of(tmp_path / "run.nc") == [0]


def test_a_group_named_all_is_not_the_whole_model(tmp_path):
  tx = sedjax.track_spectral_edge(3, groups=lambda _: "all")
  with Recorder(tmp_path / "run.nc") as recorder:
    recorder.append(0, tx.init(PARAMS))
  assert open_record(tmp_path / "run.nc").group.values.tolist() == ["all", "group all"]


@pytest.mark.parametrize("killed", [False, True])
def test_going_back_replaces(tmp_path, killed):
  path = tmp_path / "run.nc"
  leave = leave_journal if killed else record_numbers
  with recorder_of(path) as recorder:
    recorder.event(0, "began")
    recorder.append(0, report_of(0))
    recorder.event(5, "is forgotten")
    recorder.log(6, other=1.0)
  leave(path, range(1, 8), loss=1.0)
  leave(path, [4, 6, 9], loss=10.0)
  assert steps_of(path) == [0, 1, 2, 3, 4, 6, 9]
  record = open_record(path)
  assert record.loss.values.tolist() == [1, 2, 3, 40, 60, 90]
  assert record.event.values.tolist() == ["began"]
  assert record.sizes["other_step"] == 0
  record.close()
  with recorder_of(path):
    pass  # takes what was left into the file
  assert not journal_of(path).exists()
  assert steps_of(path) == [0, 1, 2, 3, 4, 6, 9]
  assert open_record(path).event.values.tolist() == ["began"]


def test_going_back_in_two_killed_sessions_empties_a_series(tmp_path):
  path = tmp_path / "run.nc"
  leave_journal(path, [1, 3], loss=1.0)
  with recorder_of(path) as recorder:
    recorder.append(2, report_of(2))
    recorder.flush()
    assert steps_of(path) == [1, 2]
    assert open_record(path).loss.values.tolist() == [1]
  leave_journal(tmp_path / "all.nc", [3], loss=1.0)
  with recorder_of(tmp_path / "all.nc") as recorder:
    recorder.append(2, report_of(2))
    recorder.flush()
    assert open_record(tmp_path / "all.nc").sizes["loss_step"] == 0
  assert open_record(tmp_path / "all.nc").sizes["loss_step"] == 0
  assert steps_of(tmp_path / "all.nc") == [2]
  with recorder_of(tmp_path / "all.nc") as recorder:
    recorder.log(2, loss=0.5)
  assert open_record(tmp_path / "all.nc").loss.values.tolist() == [0.5]


def test_series_can_be_added_to_a_finished_record(tmp_path):
  path = tmp_path / "run.nc"
  record_numbers(path, range(5), loss=1.0)
  with recorder_of(path, attrs={"model": "tiny"}) as recorder:
    recorder.log(1, accuracy=0.5)
    recorder.log(3, loss=7.0)
    recorder.event(2, "remembered")
  assert steps_of(path) == [0, 1, 2, 3, 4]
  record = open_record(path)
  assert record.accuracy.values.tolist() == [0.5]
  assert record.loss.values.tolist() == [0, 1, 2, 7]
  assert record.event_step.values.tolist() == [2]
  assert record.attrs["model"] == "tiny"


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("first", ["number", "seeds"])
def test_a_series_may_be_over_seeds_in_some_sessions_alone(tmp_path, first, again):
  path = tmp_path / "run.nc"
  reports = jax.tree.map(lambda x: np.stack([x, x]), report_of(1))
  values = {"number": 0.5, "seeds": np.asarray([1.0, 2.0])}
  second = "seeds" if first == "number" else "number"
  for step, kind in ((3, first), (3 if again else 5, second), (7, first)):
    with recorder_of(path) as recorder:
      recorder.append(step, reports)
      recorder.log(step, loss=values[kind])
      recorder.flush()
      live = open_record(path).load()
  expected = [np.broadcast_to(values[kind], 2) for kind in ([] if again else [first]) + [second, first]]
  for record in (live, open_record(path), xr.load_dataset(path, engine="h5netcdf")):
    assert record.loss.dims == ("loss_step", "seed")
    np.testing.assert_array_equal(record.loss, expected)
    np.testing.assert_array_equal(record.loss_step, [3, 7] if again else [3, 5, 7])
    assert record.loss.long_name == "loss"


@pytest.mark.parametrize(
  "copied", [copy.deepcopy, lambda x: x.copy(deep=True), lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("finished", [True, False])
def test_copies_have_everything_in_memory(tmp_path, copied, finished):
  path = tmp_path / "run.nc"
  record_numbers(path, range(4), loss=1.0)
  if not finished:
    leave_journal(path, range(2, 6), loss=2.0)
  with open_record(path) as record:
    one, part = copied(record), copied(record.isel(step=[1], window=1))
    wanted = record.load()
  shutil.rmtree(tmp_path)
  xr.testing.assert_identical(one, wanted)
  xr.testing.assert_identical(part, wanted.isel(step=[1], window=1))
  one.close()


def test_a_kill_between_file_and_journal_duplicates_nothing(tmp_path):
  path = tmp_path / "run.nc"
  record_numbers(path, range(6), loss=1.0)
  leave_journal(path, range(3, 8), loss=2.0)
  recorder = recorder_of(path)
  recorder.append(6, report_of(6))
  recorder.append(8, report_of(8))
  recorder.event(8, "once")
  recorder.flush()
  journal = journal_of(path).read_bytes()
  recorder.close()
  wanted = open_record(path).load()
  journal_of(path).write_bytes(journal)
  with open_record(path) as both:
    assert_same_record(both, wanted)
  with recorder_of(path):
    pass
  with open_record(path) as again:
    assert_same_record(again, wanted)
  assert steps_of(path) == [0, 1, 2, 3, 4, 5, 6, 8]


def test_many_blocks(tmp_path, monkeypatch):
  """Blocks that do not begin where a chunk does, and steps that are left out."""
  monkeypatch.setattr(_netcdf, "LONGEST_CHUNK", 4)
  path = tmp_path / "run.nc"
  record_numbers(path, range(10))
  record_numbers(path, range(7, 30, 2))
  assert steps_of(path) == [*range(7), *range(7, 30, 2)]


# ---- damage ----


@pytest.fixture(scope="module")
def small_journal(tmp_path_factory):
  """A journal's bytes, and where each of its rows ends."""
  path = tmp_path_factory.mktemp("journal") / "run.nc"
  leave_journal(path, range(4))
  with open(journal_of(path), "rb") as file:
    ends = [frame.end for frame in _journal.frames(file) if frame.kind == _journal.ROW]
  return journal_of(path).read_bytes(), ends


def test_a_journal_cut_anywhere_has_the_rows_before(tmp_path, small_journal):
  data, ends = small_journal
  path = tmp_path / "run.nc"
  for length in range(ends[1] - 1, len(data) + 1):
    journal_of(path).write_bytes(data[:length])
    with open(journal_of(path), "rb") as file:
      contents = _journal.read(file)
    assert [row.step for row in contents.rows] == list(range(sum(end <= length for end in ends))), length
    if length % 17 == 0 or length in ends:
      assert steps_of(path) == [row.step for row in contents.rows]


def test_a_damaged_byte_costs_the_row_that_it_is_in(tmp_path, small_journal):
  data, ends = small_journal
  path = tmp_path / "run.nc"
  for at in range(ends[0], len(data)):
    damaged = bytearray(data)
    damaged[at] ^= 0x41
    journal_of(path).write_bytes(damaged)
    with open(journal_of(path), "rb") as file:
      contents = _journal.read(file)
    lost = sum(end <= at for end in ends)
    assert [row.step for row in contents.rows] == [step for step in range(4) if step != lost], at
    # What is torn at the end is no damage, but what a kill leaves.
    assert contents.damaged == (ends[lost] - ends[lost - 1] if lost < 3 else 0)


def test_damage_is_told_and_the_rest_goes_on(tmp_path, small_journal):
  data, ends = small_journal
  damaged = bytearray(data)
  damaged[ends[1] + 20] ^= 1
  path = tmp_path / "run.nc"
  journal_of(path).write_bytes(damaged)
  with pytest.warns(RuntimeWarning, match=f"{ends[2] - ends[1]} bytes of .* are damaged"):
    assert steps_of(path) == [0, 1, 3]
  with pytest.warns(RuntimeWarning, match="are damaged"):
    record_numbers(path, [4])
  assert steps_of(path) == [0, 1, 3, 4]


def test_a_long_journal_is_checked_where_it_is_read(tmp_path, monkeypatch, small_journal):
  """Opening reads the heads of its rows; what is damaged is never read as numbers, and closing leaves it out."""
  data, ends = small_journal
  damaged = bytearray(data)
  damaged[ends[1] - 10] ^= 1  # a value of the last field, in row 1
  path = tmp_path / "run.nc"
  journal_of(path).write_bytes(damaged)
  monkeypatch.setattr(_journal, "CHECKED", ends[3] - ends[2])
  record = open_record(path)
  assert record.step.values.tolist() == [0, 1, 2, 3]
  assert record.gap_ratio.values[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
  with pytest.raises(ValueError, match=r"status of step 1 in .*run\.nc\.journal is damaged; open the record with"):
    _ = record.status.values
  assert (record.status.isel(step=[0, 2, 3]).values[:, 0, 0, 0] == [0, 2, 3]).all()
  record.close()
  recorder = recorder_of(path)
  with pytest.warns(RuntimeWarning, match=f"{ends[1] - ends[0]} bytes of .* are damaged"):
    recorder.close()
  assert steps_of(path) == [0, 2, 3]


def test_damage_does_not_bring_back_what_was_replaced(tmp_path):
  """Also where it is the row with which a later session began."""
  path = tmp_path / "run.nc"
  leave_journal(path, range(6), loss=1)
  first = len(journal_of(path).read_bytes())
  leave_journal(path, range(3, 6), loss=2)
  data = journal_of(path).read_bytes()
  with open(journal_of(path), "rb") as file:
    session, row, *_ = (found for found in _journal.frames(file) if found.start >= first)
  assert (session.kind, row.kind) == (_journal.SESSION, _journal.ROW)
  damaged = bytearray(data)
  damaged[row.end - 5] ^= 1
  journal_of(path).write_bytes(damaged)
  with pytest.warns(RuntimeWarning, match="are damaged"):
    record = open_record(path)
  assert record.step.values.tolist() == [0, 1, 2, 4, 5]
  assert record.loss.values.tolist() == [0, 1, 2, 6, 8, 10]
  record.close()
  # A session that was killed before its first row has replaced nothing.
  journal_of(path).write_bytes(data[: row.end - 5])
  assert steps_of(path) == list(range(6))


def test_a_damaged_first_row_costs_no_other_however_long_rows_are(tmp_path):
  """Rows of 2.5 MB, more than what is sought for other frames."""
  path, groups = tmp_path / "run.nc", [f"group {i}" for i in range(12_000)]
  shapes = {"singular_values": (len(groups), 2, 5), "ratios": (len(groups), 2, 4)}
  recorder = Recorder(path, windows=(3, 5), groups=groups)
  for step in range(3):
    fields = {name: np.full(shapes.get(name, (len(groups), 2)), step, np.float32) for name in FIELDS}
    recorder.append(step, sedjax.Report(**fields))
    if step == 0:
      recorder.flush()
      damaged = journal_of(path).stat().st_size - 1000
  recorder.flush()
  data = bytearray(journal_of(path).read_bytes())
  recorder.close()
  path.unlink()
  data[damaged] ^= 1
  journal_of(path).write_bytes(data)
  with pytest.warns(RuntimeWarning, match=r"bytes of .* are damaged"):
    Recorder(path).close()
  assert steps_of(path) == [1, 2]


def test_a_damaged_beginning_is_refused_and_kept(tmp_path, small_journal):
  damaged = bytearray(small_journal[0])
  damaged[20] ^= 1
  path = tmp_path / "run.nc"
  journal_of(path).write_bytes(damaged)
  for use in (open_record, functools.partial(record_numbers, steps=[4])):
    with pytest.raises(ValueError, match="does not begin as a sedjax journal does"):
      use(path)
  assert journal_of(path).read_bytes() == damaged


def test_a_damaged_session_frame(tmp_path):
  """What the second session recorded again is still what counts."""
  path = tmp_path / "run.nc"
  leave_journal(path, range(4))
  first = len(journal_of(path).read_bytes())
  leave_journal(path, range(2, 6), loss=3)
  damaged = bytearray(journal_of(path).read_bytes())
  damaged[first + 20] ^= 1
  journal_of(path).write_bytes(damaged)
  with pytest.warns(RuntimeWarning, match="are damaged"):
    record = open_record(path)
  assert record.step.values.tolist() == list(range(6))
  assert record.loss.values.tolist() == [6, 9, 12, 15]
  record.close()


def test_a_journal_cut_in_its_first_frame_is_begun_anew(tmp_path, small_journal):
  path = tmp_path / "run.nc"
  for length in (0, 1, 8, 9, 100):
    journal_of(path).write_bytes(small_journal[0][:length])
    with pytest.raises(FileNotFoundError, match="has no rows yet"):
      open_record(path)
    record_numbers(path, [3])
    assert steps_of(path) == [3]
    path.unlink()


def test_goes_on_after_a_torn_row(tmp_path, small_journal):
  path = tmp_path / "run.nc"
  journal_of(path).write_bytes(small_journal[0][:-5])
  record_numbers(path, [3, 4])
  assert steps_of(path) == [0, 1, 2, 3, 4]


def test_full_disk(tmp_path, monkeypatch):
  """A row that does not fit leaves nothing of itself, and the next call says so."""
  path, write = tmp_path / "run.nc", os.write
  recorder = recorder_of(path)
  for step in range(3):
    recorder.append(step, report_of(step))
  recorder.flush()
  room = [50]

  def full(fd, data):
    if room[0] == 0:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    part = data[: room[0]]
    room[0] -= len(part)
    return write(fd, part)

  monkeypatch.setattr(_journal.os, "write", full)
  recorder.append(3, report_of(3))
  recorder._jobs.join()
  monkeypatch.undo()
  words = (
    r"step 3 could not be written to .*run.nc \(No space left on device\); what was recorded before stays readable"
  )
  for call in (lambda: recorder.append(4, report_of(4)), recorder.flush, recorder.close):
    with pytest.raises(RuntimeError, match=words):
      call()
  assert steps_of(path) == [0, 1, 2]
  record_numbers(path, [3])
  assert steps_of(path) == [0, 1, 2, 3]


def test_no_room_for_the_file(tmp_path, monkeypatch):
  path = tmp_path / "run.nc"
  record_numbers(path, range(3))

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as context:
    context.setattr(_netcdf, "_extend", full)
    recorder = recorder_of(path)
    recorder.append(3, report_of(3))
    with pytest.raises(RuntimeError, match=r"could not be made .*No space left on device.*stays readable"):
      recorder.close()
  assert sorted(os.listdir(tmp_path)) == ["run.nc", "run.nc.journal"]
  assert steps_of(path) == [0, 1, 2, 3]
  record_numbers(path, [4])
  assert steps_of(path) == [0, 1, 2, 3, 4]


def test_a_disk_that_may_be_too_full_is_told_before_hdf5_finds_out(tmp_path, monkeypatch):
  path = tmp_path / "run.nc"
  recorder = recorder_of(path)
  recorder.append(0, report_of(0))
  with monkeypatch.context() as context:
    context.setattr(_netcdf.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=100_000))
    with pytest.raises(RuntimeError, match=r"could not be made .*no space left on the disk: it may need [\d,]+ bytes"):
      recorder.close()
  assert os.listdir(tmp_path) == ["run.nc.journal"]
  record_numbers(path, [1])
  assert steps_of(path) == [0, 1]


def kill_writers(folder, kills, seed):
  command = [sys.executable, "tests/record_worker.py", str(folder), str(kills), str(seed)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380, check=False)
  assert done.returncode == 0, done.stderr
  counts = json.loads(done.stdout)
  assert counts["kills"] == kills
  assert counts["rows reported"] > kills
  assert counts["with a journal"] > 0
  return counts


def test_killed_writers_lose_no_row(tmp_path):
  assert kill_writers(tmp_path, 20, 0)["rows reported"] > 20


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_killed_writers_lose_no_row(tmp_path, seed):
  counts = kill_writers(tmp_path, 50, seed)
  assert counts["in the conversion"] > 5
  assert counts["with a file"] > 5


# ---- what bad input gets ----


def test_opening_what_is_no_record(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no record"):
    open_record(tmp_path / "none.nc")
  (tmp_path / "text.nc").write_text("hello" * 100)
  with pytest.raises(ValueError, match=r"cannot read .*text.nc"):
    open_record(tmp_path / "text.nc")
  xr.Dataset({"a": ("x", [1])}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
  for use in (open_record, recorder_of):
    with pytest.raises(ValueError, match=r"other.nc is not a record"):
      use(tmp_path / "other.nc")
  with h5py.File(tmp_path / "plain.h5", "w") as file:
    file["x"] = np.zeros((3, 4))
  with pytest.raises(ValueError, match=r"cannot read .*plain.h5: variable 'x' has axes without names"):
    open_record(tmp_path / "plain.h5")
  for version in ("x", [1, 2], 1.5):
    xr.Dataset({"a": ("x", [1])}, attrs={"record_version": version}).to_netcdf(tmp_path / "odd.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match=r"odd.nc is not a record"):
      open_record(tmp_path / "odd.nc")
  payload = json.dumps({"format": "another"}).encode()
  journal_of(tmp_path / "run.nc").write_bytes(_journal.frame(_journal.SESSION, payload))
  with pytest.raises(ValueError, match="does not begin as a sedjax journal"):
    open_record(tmp_path / "run.nc")


def test_a_cut_file_is_refused(tmp_path):
  path = tmp_path / "run.nc"
  record_numbers(path, range(3))
  data = path.read_bytes()
  for length in (0, 7, 100, len(data) // 2, len(data) - 1):
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match="cannot read"):
      open_record(path)


@pytest.mark.parametrize("finished", [True, False])
def test_newer_version(tmp_path, monkeypatch, finished):
  path = tmp_path / "run.nc"
  for module in ("_dataset", "record"):
    monkeypatch.setattr(f"sedjax.{module}.VERSION", 2)
  (record_numbers if finished else leave_journal)(path, range(3))
  monkeypatch.undo()
  for use in (open_record, recorder_of):
    with pytest.raises(ValueError, match="record of version 2, this library reads up to 1; update sedjax"):
      use(path)


def test_a_newer_journal_is_refused_whatever_its_frames_are_and_stays(tmp_path, monkeypatch):
  path = tmp_path / "run.nc"
  for module in ("_dataset", "record"):
    monkeypatch.setattr(f"sedjax.{module}.VERSION", 2)
  leave_journal(path, range(3))
  monkeypatch.undo()
  data = journal_of(path).read_bytes() + _journal.frame(b"X", b"something new") + b"torn"
  journal_of(path).write_bytes(data)
  for use in (open_record, recorder_of):
    with pytest.raises(ValueError, match="record of version 2, this library reads up to 1; update sedjax"):
      use(path)
  assert journal_of(path).read_bytes() == data


def test_a_refused_log_leaves_nothing_behind(tmp_path):
  with recorder_of(tmp_path / "run.nc") as recorder:
    with pytest.raises(ValueError, match="b has 2 seeds, the record has 3"):
      recorder.log(0, a=np.ones(3), b=np.ones(2))
    recorder.append(0, report_of(0))
  assert steps_of(tmp_path / "run.nc") == [0]


def test_series_without_a_row_are_told(tmp_path):
  recorder = recorder_of(tmp_path / "run.nc")
  recorder.log(1, loss=1.0)
  recorder.event(2, "began")
  with pytest.warns(RuntimeWarning, match=r"run\.nc was not made: 2 calls of log and event, but no append"):
    recorder.close()
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("finished", [True, False])
def test_a_number_among_arrays_is_that_of_all_seeds(tmp_path, finished):
  path = tmp_path / "run.nc"
  recorder = recorder_of(path)
  recorder.append(1, report_of(1))
  recorder.log(1, loss=0.5)
  recorder.log(2, loss=np.array([0.25]))
  with pytest.raises(ValueError, match="loss has 2 seeds, the record has 1"):
    recorder.log(3, loss=np.zeros(2))
  recorder.flush()
  if finished:
    recorder.close()
    recorder.flush()  # has nothing to wait for
  with open_record(path) as record:
    np.testing.assert_array_equal(record.loss.values, [[0.5], [0.25]])
  recorder.close()


def test_text_that_hdf5_cannot_store(tmp_path):
  path = tmp_path / "run.nc"
  with recorder_of(path, attrs={"note": "a\0b", "large": 2**70, "limits": [0.5, np.inf]}) as recorder:
    recorder.append(1, report_of(1))
    recorder.event(1, "half \ud800")
    recorder.event(2, 7)
  with open_record(path) as record:
    assert record.event.values.tolist() == ["half \\ud800", "7"]
    np.testing.assert_array_equal(record.attrs["limits"], [0.5, np.inf])
    assert (record.attrs["note"], record.attrs["large"]) == ("a\\0b", str(2**70))
  assert _recordable.file_attributes(
    {"flags": [True, False], "rates": (np.float32(0.5), np.int64(3)), "one": True}
  ) == {
    "flags": [1, 0],
    "rates": [0.5, 3],
    "one": 1,
  }
  with pytest.raises(ValueError, match="an attribute cannot be named 'record_version'"):
    recorder_of(tmp_path / "other.nc", attrs={"record_version": 99})


@pytest.mark.parametrize("name", ["source", "every", "momentum", "windows", "sketch", "sketch_id"])
def test_attributes_that_the_tracker_has(tmp_path, name):
  """Else the record could not be continued, or the page would go by what the user called so."""
  with pytest.raises(ValueError, match=f"attribute '{name}' is what tracker= says; give yours another name"):
    Recorder(tmp_path / "run.nc", tracker=OPTIONS, attrs={name: "imagenet"})
  assert list(tmp_path.iterdir()) == []


def test_steps_ascend(tmp_path):
  with recorder_of(tmp_path / "run.nc") as recorder:
    recorder.append(3, report_of(3))
    recorder.log(3, loss=1.0)
    for step in (3, 2):
      with pytest.raises(ValueError, match=f"steps must ascend, append got {step} after 3"):
        recorder.append(step, report_of(step))
      with pytest.raises(ValueError, match=f"steps must ascend, log loss got {step} after 3"):
        recorder.log(step, loss=1.0)
    with pytest.raises(ValueError, match="step must be an int in 0"):
      recorder.append(-1, report_of(0))
    with pytest.raises(TypeError, match="step must be a Python int, got an array"):
      recorder.append(jnp.int32(4), report_of(4))
    with pytest.raises(TypeError, match=r"step must be an int, got 4\.0"):
      recorder.append(4.0, report_of(4))
  assert steps_of(tmp_path / "run.nc") == [3]


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ({"windows": (3, 6)}, "its windows, .* differ"),
    ({"groups": ("all", "tail")}, "its groups, .* differ"),
    ({"seeds": [5]}, "its seeds, .* differ"),
    ({"tracker": {"sketch": sedjax.sketch.exact()}}, "its sketch id, .* differ"),
  ],
)
def test_another_run_is_refused(tmp_path, options, words):
  path = tmp_path / "run.nc"
  record_numbers(path, range(3))
  with pytest.raises(ValueError, match=words):
    Recorder(path, **{"windows": (3, 5), "groups": ("all", "head"), **options})
  assert steps_of(path) == [0, 1, 2]


@pytest.mark.parametrize(
  ("tracker", "vmapped", "words"),
  [
    (sedjax.track_spectral_edge((3, 6), groups=lambda _: "head"), False, "its windows, .* differ"),
    (sedjax.track_spectral_edge((3, 5)), False, "its groups, 2, differ from this run's, 1"),
    (sedjax.track_spectral_edge((3, 5), groups=lambda _: "head"), True, "its seeds, 1, differ from this run's, 2"),
  ],
)
def test_a_state_of_another_run_is_refused_at_once(tmp_path, tracker, vmapped, words):
  path = tmp_path / "run.nc"
  record_numbers(path, range(3))
  init = jax.vmap(lambda _: tracker.init(PARAMS)) if vmapped else lambda _: tracker.init(PARAMS)
  with Recorder(path) as recorder, pytest.raises(ValueError, match=words):
    recorder.append(3, init(jnp.arange(2)))
  assert steps_of(path) == [0, 1, 2]


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("name", "value"), [("every", 7), ("source", "params")])
def test_rows_of_another_rhythm_or_source_are_refused(tmp_path, finished, name, value):
  path, options = tmp_path / "run.nc", {"window": (3, 5)}
  with Recorder(path, tracker=options, windows=(3, 5), groups=("all", "head")) as recorder:
    recorder.append(0, report_of(0))
    recorder.flush()
    shutil.copyfile(journal_of(path), tmp_path / "kept")
  if not finished:
    path.unlink()
    os.replace(tmp_path / "kept", journal_of(path))
  with pytest.raises(ValueError, match=f"its {name}, .*, is not this run's, {value}; give this run a new file"):
    Recorder(path, tracker={**options, name: value})
  Recorder(path, tracker=options).close()


def test_a_sketch_that_is_not_the_states_is_refused(tmp_path):
  tx = sedjax.track_spectral_edge(3)
  recorder = Recorder(tmp_path / "run.nc", tracker={"window": 3, "sketch": sedjax.sketch.exact()})
  recorder.append(0, tx.init({"w": jnp.ones(3)}))
  with pytest.raises(RuntimeError, match=r"the state's sketch .* is \[0, 4, 0, 16384\], tracker= says"):
    recorder.close()


@pytest.mark.parametrize(
  ("options", "words"),
  [({"groups": lambda _: "tail"}, "its groups, .* differ"), ({"sketch": sedjax.sketch.count(64)}, "its sketch id, .*")],
)
def test_what_only_the_state_tells_is_raised_by_the_next_call(tmp_path, options, words):
  path = tmp_path / "run.nc"
  first = sedjax.track_spectral_edge((3, 5), groups=lambda _: "head").init(PARAMS)
  with Recorder(path) as recorder:
    recorder.append(0, first)
  recorder = Recorder(path)
  recorder.append(1, sedjax.track_spectral_edge((3, 5), **{"groups": lambda _: "head", **options}).init(PARAMS))
  with pytest.raises(RuntimeError, match=words):
    recorder.flush()
  with pytest.raises(RuntimeError, match=words):
    recorder.close()
  assert open_record(path).step.values.tolist() == [0]


def test_reports_with_the_windows_of_the_tracker(tmp_path):
  options = {"window": (3, 5), "groups": lambda _: "head"}
  with Recorder(tmp_path / "grouped.nc", tracker=options, groups=("all", "head")) as recorder:
    recorder.append(0, report_of(0))
  record = open_record(tmp_path / "grouped.nc")
  assert (record.window.values.tolist(), record.group.values.tolist()) == ([3, 5], ["all", "head"])
  with Recorder(tmp_path / "whole.nc", tracker={"window": (3, 5)}) as recorder:
    recorder.append(0, jax.tree.map(lambda x: x[:1], report_of(0)))
  record = open_record(tmp_path / "whole.nc")
  assert (record.window.values.tolist(), record.group.values.tolist()) == ([3, 5], ["all"])


def test_wrong_arguments(tmp_path):
  path = tmp_path / "run.nc"
  state = run()[0][-1]
  with Recorder(path, tracker={"window": 4}) as recorder:
    with pytest.raises(ValueError, match=r"windows are \(3, 5\), tracker= says \(4,\)"):
      recorder.append(0, state)
    with pytest.raises(ValueError, match="no tracker in this optimizer state"):
      recorder.append(0, {"w": jnp.ones(3)})
    for name in ("step", "gap_ratio", "event", "loss_step", "a b", "val/loss"):
      with pytest.raises((ValueError, TypeError), match=r"cannot be named|multiple values"):
        recorder.log(0, **{name: 1.0})
    for value in ("high", np.ones((2, 2)), None, np.zeros(0)):
      with pytest.raises(ValueError, match="loss must be a number or an array over seeds"):
        recorder.log(0, loss=value)
  assert not path.exists()
  grouped = {"window": (3, 5), "groups": lambda _: "head"}
  for options in ({}, {"tracker": grouped}):
    with (
      Recorder(path, **options) as recorder,
      pytest.raises(ValueError, match=r"pass tracker=… or windows=… to Recorder, and"),
    ):
      recorder.append(0, report_of(0))
  with (
    Recorder(path, tracker={"window": (3, 5)}) as recorder,
    pytest.raises(ValueError, match=r"reports of shape \(2, 2\)"),
  ):
    recorder.append(0, report_of(0))
  with Recorder(path, windows=(4, 5), groups=["all", "head", "body"]) as recorder:
    with pytest.raises(ValueError, match=r"windows are \(3, 5\), windows= says \(4, 5\)"):
      recorder.append(0, state)
  with Recorder(path, seeds=[1, 2]) as recorder, pytest.raises(ValueError, match="the state holds 1 seed, but"):
    recorder.append(0, state)
  with Recorder(path, tracker=OPTIONS) as recorder:
    with pytest.raises(ValueError, match="called inside jit"):
      jax.jit(lambda s: recorder.append(0, s))(state)
    with pytest.raises(ValueError, match="called inside jit"):
      jax.jit(lambda x: recorder.log(0, loss=x))(1.0)
    recorder.append(0, state)
    with pytest.raises(ValueError, match=r"reports' shape was \(3, 2\) and is now \(3, 3, 2\)"):
      recorder.append(1, run(3)[0][-1])
    with pytest.raises(ValueError, match="another recorder is writing it"):
      Recorder(path)
  with pytest.raises(ValueError, match=r"recorder of .*run.nc is closed"):
    recorder.append(2, state)
  with pytest.raises(ValueError, match=r"cannot write .*none/run.nc: No such file"):
    Recorder(tmp_path / "none" / "run.nc")
  with pytest.raises(ValueError, match="names some twice"):
    Recorder(path, seeds=["a", "a"])
  for seeds in ([[1, 2], [3, 4]], [2**63, 1], [2**63], [2**70], [1.5, 2.5], "ab"):
    with pytest.raises(ValueError, match="seeds must be a list of 64-bit ints or of texts, got"):
      Recorder(path, seeds=seeds)
  with pytest.raises(ValueError, match="have NUL or halves of characters in them"):
    Recorder(path, seeds=["a\0b"])
  for windows in ((5, 3), (3, 3), (-3, 5), ()):
    with pytest.raises(ValueError, match="windows must be ascending sizes, as of the tracker, got"):
      Recorder(path, windows=windows)
  with pytest.raises(ValueError, match=r"groups=.* names some twice"):
    Recorder(path, windows=[3], groups=["all", "all"])
  with pytest.raises(ValueError, match="cannot continue"):
    Recorder(path, seeds=["a", "b"])
  assert not journal_of(path).exists()


@pytest.mark.parametrize("again", [None, ["a", "b", "c"]])
def test_names_of_seeds_are_those_of_the_record_that_is_continued(tmp_path, again):
  path, (states, _) = tmp_path / "run.nc", run(3)
  with Recorder(path, seeds=["a", "b", "c"]) as recorder:
    recorder.append(0, states[0])
  with Recorder(path, seeds=again) as recorder:
    recorder.append(1, states[1])
    recorder.append(2, states[2])
  found = open_record(path)
  assert (found.seed.values.tolist(), found.step.values.tolist()) == (["a", "b", "c"], [0, 1, 2])
  assert found["count"].values[2, :, 0, 0].tolist() == [3, 3, 3]


def test_the_first_error_is_the_one_to_see(tmp_path):
  def run_and_fail():
    with recorder_of(tmp_path / "run.nc") as recorder:
      recorder.append(0, report_of(0))
      raise KeyError("mine")

  with pytest.raises(KeyError, match="mine"):
    run_and_fail()
  assert steps_of(tmp_path / "run.nc") == [0]


# ---- sinks ----


def test_jsonl_sink(tmp_path):
  path = tmp_path / "run.jsonl"
  states, reports = run(3)
  with Recorder(tmp_path / "run.nc", tracker=OPTIONS, sinks=[sedjax.sinks.JSONL(path)]) as recorder:
    for step in (6, 7):
      recorder.append(step, states[step])
    recorder.log(7, loss=np.asarray([1.0, np.nan, 3.0]), rate=0.5)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["step"] for line in lines] == [6, 7, 7]
  assert lines[1]["sedjax/gap_ratio/head/w5/seed_1"] == float(reports.gap_ratio[7, 1, 2, 1])
  assert len(lines[0]) == 1 + 12 * 3 * 3 * 2
  assert lines[2] == {"step": 7, "loss/seed_0": 1.0, "loss/seed_1": None, "loss/seed_2": 3.0, "rate": 0.5}


def test_jsonl_goes_on_after_a_torn_line(tmp_path):
  path = tmp_path / "run.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "lo')
  for step in (2, 3):
    sink = sedjax.sinks.JSONL(path)
    sink(step, {})
    sink.close()
  assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "lo', '{"step": 2}', '{"step": 3}']


@pytest.mark.filterwarnings("error:sedjax.record")
def test_a_failing_sink_stops_no_record_where_warnings_are_errors(tmp_path, capsys):
  with recorder_of(tmp_path / "run.nc", sinks=[lambda *_: 1 / 0]) as recorder:
    recorder.append(0, report_of(0))
    recorder.append(1, report_of(1))
  assert steps_of(tmp_path / "run.nc") == [0, 1]
  assert "the sink function failed at step 0 (ZeroDivisionError" in capsys.readouterr().err


def test_a_failing_sink_is_told_no_more(tmp_path):
  told = []

  def broken(step, _):
    told.append(step)
    raise OSError("gone")

  recorder = recorder_of(tmp_path / "run.nc", sinks=[broken, lambda step, _: told.append(step)])

  def record_two():
    recorder.append(0, report_of(0))
    recorder.append(1, report_of(1))
    recorder.flush()

  with pytest.warns(RuntimeWarning, match=r"the sink function failed at step 0 \(OSError: gone\); it is told no more"):
    record_two()
  recorder.close()
  assert told == [0, 0, 1]
  assert steps_of(tmp_path / "run.nc") == [0, 1]


def test_sinks_call_a_series_the_same_before_and_after_the_first_row(tmp_path):
  told = []
  reports = jax.tree.map(lambda x: np.stack([x, x]), report_of(1))
  with recorder_of(tmp_path / "run.nc", seeds=["x", "y"], sinks=[lambda _, scalars: told.append(scalars)]) as recorder:
    recorder.log(0, loss=np.ones(2))
    recorder.append(1, reports)
    recorder.log(2, loss=np.ones(2))
  assert set(told[0]) == set(told[2]) == {"loss/seed_x", "loss/seed_y"}


def test_tensorboard_sink(tmp_path):
  pytest.importorskip("tensorboardX")
  from tensorboardX.proto import event_pb2

  state = run()[0][-1]
  with Recorder(tmp_path / "run.nc", tracker=OPTIONS, sinks=[sedjax.sinks.TensorBoard(tmp_path / "board")]) as recorder:
    recorder.append(5, state)
    recorder.log(5, loss=0.5)
  (file,) = (tmp_path / "board").iterdir()
  data, found, at = file.read_bytes(), {}, 0
  while at < len(data):  # length, its check sum, an event, its check sum
    length = int.from_bytes(data[at : at + 8], "little")
    event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
    found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
    at += 16 + length
  assert found["loss"] == (5, 0.5)
  wanted = float(sedjax.get_report(state, group="head", window=3).gap_ratio)
  assert found["sedjax/gap_ratio/head/w3"] == (5, pytest.approx(wanted))


def test_wandb_sink_offline(tmp_path, monkeypatch):
  wandb = pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_SILENT", "true")
  with wandb.init(project="sedjax", mode="offline", dir=tmp_path) as logged:
    with Recorder(tmp_path / "run.nc", tracker=OPTIONS, sinks=[sedjax.sinks.WandB(logged)]) as recorder:
      for step, state in enumerate(run()[0]):
        recorder.append(step, state)
      recorder.log(7, loss=0.5)
    assert logged.summary["sedjax/step"] == 7
    assert logged.summary["loss"] == 0.5
    wanted = float(sedjax.get_report(state, group="head", window=3).gap_ratio)
    assert logged.summary["sedjax/gap_ratio/head/w3"] == wanted
  with pytest.raises(TypeError, match=r"run must be what wandb.init returned, got dict"):
    sedjax.sinks.WandB({})


@pytest.mark.parametrize(
  ("sink", "module", "extra"), [("TensorBoard", "tensorboardX", "tensorboard"), ("WandB", "wandb", "wandb")]
)
def test_a_sink_names_its_extra(tmp_path, monkeypatch, sink, module, extra):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ImportError, match=rf"sedjax\[{extra}\]"):
    getattr(sedjax.sinks, sink)(tmp_path)
