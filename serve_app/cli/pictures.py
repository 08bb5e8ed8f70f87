"""Pictures of expert loads; matplotlib comes with the extra ``plot``."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from serve_app.observe.loads import Drift, ExpertLoads

_DPI = 150


def load_picture(loads: ExpertLoads, file: Path) -> None:
    """Draw how often each expert of each layer was chosen, and each layer's imbalance."""
    relative = loads.relative()
    figure = _figure(width=10, rows=len(loads.layers))
    grid = figure.add_gridspec(1, 2, width_ratios=(5, 1), wspace=0.08)
    heat, bars = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, float(relative.max())))
    image = heat.imshow(relative, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    heat.set_xlabel("expert")
    heat.set_ylabel("layer")
    _layer_ticks(heat, loads.layers)
    tokens = sum(loads.tokens.values())
    heat.set_title(f"Load per expert, 1 = even share ({tokens:,} tokens)", loc="left")
    figure.colorbar(image, ax=heat, pad=0.02)
    bars.barh(range(len(loads.layers)), loads.imbalance(), color="tab:gray")
    bars.invert_yaxis()
    bars.set_ylim(len(loads.layers) - 0.5, -0.5)
    bars.set_yticks([])
    bars.axvline(1.0, color="black", linewidth=0.8)
    bars.set_title("busiest / mean", loc="left")
    figure.savefig(file, dpi=_DPI, bbox_inches="tight")


def drift_picture(loads: ExpertLoads, file: Path) -> None:
    """Draw how far each layer's loads moved from one weight version to the next."""
    steps = loads.drift()
    figure = _figure(width=max(6.0, 2 + 0.5 * len(steps)), rows=len(loads.layers))
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 2), hspace=0.12)
    mean, heat = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
    distances = np.array([step.distance for step in steps]).T
    mean.plot(range(len(steps)), distances.mean(axis=0), marker="o", color="tab:blue")
    mean.fill_between(
        range(len(steps)), distances.min(axis=0), distances.max(axis=0), alpha=0.2, color="tab:blue"
    )
    mean.set_ylim(bottom=0)
    mean.set_xlim(-0.5, len(steps) - 0.5)
    mean.set_xticks([])
    mean.set_ylabel("moved share")
    mean.set_title("Load that moved to other experts, by weight update", loc="left")
    image = heat.imshow(distances, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    heat.set_ylabel("layer")
    heat.set_xlabel("weight versions")
    _layer_ticks(heat, loads.layers)
    _version_ticks(heat, steps)
    figure.colorbar(image, ax=[mean, heat], pad=0.02, label="total variation distance")
    figure.savefig(file, dpi=_DPI, bbox_inches="tight")


def _figure(width: float, rows: int) -> Figure:
    figure = Figure(figsize=(width, min(12.0, 3.5 + 0.12 * rows)))
    FigureCanvasAgg(figure)  # draws without a display
    return figure


def _layer_ticks(axes: object, layers: Sequence[int]) -> None:
    _ticks(axes, "y", [str(layer) for layer in layers])


def _version_ticks(axes: object, steps: Sequence[Drift]) -> None:
    _ticks(axes, "x", [f"{step.before}→{step.after}" for step in steps])


def _ticks(axes: object, side: str, labels: list[str]) -> None:
    axis = getattr(axes, f"{side}axis")
    axis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axis.set_major_formatter(
        lambda at, _: labels[int(at)] if at == int(at) and 0 <= at < len(labels) else ""
    )
