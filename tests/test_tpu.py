"""What libtpu's compiler makes of `observe`, ahead of time, for TPUs that are not there: its counts, not runs."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import sedjax

WORKER = pathlib.Path(__file__).with_name("tpu_worker.py")


@pytest.fixture(scope="module")
def compiled():
  pytest.importorskip("libtpu")
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  run = subprocess.run([sys.executable, WORKER], env=environment, capture_output=True, text=True, timeout=400)
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
def test_one_chip_reads_the_updates_once(compiled):
  """On GPT-2 124M the bytes accessed are 0.97 to 1.05 of the updates', at no more than 4 MiB of temporaries."""
  cost = compiled["one"]
  assert cost["platform"] == "tpu"
  assert cost["update_bytes"] == 4 * 124_439_808
  assert 0.97 <= cost["reads"] <= 1.05
  assert cost["temporaries"] <= 4 * 2**20
  assert cost["broken"] == []


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("tree", ["", ", wider than the sketch"])
def test_a_mesh_moves_the_sketch_only(compiled, kind, tree):
  """On 2x4 chips no collective gives more than the sketch's 16,384 numbers; over explicit axes all give no more."""
  cost = compiled[kind + tree]
  assert cost["temporaries"] <= 4 * 2**20
  assert cost["largest_collective"] <= 16384
  assert tree or cost["broken"] == []  # of a single leaf the report is a good part
  if kind == "Explicit":
    assert cost["all_collectives"] == 16384


@pytest.mark.tpu
@pytest.mark.xdist_group("tpu")
def test_no_loop_or_scatter_is_of_parameter_size(compiled):
  assert compiled["large_loops"] == []
  assert not compiled["float64"]
  assert not compiled["callback"]


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_observe_exports(platform):
  """The whole of `observe` lowers for each platform on a machine that need not have it."""
  config = sedjax.core.Config(window=4)
  params = {"w": jax.ShapeDtypeStruct((64, 48), jnp.float32), "b": jax.ShapeDtypeStruct((48,), jnp.bfloat16)}
  state = jax.eval_shape(lambda: sedjax.core.init(config, params))
  observe = jax.jit(lambda s, u: sedjax.core.observe(config, s, u))
  exported = jax.export.export(observe, platforms=[platform])(state, params)
  assert exported.platforms == (platform,)
