"""What all plots share: one colour, shape and dash per arm over the whole page, axes, and charts as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

Record = dict[str, Any]
Spec = dict[str, Any]
Figure = dict[str, Any]

COLOURS = 8  # in the style sheet: --arm-1 to --arm-8
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
DASHES = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3])
ZERO = {"strokeWidth": 1.25, "strokeDash": [4, 3]}
POINT = {"filled": True, "opacity": 1}


def shapes(arms: Sequence[str]) -> list[str]:
    """A mark per arm: with its colour, unique for 64 arms."""
    return [SHAPES[(index + index // COLOURS) % len(SHAPES)] for index in range(len(arms))]


def dashes(arms: Sequence[str]) -> list[list[int]]:
    """A dash per arm: with its colour, unique for 32 arms."""
    return [DASHES[(index + index // COLOURS) % len(DASHES)] for index in range(len(arms))]


def colour(names: Sequence[str], legend: Any = None, field: str = "arm") -> Any:
    """The colour channel of a field: of all its names, so that each keeps its colour where others are missing."""
    scale = alt.Scale(domain=list(names), range="category")
    return alt.Color(f"{field}:N", scale=scale, title=None, legend=legend)


def shape(names: Sequence[str], legend: Any = None) -> Any:
    """The shape channel of the field `arm`; see `colour`."""
    return alt.Shape("arm:N", scale=alt.Scale(domain=list(names), range=shapes(names)), title=None, legend=legend)


def dash(names: Sequence[str], legend: Any = None, field: str = "arm") -> Any:
    """The dash channel of a field; see `colour`."""
    scale = alt.Scale(domain=list(names), range=dashes(names))
    return alt.StrokeDash(f"{field}:N", scale=scale, title=None, legend=legend)


def value_axis(field: str, title: Any, **scale: Any) -> Any:
    """The vertical channel of a field, from 0 unless `scale` says otherwise."""
    return alt.Y(f"{field}:Q", title=title, scale=alt.Scale(**{"zero": True, "nice": True, **scale}))


def layer_axis(field: str = "layer", title: str = "Layer", padding: float = 0) -> Any:
    """The horizontal channel of layers, with `padding` pixels at both ends."""
    axis = alt.Axis(grid=False, tickMinStep=1, format="d")
    return alt.X(f"{field}:Q", title=title, axis=axis, scale=alt.Scale(nice=False, padding=padding, zero=False))


def tooltips(words: Mapping[str, str], quantities: Mapping[str, str] | None = None, form: str = "") -> list[Any]:
    """Tooltip lines, shorthand field → title: words as they are, quantities in the given format."""
    plain = [alt.Tooltip(field, title=title) for field, title in words.items()]
    return plain + [alt.Tooltip(field, title=title, format=form) for field, title in (quantities or {}).items()]


def shown_arms(arms: Sequence[str], records: Sequence[Record], size: int) -> Any:
    """The legend of the arms that any record is of, their marks `size` square pixels large."""
    shown = {record["arm"] for record in records}
    return alt.Legend(values=[arm for arm in arms if arm in shown], symbolType="circle", symbolSize=size)


def chart(records: Sequence[Record]) -> Any:
    """A chart of records, without marks yet."""
    return alt.Chart(alt.InlineData(values=list(records)))


def once(source: Any) -> Any:
    """The same data as one row without fields, for marks that are drawn once: lines at 0, words."""
    return source.transform_aggregate(rows="count()")


def zero_line(source: Any, axis: str = "y") -> Any:
    """A dashed line at 0 of an axis."""
    return once(source).mark_rule(**ZERO).encode(**{axis: alt.datum(0)})


def specification(layers: Sequence[Any], *, height: int) -> Spec:
    """Layers as a Vega-Lite dictionary as wide as its container, `height` pixels high.

    Altair's check against the schema, which takes as long as all the rest of a page, is left to the tests.
    """
    with alt.data_transformers.enable("default", consolidate_datasets=False, max_rows=None):
        spec: Spec = alt.layer(*layers).properties(width="container", height=height).to_dict(validate=False)
    spec.pop("$schema", None)  # an address, though nothing would load it
    spec.pop("config", None)  # the page's own
    return spec


def figure(key: str, section: str, title: str, spec: Spec, alt: str, note: str = "") -> Figure:
    """A specification with its unique key, the page's section, a title and note, and the figure in words."""
    return {"key": key, "section": section, "title": title, "note": note, "alt": alt, "spec": spec}
