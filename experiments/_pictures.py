"""Pictures of the maps themselves, from tables of their values."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._maps import MAPS, MapName
from experiments._plots import COLOURS, panels
from experiments._types import Arrays

__all__ = ["draw_sigmoid", "draw_simplex", "tabulate_sigmoid", "tabulate_simplex"]


def tabulate_simplex(names: tuple[MapName, ...]) -> Arrays:
    """Circles of three logits around zero, under each map, `[circles, n, 3]`."""
    radius, angle = np.arange(1, 11)[:, None] / 5, np.linspace(0, 2 * np.pi, 361)
    basis = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    plane = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    logits = jnp.asarray(plane @ basis, float)
    return {f"simplex/{name}": np.asarray(MAPS[name].probs(logits)) for name in names}


def draw_simplex(arrays: Arrays) -> Figure:
    """Where each map sends the circles: sparse maps reach the edges, softmax never does."""
    names = [name for name in arrays if name.startswith("simplex/")]
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])
    figure, axes = panels([name.removeprefix("simplex/") for name in names])
    for panel, name in zip(axes, names, strict=True):
        panel.fill(*corners.T, facecolor="none", edgecolor="black", linewidth=0.8)
        for number, (x, y) in enumerate(corners, start=1):
            panel.text(
                x, y + (0.02 if y else -0.06), f"class {number}", fontsize=7, ha="center"
            )
        circles = arrays[name] @ corners
        for shade, circle in zip(np.linspace(0.35, 1, len(circles)), circles, strict=True):
            panel.plot(*circle.T, color=COLOURS[0], alpha=shade, linewidth=1.2)
        panel.set_aspect("equal")
        panel.set_axis_off()
    figure.suptitle("circles of three logits, of radius 0.2 to 2, on the simplex", fontsize=9)
    return figure


def tabulate_sigmoid() -> Arrays:
    """The softmax of (x, 0) and the sigmoid of x, which are the same function."""
    logits = jnp.linspace(-8, 8, 321)
    both: dict[str, Array] = {
        "logits": logits,
        "softmax": sj.softmax(jnp.stack([logits, jnp.zeros_like(logits)], axis=-1))[:, 0],
        "sigmoid": jax.nn.sigmoid(logits),
    }
    return {f"sigmoid/{name}": np.asarray(values) for name, values in both.items()}


def draw_sigmoid(arrays: Arrays) -> Figure:
    """The two over each other, and their difference."""
    logits, softmax = arrays["sigmoid/logits"], arrays["sigmoid/softmax"]
    sigmoid = arrays["sigmoid/sigmoid"]
    figure, (values, gaps) = panels(["softmax of (x, 0)", "softmax less sigmoid"])
    values.plot(logits, softmax, color=COLOURS[0], linewidth=4, alpha=0.4, label="softmax")
    values.plot(logits, sigmoid, color=COLOURS[1], linestyle="--", label="sigmoid")
    values.legend(fontsize=7)
    gaps.plot(logits, softmax - sigmoid, color=COLOURS[0])
    for panel in (values, gaps):
        panel.set_xlabel("x")
    return figure
