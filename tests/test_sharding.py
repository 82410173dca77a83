"""Sharded parameters: the same reports, and nothing larger than the sketch between devices.

Leaves are sketched where they lie, whatever the layout. Over explicit axes and inside shard_map
one all-reduce adds the sketches up; over automatic axes XLA's partitioner decides, and gives d numbers at a time.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import slow
from jax.sharding import AxisType

import sedjax
from sedjax import _indexed, _placement
from sedjax._cost import collectives_of

P = jax.P
DIM = 4096
SHAPES = {
  "embed": (5024, 48),  # over 8: 628 rows, no multiple of 32
  "up": (96, 384),  # over 8: 12 rows, or 48 columns
  "down": (384, 96),
  "bias": (384,),
  "norm": (96,),
  "stack": (8, 40, 56),
  "conv": (3, 3, 8, 16),
  "odd": (7, 64),
  "scale": (),
}
REPLICATED = {name: P() for name in SHAPES}
LAYOUTS = {
  "fsdp": {**REPLICATED, **{name: P(("x", "y")) for name in ("embed", "up", "down", "bias", "norm", "stack")}},
  "leading": {**REPLICATED, "embed": P("x"), "up": P("x"), "down": P("x"), "stack": P(None, "x")},
  "trailing": {
    **REPLICATED,
    **{name: P(None, "x") for name in ("embed", "up", "down", "odd")},
    "bias": P("x"),
    "stack": P(None, None, "x"),
    "conv": P(None, None, None, "x"),
  },
  "both": {**REPLICATED, "embed": P("x", "y"), "up": P("y", "x"), "down": P("x", "y"), "conv": P(None, None, "y", "x")},
  "stacked": {**REPLICATED, "stack": P(("x", "y"))},
  "replicated": REPLICATED,
}
RNG = np.random.default_rng(0)
STEPS = [{name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(5)]


def mesh_of(kind):
  return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def tracker(sketch, **options):
  return sedjax.track_spectral_edge(3, sketch=sketch, **options)


@functools.cache
def unsharded(sketch, grouped):
  tx = tracker(sketch, groups=by_name if grouped else None)
  state, update = tx.init(STEPS[0]), jax.jit(tx.update)
  for step in STEPS:
    _, state = update(step, state)
  return jax.device_get(sedjax.get_reports(state))


def by_name(path):
  return "mlp" if path in ("up", "down", "bias") else "rest"


def assert_same(reports, expected):
  np.testing.assert_allclose(reports.singular_values, expected.singular_values, rtol=1e-5)
  np.testing.assert_allclose(reports.gap_ratio, expected.gap_ratio, rtol=1e-4)
  for name in ("k_star", "phase", "count", "status"):
    np.testing.assert_array_equal(getattr(reports, name), getattr(expected, name))


def place(step, layout, mesh):
  return {name: jax.device_put(x, jax.NamedSharding(mesh, layout[name])) for name, x in step.items()}


def state_specs(state, layout):
  """Of a tracker's state inside a shard_map: exact rows are split as the parameters are, all else is replicated."""
  specs = jax.tree.map(lambda _: P(), state)
  old = specs.trackers["spectral_edge"]
  if isinstance(old.rows, dict):
    old = old._replace(rows={name: P(None, *spec) for name, spec in layout.items()})
  return sedjax.SpectralEdgeState({"spectral_edge": old})


def run(update, state, layout, mesh):
  """Five steps through one compiled program: the last reports, and its HLO."""
  program = jax.jit(update).lower(place(STEPS[0], layout, mesh), state).compile()
  for step in STEPS:
    state = program(place(step, layout, mesh), state)
  return jax.device_get(sedjax.get_reports(state)), program.as_text(), state


SKETCHES = {"count": sedjax.sketch.count(DIM), "exact": sedjax.sketch.exact()}


def cases(**quick):
  """Layouts by sketch: quick ones, and the others, which take minutes more."""
  return pytest.mark.parametrize(
    ("layout", "sketch"),
    [
      pytest.param(layout, sketch, marks=() if layout in quick[sketch] else pytest.mark.slow)
      for layout in LAYOUTS
      for sketch in SKETCHES
    ],
  )


@cases(count=LAYOUTS, exact=["both"])
def test_explicit_axes(layout, sketch):
  """One all-reduce of d numbers (or of a Gram column), and the unsharded report."""
  specs, mesh = LAYOUTS[layout], mesh_of(AxisType.Explicit)
  tx = tracker(SKETCHES[sketch])
  with jax.set_mesh(mesh):
    state = tx.init(place(STEPS[0], specs, mesh))
    reports, program, last = run(lambda u, s: tx.update(u, s)[1], state, specs, mesh)
  assert_same(reports, unsharded(SKETCHES[sketch], False))
  moved = [numbers for _, numbers in collectives_of(program)]
  if sketch == "count":
    assert moved == ([DIM] if layout != "replicated" else [])
  else:
    assert sum(moved) <= 4 * 4 + 1
    rows = last.trackers["spectral_edge"].rows
    for name, spec in specs.items():
      assert rows[name].sharding.is_equivalent_to(jax.NamedSharding(mesh, P(None, *spec)), rows[name].ndim)


