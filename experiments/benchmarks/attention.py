"""How fast is attention, and how does its memory grow with the length?

Causal, full, windowed and packed attention in float32, on the device that JAX finds, beside
`jax.nn.dot_product_attention` and, where a mask leaves tiles empty, beside itself under the
causal mask; and at the sizes of most models, with the time to compile. Expected: every ratio
within its limit, and temporary memory that grows no faster than the length in the value, the
gradient, the JVP and Hessian-vector products. A limit that is missed in run after run refutes
it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import softjax as sj
from experiments.benchmarks import _measure as measure
from softjax import masks

__all__ = ["main", "run"]

Attend = Callable[[Array, Array, Array], Array]
Derive = Callable[[Attend], Callable[..., Any]]


@dataclasses.dataclass(frozen=True)
class Contest:
    """One attention beside a rival, with the limit of the ratio of their times by mode."""

    name: str
    attend: Attend
    rival_name: str
    rival: Attend
    length: int
    limits: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths of the contests and of the measurement of memory; shapes of most models."""

    short: int = 128
    long: int = 2048
    longer: int = 8192
    memory: tuple[int, ...] = (1024, 4096, 16384)
    heads: int = 4
    width: int = 64
    models: tuple[tuple[int, int, int, int], ...] = (  # batch, tokens, heads, width
        *((8, 256, 4, 32), (32, 64, 4, 32), (8, 128, 8, 64), (64, 16, 4, 16), (4, 512, 8, 64)),
    )
    seconds: float = 6.0
    model_seconds: float = 2.0
    least: int = 5
    num_compilations: int = 3
    judged: bool = True


QUICK = Sizes(
    *(16, 64, 128, (64, 256), 2, 8, ((2, 16, 2, 8),)),
    seconds=0.05,
    model_seconds=0.05,
    least=3,
    num_compilations=1,
    judged=False,
)
MODEL_LIMITS = {"ratio": 1.1, "compile_ratio": 2.0}
GROWTH_LIMIT = 4.5  # times as much memory for four times the length
TIME_HEAD = ["attention", "mode", "length", "ms", "rival", "ms of rival", "ratio", "limit"]
TIME_HEAD += ["pass"]
MODEL_HEAD = ["attention", "mode", "queries", "ms", "ms of jax.nn", "s to compile", "jax.nn"]
MODEL_HEAD += ["time ratio", "compile ratio", "pass"]
MEMORY_HEAD = ["mode", "length", "MiB", "MiB of jax.nn", "growth", "pass"]


def gradient(attend: Attend) -> Callable[..., Any]:
    """All three gradients, from a cotangent."""
    return lambda bar, *args: jax.vjp(attend, *args)[1](bar)


def forward(attend: Attend) -> Callable[..., Any]:
    """The derivative in the direction of the arguments."""
    return lambda bar, *args: jax.jvp(attend, args, args)[1]


def hessian_product(attend: Attend) -> Callable[..., Any]:
    """The derivative of the gradient in the direction of the arguments."""
    return lambda bar, *args: jax.jvp(lambda *at: jax.vjp(attend, *at)[1](bar), args, args)[1]


MODES: dict[str, Derive] = {
    "value": lambda attend: lambda bar, *args: attend(*args),
    "gradient": gradient,
    "JVP": forward,
    "HVP": hessian_product,
}


def main(args: Sequence[str]) -> int:
    """Runs, prints the tables and, with --out, writes `attention-<platform>.json`."""
    options = measure.options(__doc__, args, "attention")
    results = run(QUICK if options.quick else Sizes())
    print(_report(results))
    measure.write(options.out, f"attention-{results['environment']['platform']}", results)
    return 0


def run(sizes: Sizes) -> dict[str, Any]:
    """Times, in seconds, and memory, in bytes, with the environment that they hold for."""
    environment = measure.environment()
    times = [
        _timed(contest, mode, sizes) for contest in contests(sizes) for mode in contest.limits
    ]
    models = [
        _at_models_size(shape, is_causal, mode, sizes)
        for shape in sizes.models
        for is_causal in (True, False)
        for mode in ("value", "with gradient")
    ]
    memory = [record for mode in MODES for record in _memory(mode, sizes)]
    return {
        "benchmark": "attention",
        "environment": environment,
        "times": times,
        "models": models,
        "memory": memory,
    }


