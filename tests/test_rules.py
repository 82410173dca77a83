"""What becomes a row, and what the reports then say: against rows that NumPy sums by the stated rules."""

import functools
import re

import contract
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from conftest import slow

import sedjax
from sedjax import Phase, Status, core

SHAPE = (11, 7)
EXACT, COUNT = sedjax.sketch.exact(), sedjax.sketch.count(512)


def updates_with(accidents, count=24, seed=0):
  """float32[count, *SHAPE] of random updates, some replaced by zeros, NaN or Inf."""
  updates = np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)
  for step, value in accidents.items():
    if value == 0:
      updates[step] = 0
    else:
      updates[step, 3, 2] = value
  return updates


@functools.partial(jax.jit, static_argnums=0)
def reports_of(tx, updates, params):
  """Reports after each step, for trees with a leading axis of steps; parameters as given."""

  def step(state, inputs):
    _, state = tx.update(inputs[0], state, inputs[1])
    return state, sedjax.get_report(state)

  return jax.lax.scan(step, tx.init(jax.tree.map(lambda x: x[0], params)), (updates, params))


def run(tx, updates, params=None):
  tree = {"w": jnp.asarray(updates)}
  state, reports = reports_of(tx, tree, tree if params is None else {"w": jnp.asarray(params)})
  return state, jax.device_get(reports)


def rows_by_the_rules(updates, every):
  """[(step after which the row is there, row, steps in it)], for source="updates"."""
  rows, total, used, elapsed = [], 0, 0, 0
  for step, update in enumerate(updates.astype(np.float64)):
    if np.all(update == 0):
      continue
    elapsed += 1
    if np.all(np.isfinite(update)):
      total, used = total + update, used + 1
    if elapsed == every:
      if used:
        rows.append((step, total, used))
      total, used, elapsed = 0, 0, 0
  return rows


