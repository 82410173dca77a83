"""Trains a small sharded model in one process of several, and writes the reports of every step as JSON.

    python process_worker.py FOLDER PORT PROCESS PROCESSES TASK…

Each of the processes holds its share of four virtual CPU devices. Tasks are done in turn:

- `train=RUN`: trains each case of `CASES` for `STEPS` steps; keeps a checkpoint at half of them under RUN.
- `resume=RUN`: goes on from the checkpoints of RUN with the second half of the steps.
- `endless=RUN`: trains one case until something ends it, with a checkpoint every second step up to `SAVED`.
- `saving=RUN`: likewise, with checkpoints to the end.
- `migrate=RUN`: carries seeds of their own on each device over to a tracker of another window, and goes on.
- `last=RUN`: says what the last checkpoint of such a RUN holds, and does one more step.
"""

import functools
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import AxisType

import sedjax

DEVICES, STEPS, SAVED, HISTORY = 4, 8, 6, 64
CASES = {
  "auto": (AxisType.Auto, sedjax.sketch.count(256)),
  "explicit": (AxisType.Explicit, sedjax.sketch.count(256)),
  "exact": (AxisType.Explicit, sedjax.sketch.exact()),
}
ENDLESS = "explicit"
SPECS = {"up": jax.P("data"), "bias": jax.P("data"), "down": jax.P(None, "data"), "gain": jax.P()}
SHAPES = {"up": (16, 24), "bias": (24,), "down": (24, 8), "gain": ()}


@functools.cache
def program(case):
  """Mesh of all devices, optimizer and jitted step of a case."""
  kind, sketch = CASES[case]
  mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))
  gather = jax.sharding.reshard if kind == AxisType.Explicit else jax.lax.with_sharding_constraint
  tx = optax.chain(
    optax.adamw(1e-2, b1=0.5), sedjax.track_spectral_edge(4, sketch=sketch, momentum=0.5, history=HISTORY)
  )

  def loss(params, batch):
    whole = {name: gather(leaf, jax.P()) for name, leaf in params.items()}
    hidden = jnp.tanh(batch["x"] @ whole["up"] + whole["bias"])
    return jnp.mean((whole["gain"] * (hidden @ whole["down"]) - batch["y"]) ** 2)

  @jax.jit
  def step(params, state, batch):
    updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
    return optax.apply_updates(params, updates), state, sedjax.get_report(state)

  return mesh, tx, step


class Run:
  """One case under way: its parameters, its optimizer state, how many steps it has done."""

  def __init__(self, case):
    self._mesh, tx, self._step = program(case)
    rng = np.random.default_rng(0)
    with jax.set_mesh(self._mesh):
      self.params = {name: self._place(rng.normal(0, 0.3, SHAPES[name]), spec) for name, spec in SPECS.items()}
      self.state = tx.init(self.params)
    self.count = 0

  def _place(self, value, spec):
    value = np.asarray(value, np.float32)
    return jax.make_array_from_callback(value.shape, jax.NamedSharding(self._mesh, spec), lambda index: value[index])

  def step(self):
    """Does one step, and returns its report."""
    rng = np.random.default_rng(1 + self.count)
    x = rng.normal(size=(8, SHAPES["up"][0]))
    batch = {"x": self._place(x, jax.P("data")), "y": self._place(np.sin(x[:, :8]), jax.P("data"))}
    with jax.set_mesh(self._mesh):
      self.params, self.state, report = self._step(self.params, self.state, batch)
    self.count += 1
    return plain(report)

  def report(self):
    with jax.set_mesh(self._mesh):
      return plain(sedjax.get_report(self.state))

  def history(self):
    with jax.set_mesh(self._mesh):
      return plain(sedjax.get_history(self.state))

  def save(self, manager):
    manager.save(self.count, args=ocp.args.StandardSave((self.params, self.state)))
    manager.wait_until_finished()

  def restore(self, manager):
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (self.params, self.state)
    )
    self.count = manager.latest_step()
    self.params, self.state = manager.restore(self.count, args=ocp.args.StandardRestore(target))


def plain(report):
  """A report, which every process holds whole, as a dict of lists and numbers."""
  assert all(field.is_fully_replicated for field in report)
  return {name: np.asarray(field).tolist() for name, field in jax.device_get(report)._asdict().items()}


