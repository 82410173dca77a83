"""Compiles `observe` on GPT-2 124M for TPUs with libtpu, and prints what the compiler says as one JSON.

It runs in a process of its own, since libtpu takes the XLA_FLAGS of the other tests for errors.
"""

import json
import os
import re

# libtpu looks for a machine's metadata unless it is told what it would find.
os.environ |= {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import sedjax

P = jax.P
LARGE = ("[50257,768]", "[768,3072]", "[3072,768]", "[768,2304]")


def gpt2(width=768, layers=12, vocab=50257):
  """Shapes of GPT-2 124M, biases and norms included, and how they are split over the axes "data" and "model"."""
  vector, matrix = P(None), P(None, None)
  norm = {"scale": ((width,), vector), "bias": ((width,), vector)}

  def linear(rows, columns, spec):
    return {"kernel": ((rows, columns), spec), "bias": ((columns,), P(spec[1]))}

  tree = {"wte": ((vocab, width), matrix), "wpe": ((1024, width), matrix), "ln_f": norm}
  for i in range(layers):
    tree[f"block_{i}"] = {
      "ln_1": norm,
      "ln_2": norm,
      "qkv": linear(width, 3 * width, P("data", "model")),
      "out": linear(width, width, P("model", "data")),
      "up": linear(width, 4 * width, P("data", "model")),
      "down": linear(4 * width, width, P("model", "data")),
    }
  return tree


def abstract(place, **sizes):
  def leaf(pair):
    return jax.ShapeDtypeStruct(pair[0], jnp.float32, sharding=place(pair[1]))

  return jax.tree.map(leaf, gpt2(**sizes), is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[1], jax.P))


def cost_of(params, **options):
  cost = sedjax.check_cost(sedjax.track_spectral_edge(window=10, **options), params)
  return {
    "platform": cost.platform,
    "reads": cost.bytes_accessed / cost.update_bytes,
    "update_bytes": cost.update_bytes,
    "temporaries": cost.temporaries,
    "largest_collective": max((n for _, n in cost.collectives), default=0),
    "all_collectives": sum(n for _, n in cost.collectives),
    "broken": cost.broken(),
  }


def program_of(one):
  """Of two layers: what it is looked through for would be there as in all twelve."""
  params, config = abstract(lambda _: one, layers=2), sedjax.core.Config(window=10)
  state = jax.eval_shape(lambda: sedjax.core.init(config, params))
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
  observe = jax.jit(lambda state, updates: sedjax.core.observe(config, state, updates), donate_argnums=0)
  return observe.lower(state, params).compile().as_text()


def step_of(one, *trackers):
  """Bytes that a step of AdamW accesses, as the compiler counts, and how many large arrays it copies."""
  params = abstract(lambda _: one, layers=2)
  tx = optax.chain(optax.adamw(1e-3), *trackers)

  def step(params, state, gradients):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), jax.eval_shape(tx.init, params))
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
  compiled = lowered.compile({"xla_msa_max_outstanding_prefetches": "0"})
  copies = [line for line in compiled.as_text().splitlines() if " copy(" in line]
  analysis = compiled.cost_analysis()
  return {
    "bytes": analysis["bytes accessed"],
    "update_bytes": sum(4 * leaf.size for leaf in jax.tree.leaves(params)),
    "copies": [line for line in copies if any(shape in line for shape in LARGE)],
  }


def main():
  topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
  one = jax.sharding.SingleDeviceSharding(topology.devices[0])
  text = program_of(one)
  loops = [line for line in text.splitlines() if re.search(r" (while|scatter)\(", line)]
  found = {
    "one": cost_of(abstract(lambda _: one)),
    "float64": "f64[" in text,
    "callback": "callback" in text,
    "large_loops": [line for line in loops if any(shape in line for shape in LARGE)],
  }
  # Of other models: leaves of which not as many rows of buckets fit into the sketch as there are.
  found["small"] = cost_of({"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32, sharding=one)})
  for shape in ((2048, 5632), (1600, 4800), (4096, 11008)):
    found[f"one {shape}"] = cost_of({"kernel": jax.ShapeDtypeStruct((8, *shape), jnp.float32, sharding=one)})
  found["step"] = step_of(one)
  found["tracked step"] = step_of(one, sedjax.track_spectral_edge(10))
  for kind in ("Explicit", "Auto"):
    types = (jax.sharding.AxisType[kind],) * 2
    mesh = topologies.make_mesh(topology, (2, 4), ("data", "model"))
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)
    found[kind] = cost_of(abstract(lambda spec, mesh=mesh: jax.NamedSharding(mesh, spec)))
    wide = {
      "head": jax.ShapeDtypeStruct((768, 50304), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", "model")))
    }
    found[f"{kind}, wider than the sketch"] = cost_of(wide)
    square = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", "model")))
    found[f"{kind}, parameters"] = cost_of({"w": square}, source="params")
  print(json.dumps(found))


if __name__ == "__main__":
  main()
