"""The benchmarks: they run, write what they promise, and can see that a function is wrong."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from experiments.benchmarks import __main__ as command_line
from experiments.benchmarks import _measure as measure
from experiments.benchmarks import accuracy, compiled, gpu, maps, sampling, shapes
from experiments.benchmarks import compile as compile_times

ROOT = Path(__file__).parent.parent
ROWS = {
    "maps": [
        *("| softmax ", "| softmax, gradient ", "| log_softmax ", "| log_softmax, gradient "),
        *("| softmax, value and gradient ", "| log_softmax, value and gradient "),
        *("| sparsemax ", "| entmax15 ", "| entmax(alpha=1.3) ", "| soft_top_k(k=8) "),
        *("| top_p_filter(p=0.9) ", "| top_k_filter(k=50) ", "Copy: "),
    ],
    "attention": [
        *("| causal ", "| full ", "| window of 4 ", "| 8 documents ", "| entmax15 "),
        *("| value ", "| gradient ", "| JVP ", "| HVP "),
    ],
    "losses": [
        *("| cross_entropy ", "| linear_cross_entropy ", "| info_nce ", "| siglip_loss "),
        "| linear_cross_entropy, forward_gradient ",
    ],
    "sampling": [f"| {case.name} " for case in sampling.QUICK],
    "compile": [f"| {name} " for name in compile_times.QUICK.names],
    "compiled": [
        *("| softmax ", "| log_softmax ", "| logsumexp ", "| cross_entropy ", "| log_prob "),
        *("| kl_divergence ", "| sparsemax ", "| top_p_filter ", "| sample ", "| attention "),
    ],
    "gpu": [
        "| accuracy ",
        "| rows ",
        "| attention ",
        "| others ",
        "0 of 0 counted predictions",
    ],
    "ring": ["| ring ", "| allgather ", "| ulysses "],
    "steps": ["| transformer ", "| actor-critic ", "| classifier "],
    "rollouts": [
        *("| softmax ", "| softmax, gradient ", "| log_softmax ", "| log_prob, gradient "),
        *("| sample ", "| select_action "),
    ],
    "shapes": [
        *(
            "| cross_entropy ",
            "| cross_entropy along axis 1 ",
            "| cross_entropy, half ignored ",
        ),
        *("| cross_entropy, smoothed ", "| distillation_loss ", "| log_softmax "),
        *("| softmax ", "| softmax, masked ", "| softmax along axis 1 "),
    ],
    "scale": [
        *("| softmax ", "| sparsemax ", "| linear_cross_entropy ", "| MiB sent, value "),
        *("| tokens of a device from which a hop overlaps ", "| strong ", "| weak "),
        "Simulated devices share one processor",
    ],
    "accuracy": [
        f"| {name} "
        for name in ("softmax", "log_softmax", "logsumexp", "sparsemax", "entmax15")
    ],
}
OPTIONS = {"compiled": ["--target", "cpu"]}


def launch(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


# The command line.


def test_every_benchmark_asks_a_question(capsys):
    assert set(command_line.questions()) == set(ROWS)
    assert command_line.main([]) == 0
    listing = capsys.readouterr().out
    for name, question in command_line.questions().items():
        assert question.endswith("?")
        assert f"  {name} " in listing
        assert question in listing


def test_unknown_name(capsys):
    assert command_line.main(["map"]) == 2
    assert "no benchmark 'map'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ROWS))
def test_quick_run(tmp_path, name):
    done = launch(name, *OPTIONS.get(name, []), "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    lines = done.stdout.splitlines()
    for row in ROWS[name]:
        assert any(line.startswith(row) for line in lines), row

    (file,) = tmp_path.iterdir()
    results = json.loads(file.read_text(encoding="utf-8"))
    assert file.stem == ("accuracy" if name == "accuracy" else f"{name}-cpu")
    assert results["benchmark"] == name
    versions = results["environment"]["versions"]
    assert versions.keys() >= {"jax", "jaxlib", "numpy", "softjax", "optax", "distrax", "torch"}
    assert results["environment"]["platform"] == "cpu"
    assert str(tmp_path) not in done.stdout
    assert not {"<=", "limit", "pass", "promised"} & set(done.stdout.replace("(", " ").split())
    globals()[f"check_{name}"](results)


def check_maps(results):
    for record in results["times"]:
        assert record["seconds"] > 0
        assert record["copy_gb_per_second"] > 0
        assert (record["ratio"] is None) == (record["rival_seconds"] is None)
        assert record["limit"] is record["passed"] is None
    assert {record["map"] for record in results["memory"]} == set(maps.MAPS)
    for record in results["memory"]:
        assert record["output_bytes"] == 4 * math.prod(record["shape"])
        assert record["residual_bytes"] >= 0


def check_losses(results):
    modes = {(record["loss"], record["mode"]) for record in results["records"]}
    assert modes >= {("linear_cross_entropy", mode) for mode in ("value", "gradient", "jvp")}
    for record in results["records"]:
        assert record["seconds"] is None or record["seconds"] > 0
        assert (record["time_ratio"] is None) == (record["rival_seconds"] is None)
        assert record["time_limit"] is record["memory_limit"] is record["passed"] is None


def check_sampling(results):
    for record, case in zip(results["records"], sampling.QUICK, strict=True):
        assert record["seconds"] > 0
        assert record["ratio"] > 0
        assert record["ratio_passed"] is record["numbers_passed"] is None
        noise = 4 * case.rows * case.classes * case.draws
        assert record["rival_temporary_bytes"] >= noise
    assert record["temporary_bytes"] < noise / 2


def check_attention(results):
    for record in results["times"]:
        assert record["ratio"] > 0
        assert record["limit"] is record["passed"] is None
    assert {(record["attention"], record["mode"]) for record in results["models"]} == {
        (mask, mode) for mask in ("causal", "full") for mode in ("value", "with gradient")
    }
    for record in results["models"]:
        assert record["ratio"] > 0
        assert record["compile_ratio"] > 0
        assert record["passed"] is None
    for record in results["memory"]:
        assert record["bytes"] > 0
        assert (record["growth"] is None) == (record["length"] == 64)


def check_compile(results):
    for record in results["records"]:
        assert record["equations"] > 0
        assert record["compile_seconds"] > 0
        assert record["call_seconds"] > 0
        assert record["compile_ratio"] > 0
        assert record["passed"] is None
    modes = [record["mode"] for record in results["records"]]
    assert modes == ["value", "gradient", "value", "gradient", "value"]


def check_compiled(results):
    for record in results["records"]:
        assert record["mode"] in ("value", "both")
        for found in filter(None, (record["ours"], record["peer"])):
            assert found["kernels"] > 0
            assert found["units"] >= 1
            assert found["unknown_loops"] <= found["loops"]
            assert found["temporary_bytes"] >= 0
    assert results["environment"]["target"]["versions"] == {}


def check_ring(results):
    for record in results["records"]:
        assert record["bytes"] == record["formula_bytes"] > 0
        assert record["passed"] is None


def check_gpu(results):
    assert {record["step"] for record in results["records"]} == set(gpu.FULL.seconds)
    for record in results["records"]:
        # A slow machine may have no time left; nothing else may fail.
        assert record["failed"] in (None, gpu.LATE)
        if record["failed"] is None and record["step"] != "accuracy":
            assert record["seconds"] > 0
        assert record["error"] is None or record["error"] < 32
        assert record["counted_ratio"] is record["is_wrong"] is None


def check_scale(results):
    sizes = results["sizes"]
    payload = {}
    for record in results["records"]:
        name, mode = record["function"], record["mode"]
        pairs_meet = name in ("info_nce", "siglip_loss")
        assert ("all-gather" in record["collectives"]) == pairs_meet
        assert pairs_meet or list(record["collectives"]) == ["all-reduce"]
        in_search = record["payload_bytes_in_loops"] > 0
        assert in_search == (name in ("sparsemax", "entmax15", "sparsemax_loss"))
        payload[name, mode] = record["payload_bytes"]["all-reduce"]
    value, gradient = (payload["linear_cross_entropy", m] for m in ("value", "gradient"))
    assert gradient - value == 4 * sizes["num_tokens"] * sizes["num_features"]
    for record in results["scaling"]:
        assert record["payload_bytes"] == {"all-reduce": gradient}


def check_steps(results):
    arms = [(record["step"], record["arm"], record["peer"]) for record in results["records"]]
    assert arms == [
        ("transformer", "softjax", "jax.nn, optax"),
        ("transformer", "softjax, linear_cross_entropy", "jax.nn, optax"),
        ("actor-critic", "softjax", "jax.nn"),
        ("actor-critic", "softjax", "distrax"),
        ("classifier", "softjax", "optax"),
    ]
    for record in results["records"]:
        check_ratios(results, record, "ratio", "compile_ratio", "memory_ratio")
        assert record["compile_seconds"] > record["seconds"] > 0
        assert record["temporary_bytes"] > 0
        assert record["passed"] is None


def check_rollouts(results):
    for record in results["records"]:
        check_ratios(results, record, "ratio")
        assert record["seconds"] > 0
        assert record["passed"] is None


def check_shapes(results):
    for record in results["records"]:
        assert record["ratio"] > 0
        assert record["temporary_bytes"] >= 0
        assert record["passed"] is None


def check_ratios(results, record, *names):
    """Ratios are there, unless the peer is not installed."""
    found = record["peer"] != "distrax" or results["environment"]["versions"]["distrax"]
    for name in names:
        assert record[name] > 0 if found else record[name] is None


def check_accuracy(results):
    found = {(e["function"], e["dtype"], e["library"]): e["error"] for e in results["errors"]}
    for name in accuracy.LIMITS:
        assert (name, "float32", "softjax") in found
    assert found["log_softmax", "float32", "softjax"] < 4
    assert found["log_softmax", "float32", "jax.nn"] > 1e6  # 0 for a confident entry.


# What is measured.


def test_times():
    times = measure.Times({"ours": [1.0, 8.0, 3.0], "theirs": [1.0, 2.0, 1.0]})
    assert times.median("ours") == 3
    assert times.ratio("ours", "theirs") == 3
    assert times.rounds == 3


def test_paired_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.paired(calls, seconds=0, least=4)
    assert times.rounds == 4  # and the two calls
    assert order.count("a") > 4
    assert set(times.samples) == {"a", "b"}


def test_equations_of_a_function_that_is_called_twice_count_once():
    inner = jax.jit(lambda x: jnp.sin(x) + 1.0)
    assert measure.equations(inner, 1.0) == 3  # the call, the sine and the sum
    assert measure.equations(lambda x: inner(inner(x)), 1.0) == 4  # and the two calls
    scan = lambda x: jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, length=3)[0]
    assert measure.equations(scan, 1.0) == 2


def test_value_with_gradient():
    function = lambda x, y, n: x * y + n
    both = measure.with_gradient(function, 2)
    assert both(2.0, 3.0, 5.0, 7.0) == (22.0, (10.0, 6.0))
    assert measure.cotangent(function, jnp.ones(3), 1.0, 0.0).shape == (3,)


def test_compile_times():
    # `jax.clear_caches` would cost the tests that follow in this process.
    forgotten = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "clear_caches", lambda: forgotten.append(None))
        functions = {name: (jnp.sin, [1.0]) for name in "ab"}
        times, programs = measure.compile_times(functions, rounds=2)
    assert times.rounds == 2
    assert len(forgotten) == 4  # and the two calls
    assert times.median("a") > 0
    assert programs["b"](1.0) == pytest.approx(math.sin(1.0))
    assert measure.planned_bytes(programs["b"])["output_bytes"] > 0


def test_limits():
    figures = {"time": 2.0, "memory": None}
    assert measure.kept(figures, {}) is None
    assert measure.kept(figures, {"time": None, "memory": 1.0}) is None
    assert measure.kept(figures, {"time": 2.0, "memory": 1.0}) is True
    assert measure.kept(figures, {"time": 1.5}) is False
    assert measure.limited(2.0, 1.5) == "**2.00 (<= 1.50)**"
    assert measure.limited(0.25, 1.5) == "1/4 (<= 1.50)"
    assert measure.limited(2.0, None) == "2.00"
    assert measure.at_most(None) == measure.verdict(None) == "-"


def test_every_public_function_is_compiled(monkeypatch):
    monkeypatch.setattr(measure, "peer", lambda name: None)
    names = [case.name for case in compile_times.cases()]
    assert len(names) == len(set(names))
    assert set(names) == set(sj.__all__) - {"check_labels", "explain_attention"}
    known = {(case.name, shape) for case in compile_times.cases() for shape in case.shapes}
    assert {(name, shape) for name, _, shape in compile_times.LIMITS} <= known


def test_losses_agree_with_their_peers():
    for contest in shapes.contests(shapes.QUICK):
        if contest.peer_name == "jax.nn":
            continue
        args = (shapes._normal(contest.shape), *contest.others)
        actual, expected = contest.ours(*args), contest.peer(*args)
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6, err_msg=contest.name)


def test_missing_peer():
    sizes = maps.Sizes(seconds=0, least=1)
    rivals = [maps.Rival("absent", None, limit=2.0)]
    (record,) = maps._timed("map", (2, 3), lambda: None, rivals, sizes=sizes)
    assert record["passed"] is None
    row = maps._time_row(record)
    assert row[4:] == ["absent", "-", "-", "<= 2.00", "-"]
    assert measure.peer("no_such_module") is None
    assert measure.missing("optax") == ""
    expected = "Not compared, because no_such_module is not installed."
    assert measure.missing("optax", "no_such_module") == expected


@pytest.mark.optimized
def test_residuals():
    x = maps._normal((4, 8))
    assert measure.residual_bytes(lambda x: 2 * x, x) <= 8
    assert measure.residual_bytes(lambda x: x * x, x) in (x.nbytes, 2 * x.nbytes)


def test_table():
    assert measure.table(["a", "bc"], [["def", "g"]]).splitlines() == [
        "| a   | bc |",
        "| --- | -- |",
        "| def | g  |",
    ]
    empty = measure.table(["a", "limit"], [["1", "-"], ["-", "-"]])
    assert empty.splitlines() == ["| a |", "| - |", "| 1 |", "| - |"]


# A run on a GPU.


def one_contest(arms, args=((4, 8),), **changes):
    shapes = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in args)
    given = {"step": "rows", "name": "map", "mode": "both", "num_floats": 1, "base": "peer"}
    given |= {"exact": None, "calls": 3}
    return gpu.Contest(args=shapes, arms=arms, **given | changes)


def test_repeated_calls_are_made():
    seen = []

    def function(x):
        jax.debug.callback(lambda: seen.append(None))
        return 2 * x

    out = jax.jit(gpu.repeated(function, 5))(jnp.ones(3))
    jax.effects_barrier()
    np.testing.assert_array_equal(out, [2, 2, 2])
    assert len(seen) == 5


def test_predictions_are_judged():
    arms = {gpu.OURS: jnp.sin, "peer": jnp.sin}
    judge = lambda counted: gpu._measured(
        one_contest(arms), gpu.QUICK, {("map", (4, 8), "both"): counted}, math.inf
    )
    ours, peer = judge(1e6)
    assert ours["is_wrong"] is True
    assert ours["seconds"] > 0
    assert peer["is_wrong"] is peer["ratio"] is None
    environment = {"device": "d", "cores": 2, "load_average": None, "versions": {"jax": "0"}}
    text = gpu._report({"environment": environment, "records": [ours, peer]})
    assert "1 of 1 counted predictions were wrong:" in text
    assert "- map 4 x 8, both: " in text

    ours, _ = judge(ours["ratio"])
    assert ours["is_wrong"] in (True, False)  # The times of two runs differ.
    assert not any(
        r["is_wrong"] for r in gpu._measured(one_contest(arms), gpu.QUICK, {}, math.inf)
    )


def test_what_fails_or_comes_late_is_recorded():
    def fails(x):
        raise ValueError("no kernel\nand more")

    contest = one_contest({gpu.OURS: jnp.sin, "peer": fails})
    ours, peer = gpu._measured(contest, gpu.QUICK, {}, math.inf)
    assert ours["failed"] is None
    assert ours["seconds"] > 0
    assert ours["ratio"] is None
    assert peer["failed"] == "ValueError: no kernel"
    for record in gpu._measured(contest, gpu.QUICK, {}, -math.inf):
        assert record["failed"] == gpu.LATE


def test_wrong_results_show():
    exact = one_contest({gpu.OURS: jnp.exp, "peer": lambda x: jnp.exp(x) + 1e-3}, exact=jnp.exp)
    ours, peer = gpu._measured(exact, gpu.QUICK, {}, math.inf)
    assert 0 < ours["error"] < 2
    assert peer["error"] > 1e3
    eps = 2.0**-23
    assert gpu.errors(np.float32([1, 2]), np.array([1, 2 - 2 * eps])) == pytest.approx(
        1, rel=1e-6
    )
    assert gpu.errors(np.float32([np.nan]), np.array([1.0])) == 1e30
    edges = np.array([np.nan, np.inf, -np.inf, 0])
    assert gpu.errors(edges.astype(np.float32), edges) == 0


def test_counted_predictions_are_of_cases():
    known = {
        (case.name, case.shape, mode)
        for case in compiled.cases(compiled.FULL)
        for mode in case.modes
    }
    assert gpu._counted().keys() <= known
    assert all(ratio > 0 for ratio in gpu._counted().values())


# The judge of accuracy.


def test_ulp():
    values = np.array([1.0, 1.5, 2.0, -3.0, 0.99, 0.0])
    np.testing.assert_array_equal(
        accuracy.ulp(values, "float64"), [*np.spacing([1.0, 1.5, 2.0, 3.0, 0.99]), 2.0**-1074]
    )
    assert accuracy.ulp(1.0, "float32") == 2.0**-23
    assert accuracy.ulp(1.0, "bfloat16") == 2.0**-7
    assert accuracy.ulp(2.0**-30, "float16") == 2.0**-24


def test_truth():
    dense = accuracy.truth(np.array([2.33, -1.46, 0.56]))
    expected = [0.83827314, 0.01894129, 0.14278557]
    np.testing.assert_allclose(dense["softmax"].astype(float), expected, atol=5e-9)
    confident = accuracy.truth(np.array([100.0, 0.0, -np.inf]), 2.0)
    assert float(confident["log_softmax"][0]) == pytest.approx(-math.exp(-50), rel=1e-15)
    assert confident["log_softmax"][2] == -np.inf
    assert confident["logsumexp"] == 50 + np.log1p(np.exp(np.longdouble(-50)))
    sparse = accuracy.truth(np.array([1.0, 0.5, -1.0]))["sparsemax"]
    np.testing.assert_array_equal(sparse, [0.75, 0.25, 0.0])
    # Two entries at a distance of d: each root is +-d/4 + r, where r^2 = 1/2 - d^2/16.
    root = math.sqrt(0.5 - 1 / 16)
    halfway = accuracy.truth(np.array([1.0, 0.0, -2.0]))["entmax15"].astype(float)
    np.testing.assert_allclose(halfway, [(root + 0.25) ** 2, (root - 0.25) ** 2, 0], rtol=1e-15)


@pytest.mark.parametrize("name", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 20.0])
def test_true_sparse_maps_are_distributions(name, temperature):
    row = np.random.default_rng(0).standard_normal(1000)
    weights = accuracy.truth(row, temperature)[name]
    assert abs(weights.sum() - 1) < 1e-17
    # All kept entries share one threshold, below which all others lie.
    power = 1 if name == "sparsemax" else 2
    threshold = row / (power * temperature) - weights.astype(float) ** (1 / power)
    kept = weights > 0
    assert np.ptp(threshold[kept]) < 1e-13
    assert (threshold[~kept] <= threshold[kept].min() + 1e-13).all()


def test_broken_functions_show():
    row = np.array([60.0, 0.0, 1.0], np.float32)
    exact = accuracy.truth(row)

    def error(name, actual, of=None):
        return accuracy.errors(name, np.asarray(actual, np.float32), exact[name], row)[
            of or name
        ]

    rounded = {name: values.astype(np.float32) for name, values in exact.items()}
    for name in ("softmax", "log_softmax", "logsumexp", "sparsemax", "entmax15"):
        assert error(name, rounded[name]) <= 0.5
        assert error(name, rounded[name] * np.nan) == np.inf
        assert error(name, rounded[name] * np.float32(1 + 2**-20)) >= 4
    assert error("log_softmax", [0.0, -60.0, -59.0]) > 1e6
    assert error("sparsemax", [1.0, 1e-30, 0.0]) < 0.5
    assert error("sparsemax", [1.0, 1e-30, 0.0], accuracy.SUPPORT["sparsemax"]) == 1
    assert error("entmax15", [1.0, 0.0, 0.0], accuracy.SUPPORT["entmax15"]) == 0


def test_logsumexp_is_judged_by_its_larger_term():
    row = np.array([-1.0, -1.0, -1.0], np.float32)
    exact = accuracy.truth(row)["logsumexp"]
    found = accuracy.errors("logsumexp", exact + 2.0**-23, exact, row)
    assert found[accuracy.LARGER_TERM] == pytest.approx(1)
    assert found["logsumexp"] == pytest.approx(16)
