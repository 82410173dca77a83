"""What the package promises as a whole: its names, its imports, its documentation."""

import doctest
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import sedjax

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = sorted(pathlib.Path(sedjax.__file__).parent.glob("*.py"))
# Of those that users import, what may be used; every addition shows here.
PUBLIC = {
  "sedjax": (
    "Cost Phase Report SpectralEdgeState Status check_cost core explain get_history get_report get_reports migrate "
    "sketch track_spectral_edge"
  ),
  "sedjax.core": ("Config TrackerState history init observe report reports window_sizes"),
  "sedjax.checkpoints": "CheckpointError analyze",
  "sedjax.plot": "against_null fidelity gap_ratio groups ratios series singular_values",
  "sedjax.record": "DIMS FIELDS Recorder WHOLE open_record to_dataset",
  "sedjax.sinks": "JSONL TensorBoard WandB",
  "sedjax.sketch": "Count Exact Gaussian count exact gaussian",
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
  module, names = importlib.import_module(module), PUBLIC[module].split()
  assert sorted(module.__all__) == names
  for name in names:
    each = getattr(module, name)
    assert each.__doc__
    if inspect.isfunction(each):
      wanted = ["Returns:", "Example:", *(["Args:"] if inspect.signature(each).parameters else [])]
      assert [section for section in wanted if section not in each.__doc__] == [], name


def test_import_brings_in_no_extra():
  extras = ("matplotlib", "xarray", "flax", "orbax", "rich", "h5netcdf", "scipy", "tensorboardX", "wandb")
  code = f"""
import sys, jax, optax, numpy
before = set(sys.modules)
import sedjax
print(sorted((set(sys.modules) - before) & set({extras})))
"""
  done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
  assert done.stdout == "[]\n"


@pytest.mark.parametrize("module", [f"sedjax.{file.stem}" for file in SOURCES if ">>>" in file.read_text()])
def test_docstring_examples_run(module):
  result = doctest.testmod(importlib.import_module(module))
  assert result.attempted > 0
  assert result.failed == 0


def test_readme_figures_are_the_stored_ones():
  command = [sys.executable, ROOT / "benchmarks" / "report.py", "--check"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_readme_python_runs(tmp_path, monkeypatch):
  """The code blocks of the README, one after the other in one namespace."""
  monkeypatch.chdir(tmp_path)
  blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
  assert blocks
  namespace = {}
  for block in blocks:
    exec(compile(block, "README.md", "exec"), namespace)


def test_report_shapes_are_as_documented():
  tx = sedjax.track_spectral_edge(5)
  report = jax.eval_shape(lambda p: sedjax.get_report(tx.init(p)), {"w": jax.ShapeDtypeStruct((3,), "float32")})
  sizes = {"": (), "W": (5,), "W - 1": (4,)}
  documented = re.findall(
    r"^    (\w+): (float32|int32|bool)(?:\[(.*?)\])?(?: in \[0, 1\])?,", sedjax.Report.__doc__, re.M
  )
  assert [name for name, _, _ in documented] == list(sedjax.Report._fields)
  for name, dtype, size in documented:
    field = getattr(report, name)
    assert (str(field.dtype), field.shape) == (dtype, sizes[size]), name
