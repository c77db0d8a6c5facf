"""Kernels, and passes over memory, of the functions when compiled for accelerators.

The counter is tested on programs for the CPU, whose counts are known. The tests that are marked
`aot` compile for an H200 or a TPU, which needs the plugin of the extra `aot-gpu` or `aot-tpu`,
and no device.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct, lax
from jax._src.cudnn import fused_attention_stablehlo

import softjax as sj
from experiments.benchmarks import _programs as programs
from experiments.benchmarks import compiled
from softjax import masks

H200, V5E = (programs.TARGETS[name] for name in ("h200", "v5e"))
SHAPE = (64, 1000)
UNIT = 4 * 64 * 1000


def compiled_for(target):
    return [
        pytest.mark.aot,
        pytest.mark.optimized,
        pytest.mark.skipif(bool(target.missing), reason=target.missing),
    ]


for_h200, for_v5e = map(compiled_for, (H200, V5E))


@pytest.fixture(autouse=True)
def as_for_users():
    """The other tests compute in 64 bits, and promote strictly."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


# The counter.


def counts(function, *shapes):
    args = [ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = programs.compile_for(programs.TARGETS["cpu"], function, *args)
    return programs.count(program.as_text())


@pytest.mark.optimized
def test_one_kernel_reads_and_writes_once():
    found = counts(lambda x: jnp.exp(x) + 1, SHAPE)
    assert (found.kernels, found.bytes) == (1, 2 * UNIT)
    assert not found.loops
    assert not found.conditionals
    assert not found.custom_calls


@pytest.mark.optimized
def test_loops_count_their_turns():
    step = lambda _, x: lax.optimization_barrier(jnp.sin(x))
    known = counts(lambda x: lax.fori_loop(0, 5, step, x), SHAPE)
    assert (known.loops, known.unknown_loops) == (1, 0)
    assert 10 * UNIT <= known.bytes < 13 * UNIT
    more = counts(lambda x: lax.fori_loop(0, 50, step, x), SHAPE)
    assert more.kernels >= known.kernels + 45

    unknown = lambda x: lax.while_loop(lambda x: x[0, 0] < 1, lambda x: step(0, x), x)
    found = counts(unknown, SHAPE)
    assert (found.loops, found.unknown_loops) == (1, 1)
    assert 2 * UNIT <= found.bytes < 5 * UNIT


@pytest.mark.optimized
def test_a_branch_counts_where_it_moves_most():
    branches = (lambda x: x, lambda x: x @ x, lambda x: (x @ x) @ (x @ (x + 1)))
    found = counts(lambda x, i: lax.switch(i[0].astype(int), branches, x), (64, 64), (1,))
    assert found.conditionals == 1
    assert found.bytes >= 9 * 4 * 64 * 64


@pytest.mark.optimized
def test_a_slice_is_read_alone():
    found = counts(lambda x: jnp.exp(lax.slice_in_dim(x, 3, 5)), SHAPE)
    assert found.bytes == 2 * 4 * 2 * 1000


HLO = """
HloModule m

%fused (p.0: f32[8,128], p.1: s32[]) -> f32[1,128] {
  %p.0 = f32[8,128]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,128}
}

%body (s: (s32[], f32[8,128], f32[1,128])) -> (s32[], f32[8,128], f32[1,128]) {
  %s = (s32[], f32[8,128]{1,0}, f32[1,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%s), index=1
  %row = f32[1,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  ROOT %t = (s32[], f32[8,128]{1,0}, f32[1,128]{1,0}) tuple(%i, %x, %row)
}

%test (s: (s32[], f32[8,128], f32[1,128])) -> pred[] {
  %s.1 = (s32[], f32[8,128]{1,0}, /*index=2*/f32[1,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %end = s32[]{:T(128)} constant(8), metadata={op_name="end"}
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (x.1: f32[8,128], i.2: s32[]) -> f32[1,128] {
  %x.1 = f32[8,128]{1,0} parameter(0)
  %i.2 = s32[] parameter(1)
  %near = f32[1,128]{1,0:T(8,128)S(1)} custom-call(%x.1), custom_call_target="library"
  %call = (f32[1,128]{1,0}, s8[4096]{0}) custom-call(%near), custom_call_target="library"
  %first = f32[1,128]{1,0} get-tuple-element(%call), index=0
  %start = (s32[], f32[8,128]{1,0}, f32[1,128]{1,0}) tuple(%i.2, %x.1, %first)
  %loop = (s32[], f32[8,128]{1,0}, f32[1,128]{1,0}) while(%start), condition=%test, body=%body
  ROOT %out = f32[1,128]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_text_of_a_program():
    found = programs.count(HLO)
    row, whole = 512, 4096
    assert found.kernels == 2 + 8
    assert (found.loops, found.unknown_loops) == (1, 0)
    assert found.custom_calls == {"library": 2}
    # The first call writes near the processor, the second needs room, and the loop slices.
    assert found.bytes == whole + row + 8 * (2 * row + 4)
    growing = programs.count(HLO.replace("direction=LT", "direction=NE"))
    assert growing.unknown_loops == 1


def test_bytes_of_shapes():
    assert programs.num_bytes("f32[2,3]{1,0}") == 24
    assert programs.num_bytes("(bf16[2,3]{1,0}, pred[], f8e4m3fn[7], s32[0])") == 12 + 1 + 7
    assert programs.num_bytes("f32[8,128]{1,0:T(8,128)S(1)}") == 0


def test_missing_plugins_are_told(monkeypatch, capsys):
    monkeypatch.setattr(programs, "_found", lambda module: False)
    assert compiled.main(["--target", "h200", "--quick"]) == 2
    assert "pip install -e '.[aot-gpu]'" in capsys.readouterr().err
    assert not programs.TARGETS["cpu"].missing


def test_every_case_has_its_shapes():
    found = list(compiled.cases(compiled.FULL))
    keys = [(case.name, case.shape) for case in found]
    assert len(set(keys)) == len(keys)
    for case in found:
        jax.eval_shape(case.ours, *case.args)


# On an H200.


# Bounds for the units of value, gradient and both, and for the kernels of both. They are the
# counts with jax 0.10.2 and 0.12.0.1, and a change of the library may lower them.
UNITS = {
    ("softmax", (65536, 1024)): (2.1, 3.1, 5.1, 2),
    ("softmax", (1048576, 21)): (2.1, 3.1, 5.1, 2),
    ("softmax", (8192, 32768)): (3.1, 6.1, 7.1, 6),
    ("softmax, axis 0", (65536, 1024)): (3.1, 6.1, 7.1, 6),
    ("softmax, temperature", (65536, 1024)): (3.1, 6.1, 6.1, 4),
    ("log_softmax", (65536, 1024)): (2.1, 3.1, 5.1, 2),
    ("logsumexp", (65536, 1024)): (1.1, 3.1, 3.1, 3),
    ("cross_entropy", (65536, 1024)): (2.1, 4.1, 4.1, 6),
    ("cross_entropy", (1048576, 21)): (2.6, 5.1, 5.2, 5),
    ("cross_entropy", (8192, 32768)): (2.1, 4.1, 4.1, 8),
    ("log_prob", (65536, 1024)): (2.1, 4.1, 4.1, 6),
    ("kl_divergence", (2048, 8192)): (6.1, 17.1, 17.1, 16),
    ("distillation_loss", (2048, 8192)): (6.1, 17.9, 17.9, 12),
    ("sparsemax", (2048, 8192)): (7.1, 8.6, 10.6, 17),
    ("top_p_filter", (2048, 8192)): (10.1, 11.1, 12.1, 13),
}


def case_of(name, shape):
    (found,) = (
        case
        for case in compiled.cases(compiled.FULL)
        if (case.name, case.shape) == (name, shape)
    )
    return found


@pytest.mark.parametrize(
    ("name", "shape"), [pytest.param(*key, marks=for_h200) for key in UNITS]
)
def test_passes(name, shape):
    case = case_of(name, shape)
    *most, most_kernels = UNITS[name, shape]
    for mode, limit in zip(compiled.MODES, most, strict=True):
        found = compiled.counted(case.ours, case, mode, H200)
        assert 1 <= found["units"] <= limit, mode
        assert not found["conditionals"], mode
        assert not found["custom_calls"], mode
    assert found["kernels"] <= most_kernels


@pytest.mark.parametrize(
    ("shape", "modes"),
    [
        pytest.param((65536, 1024), compiled.MODES, marks=for_h200),
        pytest.param((1048576, 21), ("gradient", "both"), marks=for_h200),
        pytest.param((8192, 32768), compiled.MODES, marks=for_h200),
    ],
)
def test_cross_entropy_takes_no_more_passes_than_optax(shape, modes):
    case = case_of("cross_entropy", shape)
    for mode in modes:
        ours, theirs = (
            compiled.counted(f, case, mode, H200)["units"] for f in (case.ours, case.peer)
        )
        assert ours <= theirs + 0.1, mode


@pytest.mark.parametrize("rows", [pytest.param((64, 131072), marks=for_h200)])
def test_sample_turns_a_known_number_of_times(rows):
    case = case_of("sample", rows)
    found = compiled.counted(case.ours, case, "value", H200)
    assert found["unknown_loops"] == 0
    assert found["units"] <= 4.2
    assert found["kernels"] <= 75


@pytest.fixture
def a_gpu_seems_present(monkeypatch):
    """JAX asks the device which cuDNN it has, although it compiles for another."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(
        fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    yield
    jax.clear_caches()


@pytest.mark.parametrize("title", [pytest.param("attention", marks=for_h200)])
def test_attention_beside_jax_nn(a_gpu_seems_present, title):
    """Where the default device is an accelerator, sequences of this length are not cut."""
    case = case_of(title, (2, 2048, 8, 64))
    for mode, most in (("value", 20), ("gradient", 40)):
        ours, theirs = (compiled.counted(f, case, mode, H200) for f in (case.ours, case.peer))
        assert ours["kernels"] <= most, mode
        assert not ours["loops"], mode
        assert not ours["conditionals"], mode
        assert ours["bytes"] <= 2.5 * theirs["bytes"], mode


@pytest.mark.parametrize(
    "mask", [pytest.param(m, marks=for_h200) for m in (None, masks.Causal())]
)
def test_cudnn_attention(a_gpu_seems_present, mask):
    """Nine kernels keep NaN from who does not see it; the other two are cuDNN's."""
    tokens = ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16)
    case = compiled.Case("attention", sj.attention, (tokens,) * 3, 3)
    cudnn = functools.partial(sj.attention, mask=mask, implementation="cudnn")
    forward, backward = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    found = compiled.counted(cudnn, case, "value", H200)
    assert found["custom_calls"] == {forward: 1}
    assert found["kernels"] <= 7
    found = compiled.counted(cudnn, case, "gradient", H200)
    assert found["custom_calls"] == {forward: 1, backward: 1}
    assert found["kernels"] <= 11
    assert found["temporary_bytes"] <= 21 * 2**20
    assert not found["loops"]
    assert not found["conditionals"]


# On a TPU v5e.


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=for_v5e)
        for name in ("softmax", "log_softmax", "logsumexp")
        for shape in compiled.FULL.rows
    ],
)
def test_passes_on_a_tpu_beside_jax_nn(name, shape):
    """No more than those of jax.nn, but for short slices, whose own numbers count there."""
    more = 1.3 if shape[-1] < 32 else 0
    case = case_of(name, shape)
    for mode in compiled.MODES:
        ours, theirs = (
            compiled.counted(f, case, mode, V5E)["units"] for f in (case.ours, case.peer)
        )
        assert ours <= theirs + more, mode