def contests(sizes: Sizes) -> list[Contest]:
    """The attentions of the first table, each with its rival."""
    causal, full = _softjax(masks.Causal()), _softjax(None)
    nn_causal, nn_full = _jax_nn(is_causal=True), _jax_nn(is_causal=False)
    window = sizes.longer // 32
    documents = np.repeat(np.arange(8, dtype=np.int32), sizes.longer // 8)
    packed = _softjax(masks.Segments(jnp.asarray(documents)) & masks.Causal())
    return [
        Contest("causal", causal, "jax.nn", nn_causal, sizes.short, _modes(1.1, 1.1)),
        Contest(
            "causal", causal, "jax.nn", nn_causal, sizes.long, _modes(1 / 3, 1 / 2, 1 / 1.5)
        ),
        Contest("full", full, "jax.nn", nn_full, sizes.long, _modes(1 / 1.5, 1 / 1.3, 1 / 1.5)),
        Contest(
            f"window of {window}",
            _softjax(masks.Window(window)),
            "causal",
            causal,
            sizes.longer,
            _modes(1 / 4, 0.4),
        ),
        Contest("8 documents", packed, "causal", causal, sizes.longer, _modes(1 / 3, 0.45)),
        Contest(
            "entmax15",
            lambda q, k, v: sj.attention(q, k, v, mask=masks.Causal(), normalizer="entmax15"),
            "entmax15 of all scores",
            _dense_entmax15,
            sizes.long,
            {"value": 1.0},
        ),
    ]


def _modes(value: float, gradient: float, jvp: float | None = None) -> dict[str, float]:
    limits = {"value": value, "gradient": gradient}
    return limits if jvp is None else limits | {"JVP": jvp}


def _softjax(mask: masks.Mask | None) -> Attend:
    return lambda queries, keys, values: sj.attention(queries, keys, values, mask=mask)


def _jax_nn(is_causal: bool) -> Attend:
    return lambda *args: jax.nn.dot_product_attention(*args, is_causal=is_causal)


def _dense_entmax15(queries: Array, keys: Array, values: Array) -> Array:
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys) / queries.shape[-1] ** 0.5
    causal = np.tri(*scores.shape[-2:])[None, None] > 0
    return jnp.einsum("bnts,bsnw->btnw", sj.entmax15(scores, where=causal), values)