# At 128 no leaf's bucket sums fit into the sketch without being folded.
@pytest.mark.parametrize(
  ("layout", "dim", "mesh_is_set"),
  [(layout, 128, False) for layout in LAYOUTS]
  + [
    pytest.param(layout, DIM, True, marks=() if layout in ("fsdp", "both") else pytest.mark.slow) for layout in LAYOUTS
  ],
)
def test_automatic_axes(layout, dim, mesh_is_set):
  """No collective gives more than d numbers, and the state stays where it was."""
  specs, mesh, sketch = LAYOUTS[layout], mesh_of(AxisType.Auto), sedjax.sketch.count(dim)
  tx = tracker(sketch)
  with jax.set_mesh(mesh) if mesh_is_set else contextlib.nullcontext():
    state = jax.device_put(tx.init(place(STEPS[0], specs, mesh)), jax.NamedSharding(mesh, P()))
    reports, program, _ = run(lambda u, s: tx.update(u, s)[1], state, specs, mesh)
  assert_same(reports, unsharded(sketch, False))
  assert max((numbers for _, numbers in collectives_of(program)), default=0) <= dim


@pytest.mark.parametrize("spec", [P("y", "x"), slow(P(None, ("x", "y")))], ids=str)
def test_automatic_axes_that_do_not_divide_a_leaf(spec):
  """Blocks of which the last is padded; the mesh is one that arguments do not tell."""
  mesh, sketch = mesh_of(AxisType.Auto), sedjax.sketch.count(100)
  tx = tracker(sketch)
  steps = [{"odd": RNG.normal(size=(37, 131)).astype(np.float32)} for _ in range(4)]

  def update(updates, state):
    updates = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(2 * x, jax.NamedSharding(mesh, spec)), updates)
    return tx.update(updates, state)[1]

  on_mesh, on_none, alone = jax.jit(update), jax.jit(update), jax.jit(lambda u, s: tx.update(u, s)[1])
  states = [tx.init(steps[0])] * 3
  for step in steps:
    states[0] = on_mesh(jax.device_put(step, jax.NamedSharding(mesh, P())), states[0])
    with jax.set_mesh(mesh):
      states[1] = on_none(step, states[1])
    states[2] = alone(jax.tree.map(lambda x: 2 * x, step), states[2])
  *found, wanted = (jax.device_get(sedjax.get_reports(state)) for state in states)
  for reports in found:
    assert_same(reports, wanted)


def test_vmapped_seeds_over_automatic_axes():
  """Of leaves whose bucket sums do not fit into the sketch, too."""
  mesh, sketch = mesh_of(AxisType.Auto), sedjax.sketch.count(128)
  tx = tracker(sketch)
  steps = [{name: np.stack([step[name], 2 * step[name]]) for name in ("up", "bias")} for step in STEPS]
  state = jax.vmap(tx.init)(steps[0])
  update = jax.jit(jax.vmap(lambda u, s: tx.update(u, s)[1]))
  for step in steps:
    state = update({n: jax.device_put(x, jax.NamedSharding(mesh, P(None, "x"))) for n, x in step.items()}, state)
  reports = jax.device_get(sedjax.get_reports(state))
  single = jax.jit(lambda u, s: tx.update(u, s)[1])
  for seed in range(2):
    alone = tx.init(jax.tree.map(lambda x: x[0], steps[0]))
    for step in steps:
      alone = single(jax.tree.map(lambda x, seed=seed: x[seed], step), alone)
    assert_same(jax.tree.map(lambda x, seed=seed: x[seed], reports), jax.device_get(sedjax.get_reports(alone)))


@cases(count=["fsdp", "both", "stacked"], exact=["fsdp"])
def test_inside_shard_map(layout, sketch):
  """Likewise where update is given blocks, and is told the axes' names or the parameters' specs."""
  specs, mesh = LAYOUTS[layout], mesh_of(AxisType.Auto)
  told = sketch == "count" and not any(isinstance(axes, tuple) for spec in specs.values() for axes in spec)
  tx = tracker(SKETCHES[sketch], axis_name=("x", "y") if told else specs)
  state = tx.init(STEPS[0])
  splits = state_specs(state, specs)
  update = jax.shard_map(lambda u, s: tx.update(u, s)[1], mesh=mesh, in_specs=(specs, splits), out_specs=splits)
  reports, program, _ = run(update, state, specs, mesh)
  assert_same(reports, unsharded(SKETCHES[sketch], False))
  moved = [numbers for _, numbers in collectives_of(program)]
  assert sum(moved) <= (DIM if sketch == "count" else 4 * 4 + 1)


@pytest.mark.parametrize("order", [("x", "y"), ("y", "x")])
def test_one_dimension_split_over_two_axes(order):
  """Whose block is which is in the specs, and not in shapes."""
  specs, mesh = {**LAYOUTS["replicated"], "up": P(order)}, mesh_of(AxisType.Auto)
  for axis_name in (specs, ("x", "y"), ("y", "x")):
    tx = tracker(SKETCHES["count"], axis_name=axis_name)
    state = tx.init(STEPS[0])
    update = jax.shard_map(lambda u, s, tx=tx: tx.update(u, s)[1], mesh=mesh, in_specs=(specs, P()), out_specs=P())
    if axis_name is specs:
      assert_same(run(update, state, specs, mesh)[0], unsharded(SKETCHES["count"], False))
    else:
      with pytest.raises(ValueError, match=r"of leaf 'up' .* fits 2 splits .* give axis_name=specs"):
        jax.eval_shape(update, STEPS[0], state)


