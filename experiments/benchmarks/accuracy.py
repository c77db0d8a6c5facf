"""How many units in the last place (ulp) lie between each function and the truth?

Every library meets the same slices: scales, offsets, margins, ties, dropped (-inf) entries,
1 to 100000 long. They are rounded to the dtype first, so the rounded inputs are exact. An
entry counts where its true value is a normal number, and a log-probability where it errs by
more than n times the smallest of these, because weights that underflow leave the sum. A sparse
map is judged in ulp of the largest weight of the slice, and by its support. Expected of
softjax: softmax and log_softmax within 4 ulp; logsumexp within 2.5 ulp of the larger of the
two terms that it adds, because no
function can keep the digits of a result in which they cancel; sparse maps within 8 ulp and
with exactly the right support; half precision within 0.52 ulp. A larger number refutes it.

The reference is `np.longdouble`, where that has 64 bits or more. Peaks are subtracted first,
the peak leaves the sum and enters through log1p, NumPy sums in pairs, and a support is found
from sums and inequalities. Its relative error is about 2^-64 times the exponent of the entry,
which is below 750 for a normal number, plus log2(n): under half an ulp of float64 at the
far end, hundredths of one nearly everywhere, and nothing beside the ulp of other dtypes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import softjax as sj
from experiments.benchmarks import _measure as measure

__all__ = ["errors", "main", "run", "truth", "ulp"]

Exact = NDArray[np.longdouble]
Function = Callable[[Any], Any]

SIZES = (1, 2, 3, 7, 1000, 100_000)
TEMPERATURES = (0.05, 0.3, 1.7, 20.0)
DTYPES = ("float32", "float64", "bfloat16", "float16")
HALF = ("bfloat16", "float16")
QUICK = (3, 100), ("float32", "bfloat16")  # few, because compilation takes most of the time
LARGER_TERM = "logsumexp, of the larger term"
SUPPORT = {name: f"{name}, wrong entries" for name in ("sparsemax", "entmax15")}
LIMITS = {
    "softmax": 4.0,
    "log_softmax": 4.0,
    "logsumexp": None,
    LARGER_TERM: 2.5,
    "sparsemax": 8.0,
    SUPPORT["sparsemax"]: 0.0,
    "entmax15": 8.0,
    SUPPORT["entmax15"]: 0.0,
}
LIBRARIES = ("softjax", "softjax with T", "jax.nn", "PyTorch", "entmax")


def main(args: Sequence[str]) -> int:
    """Runs, prints the table and, with --out, writes `accuracy.json`."""
    options = measure.options(__doc__, args, "accuracy")
    with jax.enable_x64(True):
        results = run(*QUICK) if options.quick else run(SIZES, DTYPES)
    print(_report(results, {} if options.quick else LIMITS))
    measure.write(options.out, "accuracy", results)
    return 0


def run(sizes: Sequence[int], dtypes: Sequence[str]) -> dict[str, Any]:
    """The worst error by function, dtype and library, with the case that shows it."""
    environment = measure.environment()
    worst: dict[tuple[str, str, str], dict[str, Any]] = {}
    long = np.finfo(np.longdouble).nmant >= 63
    for dtype in (name for name in dtypes if long or name != "float64"):
        for n in sizes:
            for library, case, name, error in _measured(n, dtype):
                key = name, dtype, library
                if key not in worst or error > worst[key]["error"]:
                    worst[key] = {"error": error, "n": n, "case": case}
    return {
        "benchmark": "accuracy",
        "environment": environment,
        "sizes": list(sizes),
        "errors": [
            {"function": name, "dtype": dtype, "library": library, **_finite(found)}
            for (name, dtype, library), found in worst.items()
        ],
    }


def _finite(found: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity, so null stands for the error of a NaN or of an infinity.
    return found | {"error": found["error"] if np.isfinite(found["error"]) else None}


def _measured(n: int, dtype: str) -> Iterator[tuple[str, str, str, float]]:
    """Library, case, function and error, for every slice of n logits in the dtype."""
    names, logits = _slices(n)
    rounded = logits.astype(jnp.dtype(dtype))
    for temperature in (1.0, *TEMPERATURES):
        rounded_temperature = np.asarray(temperature).astype(rounded.dtype)
        exact = [truth(row, float(rounded_temperature)) for row in rounded]
        for library, functions in _libraries(dtype, rounded_temperature):
            for function, call in functions.items():
                results = np.asarray(call(rounded))
                for i, case in enumerate(names):
                    found = errors(function, results[i], exact[i][function], rounded[i])
                    for name, error in found.items():
                        yield library, f"{case}, T {temperature}", name, error


def _slices(n: int) -> tuple[list[str], NDArray[np.float64]]:
    """The names of the cases, and their logits `[cases, n]`."""
    draw = np.random.default_rng(n)
    slices: dict[str, NDArray[np.floating[Any]]] = {
        f"scale {scale}, offset {offset}": offset + scale * draw.standard_normal(n)
        for scale in (1e-3, 1.0, 30.0)
        for offset in (0.0, 1e2, 1e4)
    }
    for margin in (1, 2, 5, 10, 17, 20, 40, 60, 80):
        slices[f"margin {margin}"] = row = draw.standard_normal(n)
        row[draw.integers(n)] = row.max() + margin
    slices["all equal"] = np.zeros(n)
    slices["ties"] = 0.25 * draw.integers(-2, 3, n)
    slices["two levels"] = -200.0 * draw.integers(0, 2, n)
    for name in ("scale 1.0, offset 0.0", "scale 30.0, offset 100.0", "margin 20"):
        keep = draw.random(n) < 0.6
        keep[0] = True
        slices[f"{name}, dropped"] = np.where(keep, slices[name], -np.inf)
    return list(slices), np.stack(list(slices.values()))


def _libraries(
    dtype: str, temperature: NDArray[Any]
) -> Iterator[tuple[str, dict[str, Function]]]:
    """The functions of each library that takes the dtype and the temperature."""
    softjax = {name: getattr(sj, name) for name in ("softmax", "log_softmax", *SUPPORT)}
    if temperature != 1:
        t = jnp.asarray(temperature)
        partial = functools.partial
        yield "softjax with T", {k: partial(f, temperature=t) for k, f in softjax.items()}
        return
    sums = {"logsumexp": functools.partial(sj.logsumexp, axis=-1)}
    yield "softjax", softjax | sums
    names = ("softmax", "log_softmax", "logsumexp")
    yield "jax.nn", {k: jax.jit(functools.partial(getattr(jax.nn, k), axis=-1)) for k in names}
    torch, entmax = measure.peer("torch"), measure.peer("entmax")
    if torch is not None and dtype == "float32":
        yield "PyTorch", {k: _from_torch(torch, getattr(torch, k)) for k in names}
        if entmax is not None:
            yield "entmax", {k: _from_torch(torch, getattr(entmax, k)) for k in SUPPORT}


def _from_torch(torch: Any, function: Callable[..., Any]) -> Function:
    return lambda logits: function(torch.from_numpy(logits), dim=-1).numpy()


def truth(row: NDArray[Any], temperature: float = 1.0) -> dict[str, Exact]:
    """Every function of one slice, in which entries of -inf are dropped."""
    wide = _wide(row)
    keep = wide > -np.inf
    kept, dropped = wide[keep], {"log_softmax": -np.inf}
    peak = kept.max()
    found = _true_dense(kept - peak, temperature)
    found["logsumexp"] = peak / temperature + found["logsumexp"]
    for name, function in (("sparsemax", _true_sparsemax), ("entmax15", _true_entmax15)):
        found[name] = function(kept - peak, np.longdouble(temperature))
    whole = {}
    for name, values in found.items():
        whole[name] = values
        if name != "logsumexp":
            whole[name] = np.full(row.shape, dropped.get(name, 0.0), np.longdouble)
            whole[name][keep] = values
    return whole


def _true_dense(centred: Exact, temperature: float) -> dict[str, Exact]:
    scores = centred / np.longdouble(temperature)
    weights = np.exp(scores)
    others = weights.copy()
    others[centred.argmax()] = 0  # The peak is exactly 1, so only the others are summed.
    rest = others.sum()
    log_total = np.log1p(rest)
    return {
        "softmax": weights / (1 + rest),
        "log_softmax": scores - log_total,
        "logsumexp": log_total,
    }


def _true_sparsemax(centred: Exact, temperature: np.longdouble) -> Exact:
    """Michelot's method: entries below the threshold leave the support, until none is."""
    support = centred > -temperature
    while True:
        excess, count = centred[support].sum() - temperature, support.sum()
        # Products of numbers with few bits are exact, so that ties stay ties.
        smaller = support & (centred * count > excess)
        if (smaller == support).all():
            return np.maximum(centred - excess / count, 0) * support / temperature
        support = smaller


