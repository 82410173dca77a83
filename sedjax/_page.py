"""The report: one self-contained page that says in words what a record holds, with pictures beside."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedjax import _drawing, _sections, record
from sedjax._dataset import storable
from sedjax._files import replacing
from sedjax._html import escape
from sedjax._page_style import GLOSSARY, STYLE
from sedjax._summary import NEEDED, Facts
from sedjax._warnings import warnings

if TYPE_CHECKING:
  import xarray as xr

_BEGINNING = "<!doctype html>"


def open_record(path: str | os.PathLike[str]) -> xr.Dataset:
  """`record.open_record`, of a record that has what a page needs; it raises ValueError where that lacks."""
  found = record.open_record(os.fspath(path))
  check_record(found, os.fspath(path))
  return found


def check_record(found: xr.Dataset, name: str) -> None:
  """Raises ValueError, naming what is wrong, for what is no record."""
  lacking = [key for key in record.DIMS if key not in found.dims or key not in found.coords]
  lacking += [key for key in NEEDED if key not in found.data_vars]
  if lacking:
    raise ValueError(f"sedjax report: {name} is no record of sedjax: it lacks {', '.join(lacking)}; give a whole one.")
  if not all(found.sizes[dim] for dim in record.DIMS):
    raise ValueError(f"sedjax report: {name} holds no rows; record at least one.")


def write_page(
  source: xr.Dataset, out: str | os.PathLike[str], *, name: str = "record", window: int | None = None, group: Any = None
) -> None:
  """Writes the page of a record; the file appears whole or not at all.

  Raises:
    ValueError: the page cannot be written there, or would take the place of what is no page; else as `make_page`.
  """
  target = Path(out).resolve()  # a link stays
  _check_target(target, os.fspath(out))
  with contextlib.ExitStack() as stack:
    try:  # first, so that a place that cannot be written to is told before the record is read
      file = stack.enter_context(open(stack.enter_context(replacing(target)), "w", encoding="utf-8"))
    except OSError as error:
      raise ValueError(f"sedjax report: {out} cannot be written: {error.strerror}.") from error
    file.write(make_page(source, name=storable(name), window=window, group=group))


def _check_target(target: Path, given: str) -> None:
  if not given or given.endswith("/") or target.is_dir():
    raise ValueError(f"sedjax report: the page cannot be {given!r}, which is no name or a folder's; name a file.")
  if not target.exists():
    return
  beginning = b""
  if target.is_file():
    with open(target, "rb") as file:
      beginning = file.read(len(_BEGINNING)) or _BEGINNING.encode()  # an empty file may be anything
  if beginning.lower() != _BEGINNING.lower().encode():
    raise ValueError(f"sedjax report: {given} exists and is no page, so it is not replaced; give another name.")


def make_page(source: xr.Dataset, *, name: str = "record", window: int | None = None, group: Any = None) -> str:
  """The page of a record, as HTML.

  Args:
    source: the record, lazily opened or in memory.
    name: what the page calls it.
    window: the window of the text and pictures; None for the largest. Tables have all.
    group: likewise; None for the whole model.

  Raises:
    ValueError: it is no record, is damaged, or has no such window or group.
    ImportError: matplotlib is missing.
  """
  _drawing.load_matplotlib()  # before minutes of reading
  check_record(source, name)
  windows, groups = source.window.values.tolist(), source.group.values.tolist()
  window = max(windows) if window is None else window
  if group is None:
    group = record.WHOLE if record.WHOLE in groups else groups[0]
  for what, label, labels in (("window", window, windows), ("group", group, groups)):
    if label not in labels:
      raise ValueError(f"sedjax report: the record has no {what} {label!r}; it has {', '.join(map(str, labels))}.")
  facts = Facts(source, name, window, group)
  return _text(facts)


def _text(facts: Facts) -> str:
  notes = warnings(facts)
  title = f"What happened in {facts.name}"
  parts = [
    _sections.summary(facts),
    _sections.warning_box(notes),
    _sections.phase_section(facts),
    _sections.edge_section(facts),
    _sections.spectrum_section(facts),
    _sections.series_section(facts),
    _sections.group_section(facts),
    _sections.fidelity_section(facts),
    _sections.provenance_section(facts),
    GLOSSARY,
  ]
  body = "\n".join(part for part in parts if part)
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    # The page asks no host for anything, and a browser is told to see to it.
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'\">\n"
    f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
    f"<main>\n<h1>{escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
  )