def _tokens(shape: tuple[int, int, int, int]) -> list[Array]:
    """A cotangent, queries, keys and values."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for _ in range(4)]


def _timed(contest: Contest, mode: str, sizes: Sizes) -> dict[str, Any]:
    arrays = _tokens((1, contest.length, sizes.heads, sizes.width))
    ours, theirs = (jax.jit(MODES[mode](f)) for f in (contest.attend, contest.rival))
    calls: dict[str, measure.Call] = {
        "ours": lambda: ours(*arrays),
        "theirs": lambda: theirs(*arrays),
    }
    times = measure.paired(calls, seconds=sizes.seconds, least=sizes.least)
    ratio = times.ratio("ours", "theirs")
    limit = contest.limits[mode] if sizes.judged else None
    return {
        "attention": contest.name,
        "mode": mode,
        "length": contest.length,
        "rival": contest.rival_name,
        "seconds": times.median("ours"),
        "rival_seconds": times.median("theirs"),
        "ratio": ratio,
        "limit": limit,
        "passed": measure.kept({"ratio": ratio}, {"ratio": limit}),
        "rounds": times.rounds,
    }


def _at_models_size(
    shape: tuple[int, int, int, int], is_causal: bool, mode: str, sizes: Sizes
) -> dict[str, Any]:
    """Times of calls and of compilation beside `jax.nn`."""
    bar, *arrays = _tokens(shape)
    attends = {
        "ours": _softjax(masks.Causal() if is_causal else None),
        "theirs": _jax_nn(is_causal=is_causal),
    }
    args = arrays
    functions: dict[str, measure.Function] = dict(attends)
    if mode == "with gradient":
        args = [bar, *arrays]
        functions = {name: measure.with_gradient(f, 3) for name, f in attends.items()}
    compiled, programs = measure.compile_times(
        {name: (function, args) for name, function in functions.items()},
        rounds=sizes.num_compilations,
    )
    calls = {name: functools.partial(program, *args) for name, program in programs.items()}
    times = measure.paired(calls, seconds=sizes.model_seconds, least=sizes.least)
    record = {
        "attention": "causal" if is_causal else "full",
        "mode": mode,
        "shape": list(shape),
        "seconds": times.median("ours"),
        "rival_seconds": times.median("theirs"),
        "compile_seconds": compiled.median("ours"),
        "rival_compile_seconds": compiled.median("theirs"),
        "ratio": times.ratio("ours", "theirs"),
        "compile_ratio": compiled.ratio("ours", "theirs"),
        "rounds": times.rounds,
    }
    limits = MODEL_LIMITS if sizes.judged else {}
    return record | {"limits": limits, "passed": measure.kept(record, limits)}


def _memory(mode: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Temporary bytes at each length, as the compiler plans them."""
    records: list[dict[str, Any]] = []
    for length in sizes.memory:
        shape = (1, length, sizes.heads, sizes.width)
        arrays: list[Any] = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 4
        ours, theirs = (
            measure.compiled_bytes(MODES[mode](f), *arrays)["temporary_bytes"]
            for f in (_softjax(masks.Causal()), _jax_nn(is_causal=True))
        )
        growth = None
        if records and ours is not None:
            before = records[-1]
            growth = ours / before["bytes"] * 4 * before["length"] / length
        limit = GROWTH_LIMIT if sizes.judged else None
        passed = measure.kept({"growth": growth}, {"growth": limit})
        if passed and mode == "gradient" and ours is not None and theirs is not None:
            passed = ours <= theirs / 10
        records.append(
            {
                "mode": mode,
                "length": length,
                "bytes": ours,
                "jax_nn_bytes": theirs,
                "growth": growth,
                "passed": passed,
            }
        )
    return records


def _report(results: dict[str, Any]) -> str:
    return "\n\n".join(
        [
            f"{measure.machine(results['environment'])}, "
            "float32. A ratio is the time of softjax over the rival's, the median of the "
            "rounds.",
            measure.table(TIME_HEAD, map(_time_row, results["times"])),
            "At the sizes of most models.",
            measure.table(MODEL_HEAD, map(_model_row, results["models"])),
            "Temporary memory of causal attention; growth for four times the length.",
            measure.table(MEMORY_HEAD, map(_memory_row, results["memory"])),
        ]
    )


def _time_row(record: dict[str, Any]) -> list[str]:
    return [
        record["attention"],
        record["mode"],
        str(record["length"]),
        f"{1e3 * record['seconds']:.3g}",
        record["rival"],
        f"{1e3 * record['rival_seconds']:.3g}",
        measure.number(record["ratio"]),
        measure.at_most(record["limit"]),
        measure.verdict(record["passed"]),
    ]


def _model_row(record: dict[str, Any]) -> list[str]:
    milliseconds = (record["seconds"], record["rival_seconds"])
    to_compile = (record["compile_seconds"], record["rival_compile_seconds"])
    return [
        *(record["attention"], record["mode"], measure.by(record["shape"])),
        *(measure.scaled(seconds, 1e3) for seconds in milliseconds),
        *(measure.scaled(seconds, 1) for seconds in to_compile),
        *(
            measure.limited(record[k], record["limits"].get(k))
            for k in ("ratio", "compile_ratio")
        ),
        measure.verdict(record["passed"]),
    ]


def _memory_row(record: dict[str, Any]) -> list[str]:
    mebibytes = lambda n: "-" if n is None else f"{n / 2**20:.1f}"
    return [
        record["mode"],
        str(record["length"]),
        mebibytes(record["bytes"]),
        mebibytes(record["jax_nn_bytes"]),
        "-" if record["growth"] is None else f"{record['growth']:.1f}",
        measure.verdict(record["passed"]),
    ]