def _true_entmax15(centred: Exact, temperature: np.longdouble) -> Exact:
    """Newton's method from the left, where it never steps too far; then a quadratic."""
    unit = 2 * temperature
    threshold = -unit
    support = centred > threshold
    for _ in range(200):
        reach = np.maximum(centred - threshold, 0)
        raised = threshold + max((reach**2).sum() - unit**2, 0) / (2 * reach.sum())
        if raised == threshold:
            break
        threshold = raised
    support = centred > threshold
    mean = centred[support].mean()
    spread = ((centred[support] - mean) ** 2).sum()
    root = np.sqrt((unit**2 - spread) / support.sum())
    return np.where(support, np.maximum(centred - mean + root, 0) / unit, 0) ** 2


def errors(name: str, actual: Any, exact: Exact, row: NDArray[Any]) -> dict[str, float]:
    """The largest errors of one slice, by what is judged; inf for NaN.

    Args:
        name: name of the function.
        actual: result of a library.
        exact: true result.
        row: logits, whose dtype gives the ulp.

    Returns:
        Errors in ulp of each entry. For a sparse map, in ulp of the largest weight, with
        the number of entries that are wrongly zero or wrongly not. For logsumexp also in
        ulp of the largest of the peak, the term added to it, and their sum.
    """
    dtype = row.dtype.name
    with np.errstate(invalid="ignore"):  # The infinite results of dropped entries.
        distance = np.abs(_wide(actual) - exact)
    distance = np.where(np.isnan(distance), np.inf, distance)
    normal = np.isfinite(exact) & (np.abs(exact) >= float(jnp.finfo(dtype).smallest_normal))
    if name in SUPPORT:
        largest = exact.max()
        wrong = np.where(normal, _wide(actual) == 0, (exact == 0) & (_wide(actual) != 0))
        return {
            name: float(distance.max() / ulp(largest, dtype)) if normal.any() else 0.0,
            SUPPORT[name]: float(wrong.sum()),
        }
    if name == "log_softmax":
        computed = "float64" if dtype == "float64" else "float32"
        normal &= distance > row.size * float(jnp.finfo(computed).smallest_normal)
    found = {name: float((distance / ulp(exact, dtype)).max(where=normal, initial=0.0))}
    if name == "logsumexp":
        peak = _wide(row).max()
        larger = np.abs([peak, exact - peak, exact]).max()
        found[LARGER_TERM] = float(distance / ulp(larger, dtype))
    return found