@pytest.mark.parametrize("shape", [(12, 4, 96), (9, 400), (66, 400)], ids=str)
def test_padding_of_leaves_that_leave_devices_empty(shape):
  """Blocks that begin beyond a leaf that is split unevenly, where the padding holds other numbers than 0."""
  split = jax.NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), P("x"))
  tx, x = tracker(SKETCHES["count"]), np.random.default_rng(0).normal(size=shape).astype(np.float32)

  def step(x, state, place):
    return tx.update({"w": place(jnp.exp(place(x)))}, state)[1].trackers["spectral_edge"].rows

  alone = jax.jit(functools.partial(step, place=lambda x: x))(x, tx.init({"w": x}))
  place = lambda x: jax.lax.with_sharding_constraint(x, split)  # noqa: E731
  np.testing.assert_allclose(jax.jit(functools.partial(step, place=place))(x, tx.init({"w": x})), alone, atol=1e-4)


@pytest.mark.parametrize("options", [{"source": "params"}, {"groups": by_name, "every": 2}], ids=["params", "groups"])
@pytest.mark.parametrize("spec", [P("x"), slow(P())], ids=str)
def test_an_explicit_mesh_of_one_device(options, spec):
  """Which a script for several is run on; with and without its mesh around it."""
  mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
  place = jax.NamedSharding(mesh, spec)
  tx = sedjax.track_spectral_edge(3, **options)  # of as many numbers as leaves are added in one place
  update = jax.jit(lambda u, s: tx.update(u, s, u)[1])
  steps = [{name: step[name] for name in ("up", "bias", "norm")} for step in STEPS]

  def reports(steps):
    state = tx.init(steps[0])
    for step in steps:
      state = update(step, state)
    return jax.device_get(sedjax.get_reports(state))

  expected, placed = reports(steps), [jax.tree.map(lambda x: jax.device_put(x, place), step) for step in steps]
  assert_same(reports(placed), expected)
  with jax.set_mesh(mesh):
    assert_same(reports(placed), expected)


def test_groups_move_a_sketch_each():
  specs, mesh = LAYOUTS["both"], mesh_of(AxisType.Explicit)
  tx = tracker(SKETCHES["count"], groups=by_name)
  with jax.set_mesh(mesh):
    state = tx.init(place(STEPS[0], specs, mesh))
    reports, program, _ = run(lambda u, s: tx.update(u, s)[1], state, specs, mesh)
  assert_same(reports, unsharded(SKETCHES["count"], True))
  assert sorted(collectives_of(program)) == [("all-reduce", DIM)] * 2


@pytest.mark.parametrize("chunk", [2000, 1])
def test_large_blocks_are_sketched_in_parts(chunk, monkeypatch):
  """On CPU a block is signed a part at a time, with a rest or without one, to the same numbers."""
  monkeypatch.setattr(_indexed, "_CHUNK", chunk)
  specs, mesh = LAYOUTS["both"], mesh_of(AxisType.Auto)
  sketch = sedjax.sketch.count(DIM, seed=7 + chunk)  # no other test's, whose traces would be used again
  tx = tracker(sketch, axis_name=("x", "y"))
  state = tx.init(STEPS[0])
  splits = state_specs(state, specs)
  update = jax.shard_map(lambda u, s: tx.update(u, s)[1], mesh=mesh, in_specs=(specs, splits), out_specs=splits)
  reports, program, _ = run(update, state, specs, mesh)
  assert " while(" in program
  assert_same(reports, unsharded(sketch, False))


