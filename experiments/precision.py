"""How many digits of a confident prediction are left?

A row of logits whose largest stands above the others by a growing margin, in the default
float. The loss of the right class falls as exp(-margin), and so does its gradient; the
definition is evaluated in float64 for comparison. Expected: `softjax` keeps every digit at
every margin, while the usual form, log_softmax of `jax.nn`, loses them one by one and
returns 0 from a margin of about 17 on. An error of `softjax` that grows with the margin would
refute it. Beside it, what each map makes of the same row of logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import softjax as sj
from experiments._plots import bars, finish, panels, style
from experiments._run import Arrays, Experiment, Measure, Options, Track, launch, untracked

__all__ = ["Config", "draw", "judge", "main", "run"]

LOSSES: dict[str, Callable[[Array], Array]] = {
    "softjax": lambda logits: -sj.log_prob(logits, jnp.array(0)),
    "jax.nn": lambda logits: -jax.nn.log_softmax(logits)[0],
}
MAPS: dict[str, Callable[[Array], Array]] = {
    "softmax": sj.softmax,
    "entmax, alpha 1.25": lambda logits: sj.entmax(logits, 1.25),
    "entmax15": sj.entmax15,
    "sparsemax": sj.sparsemax,
    "soft_top_k, k = 2": lambda logits: sj.soft_top_k(logits, 2),
}
ROW = (2.0, 1.6, 1.3, 0.4, 0.1, -0.5, -1.2, -2.0)


@dataclass(frozen=True)
class Config(Options):
    """Options of the precision of confident predictions."""

    num_classes: int = 10
    """Entries in a row."""
    max_margin: float = 80.0
    """The largest margin between the first logit and the others."""
    num_margins: int = 321
    """Margins from 0 to the largest."""
    max_ulps: float = 4.0
    """Target: the largest error of softjax, in units of the last place."""

    @classmethod
    def reduced(cls) -> Self:
        """Fewer margins; the target stays."""
        return cls(quick=True, num_margins=81)


def run(config: Config, track: Track = untracked) -> Arrays:
    """Relative errors by margin, of the loss and of its gradient; and each map's weights."""
    margins = np.linspace(0, config.max_margin, config.num_margins).astype(_float())
    logits = np.zeros((config.num_margins, config.num_classes), margins.dtype)
    logits[:, 0] = margins
    small = (config.num_classes - 1) * np.exp(-margins.astype(np.float64))
    exact = {"loss": np.log1p(small), "gradient": -small / (1 + small)}
    arrays: Arrays = {"margins": margins}
    for name in track(range(len(LOSSES)), "precision"):
        library, loss = list(LOSSES.items())[name]
        values, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(jnp.asarray(logits))
        got = {"loss": values, "gradient": gradients[:, 0]}
        for measure, reference in exact.items():
            error = np.abs(np.asarray(got[measure], np.float64) / reference - 1)
            arrays[f"error/{measure}/{library}"] = error
    for library, weigh in MAPS.items():
        arrays[f"weights/{library}"] = np.asarray(weigh(jnp.array(ROW)))
    return arrays


def judge(config: Config, arrays: Arrays) -> list[Measure]:
    """The largest errors of softjax, in ulps, and the margin at which jax.nn has lost all."""
    eps = float(np.finfo(arrays["margins"].dtype).eps)
    lost = arrays["margins"][arrays["error/loss/jax.nn"] >= 1]
    return [
        Measure(
            f"{measure}: error of softjax, in ulps",
            arrays[f"error/{measure}/softjax"] / eps,
            at_most=config.max_ulps,
            summary="max",
        )
        for measure in ("loss", "gradient")
    ] + [Measure("margin at which jax.nn returns 0", np.min(lost, initial=np.inf))]


def draw(arrays: Arrays) -> dict[str, Figure]:
    """Errors by margin, and the weights of one row under each map."""
    titles = [
        "relative error of the loss",
        "relative error of its gradient",
        "weights of one row under each map",
    ]
    figure, axes = panels(
        titles,
        "Left, middle: one logit stands above nine others by the margin; 1 means that no"
        " digit is left, and 0 is drawn as 1e-9. Right: eight logits under five maps.",
        size=4.4,
        columns=3,
    )
    for panel, measure in zip(axes, ("loss", "gradient"), strict=False):
        for number, library in enumerate(LOSSES):
            error = np.maximum(arrays[f"error/{measure}/{library}"], 1e-9)
            panel.plot(arrays["margins"], error, **style(number), label=library)
        finish(panel, "margin of the right class, nats", "relative error", y_scale="log")
        panel.set_ylim(5e-10, 5)
        panel.legend(fontsize=8, loc="center right")
    weights = {name: arrays[f"weights/{name}"] for name in MAPS}
    bars(axes[2], [f"{logit:g}" for logit in ROW], weights)
    finish(axes[2], "logit", "weight")
    axes[2].legend(fontsize=8)
    return {"precision": figure}


def _float() -> np.dtype:
    return np.dtype(jnp.zeros(()).dtype)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the experiment from its command line; returns the exit code."""
    return launch(Experiment("precision", __doc__, Config, run, judge, draw), args)
