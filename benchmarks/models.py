"""Trees of a GPT's parameters in several sizes, and a plain GPT over such a tree: what the benchmarks measure on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any  # nested dicts of arrays


class Gpt(NamedTuple):
  """The sizes of a GPT whose output layer is its token embedding, unless it has a head of its own."""

  vocab: int
  width: int
  layers: int
  context: int
  widening: int = 4  # of the hidden layers
  head: bool = False


GPTS = {
  "gpt_220k": Gpt(97, 128, 1, 64),
  "grok_290k": Gpt(97, 128, 2, 2, widening=2, head=True),  # of the paper's modular arithmetic: 290,401 parameters
  "gpt_51m": Gpt(50257, 512, 8, 256),
  "gpt2_124m": Gpt(50257, 768, 12, 1024),
  "gpt2_1p3b": Gpt(50257, 2048, 24, 1024),
}
HEAD_WIDTH = 64
# Layers of a GPT with fewer are not exchanged but drawn several times, see `variants`.
_MANY_LAYERS, _DRAWS, _VARIANTS = 8, 16, 64


def shapes(name: str, dtype: Any = jnp.float32, lead: tuple[int, ...] = ()) -> Tree:
  """The tree as `jax.ShapeDtypeStruct`s; `lead` (seeds, say) goes in front of every shape."""
  gpt = GPTS[name]
  hidden = gpt.widening * gpt.width

  def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*lead, *shape), dtype)

  def linear(inputs: int, outputs: int) -> Tree:
    return {"kernel": leaf(inputs, outputs), "bias": leaf(outputs)}

  def norm() -> Tree:
    return {"scale": leaf(gpt.width), "bias": leaf(gpt.width)}

  def block() -> Tree:
    return {
      "ln_1": norm(),
      "attn": {"qkv": linear(gpt.width, 3 * gpt.width), "out": linear(gpt.width, gpt.width)},
      "ln_2": norm(),
      "mlp": {"up": linear(gpt.width, hidden), "down": linear(hidden, gpt.width)},
    }

  blocks = {f"block_{i:02}": block() for i in range(gpt.layers)}
  head = {"head": linear(gpt.width, gpt.vocab)} if gpt.head else {}
  return {"wte": leaf(gpt.vocab, gpt.width), "wpe": leaf(gpt.context, gpt.width), "ln_f": norm(), **head, **blocks}


def sizes(tree: Tree) -> dict[str, int]:
  """How large a tree is: leaves, parameters, bytes."""
  leaves = jax.tree.leaves(tree)
  return {
    "leaves": len(leaves),
    "parameters": sum(leaf.size for leaf in leaves),
    "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
  }


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  return (1e-3 * jax.random.normal(key, shape)).astype(dtype)


def random_tree(shape: Tree, seed: int) -> Tree:
  """Normal numbers of standard deviation 1e-3, as updates are small."""
  leaves, structure = jax.tree.flatten(shape)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return structure.unflatten([_draw(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)])


def variants(shape: Tree, seed: int = 0) -> list[Tree]:
  """Many trees in the memory of one, so that a window's rows differ although nothing is made between two timings.

  Of a GPT with many layers one tree is drawn, and each kind of leaf is handed to another layer; of a small one
  several trees are drawn.
  """
  names = [name for name in shape if name.startswith("block_")]
  if len(names) < _MANY_LAYERS:
    return [random_tree(shape, seed + i) for i in range(_DRAWS)]
  tree = random_tree(shape, seed)
  columns = zip(*(jax.tree.leaves(tree[name]) for name in names), strict=True)
  kinds = [list(column) for column in columns]  # of each kind of leaf, that of every layer
  block = jax.tree.structure(tree[names[0]])
  generator = np.random.default_rng(seed)
  trees = []
  for _ in range(_VARIANTS):
    shifts = generator.integers(len(names), size=len(kinds))
    blocks = {
      name: block.unflatten([kind[(i + shift) % len(names)] for kind, shift in zip(kinds, shifts, strict=True)])
      for i, name in enumerate(names)
    }
    trees.append({**tree, **blocks})
  return trees


# ---- a GPT over such a tree ----


def initial_params(name: str, seed: int = 0) -> Tree:
  """Parameters to begin training with: kernels and embeddings of deviation 0.02, scales 1, biases 0."""

  def start(path: Any, leaf: jax.Array) -> jax.Array:
    kind = path[-1].key
    return jnp.ones_like(leaf) if kind == "scale" else jnp.zeros_like(leaf) if kind == "bias" else 20 * leaf

  return jax.tree.map_with_path(start, random_tree(shapes(name), seed))


def _linear(layer: Tree, x: jax.Array) -> jax.Array:
  return x @ layer["kernel"] + layer["bias"]


def _norm(layer: Tree, x: jax.Array) -> jax.Array:
  wide = x.astype(jnp.float32)
  wide = wide - wide.mean(-1, keepdims=True)
  wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
  return wide.astype(x.dtype) * layer["scale"] + layer["bias"]


def _block(block: Tree, x: jax.Array) -> jax.Array:
  batch, length, width = x.shape
  joint = _linear(block["attn"]["qkv"], _norm(block["ln_1"], x))
  query, key, value = jnp.moveaxis(joint.reshape(batch, length, 3, width // HEAD_WIDTH, HEAD_WIDTH), 2, 0)
  # On NVIDIA's GPUs the fused kernels that fast training uses; they know no float32.
  fused = "cudnn" if jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16 else None
  mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=fused).reshape(x.shape)
  x = x + _linear(block["attn"]["out"], mixed)
  return x + _linear(block["mlp"]["down"], jax.nn.gelu(_linear(block["mlp"]["up"], _norm(block["ln_2"], x))))


def loss(params: Tree, tokens: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
  """Mean cross-entropy of int32[batch, length + 1] tokens, each after the ones before it, computed in `dtype`."""
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  inputs, targets = tokens[:, :-1], tokens[:, 1:]
  x = params["wte"][inputs] + params["wpe"][: inputs.shape[1]]
  for name in (name for name in params if name.startswith("block_")):
    x = _block(params[name], x)
  head = params.get("head", {"kernel": params["wte"].T, "bias": jnp.zeros((), dtype)})
  logits = _linear(head, _norm(params["ln_f"], x))
  return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()