def test_parameters_as_source():
  """Rows of sharded parameters' differences, over explicit axes and inside shard_map."""
  specs = LAYOUTS["both"]
  reports = []
  for kind in ("none", "explicit", "shard_map"):
    mesh = mesh_of(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    tx = tracker(SKETCHES["count"], source="params", axis_name=("x", "y") if kind == "shard_map" else None)
    update = lambda u, s, tx=tx: tx.update(u, s, u)[1]  # noqa: E731
    if kind == "explicit":
      with jax.set_mesh(mesh):
        state = tx.init(place(STEPS[0], specs, mesh))
        reports.append(run(update, state, specs, mesh)[0])
      continue
    state = tx.init(STEPS[0])
    if kind == "shard_map":
      splits = state_specs(state, specs)
      update = jax.shard_map(update, mesh=mesh, in_specs=(specs, splits), out_specs=splits)
    reports.append(run(update, state, specs if kind == "shard_map" else REPLICATED, mesh)[0])
  for other in reports[1:]:
    assert_same(other, reports[0])


def test_vmapped_seeds_of_sharded_models():
  """Seeds along a leading axis that is not split, the model over explicit axes."""
  mesh = mesh_of(AxisType.Explicit)
  specs = {"up": P(None, "x"), "bias": P()}
  steps = [{name: np.stack([step[name], 2 * step[name]]) for name in specs} for step in STEPS]
  tx = tracker(SKETCHES["count"])
  state = jax.vmap(tx.init)(steps[0])
  update = jax.jit(jax.vmap(lambda u, s: tx.update(u, s)[1]))
  for step in steps:
    state = update(step, state)
  with jax.set_mesh(mesh):
    split = [{n: jax.device_put(x, jax.NamedSharding(mesh, P(None, *specs[n]))) for n, x in s.items()} for s in steps]
    sharded = jax.vmap(tx.init)(split[0])
    for step in split:
      sharded = update(step, sharded)
  assert_same(jax.device_get(sedjax.get_reports(sharded)), jax.device_get(sedjax.get_reports(state)))


@pytest.mark.parametrize("options", [{}, slow({"every": 2, "source": "params"})], ids=["updates", "params"])
def test_explicit_axes_without_set_mesh(options):
  """The state lies on the mesh of the parameters, so that a step compiles once and fits into a scan."""
  mesh = mesh_of(AxisType.Explicit)
  steps = [{name: step[name] for name in ("up", "bias", "scale")} for step in STEPS]
  split = [place(step, LAYOUTS["both"], mesh) for step in steps]
  tx, traced = tracker(SKETCHES["count"], **options), []

  def step(state, tree):
    traced.append(tree)
    return tx.update(tree, state, tree)[1], None

  def reports(init, trees):
    state = tx.init(init)
    for tree in trees:
      state, _ = update(state, tree)
    return jax.device_get(sedjax.get_reports(state))

  update = jax.jit(step)
  found = reports(split[0], split)
  assert len(traced) == 1
  expected = reports(steps[0], steps)
  assert_same(found, expected)
  assert_same(reports(steps[0], split), expected)  # the state of parameters that lay elsewhere
  stacked = {
    name: jax.device_put(np.stack([tree[name] for tree in steps]), jax.NamedSharding(mesh, P(None, *spec)))
    for name, spec in LAYOUTS["both"].items()
    if name in steps[0]
  }
  assert_same(
    jax.device_get(sedjax.get_reports(jax.jit(jax.lax.scan, static_argnums=0)(step, tx.init(split[0]), stacked)[0])),
    expected,
  )


@pytest.mark.parametrize(
  "options",
  [
    {"every": 2},
    slow({"window": (3, 64), "every": 2}),
    slow({"every": 2, "sketch": SKETCHES["exact"]}),
  ],
  ids=["count", "windows", "exact"],
)
def test_vmapped_seeds_over_an_explicit_axis(options):
  """Each device trains one seed, of a model that it has as a whole."""
  tx = sedjax.track_spectral_edge(**{"window": 3, "sketch": SKETCHES["count"], "momentum": 0.9} | options)
  steps = [{"w": np.stack([seed * step["odd"] for seed in range(1, 9)])} for step in STEPS]
  mesh = jax.make_mesh((8,), ("seed",), axis_types=(AxisType.Explicit,))
  update = jax.jit(jax.vmap(lambda u, s: tx.update(u, s)[1]))

  def reports(put):
    state = jax.tree.map(put, jax.vmap(tx.init)(steps[0]))
    for step in steps:
      state = update(jax.tree.map(put, step), state)
    return jax.device_get(sedjax.get_reports(state))

  expected = reports(jnp.asarray)
  with jax.set_mesh(mesh):
    found = reports(lambda x: jax.device_put(x, jax.NamedSharding(mesh, P("seed"))))
  assert_same(found, expected)


def test_reports_by_name_inside_jit_of_seeds_over_an_explicit_axis():
  tx = sedjax.track_spectral_edge((3, 4), sketch=SKETCHES["count"], groups=lambda path: path, history=2)
  params = {name: np.ones((8, 4, 6), np.float32) for name in ("up", "down")}
  mesh = jax.make_mesh((8,), ("seed",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, jax.NamedSharding(mesh, P("seed")))
    state = jax.jit(jax.vmap(lambda u, s: tx.update(u, s)[1]))(placed, jax.vmap(tx.init)(placed))
    for read in (sedjax.get_report, sedjax.get_history):
      for group in ("down", None):
        pick = functools.partial(read, group=group, window=3)
        for inside, outside in zip(jax.device_get(jax.jit(pick)(state)), jax.device_get(pick(state)), strict=True):
          np.testing.assert_array_equal(inside, outside)
    assert jax.jit(lambda s: sedjax.get_report(s, group="side"))(state).status.tolist() == [256] * 8


@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("vmapped", [False, True])
def test_eigenproblems_of_several_devices_are_solved_one_by_one(sketch, vmapped):
  """jaxlib's solver of several at once may wait forever where several devices run it (0.10.2)."""
  tx = sedjax.track_spectral_edge(4, sketch=SKETCHES[sketch], groups=lambda path: path, momentum=0.9)
  mesh, lead = mesh_of(AxisType.Auto), (None,) if vmapped else ()
  step = {name: np.ones((*(2,) * vmapped, *SHAPES[name]), np.float32) for name in ("up", "down")}
  placed = place(step, {name: P(*lead, "x") for name in step}, mesh)
  over = jax.vmap if vmapped else lambda function: function
  update = jax.jit(over(lambda u, s: tx.update(u, s)[1]))
  text = update.lower(placed, over(tx.init)(placed)).compile().as_text()
  found = re.findall(r"= \((f32\[[\d,]+\]).*\) custom-call\(.*syevd", text)
  assert set(found) == {"f32[4,4]"}


@pytest.mark.parametrize("sketch", ["count", slow("exact")])
def test_vmapped_seeds_over_an_explicit_axis_of_models_split_over_another(sketch):
  tx = sedjax.track_spectral_edge(3, sketch=SKETCHES[sketch])
  steps = [{"w": np.stack([seed * step["odd"][:, :6] for seed in range(1, 5)])} for step in STEPS]
  mesh = jax.make_mesh((4, 2), ("seed", "model"), axis_types=(AxisType.Explicit,) * 2)

  def reports(split):
    state = jax.jit(jax.vmap(tx.init))(split[0])
    update = jax.jit(jax.vmap(lambda u, s: tx.update(u, s)[1]))
    for step in split:
      state = update(step, state)
    return jax.device_get(sedjax.get_reports(state))

  expected = reports(steps)
  with jax.set_mesh(mesh):
    place = jax.NamedSharding(mesh, P("seed", None, "model"))
    found = reports([{"w": jax.device_put(step["w"], place)} for step in steps])
  assert_same(found, expected)


@pytest.mark.parametrize(
  ("sketch", "source"), [("count", "updates"), ("exact", "params")], ids=["count, updates", "exact, params"]
)
def test_seeds_that_are_trained_as_a_whole_inside_shard_map(sketch, source):
  """From init on, in a loop, whose carry must have the same type after each step."""
  tx = sedjax.track_spectral_edge(3, sketch=SKETCHES[sketch], source=source)
  mesh = jax.make_mesh((8,), ("seed",), axis_types=(AxisType.Auto,))
  steps = np.stack([[seed * step["odd"] for step in STEPS] for seed in range(1, 9)])

  def train(updates):
    params = {"w": jnp.zeros_like(updates[0])}

    def step(carry, update):
      params, state = carry
      update, state = tx.update({"w": 2 * update}, state, params)
      return (optax.apply_updates(params, update), state), sedjax.get_reports(state)

    return jax.lax.scan(step, (params, tx.init(params)), updates)[1]

  @jax.jit
  def sharded(steps):
    inside = jax.shard_map(
      lambda own: jax.tree.map(lambda x: x[None], train(own[0])), mesh=mesh, in_specs=P("seed"), out_specs=P("seed")
    )
    return inside(steps)

  assert_same(jax.device_get(sharded(steps)), jax.device_get(jax.jit(jax.vmap(train))(steps)))


@pytest.mark.parametrize("kind", [slow("Explicit"), "Auto"])
def test_exact_rows_of_complex_leaves_on_meshes_of_both_kinds(kind):
  """A complex leaf has an axis more in the ring; on a mesh of two kinds of axes only one shows while tracing."""
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit, AxisType[kind]))
  tx = tracker(SKETCHES["exact"])
  steps = [
    {"z": (step["up"] + 1j * step["up"][::-1])[:, :40].astype(np.complex64), "w": step["down"]} for step in STEPS
  ]
  update = jax.jit(lambda u, s: tx.update(u, s)[1])

  def reports(put):
    state = tx.init(jax.tree.map(put, steps[0]))
    for step in steps:
      state = update(jax.tree.map(put, step), state)
    return jax.device_get(sedjax.get_reports(state))

  expected = reports(jnp.asarray)
  with jax.set_mesh(mesh):
    assert_same(reports(lambda x: jax.device_put(x, jax.NamedSharding(mesh, P("x")))), expected)