ACCIDENTS = {
  "none": {},
  "NaN": {5: np.nan, 6: np.nan, 13: np.nan},
  "Inf": {0: np.inf, 9: -np.inf},
  "zeros": {0: 0, 1: 0, 7: 0, 8: 0, 16: 0},
  "all": {2: np.nan, 3: 0, 4: np.inf, 5: np.nan, 10: 0, 23: 0},
  "a whole row": {6: np.nan, 7: np.inf, 8: np.nan},
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("accidents", ACCIDENTS)
@pytest.mark.parametrize("sketch", [EXACT, COUNT], ids=["exact", "count"])
def test_rows_of_updates(sketch, accidents, every):
  updates = updates_with(ACCIDENTS[accidents])
  window = 4
  _, reports = run(_tracker(window, every, sketch), updates)
  rows = rows_by_the_rules(updates, every)
  if sketch is COUNT:  # the map of the rows that NumPy summed
    map_row = jax.jit(lambda x: sketch.apply("w", x))
    rows = [(step, np.asarray(map_row(jnp.asarray(row, jnp.float32))), used) for step, row, used in rows]
  for step in range(len(updates)):
    known = [row for row in rows if row[0] <= step]
    assert reports.count[step] == len(known)
    assert reports.skipped_nonfinite[step] == sum(not np.all(np.isfinite(u)) for u in updates[: step + 1])
    assert reports.skipped_zero[step] == sum(np.all(u == 0) for u in updates[: step + 1])
    if len(known) < window:
      assert reports.k_star[step] == 0
      assert reports.status[step] & Status.WINDOW_FILLING
      continue
    assert not reports.status[step] & Status.WINDOW_FILLING
    truth = oracles.spectrum(np.stack([row.ravel() for _, row, _ in known[-window:]]))
    np.testing.assert_allclose(reports.singular_values[step], truth["singular_values"], rtol=2e-4)
    np.testing.assert_allclose(reports.last_update_norm[step], truth["last_update_norm"], rtol=1e-4)
    assert reports.row_steps[step] == known[-1][2]
    partial = any(used != every for _, _, used in known[-window:])
    assert bool(reports.status[step] & Status.PARTIAL_ROW) == partial


@functools.cache
def _tracker(window, every, sketch, **options):
  return sedjax.track_spectral_edge(window, every=every, sketch=sketch, **options)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("sketch", [EXACT, COUNT], ids=["exact", "count"])
def test_rows_of_parameters(sketch, every):
  """Row k is the move over n steps, seen one step later; a non-finite reading makes the next row longer."""
  path = np.cumsum(updates_with({}, 26), 0)
  path[8] = path[7]  # the optimizer did not move
  for broken in (9, 10, 15, 20):
    path[broken, 0, 0] = np.nan
  _, reports = run(_tracker(3, every, sketch, source="params"), path, path)
  rows, base, base_step = [], None, None
  for step in range(0, 26):
    if base is not None and (step - base_step) % every:
      pass
    elif base is None:
      base, base_step = path[step].astype(np.float64), step
    elif np.all(np.isfinite(path[step])) and np.any(path[step] != base):
      rows.append((path[step] - base, step - base_step))
      base, base_step = path[step].astype(np.float64), step
    assert reports.count[step] == len(rows)
    if len(rows) >= 3:
      kept = [row for row, _ in rows[-3:]]
      if sketch is COUNT:
        kept = [np.asarray(sketch.apply("w", jnp.asarray(row, jnp.float32))) for row in kept]
      sigma = oracles.spectrum(np.stack([row.ravel() for row in kept]))["singular_values"]
      np.testing.assert_allclose(reports.singular_values[step], sigma, rtol=2e-4)
      assert reports.row_steps[step] == rows[-1][1]


def test_cancellation_is_told_while_the_row_is_in_the_window():
  rng = np.random.default_rng(0)
  moves = 1e4 * rng.normal(size=(9, 300, 40))
  moves[2] = 1e-3 * rng.normal(size=(300, 40)) * (np.arange(300) == 0)[:, None]  # of numbers near 1 beside 1e6
  start = np.where(np.arange(300)[:, None] == 0, 1, 1e6) * np.ones(40)
  moves[:, 0] *= np.where(np.arange(9) == 2, 1, 1e-6)[:, None]
  path = (start + np.concatenate([np.zeros((1, 300, 40)), np.cumsum(moves, 0)])).astype(np.float32)
  _, reports = run(_tracker(4, 1, COUNT, source="params"), path, path)
  assert (np.asarray(reports.status) & int(Status.CANCELLATION) > 0).tolist() == [False] * 3 + [True] * 4 + [False] * 3
  assert np.asarray(reports.row_steps).tolist() == [0] + [1] * 9


@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-6, 3e-8])
def test_cancellation_is_small_or_told(relative):
  """Differences of sketched float32 parameters: the row is right to 1 %, or the status says that it may not be."""
  rng = np.random.default_rng(0)
  start = rng.normal(size=(300, 40))
  moves = rng.normal(size=(5, 300, 40)) * relative
  path = np.concatenate([start[None], start + np.cumsum(moves, 0)]).astype(np.float32)
  sketch = sedjax.sketch.count(1024)
  _, reports = run(_tracker(3, 1, sketch, source="params"), path, path)
  told = bool(reports.status[-1] & Status.CANCELLATION)
  realised = np.diff(path.astype(np.float64), axis=0)[-3:]  # what float32 parameters really did
  truth = np.stack([np.asarray(sketch.apply("w", jnp.asarray(row, jnp.float32))) for row in realised])
  error = np.max(np.abs(reports.singular_values[-1] / oracles.spectrum(truth)["singular_values"] - 1))
  assert error < 1e-2 or told
  if relative >= 1e-4:
    assert error < 1e-3
    assert not told


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_multisteps(where):
  """Accumulating 3 micro-steps gives the rows of the emitted updates, inside and outside."""
  gradients = {"w": jnp.asarray(updates_with({}, 24))}
  tracker = _tracker(3, 1, EXACT)
  if where == "inside":
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.5), tracker), 3).gradient_transformation()
  else:
    tx = optax.chain(optax.MultiSteps(optax.sgd(0.5), 3).gradient_transformation(), tracker)
  _, reports = reports_of(tx, gradients, gradients)
  emitted = -0.5 * np.asarray(gradients["w"], np.float64).reshape(8, 3, -1).mean(1)
  assert int(reports.count[-1]) == 8
  np.testing.assert_allclose(reports.singular_values[-1], oracles.spectrum(emitted[-3:])["singular_values"], rtol=1e-5)
  assert int(reports.skipped_zero[-1]) == (0 if where == "inside" else 16)
  assert bool(reports.status[-1] & Status.ZERO_SKIPPED) == (where == "outside")


def _label(path):
  return {"gain": None, "conv": "convolution"}.get(path, path.split("/")[0])


