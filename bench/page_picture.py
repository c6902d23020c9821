"""The picture of the performance page: a decoded layer's time against context and against sequences, its floor beside.

What it shows stands in its metadata as JSON, so that it can be judged without drawing it again: two versions of
matplotlib draw two files of the same figures.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.amounts import short as tokens
from bench.page_lines import Lookup, short
from bench.page_tables import decoded
from dsv4.errors import ConfigError

AT: Final = {"context": ("sequences", 1), "sequences": ("context", 8192)}  # along -> what stays, and where
COLOURS: Final = {"CSA": "#0072b2", "HCA": "#d55e00", "SWA": "#009e73"}
_SAID: Final = re.compile(r"<dc:description>(.*?)</dc:description>", re.DOTALL)

# Rows of the picture, "H100, Flash"; in each, for what is varied and each kind of layer, [at, µs, floor µs].
Curves = dict[str, dict[str, dict[str, list[list[float]]]]]


def curves(looks: Sequence[Lookup]) -> Curves:
    found: Curves = {}
    for look in looks:
        for said in (line.said for line in decoded(look)):
            for along, (stays, value) in AT.items():
                if said[stays] == value:
                    row = found.setdefault(f"{short(look.device)}, {said['config'].capitalize()}", {})
                    points = row.setdefault(along, {}).setdefault(said["kind"], [])
                    points.append([said[along], said["layer_us"], said["floor_us"]])
    return found


def drawn(path: Path) -> Any:
    """The curves that a picture says it shows; None without one."""
    said = _SAID.search(path.read_text(encoding="utf-8")) if path.exists() else None
    return json.loads(html.unescape(said[1])) if said else None


def draw(found: Curves, path: Path) -> None:
    """As SVG. ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("the picture needs matplotlib", do="pip install 'dsv4[report]'") from None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "dsv4", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(8, 3.2 * len(found) + 0.4), layout="constrained")
        FigureCanvasSVG(figure)
        grid = figure.subplots(len(found), len(AT), squeeze=False)
        for (name, row), places in zip(found.items(), grid, strict=True):
            for (along, (stays, value)), axes in zip(AT.items(), places, strict=True):
                fixed = "1 sequence" if stays == "sequences" else f"{tokens(value)} tokens of context"
                axes.set_title(f"{name}, {fixed}", fontsize=10)
                _panel(axes, along, row.get(along, {}))
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(list(lines.values()), list(map(str, lines)), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, metadata={"Date": None, "Description": json.dumps(found)})


def _panel(axes: Any, along: str, kinds: dict[str, list[list[float]]]) -> None:
    """Where there is one point only, a mark each."""
    for kind, points in kinds.items():
        at, us, floor = zip(*points, strict=True)
        axes.plot(at, us, "o-", color=COLOURS.get(kind, "#000000"), markersize=4, label=kind)
        axes.plot(at, floor, "_--", color=COLOURS.get(kind, "#000000"), linewidth=1.2, label=f"{kind}, its bytes")
    ticks = sorted({point[0] for points in kinds.values() for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [tokens(int(n)) for n in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_ylabel("µs a layer")
    axes.set_xlabel("tokens of context" if along == "context" else along)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)