def test_check_cost_of_exact_rows():
  """With leaves that are complex, not tracked, or on no mesh of their own."""
  mesh = mesh_of(AxisType.Explicit)
  split = jax.NamedSharding(mesh, P("x"))
  params = {
    "w": jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=split),
    "z": jax.ShapeDtypeStruct((8, 5), jnp.complex64, sharding=split),
    "count": jax.ShapeDtypeStruct((16,), jnp.int32, sharding=split),
    "bias": jax.ShapeDtypeStruct((48,), jnp.float32),
  }
  cost = sedjax.check_cost(tracker(SKETCHES["exact"]), params)
  assert cost.broken() == ()
  assert 0 < sum(numbers for _, numbers in cost.collectives) <= cost.total_allowed == 3 * 4 + 6


def test_check_cost_agrees_with_the_promise():
  for kind, specs in (("Explicit", None), ("Auto", None), ("Auto", LAYOUTS["both"])):
    mesh = mesh_of(AxisType[kind])
    params = {
      name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, LAYOUTS["both"][name]))
      for name, shape in SHAPES.items()
    }
    tx = tracker(SKETCHES["count"], axis_name=("x", "y") if specs else None)
    if specs:
      jax.eval_shape(tx.init, params)
    cost = sedjax.check_cost(tx, params, specs=specs)
    assert cost.broken() == (), cost
    assert cost.state_bytes <= (3 + 3) * DIM * 4 + 2**16
    assert (cost.total_allowed is None) == (kind == "Auto" and specs is None)
    assert "The promise holds" in str(cost)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize(
  ("shape", "spec"), [((2**26 + 8,), P(("x", "y"))), ((3, 2**24), P(None, ("x", "y"))), ((2, 2**23), P())], ids=str
)
def test_blocks_of_long_rows_are_stored_nowhere(shape, spec, kind):
  """As of a flattened model: of 32 MiB on each device."""
  mesh = mesh_of(AxisType[kind])
  params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))}
  params["matrix"] = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=jax.NamedSharding(mesh, P("x")))
  cost = sedjax.check_cost(tracker(SKETCHES["count"]), params)
  assert cost.temporaries <= 9 * 2**20
  assert cost.broken() == ()


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize(("shape", "spec"), [((16384, 1), P()), ((8 * 5000, 3), P(("x", "y")))], ids=str)
def test_narrow_leaves_have_no_number_for_each_row_and_bucket(shape, spec, kind):
  mesh = mesh_of(AxisType[kind])
  split = {"w": jax.NamedSharding(mesh, spec), "matrix": jax.NamedSharding(mesh, P("x"))}
  steps = {"w": np.random.default_rng(0).normal(size=shape), "matrix": np.ones((64, 64))}
  steps = jax.tree.map(lambda x: x.astype(np.float32), steps)
  tx = sedjax.track_spectral_edge(3)
  row = jax.jit(tx.update)(steps, tx.init(steps))[1].trackers["spectral_edge"].rows
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), steps, split)
  cost = sedjax.check_cost(tx, abstract)
  assert cost.temporaries <= 17 * 2**20
  assert max(numbers for _, numbers in cost.collectives) <= 16384
  with jax.set_mesh(mesh):
    steps = jax.device_put(steps, split)
    sharded = jax.jit(tx.update)(steps, tx.init(steps))[1].trackers["spectral_edge"].rows
  assert np.any(row)
  np.testing.assert_allclose(sharded, row, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("by_hand", [False, True], ids=["explicit", "shard_map"])
def test_blocks_are_signed_one_after_the_other(by_hand):
  """On CPU, which stores what it contracts: of 32 MiB on each device not all at once."""
  mesh, spec = mesh_of(AxisType.Auto if by_hand else AxisType.Explicit), P("x", "y")
  leaf = jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
  params = {f"w{i}": leaf for i in range(16)}
  specs = dict.fromkeys(params, spec) if by_hand else None
  cost = sedjax.check_cost(tracker(SKETCHES["count"], axis_name=specs), params, specs=specs)
  assert cost.update_bytes == 2**25
  assert cost.temporaries <= 2**23
  assert cost.broken() == ()


def test_a_dense_map_gathers_nothing_over_automatic_axes():
  split = jax.NamedSharding(mesh_of(AxisType.Auto), P(None, "x", "y"))
  params = {"stack": jax.ShapeDtypeStruct((8, 64, 32), jnp.float32, sharding=split)}
  cost = sedjax.check_cost(tracker(sedjax.sketch.gaussian(32)), params)
  assert 0 < max(numbers for _, numbers in cost.collectives) <= 32


def test_check_cost_finds_what_is_broken():
  """A callback in the update, and a chain instead of a tracker."""
  inner = tracker(SKETCHES["count"])

  def update(updates, state, params=None):
    jax.debug.callback(lambda _: None, updates["w"][0])
    return inner.update(updates, state, params)

  cost = sedjax.check_cost(optax.GradientTransformation(inner.init, update), {"w": jnp.ones((64,))})
  assert [line for line in cost.broken() if "calls the host" in line]
  assert "calls the host" in str(cost)
  with pytest.raises(ValueError, match=r"expected track_spectral_edge\(…\) by itself"):
    sedjax.check_cost(optax.chain(optax.sgd(1.0), inner), {"w": jnp.ones((64,))})
  with pytest.raises(ValueError, match=r"by itself, got <function track_spectral_edge"):
    sedjax.check_cost(sedjax.track_spectral_edge, {"w": jnp.ones((64,))})
  with pytest.raises(ValueError, match=r"params must hold arrays .* got a leaf 1\.0"):
    sedjax.check_cost(inner, {"w": 1.0})
  with pytest.raises(ValueError, match="specs needs params with NamedShardings"):
    sedjax.check_cost(inner, {"w": jnp.ones((64,))}, specs={"w": P()})


def test_collectives_are_read_off_a_program():
  text = """
  %all-reduce.1 = (f32[4,5]{1,0}, s32[]) all-reduce(%a, %b), to_apply=%add
  ROOT %g = f32[16]{0} all-gather-start(%x), dimensions={0}
  %fusion = f32[9] fusion(%all-reduce.1)
"""
  assert collectives_of(text) == (("all-reduce", 20), ("all-reduce", 1), ("all-gather", 16))


# ---- what does not fit ----


def in_shard_map(tx, layout, *, state=None, mesh=None):
  mesh = mesh or mesh_of(AxisType.Auto)
  state = tx.init(STEPS[0]) if state is None else state
  splits = state_specs(state, layout)
  update = jax.shard_map(lambda u, s: tx.update(u, s)[1], mesh=mesh, in_specs=(layout, splits), out_specs=splits)
  return jax.jit(update)(place(STEPS[0], layout, mesh), state)


def test_an_axis_that_does_not_exist():
  with pytest.raises(ValueError, match=r"axis_name='rows' is not a mesh axis here; call update inside"):
    in_shard_map(tracker(SKETCHES["count"], axis_name="rows"), LAYOUTS["leading"])


@pytest.mark.parametrize("jit", [False, True])
def test_axis_name_outside_of_shard_map(jit):
  tx = tracker(SKETCHES["count"], axis_name="x")
  state = tx.init(STEPS[0])
  with pytest.raises(ValueError, match=r"axis_name='x' is not a mesh axis here"):
    (jax.jit(tx.update) if jit else tx.update)(STEPS[0], state)


@pytest.mark.parametrize("axis_name", [3, (), ("x", 3), {}, {"w": "x"}, {"w": P(P.UNCONSTRAINED)}])
def test_bad_axis_name(axis_name):
  with pytest.raises(ValueError, match="axis_name must be None, the name of a mesh axis"):
    tracker(SKETCHES["count"], axis_name=axis_name)


def test_blocks_that_fit_no_split_or_several():
  tx = tracker(SKETCHES["count"], axis_name="x")
  with pytest.raises(ValueError, match=r"block .* of leaf 'bias' .* fits no splits over the mesh axes \{'x': 4\}"):
    in_shard_map(tx, {**REPLICATED, "bias": P("y")})
  square = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
  tx = tracker(SKETCHES["count"], axis_name=("x", "y"))
  with pytest.raises(ValueError, match=r"fits 2 splits .* give axis_name=specs"):
    in_shard_map(tx, LAYOUTS["leading"], mesh=square)


def test_blocks_that_fit_several_models_that_init_saw():
  """One of which is twice as wide and would be split over the other axis."""
  mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
  tx, step, layout = tracker(SKETCHES["count"], axis_name=("x", "y")), {"w": np.ones((8, 5), np.float32)}, {"w": P("x")}
  state = tx.init(step)
  update = jax.shard_map(
    lambda u, s: tx.update(u, s)[1], mesh=mesh, in_specs=(layout, P()), out_specs=P(), check_vma=False
  )
  jax.jit(update)(step, state)
  tx.init({"w": jax.ShapeDtypeStruct((24, 5), np.float32)})  # which has no such blocks
  jax.jit(update)(step, state)
  tx.init({"w": jax.ShapeDtypeStruct((16, 5), np.float32)})
  with pytest.raises(ValueError, match=r"fit splits .* of 2 models that tx.init saw; make an optimizer for each"):
    jax.eval_shape(lambda step, state: update(step, state), step, state)


def test_blocks_that_are_split_over_an_explicit_axis_besides():
  mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
  tx, step = tracker(SKETCHES["count"], axis_name="x"), {"w": np.ones((8, 6), np.float32)}
  state = tx.init(step)
  update = jax.shard_map(
    lambda u, s: tx.update(u, s)[1], mesh=mesh, in_specs=({"w": P("x")}, P()), out_specs=P(), axis_names={"x"},
    check_vma=False,
  )  # fmt: skip
  with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"leaf 'w' is split over an explicit axis besides"):
    jax.jit(update)({"w": jax.device_put(step["w"], jax.NamedSharding(mesh, P("x", "y")))}, state)