@pytest.mark.parametrize("sketch", [EXACT, COUNT], ids=["exact", "count"])
def test_groups(sketch):
  """A group's report is that of a tracker on its leaves alone; the whole model's does not depend on the groups."""
  rng = np.random.default_rng(0)
  shapes = {"conv": (2, 3, 4), "layer": {"bias": (7,)}, "gain": ()}
  draw = lambda shape: jnp.asarray(rng.normal(size=(6, *shape)), jnp.float32)  # noqa: E731
  updates = jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple))
  tracked = {k: updates[k] for k in ("conv", "layer")}
  with_groups = sedjax.track_spectral_edge(3, sketch=sketch, groups=_label)
  state, whole = reports_of(with_groups, updates, updates)
  assert_reports_near(whole, reports_of(_tracker(3, 1, sketch), tracked, tracked)[1], ignore=Status.UNTRACKED)
  assert int(whole.status[-1]) & Status.UNTRACKED
  for group, keys in (("convolution", ["conv"]), ("layer", ["layer"])):
    alone = {k: updates[k] for k in keys}
    report = sedjax.get_report(state, group=group)
    expected = reports_of(_tracker(3, 1, sketch), alone, alone)[0]
    assert_reports_near(report, sedjax.get_report(expected), ignore=Status.UNTRACKED)
    inside = jax.jit(lambda s, group=group: sedjax.get_report(s, group=group))(state)
    contract.assert_identical(inside, report)
  void = jax.jit(lambda s: sedjax.get_report(s, group="nowhere"))(state)
  assert np.isnan(void.gap_ratio)
  assert int(void.status) == Status.UNKNOWN_GROUP
  every = sedjax.get_reports(state)
  assert every.singular_values.shape == (3, 1, 3)
  np.testing.assert_array_equal(every.gap_ratio[0, 0], sedjax.get_report(state).gap_ratio)


def test_temporaries_grow_neither_with_leaves_nor_with_groups():
  """Neither 32 MiB of updates nor 11 MiB of the groups' rows are stored a second time, on one CPU of several."""
  shapes = {f"w{i}": (64, 64) for i in range(15)} | {"large": (8192, 1024)}
  params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  tx = sedjax.track_spectral_edge(10, groups=lambda path: path)
  update = jax.jit(lambda u, s: tx.update(u, s)[1], donate_argnums=1, **oracles.AS_USERS_COMPILE)
  memory = update.lower(params, jax.eval_shape(tx.init, params)).compile().memory_analysis()
  assert memory.temp_size_in_bytes <= 6 * 2**20


def test_many_small_leaves_are_not_stored_all_at_once():
  """9 MiB of vectors are put together a lot after the other."""
  tx, params = sedjax.track_spectral_edge(10), {f"b{i}": jax.ShapeDtypeStruct((4000,), jnp.float32) for i in range(600)}
  update = jax.jit(lambda u, s: tx.update(u, s)[1], donate_argnums=1, **oracles.AS_USERS_COMPILE)
  memory = update.lower(params, jax.eval_shape(tx.init, params)).compile().memory_analysis()
  assert memory.temp_size_in_bytes <= 5 * 2**20