def ulp(values: Any, dtype: str) -> Exact:
    """The gap between the numbers of the dtype at each value; subnormals share one gap."""
    finfo = jnp.finfo(dtype)
    values = np.asarray(values, np.longdouble)
    usable = np.isfinite(values) & (values != 0)
    _, exponent = np.frexp(np.where(usable, values, np.longdouble(finfo.smallest_normal)))
    return np.ldexp(np.longdouble(1), np.maximum(exponent - 1, finfo.minexp) - finfo.nmant)


def _wide(values: Any) -> Exact:
    # By way of float64, because NumPy cannot convert bfloat16 to longdouble directly.
    return np.asarray(values).astype(np.float64).astype(np.longdouble)


def _report(results: dict[str, Any], limits: Mapping[str, float | None]) -> str:
    """The table: one row for each function and dtype, one column for each library."""
    found = {(e["function"], e["dtype"], e["library"]): e["error"] for e in results["errors"]}

    def row(name: str, dtype: str) -> list[str]:
        limit = limits.get(name)
        limit = 0.52 if dtype in HALF and limit else limit
        cells = [_cell(found, (name, dtype, library), limit) for library in LIBRARIES]
        return [name, dtype, *cells, "-" if limit is None else f"{limit:g}"]

    dtypes = [dtype for dtype in DTYPES if any(key[1] == dtype for key in found)]
    rows = [row(name, dtype) for name in LIMITS for dtype in dtypes]
    versions = results["environment"]["versions"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return "\n\n".join(
        [
            f"Worst error in ulp over slices of {results['sizes']} logits; T: {TEMPERATURES}.",
            measure.table(["function", "dtype", *LIBRARIES, "promised"], rows),
            f"On {results['environment']['platform']} with {shown}.",
        ]
    )


def _cell(found: dict[tuple[str, str, str], Any], key: tuple[str, str, str], limit: Any) -> str:
    if key not in found:
        return "-"
    error = np.inf if found[key] is None else found[key]
    text = f"{error:.2f}" if error % 1 and error < 10 else f"{error:.3g}"
    broken = limit is not None and error > limit and key[2].startswith("softjax")
    return f"**{text}**" if broken else text