def test_specs_without_a_leaf():
  specs = {name: spec for name, spec in LAYOUTS["leading"].items() if name != "norm"}
  with pytest.raises(ValueError, match="axis_name has no PartitionSpec for leaf 'norm'"):
    in_shard_map(tracker(SKETCHES["count"], axis_name=specs), LAYOUTS["leading"])


def test_init_inside_shard_map():
  """With specs it knows the whole parameters' shapes; with names alone it cannot."""
  specs, mesh = LAYOUTS["leading"], mesh_of(AxisType.Auto)

  def first(tx):
    update = jax.shard_map(lambda u: tx.update(u, tx.init(u))[1], mesh=mesh, in_specs=(specs,), out_specs=P())
    return jax.jit(update)(place(STEPS[0], specs, mesh))

  state = first(tracker(SKETCHES["count"], axis_name=specs))
  tx = tracker(SKETCHES["count"])
  _, expected = tx.update(STEPS[0], tx.init(STEPS[0]))
  state, expected = state.trackers["spectral_edge"], expected.trackers["spectral_edge"]
  np.testing.assert_array_equal(state.counters, expected.counters)
  np.testing.assert_allclose(state.rows, expected.rows, atol=1e-4)
  assert np.any(expected.rows)
  with pytest.raises(ValueError, match="init was called inside a shard_map over"):
    first(tracker(SKETCHES["count"], axis_name=("x", "y")))