@pytest.mark.parametrize("shape", [(2**24 + 5,), (2, 2**23), (24, 2**20), (1055, 2**17)], ids=str)
def test_few_long_rows_are_stored_nowhere(shape):
  """As those that `optax.flatten` makes of a model; nor are the last rows that share a hash."""
  tx, params = sedjax.track_spectral_edge(10), {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
  update = jax.jit(lambda u, s: tx.update(u, s)[1], donate_argnums=1, **oracles.AS_USERS_COMPILE)
  memory = update.lower(params, jax.eval_shape(tx.init, params)).compile().memory_analysis()
  assert memory.temp_size_in_bytes <= 8 * 2**20


@pytest.mark.parametrize(
  "dtype",
  ["float32", pytest.param("bfloat16", marks=pytest.mark.xfail(strict=True, reason="XLA stores them in float32"))],
)
def test_reading_parameters_stores_none_of_them(dtype):
  params = {f"layer{i}": jax.ShapeDtypeStruct((4096, 1024), dtype) for i in range(4)}
  config = core.Config(10, source="params", every=20)
  state = jax.eval_shape(functools.partial(core.init, config), params)
  observe = jax.jit(lambda state, params: core.observe(config, state, None, params), donate_argnums=0)
  compiled = observe.lower(state, params).compile(**oracles.AS_USERS_COMPILE)
  assert compiled.memory_analysis().temp_size_in_bytes <= 16 * 2**20


@pytest.mark.parametrize(
  ("sketch", "source"),
  [
    (sedjax.sketch.count(), "updates"),
    (sedjax.sketch.exact(), "params"),
    slow(sedjax.sketch.count(), "params"),
    slow(sedjax.sketch.exact(), "updates"),
  ],
  ids=["count", "exact, params", "count, params", "exact"],
)
@pytest.mark.parametrize("where", [np.s_[40, 7], np.s_[:]], ids=["one", "all"])
def test_nan_is_found_in_long_rows(where, sketch, source):
  """XLA's maximum of many numbers leaves NaN out on CPU."""
  tx = sedjax.track_spectral_edge(window=3, sketch=sketch, source=source)
  update = jax.jit(tx.update, **oracles.AS_USERS_COMPILE)
  rng = np.random.default_rng(0)
  steps = [rng.normal(size=(128, 96)).astype(np.float32) for _ in range(6)]
  steps[3][where] = np.nan
  state = tx.init({"w": steps[0]})
  for step in steps:
    _, state = update({"w": step}, state, {"w": step})
  report = sedjax.get_report(state)
  assert (report.skipped_nonfinite, report.skipped_zero) == (1, 0)
  assert report.count == (5 if source == "updates" else 4)
  assert np.isfinite(report.singular_values).all()
  assert report.singular_values[0] > 0


def test_a_program_for_one_of_several_devices_is_that_for_one():
  """The form is chosen when a program is lowered: eagerly, under jit, in a scan, under vmap, once and twice."""
  assert jax.device_count() > 1
  tx = sedjax.track_spectral_edge(3)
  updates = np.random.default_rng(0).normal(size=(2, 3, 5, 130, 70)).astype(np.float32)

  def step(state, x):
    return tx.update({"w": x}, state)[1], None

  def one(updates):
    state = tx.init({"w": updates[0]})
    return sedjax.get_report(jax.lax.scan(step, state, updates)[0]).singular_values

  loops = [one(x) for run in updates for x in run]
  nested = jax.jit(jax.vmap(jax.vmap(one)))(updates)
  np.testing.assert_allclose(nested.reshape(6, -1), loops, rtol=1e-6)
  with jax.disable_jit():
    state = tx.init({"w": updates[0, 0, 0]})
    for x in updates[0, 0]:
      _, state = tx.update({"w": x}, state)
    np.testing.assert_allclose(sedjax.get_report(state).singular_values, loops[0], rtol=1e-5)
  jaxpr = jax.make_jaxpr(jax.grad(lambda x: one(x * x).sum()))(updates[0, 0])  # whose derivative is 0
  assert jaxpr.out_avals[0].shape == updates[0, 0].shape


def test_vmapped_seeds_store_no_hashes():
  """What the signs of a leaf are made of is made again where a part is summed, on one CPU of several."""
  tx = sedjax.track_spectral_edge(10)
  params, seeds = ({"w": jax.ShapeDtypeStruct((*lead, 16384, 1024), jnp.float32)} for lead in ((), (1,)))

  def temporaries(update, state, params):
    update = jax.jit(update, donate_argnums=1, **oracles.AS_USERS_COMPILE)
    return update.lower(params, state).compile().memory_analysis().temp_size_in_bytes

  one = temporaries(lambda u, s: tx.update(u, s)[1], jax.eval_shape(tx.init, params), params)
  vmapped = temporaries(jax.vmap(lambda u, s: tx.update(u, s)[1]), jax.eval_shape(jax.vmap(tx.init), seeds), seeds)
  assert vmapped <= 1.1 * one  # 16384 / 32 * 1024 hashes are 2 MiB, a fifth of it or more


def assert_reports_near(a, b, ignore=0):
  a, b = (x._replace(status=jnp.asarray(x.status) & ~int(ignore)) for x in (a, b))
  contract.assert_near(a, b, 1e-4)


def test_windows_share_one_buffer():
  """Each of several windows reports what a tracker of that window alone does."""
  updates = {"w": jnp.asarray(updates_with({}, 9))}
  together, _ = reports_of(_tracker((3, 6, 4), 1, COUNT), updates, updates)
  assert sedjax.get_reports(together).singular_values.shape == (1, 3, 6)
  for window in (3, 6):
    alone, _ = reports_of(_tracker(window, 1, COUNT), updates, updates)
    assert_reports_near(sedjax.get_report(together, window=window), sedjax.get_report(alone))
  assert_reports_near(sedjax.get_report(together), sedjax.get_report(together, window=6))


@pytest.mark.parametrize("sketch", [sedjax.sketch.count(256), sedjax.sketch.exact()], ids=["count", "exact"])
def test_one_eigenproblem_comes_after_the_other(sketch):
  """Two at once, of several matrices each, may wait for each other forever on a CPU of two cores (jaxlib 0.10.2)."""
  tx = sedjax.track_spectral_edge((3, 4, 6), momentum=0.9, sketch=sketch, groups=lambda path: path)
  params = {name: jax.ShapeDtypeStruct((2, 20, 30), jnp.float32) for name in "vw"}
  update = jax.jit(jax.vmap(lambda updates, state: tx.update(updates, state)[1]))
  text = update.lower(params, jax.eval_shape(jax.vmap(tx.init), params)).compile().as_text()
  before, solvers = {}, []  # by instruction, those that have to come before it; in the order of the text
  for line in text.split("ENTRY ")[1].splitlines():
    name, *operands = re.findall(r"%([\w.-]+)", line.split(", metadata=")[0]) or [""]
    before[name] = set(operands).union(*(before.get(operand, set()) for operand in operands))
    if "syevd" in line and " custom-call(" in line:
      assert set(solvers) <= before[name]
      solvers.append(name)
  assert len(solvers) == 2 * 3


def test_exact_rows_of_many_leaves():
  """Their inner products are added up in a loop: as one expression they would take years on a CPU."""
  rng = np.random.default_rng(0)
  steps = [{f"layer{i}": rng.normal(size=(7, 5)).astype(np.float32) for i in range(64)} for _ in range(4)]
  tx = sedjax.track_spectral_edge(3, sketch=sedjax.sketch.exact())
  state, update = tx.init(steps[0]), jax.jit(lambda u, s: tx.update(u, s)[1], **oracles.AS_USERS_COMPILE)
  for step in steps:
    state = update(step, state)
  rows = np.stack([np.concatenate([leaf.ravel() for leaf in step.values()]) for step in steps[1:]]).astype(np.float64)
  expected = np.linalg.svd(rows, compute_uv=False)
  np.testing.assert_allclose(sedjax.get_report(state).singular_values, expected, rtol=2e-6)


def test_history_is_the_last_reports():
  updates = {"w": jnp.asarray(updates_with({}, 9))}
  state, reports = reports_of(_tracker(3, 1, COUNT, history=4), updates, updates)
  contract.assert_identical(sedjax.get_history(state), jax.tree.map(lambda x: x[-4:], reports))
  early, _ = reports_of(_tracker(3, 1, COUNT, history=4), *[jax.tree.map(lambda x: x[:2], updates)] * 2)
  assert sedjax.get_history(early).count.tolist() == [0, 0, 1, 2]


def test_sed_step_skips_work_under_vmap():
  """An unbatched step gives the same rows as the counter, and keeps the branch a branch."""
  tx = _tracker(3, 4, COUNT)
  updates = jnp.asarray(np.stack([updates_with({}, 16, seed) for seed in range(3)]))

  def with_step(state, update, step):
    return tx.update({"w": update}, state, sed_step=step)[1]

  def without(state, update):
    return tx.update({"w": update}, state)[1]

  states = counted = jax.vmap(tx.init)({"w": updates[:, 0]})
  stepped = jax.jit(jax.vmap(with_step, (0, 0, None)))
  plain = jax.jit(jax.vmap(without))
  for step in range(16):
    states = stepped(states, updates[:, step], jnp.int32(step))
    counted = plain(counted, updates[:, step])
  assert sedjax.get_report(states).count.tolist() == [4, 4, 4]
  contract.assert_near(states, counted, 1e-5)
  assert " conditional(" in stepped.lower(states, updates[:, 0], jnp.int32(0)).compile().as_text()
  assert " conditional(" not in plain.lower(states, updates[:, 0]).compile().as_text()


def test_a_state_that_jit_closes_over():
  """Is a constant to it, and is checked like one."""
  tx = sedjax.track_spectral_edge(3)
  updates = {"w": jnp.ones((3, 4))}
  state = tx.init(updates)
  assert jax.jit(lambda u: sedjax.get_report(tx.update(u, state)[1]).count)(updates) == 1
  assert jax.jit(jax.grad(lambda x: tx.update({"w": updates["w"] * x}, state)[0]["w"].sum()))(2.0) == 12
  other = sedjax.track_spectral_edge(3, sketch=sedjax.sketch.count(64))
  with pytest.raises(ValueError, match="the state's rows were made with sketch"):
    jax.jit(lambda u: other.update(u, state)[1])(updates)


def test_two_trackers():
  first = sedjax.track_spectral_edge(3, sketch=COUNT, name="before")
  second = sedjax.track_spectral_edge(4, sketch=COUNT, name="after")
  tx = optax.chain(first, optax.scale(-0.5), second)
  updates = {"w": jnp.asarray(updates_with({}, 1)[0])}
  _, state = jax.jit(tx.update)(updates, tx.init(updates))
  before, after = (sedjax.get_report(state, name=name) for name in ("before", "after"))
  np.testing.assert_allclose(after.last_update_norm, before.last_update_norm / 2, rtol=1e-6)
  with pytest.raises(ValueError, match=r"several trackers, named \['before', 'after'\]"):
    sedjax.get_report(state)


@pytest.mark.parametrize("options", [{}, {"source": "params"}, {"history": 50}, {"window": (5, 10, 32)}])
@pytest.mark.parametrize("group_count", [1, 6])
def test_state_size(options, group_count):
  """At most (W + 3)·d·4 bytes a group, the history's reports, and 64 KiB."""
  params = {f"g{i}": jnp.zeros((3, 5)) for i in range(group_count)}
  groups = {} if group_count == 1 else {"groups": lambda path: path}
  tx = sedjax.track_spectral_edge(**{"window": 10, **options, **groups})
  state = jax.eval_shape(tx.init, params)
  size = lambda tree: sum(np.prod(x.shape, dtype=int) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
  (tracker,) = state.trackers.values()
  window = max(sedjax.core.window_sizes(tracker))
  assert size(state) <= (window + 3) * 16384 * 4 * group_count + size(tracker.history) + 64 * 1024


def test_the_noise_of_low_precision_updates_is_not_ours():
  """bfloat16 updates give the report of the same numbers in float32."""
  low = jnp.asarray(updates_with({}), jnp.bfloat16)
  _, reports = reports_of(_tracker(4, 1, COUNT), {"w": low}, {"w": low})
  contract.assert_near(reports, run(_tracker(4, 1, COUNT), low.astype(jnp.float32))[1], 1e-6)


def test_extreme_scales_do_not_overflow():
  updates = updates_with({}, 8).astype(np.float64)
  for sketch in (EXACT, COUNT):
    plain = run(_tracker(4, 1, sketch), updates.astype(np.float32))[1]
    for scale in (1e-25, 1e25):
      scaled = run(_tracker(4, 1, sketch), (updates * scale).astype(np.float32))[1]
      np.testing.assert_allclose(scaled.singular_values[-1] / scale, plain.singular_values[-1], rtol=1e-4)
      np.testing.assert_allclose(scaled.ratios[-1], plain.ratios[-1], rtol=1e-4)
      np.testing.assert_allclose(scaled.drift_speed[-1] / scale, plain.drift_speed[-1], rtol=1e-4)


def test_tiny_rows_beside_a_huge_one():
  """Are measured when it has left the window; it is one row of the ring still."""
  updates = updates_with({}, 5).astype(np.float64)
  for sketch in (EXACT, COUNT):
    plain = run(_tracker(4, 1, sketch), updates[1:].astype(np.float32))[1]
    for huge in (1e20, 1e32):
      scales = np.asarray([huge, 1e-20, 1e-20, 1e-20, 1e-20])[:, None, None]
      found = run(_tracker(4, 1, sketch), (updates * scales).astype(np.float32))[1]
      np.testing.assert_allclose(found.singular_values[-1] * 1e20, plain.singular_values[-1], rtol=1e-4)
      assert np.all(np.isfinite(found.singular_values))


def test_rows_beside_one_so_huge_that_their_products_vanish_stay_numbers():
  updates = updates_with({}, 8).astype(np.float64) * np.where(np.arange(8) == 2, 1e30, 1e-37)[:, None, None]
  for sketch in (EXACT, COUNT):
    found = run(_tracker(4, 1, sketch), updates.astype(np.float32))[1]
    for name in ("singular_values", "ratios", "alignment", "turning", "gap_ratio", "pc1_fraction"):
      assert np.all(np.isfinite(getattr(found, name))), name


@pytest.mark.parametrize(("sketch", "grouped"), [(EXACT, False), (COUNT, True)], ids=["exact", "count, groups"])
def test_sums_beyond_float32_are_left_out(sketch, grouped):
  """Steps that are finite, but not so with the step before, or the group beside, or the parameters before."""
  groups = (lambda path: path) if grouped else None
  size = 1e33  # of one leaf; there are two
  kept = [1.0, 2.0, 3.0, size, 4.0, 5.0]
  tree = {name: jnp.asarray([np.full((5, 4), value) for value in kept], jnp.float32) for name in "ab"}
  for options, expected in (({"every": 2}, [2, 1, 2]), ({}, [1, 1, 1, 1, 1])):
    tx = sedjax.track_spectral_edge(3, sketch=sketch, groups=groups, **options)
    big = jax.tree.map(lambda x: jnp.where(x == size, 3 * x, x), tree)
    state, reports = reports_of(tx, big, big)
    assert int(reports.skipped_nonfinite[-1]) == 1
    counts = np.asarray(reports.count)
    first = [int(np.argmax(counts == row)) for row in range(1, counts[-1] + 1)]
    assert [int(reports.row_steps[at]) for at in first] == expected
    assert np.all(np.isfinite(reports.singular_values)), options
    assert np.all(np.isfinite(sedjax.get_reports(state).singular_values)), options
  signs = jnp.asarray([1, 1, -1, 1])[:, None, None]
  params = {"a": jnp.asarray([np.full((5, 4), value) for value in (1, 2, 8e32, 8e32)], jnp.float32) * signs}
  tx = sedjax.track_spectral_edge(3, sketch=sketch, source="params", groups=groups)
  _, reports = reports_of(tx, params, params)
  assert np.all(np.isfinite(reports.singular_values))
  assert int(reports.skipped_nonfinite[-1]) == 1  # +8e32 after -8e32 is a change of 1.6e33
  assert int(reports.count[-1]) == 2


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_parameters_of_eight_bits(dtype):
  """Are read as the same numbers of float32, beside leaves of other dtypes."""
  small = jnp.asarray(updates_with({}), dtype)
  tree = {"w": small, "b": jnp.asarray(updates_with({}, seed=1))}
  wide = {**tree, "w": small.astype(jnp.float32)}
  tx = _tracker(4, 1, COUNT, source="params")
  contract.assert_near(reports_of(tx, tree, tree)[1], reports_of(tx, wide, wide)[1], 1e-6)


def test_numbers_of_python_are_leaves():
  """Outside of jit, too."""
  for options in ({}, {"sketch": EXACT}, {"source": "params"}):
    tx = sedjax.track_spectral_edge(3, **options)
    state = tx.init({"a": 1.0, "b": jnp.ones(3)})
    for value in (2.0, 4.0):
      _, state = tx.update({"a": value, "b": jnp.ones(3)}, state, {"a": value, "b": jnp.ones(3)})
    np.testing.assert_allclose(sedjax.get_report(state).last_update_norm, 2 if options.get("source") else 19**0.5)


@pytest.mark.parametrize("options", [{"every": 2}, {"every": 2, "source": "params"}], ids=["updates", "params"])
def test_steps_outside_of_jit_compile_once(options):
  tx = sedjax.track_spectral_edge(3, sketch=COUNT, **options)
  tree = {"w": jnp.asarray(updates_with({}, 1)[0])}
  state, compiled = tx.init(tree), []
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
  counts = []
  for _ in range(4):
    _, state = tx.update(tree, state, tree)
    counts.append(sum("backend_compile" in name for name in compiled))
  assert 0 < counts[1] == counts[-1]


@pytest.mark.parametrize("sketch", [EXACT, COUNT], ids=["exact", "count"])
def test_stricter_promotion_of_the_caller(sketch):
  tree = {"w": jnp.ones((4, 5)), "b": jnp.ones(5)}
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    tx = sedjax.track_spectral_edge(3, sketch=sketch)
    _, state = jax.jit(tx.update)(tree, tx.init(tree))
    assert sedjax.get_report(state).count == 1


def test_labels_longer_than_their_place_and_of_numpy():
  long = "block/" * 20
  tx = sedjax.track_spectral_edge(3, groups=lambda path: {"a": np.int64(7), "b": "\ud800"}.get(path, long + path))
  updates = {name: jnp.full(3, value) for name, value in {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}.items()}
  _, state = tx.update(updates, tx.init(updates))
  for label, value in ((7, 1), ("\ud800", 2), (long + "c", 3), (long + "d", 4)):
    np.testing.assert_allclose(sedjax.get_report(state, group=label).last_update_norm, value * 3**0.5, rtol=1e-5)
  with pytest.raises(ValueError, match="there is no group"):
    sedjax.get_report(state, group=long + "e")


def test_a_path_of_half_a_character():
  tx = sedjax.track_spectral_edge(3)
  updates = {"\ud800": jnp.ones(3)}
  assert sedjax.get_report(tx.update(updates, tx.init(updates))[1]).count == 1


def test_a_tracker_of_nothing_has_no_empty_arrays():
  """Orbax saves none."""
  tx = sedjax.track_spectral_edge(3, sketch=COUNT, groups={}.get)
  integers = {"w": jnp.ones(3, jnp.int32)}
  _, state = tx.update(integers, tx.init(integers))
  assert all(leaf.size for leaf in jax.tree.leaves(state))
  assert sedjax.get_report(state).count == 0


def test_explain_has_words_for_every_bit():
  for bit in Status:
    assert len(sedjax.explain(int(bit))) > 20
  both = sedjax.explain(Status.WINDOW_FILLING | Status.PARTIAL_ROW)
  assert both.splitlines() == [sedjax.explain(Status.WINDOW_FILLING), sedjax.explain(Status.PARTIAL_ROW)]
  assert sedjax.explain(0) == "Nothing to note."
  with pytest.raises(ValueError, match="expected one status, got an array of shape"):
    sedjax.explain(np.zeros(3, np.int32))


def test_hot_columns_are_flagged():
  """Energy in one column meets few buckets: the effective dimension says so."""
  rows = np.random.default_rng(0).normal(size=(5, 64, 512))
  hot = np.zeros_like(rows)
  hot[:, :, 3] = rows[:, :, 3]
  sketch = sedjax.sketch.count(16384)
  tx = sedjax.track_spectral_edge(3, sketch=sketch)
  for updates, low in ((rows, False), (hot, True)):
    _, reports = run(tx, updates.astype(np.float32))
    assert bool(reports.status[-1] & Status.LOW_EFFECTIVE_DIM) == low
    assert reports.phase[1] == Phase.WARMUP


@pytest.mark.parametrize("sketch", [EXACT, COUNT], ids=["exact", "count"])
def test_complex_and_integer_leaves(sketch):
  """A complex leaf counts as its real and imaginary parts; integers, booleans and None count for nothing."""
  rng = np.random.default_rng(0)
  z = (rng.normal(size=(5, 6, 7)) + 1j * rng.normal(size=(5, 6, 7))).astype(np.complex64)
  updates = {"z": jnp.asarray(z), "step": jnp.arange(5), "mask": jnp.ones((5, 3), bool), "none": None}
  _, reports = reports_of(_tracker(5, 1, sketch), updates, updates)
  truth = oracles.spectrum(np.concatenate([z.real, z.imag], 1).reshape(5, -1))
  tolerance = 1e-5 if sketch is EXACT else 0.2  # five standard errors of a sketch of 512
  np.testing.assert_allclose(reports.singular_values[-1], truth["singular_values"], rtol=tolerance)
  assert int(reports.status[-1]) & Status.UNTRACKED


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1), optax.clip(1.0)], ids=["sgd", "adam", "clip"])
def test_integers_of_which_an_optimizer_makes_floats(optimizer):
  """They are not tracked, whatever their updates are."""
  params = {"w": jnp.ones((4, 3)), "n": jnp.arange(3)}
  tx = optax.chain(optimizer, sedjax.track_spectral_edge(window=3))
  alone = optax.chain(optimizer, sedjax.track_spectral_edge(window=3))
  state, other = tx.init(params), alone.init({"w": params["w"]})
  for i in range(4):
    gradients = {"w": jnp.full((4, 3), i + 1.0), "n": jnp.zeros(3, jnp.int32)}
    updates, state = jax.jit(tx.update)(gradients, state, params)
    _, other = jax.jit(alone.update)({"w": gradients["w"]}, other, {"w": params["w"]})
    assert jnp.issubdtype(updates["n"].dtype, jnp.floating)
  found, wanted = sedjax.get_report(state), sedjax.get_report(other)
  assert found.count == wanted.count == 4
  np.testing.assert_allclose(found.last_update_norm, wanted.last_update_norm, rtol=1e-5)
  # Adam's updates are alike, so that smaller singular values are rounding.
  np.testing.assert_allclose(found.singular_values, wanted.singular_values, rtol=1e-5, atol=1e-3)


def test_reports_are_read_without_a_transfer_that_is_not_asked_for():
  tx = sedjax.track_spectral_edge(3, groups=lambda path: path, history=2)
  state = jax.jit(tx.update)({"w": jnp.ones(3)}, tx.init({"w": jnp.ones(3)}))[1]
  with jax.transfer_guard("disallow"):
    reports = [sedjax.get_report(state), sedjax.get_report(state, group="w"), sedjax.get_reports(state)]
    reports.append(sedjax.get_history(state, group="w"))
  assert all(np.all(report.count.max() == 1) for report in reports)