def manager_of(folder):
  folder.mkdir(parents=True, exist_ok=True)
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, max_to_keep=2)
  return ocp.CheckpointManager(folder, options=options)


def train(folder, name):
  found = {}
  for case in CASES:
    run = Run(case)
    rows = [run.step() for _ in range(STEPS // 2)]
    with manager_of(folder / name / case) as manager:
      run.save(manager)
    rows += [run.step() for _ in range(STEPS // 2)]
    found[case] = {"rows": rows, "history": run.history()}
  return found


def resume(folder, name):
  found = {}
  for case in CASES:
    run = Run(case)
    with manager_of(folder / name / case) as manager:
      run.restore(manager)
    restored = run.report()
    rows = [run.step() for _ in range(STEPS // 2)]
    found[case] = {"restored": restored, "rows": rows, "history": run.history()}
  return found


def endless(folder, name, saved=SAVED):
  run = Run(ENDLESS)
  with (
    manager_of(folder / name / ENDLESS) as manager,
    open(folder / f"{name}-{jax.process_index()}.jsonl", "w") as file,
  ):
    while True:
      print(json.dumps(run.step()), file=file, flush=True)
      if run.count % 2 == 0 and run.count <= saved:
        run.save(manager)


def last(folder, name):
  run = Run(ENDLESS)
  with manager_of(folder / name / ENDLESS) as manager:
    run.restore(manager)
  return {"restored": run.report(), "history": run.history(), "next": run.step()}


def seeds(folder, name):
  """What is read by a group's name where each device has a seed of its own."""
  del folder, name
  tx = sedjax.track_spectral_edge(3, sketch=sedjax.sketch.count(64), groups=lambda path: path, history=2)
  found = {}
  for kind in ("Explicit", "Auto"):
    mesh = jax.make_mesh((DEVICES,), ("seed",), axis_types=(jax.sharding.AxisType[kind],))
    x = np.random.default_rng(0).normal(size=(DEVICES, 16, 8)).astype(np.float32)
    with jax.set_mesh(mesh):
      place = jax.NamedSharding(mesh, jax.P("seed"))
      params = {name: jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]) for name in "ab"}
      state = jax.jit(jax.vmap(lambda u: tx.update(u, tx.init(u))[1]))(params)
      read = (sedjax.get_report(state, group="b"), sedjax.get_history(state, group="a"))
    found[kind] = [np.asarray(each.count.addressable_shards[0].data).tolist() for each in read]
  return found


def migrate(folder, name):
  del folder, name
  old, new = (sedjax.track_spectral_edge(w, sketch=sedjax.sketch.count(64), groups=lambda path: path) for w in (3, 5))
  mesh = jax.make_mesh((DEVICES,), ("seed",), axis_types=(AxisType.Auto,))
  place = jax.NamedSharding(mesh, jax.P("seed"))
  x = np.random.default_rng(0).normal(size=(3, DEVICES, 16, 8)).astype(np.float32)
  steps = [dict.fromkeys("ab", jax.make_array_from_callback(each.shape, place, lambda i, x=each: x[i])) for each in x]
  state = jax.jit(jax.vmap(old.init))(steps[0])
  for step in steps[:2]:
    state = jax.jit(jax.vmap(lambda u, s: old.update(u, s)[1]))(step, state)
  state = sedjax.migrate(state, jax.jit(jax.vmap(new.init))(steps[0]))
  state = jax.jit(jax.vmap(lambda u, s: new.update(u, s)[1]))(steps[2], state)
  return np.asarray(sedjax.get_report(state).count.addressable_shards[0].data).tolist()


TASKS = {
  "migrate": migrate,
  "seeds": seeds,
  "train": train,
  "resume": resume,
  "endless": endless,
  "saving": functools.partial(endless, saved=math.inf),
  "last": last,
}


def main(folder, port, process, processes, *tasks):
  process, processes = int(process), int(processes)
  jax.config.update("jax_num_cpu_devices", DEVICES // processes)
  if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
      address,
      processes,
      process,
      coordinator_bind_address=address,
      initialization_timeout=60,
      heartbeat_timeout_seconds=10,
    )
  assert len(jax.devices()) == DEVICES
  folder = pathlib.Path(folder)
  for task in tasks:
    kind, name = task.split("=")
    found = TASKS[kind](folder, name)
    (folder / f"{kind}-{name}-{process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