def test_update_before_init():
  tx = tracker(SKETCHES["count"], axis_name=("x", "y"))
  other = tracker(SKETCHES["count"]).init(STEPS[0])
  with pytest.raises(ValueError, match=r"with axis_name, call tx.init with the whole parameters first"):
    in_shard_map(tx, LAYOUTS["leading"], state=other)


def test_exact_rows_that_are_not_sharded_as_the_parameters():
  specs, mesh = LAYOUTS["leading"], mesh_of(AxisType.Explicit)
  tx = tracker(SKETCHES["exact"])
  with jax.set_mesh(mesh):
    replicated = tx.init(place(STEPS[0], REPLICATED, mesh))
    other = tx.init(place(STEPS[0], LAYOUTS["both"], mesh))
    for state in (replicated, other):
      before = jax.device_get(state)
      with pytest.raises(ValueError, match="exact rows in the state are not sharded as the parameters are"):
        jax.jit(tx.update)(place(STEPS[0], specs, mesh), state)
      jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)  # what was recorded is still there
    with pytest.raises(ValueError, match="exact rows in the state are not sharded as the parameters are"):
      jax.jit(tx.update)(place(STEPS[0], REPLICATED, mesh), other)
    both = tracker(SKETCHES["exact"], source="params")
    state, params = both.init(place(STEPS[0], specs, mesh)), place(STEPS[0], specs, mesh)
    whole = both.init(place(STEPS[0], REPLICATED, mesh)).trackers["spectral_edge"].base
    state = sedjax.SpectralEdgeState({"spectral_edge": state.trackers["spectral_edge"]._replace(base=whole)})
    with pytest.raises(ValueError, match="exact rows in the state are not sharded as the parameters are"):
      jax.jit(both.update)(params, state, params)
  tx = tracker(SKETCHES["exact"], axis_name=("x", "y"))
  state, mesh = tx.init(STEPS[0]), mesh_of(AxisType.Auto)
  splits = jax.tree.map(lambda _: P(), state)
  update = jax.shard_map(lambda u, s: tx.update(u, s)[1], mesh=mesh, in_specs=(specs, splits), out_specs=splits)
  with pytest.raises(ValueError, match=r"give jax.shard_map the spec P\(None, \*spec\) for each"):
    jax.jit(update)(place(STEPS[0], specs, mesh), state)
  splits = state_specs(state, {**specs, "up": P(None, "x"), "down": P(None, "x")})  # others than those of the blocks
  update = jax.shard_map(lambda u, s: tx.update(u, s)[1], mesh=mesh, in_specs=(specs, splits), out_specs=splits)
  with pytest.raises(ValueError, match=r"give jax.shard_map the spec P\(None, \*spec\) for each"):
    jax.jit(update)(place(STEPS[0], specs, mesh), state)


def test_resharding_between_steps_changes_no_number():
  """A sketch's state knows nothing of shardings: a run may go on under another layout."""
  mesh = mesh_of(AxisType.Explicit)
  tx = tracker(SKETCHES["count"])
  with jax.set_mesh(mesh):
    state, update = tx.init(place(STEPS[0], LAYOUTS["fsdp"], mesh)), jax.jit(tx.update)
    for step, layout in zip(STEPS, LAYOUTS.values(), strict=False):
      _, state = update(place(step, layout, mesh), state)
  assert_same(jax.device_get(sedjax.get_reports(state)), unsharded(SKETCHES["count"], False))


def test_normalised_specs():
  assert _placement.normalised(P("x", None, ("y", "z")), 4) == (("x",), (), ("y", "z"), ())


@pytest.mark.parametrize("jit", [False, True])
def test_a_state_on_another_mesh(jit):
  tx, step = tracker(SKETCHES["count"]), {"w": np.ones((16, 8), np.float32)}

  def on(shape, kind):
    mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(kind,) * 2)
    return {"w": jax.device_put(step["w"], jax.NamedSharding(mesh, P("x")))}

  state = tx.init(on((4, 2), AxisType.Explicit))
  update = jax.jit(tx.update) if jit else tx.update
  for updates, where in (
    (on((2, 4), AxisType.Explicit), r"\{'x': \(2, 'Explicit'\), 'y': \(4, 'Explicit'\)\}"),
    (on((4, 2), AxisType.Auto), r"\{'x': \(4, 'Auto'\), 'y': \(2, 'Auto'\)\}"),
  ):
    with pytest.raises(
      ValueError, match=r"the state lies on the explicit mesh \{'x': 4, 'y': 2\}, what is observed on " + where
    ):
      update(updates, state)


def test_a_spec_of_more_dimensions_than_the_leaf_has():
  tx = tracker(SKETCHES["count"], axis_name={**REPLICATED, "up": P("x", None, None)})
  with pytest.raises(ValueError, match=r"axis_name has .* for leaf 'up' of shape \(24, 384\); give the mesh axes"):
    in_shard_map(tx, LAYOUTS["leading"])


@pytest.mark.skipif(not hasattr(P("x"), "partitions"), reason="this JAX has no reduced types")
@pytest.mark.parametrize("kind", ["reduced", "unreduced"])
def test_reduced_and_unreduced_leaves(kind):
  tx, mesh = tracker(SKETCHES["count"]), mesh_of(AxisType.Explicit)
  with jax.set_mesh(mesh):
    plain = {"w": jax.device_put(np.ones((16, 8), np.float32), jax.NamedSharding(mesh, P("x")))}
    typed = {"w": jax.jit(lambda w: jax.sharding.reshard(w, P("x", **{kind: {"y"}})))(plain["w"])}
    state = tx.init(typed)  # parameters may be
    with pytest.raises(ValueError, match=r"the type of leaf 'w' is .* reduced or unreduced over a mesh axis, which"):
      tx.update(typed, state)
    assert int(sedjax.get_report(jax.jit(tx.update)(plain, state)[1]).count) == 1
