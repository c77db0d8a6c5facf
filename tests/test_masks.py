"""Masks: what they keep, what they say of a tile, and how they combine."""

import dataclasses
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import softjax as sj
from softjax import masks
from softjax._tiles import Tile, grid_of

T, S, N, BATCH = 7, 10, 2, (3,)
SHAPE = (*BATCH, N, T, S)
RNG = np.random.default_rng(0)
IDS = np.sort(RNG.integers(-1, 4, (*BATCH, T)), -1)
KEY_IDS = np.sort(RNG.integers(-1, 4, (*BATCH, S)), -1)
DENSE = RNG.random((N, T, S)) < 0.5
QUERY, KEY = np.arange(T)[:, None], np.arange(S)[None]


def per_sequence(values):
    return np.reshape(values, (-1, 1, 1, 1))


# A mask, and the definition of what it keeps, which broadcasts to SHAPE.
CASES = {
    "causal": (masks.Causal(), KEY <= QUERY),
    "causal, last aligned": (masks.Causal(S - T), KEY <= QUERY + S - T),
    "causal, per sequence": (
        masks.Causal(np.array([0, 3, -2])),
        QUERY + per_sequence([0, 3, -2]) >= KEY,
    ),
    "window": (masks.Window(2, 1), (KEY >= QUERY - 2) & (KEY <= QUERY + 1)),
    "window, left alone": (masks.Window(2), (KEY >= QUERY - 2) & (KEY <= QUERY)),
    "window, no limit on the right": (masks.Window(1, None), KEY >= QUERY - 1),
    "window, behind": (masks.Window(5, -2), (KEY >= QUERY - 5) & (KEY <= QUERY - 2)),
    "segments": (
        masks.Segments(IDS, KEY_IDS),
        ((IDS[:, :, None] == KEY_IDS[:, None]) & (IDS[:, :, None] >= 0))[:, None],
    ),
    "lengths": (
        masks.Lengths(np.array([7, 3, 0]), np.array([10, 0, 4])),
        (per_sequence([7, 3, 0]) > QUERY) & (per_sequence([10, 0, 4]) > KEY),
    ),
    "key lengths": (masks.Lengths(None, np.array([10, 0, 4])), per_sequence([10, 0, 4]) > KEY),
    "prefix": (masks.Prefix(3), np.broadcast_to(KEY < 3, (T, S))),
    "dense": (masks.Dense(DENSE), DENSE),
    "dense, one row": (masks.Dense(DENSE[0, :1]), DENSE[0, :1]),
    "dense, one column": (masks.Dense(DENSE[:, :, :1]), DENSE[:, :, :1]),
    "function": (
        masks.Function(lambda at: (at.key + at.query + at.head + at.batch) % 3 != 0),
        (KEY + QUERY + np.arange(N).reshape(N, 1, 1) + per_sequence(range(3))) % 3 != 0,
    ),
    "prefix language model": (masks.Causal() | masks.Prefix(3), (KEY <= QUERY) | (KEY < 3)),
    "documents, causal": (
        masks.Segments(IDS, KEY_IDS) & masks.Causal(),
        ((IDS[:, :, None] == KEY_IDS[:, None]) & (IDS[:, :, None] >= 0))[:, None]
        & (KEY <= QUERY),
    ),
    "sinks and a window": (
        (masks.Prefix(1) | masks.Window(2)) & ~masks.Dense(DENSE),
        ((KEY < 1) | ((KEY >= QUERY - 2) & (KEY <= QUERY))) & ~DENSE,
    ),
    "neither": (~(masks.Causal() | masks.Prefix(2)), ~((KEY <= QUERY) | (KEY < 2))),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_array_is_the_definition(name):
    mask, expected = CASES[name]
    got = mask.array(T, S, num_heads=N, batch=BATCH)
    np.testing.assert_array_equal(got, np.broadcast_to(expected, SHAPE), strict=True)


@pytest.mark.parametrize("blocks", [(3, 4), pytest.param((7, 5), marks=pytest.mark.slow)])
@every_case
def test_tiles_agree_with_their_bounds(name, blocks):
    """What is called empty or full is so; together the tiles are the mask; as traced values."""
    mask, expected = CASES[name]
    expected = np.broadcast_to(expected, SHAPE)
    grid = grid_of(BATCH, N, T, S, blocks=blocks)
    num_queries, num_keys = grid.queries.num_blocks, grid.keys.num_blocks

    @jax.jit
    def look(mask, grid=grid, pairs=(num_queries, num_keys)):
        bound = mask.bind(grid)
        tiles = [
            bound.tile(Tile(grid, i, j, grid.index(i, j)))
            for i, j in itertools.product(*map(range, pairs))
        ]
        return bound.bounds(grid), tiles

    bounds, tiles = look(mask)
    shape = (*BATCH, N, num_queries, num_keys)
    some, everything = (np.broadcast_to(b, shape) for b in bounds)
    for tile, (i, j) in zip(
        tiles, itertools.product(range(num_queries), range(num_keys)), strict=True
    ):
        part = expected[
            ...,
            i * blocks[0] : (i + 1) * blocks[0],
            j * blocks[1] : (j + 1) * blocks[1],
        ]
        got = np.broadcast_to(tile, (*BATCH, N, *blocks))
        np.testing.assert_array_equal(got[..., : part.shape[-2], : part.shape[-1]], part)
        assert (some[..., i, j] >= part.any((-2, -1))).all()
        assert (everything[..., i, j] <= part.all((-2, -1))).all()


@pytest.mark.parametrize(
    ("mask", "num_empty", "num_full"),
    [
        (masks.Causal(), 28, 28),
        (masks.Causal(-1), 28, 28),
        (masks.Window(16, 0), 49, 0),
        (masks.Window(31, 0), 43, 7),
        (masks.Segments(np.repeat(np.arange(4), 32)), 48, 16),
        (masks.Segments(np.repeat(np.arange(4), 32)) & masks.Causal(), 52, 4),
        (masks.Prefix(32), 48, 16),
        (masks.Lengths(None, 40), 40, 16),
        (masks.Dense(np.tri(128, dtype=bool)), 28, 28),
        (~masks.Causal(), 28, 28),
        (masks.Function(lambda at: at.key <= at.query), 0, 0),
    ],
)
def test_bounds_are_sharp(mask, num_empty, num_full):
    """Of 8 x 8 tiles of 16 x 16."""
    grid = grid_of((), 1, 128, 128, blocks=(16, 16))
    some, everything = jax.jit(lambda m: m.bind(grid).bounds(grid))(mask)
    shape = (1, 1, 8, 8)
    assert np.sum(~np.broadcast_to(some, shape)) == num_empty
    assert np.sum(np.broadcast_to(everything, shape)) == num_full


def test_positions():
    """Tokens dealt out to two devices, the first and the last quarter to the first one."""
    zigzag = np.array([0, 1, 6, 7, 2, 3, 4, 5])
    mask = masks.Causal() & masks.Window(4)
    got = mask.array(8, positions=(zigzag, zigzag))[0]
    plain = mask.array(8)[0]
    np.testing.assert_array_equal(got, plain[zigzag][:, zigzag])
    grid = grid_of((), 1, 8, 8, blocks=(2, 2), positions=(zigzag, zigzag))
    some, _ = mask.bind(grid).bounds(grid)
    tiles = np.asarray(plain[zigzag][:, zigzag]).reshape(4, 2, 4, 2).any((1, 3))
    np.testing.assert_array_equal(np.broadcast_to(some, (1, 1, 4, 4))[0, 0], tiles)


def test_nothing_of_the_size_of_the_scores_is_built():
    """The bounds of a long sequence, of masks whose fields are traced."""
    grid = grid_of((), 1, 65536, 65536, blocks=(512, 512))

    def bounds(offset, left, ids, length):
        mask = masks.Causal(offset) & masks.Window(left) & masks.Segments(ids)
        return (
            (mask | masks.Prefix(length) & ~masks.Lengths(None, length)).bind(grid).bounds(grid)
        )

    args = jnp.array(0), jnp.array(99), jnp.arange(65536) // 300, jnp.array(7)
    plan = jax.jit(bounds).lower(*args).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 4 * 65536 * 4


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (masks.Causal(1.5), TypeError, "`Causal.offset` must be integers, got float64"),
        (masks.Causal(np.zeros(2, int)), ValueError, r"one per sequence, \(3,\), got .*\(2,\)"),
        (masks.Window(np.zeros((3, 1), int)), ValueError, r"`Window.left`.*got .*\(3, 1\)"),
        (masks.Segments(np.zeros(T, int)), ValueError, r"`Segments.key_ids`.*\(3, 10\), got"),
        (masks.Segments(np.zeros(T)), TypeError, "`Segments.query_ids` must be integers"),
        (masks.Dense(np.ones((T, S))), TypeError, "`mask` must be bool"),
        (masks.Dense(np.ones((T, T), bool)), ValueError, r"\(7, 7\) does not broadcast to"),
        (masks.Function(lambda at: at.key), TypeError, "must give bools"),
        (masks.Function(lambda at: at.key[0] > 0), ValueError, "broadcasts to the tile"),
    ],
)
def test_errors(mask, error, message):
    with pytest.raises(error, match=message):
        mask.array(T, S, num_heads=N, batch=BATCH)


def test_masks_combine_with_bool_arrays_on_either_side():
    causal = np.asarray(KEY <= QUERY)
    for array in (DENSE, jnp.asarray(DENSE)):
        for mask, keep in (
            (masks.Causal() & array, DENSE & causal),
            (array & masks.Causal(), DENSE & causal),
            (masks.Causal() | array, DENSE | causal),
            (array | masks.Causal(), DENSE | causal),
        ):
            np.testing.assert_array_equal(mask.array(T, S, num_heads=N), keep)
    for combine in (lambda: masks.Causal() | 1, lambda: [True] & masks.Causal()):
        with pytest.raises(TypeError, match="combines with masks and bool arrays"):
            combine()
    with pytest.raises(TypeError, match="`mask` must be bool"):
        (masks.Causal() & np.ones((T, S))).array(T, S)


def test_what_a_function_captures_is_its_own():
    with pytest.raises(TypeError, match="captured"):
        masks.Function(lambda at: at.key > 0, captured=jnp.ones(3))


@pytest.mark.parametrize("blocks", [None, (2, 3)])
def test_positions_all_over_int32(blocks):
    """Seconds since 1970, say: differences and limits of which none wraps around."""
    end = 2**31 - 2
    places = np.array([-end, -(2**30) - 5, -1, 0, 1_700_000_000, 1_700_003_600, end])
    query, key = places[:, None], places[None]
    for mask, keep in (
        (masks.Causal(), key <= query),
        (masks.Causal(2**31 - 10), key <= query + 2**31 - 10),
        (masks.Causal(-(2**31) + 10), key <= query - 2**31 + 10),
        (masks.Window(3600), (key <= query) & (key >= query - 3600)),
        (masks.Window(None, 3600), key <= query + 3600),
        (masks.Window(2**31 - 3, None), key >= query - 2**31 + 3),
        (masks.Window(-1, 2**31 - 3), (key >= query + 1) & (key <= query + 2**31 - 3)),
        (masks.Lengths(None, end), key < end),
        (masks.Lengths(2**30 + 7, end), (query < 2**30 + 7) & (key < end)),
    ):
        given = (places, places)
        got = mask.array(7, positions=given)[0]
        np.testing.assert_array_equal(got, np.broadcast_to(keep, (7, 7)))
        if blocks is not None:
            grid = grid_of((), 1, 7, 7, blocks=blocks, positions=given)
            some, every = (
                np.broadcast_to(x, (1, 1, 4, 3))[0, 0] for x in mask.bind(grid).bounds(grid)
            )
            for i, j in np.ndindex(4, 3):
                tile = np.broadcast_to(keep, (7, 7))[2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
                assert some[i, j] >= tile.any()
                assert every[i, j] <= tile.all()


def test_a_function_is_not_a_mask():
    with pytest.raises(TypeError, match=r"masks\.Function"):
        masks.as_mask(lambda at: at.key > 0)


def test_masks_are_pytrees():
    mask = masks.Causal(jnp.array(2)) & ~masks.Window(jnp.array(3), None)
    leaves, structure = jax.tree.flatten(mask)
    assert len(leaves) == 2
    again = jax.tree.unflatten(structure, leaves)
    np.testing.assert_array_equal(again.array(T, S), mask.array(T, S))
    assert dataclasses.is_dataclass(masks.Causal)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
def test_any_number_names_a_document(dtype):
    ids = np.array([2**30 + 1] * 3 + [2**30 + 2] * 3, dtype)
    seen = masks.Segments(jnp.asarray(ids)).array(6)
    np.testing.assert_array_equal(seen[0], ids[:, None] == ids)
    hashes = np.array([2**31 - 1, 2**31 - 2, 0], "int32")
    mixed = masks.Segments(jnp.asarray(hashes), jnp.asarray(hashes.astype("int64")))
    np.testing.assert_array_equal(mixed.array(3)[0], hashes[:, None] == hashes)


def test_names_of_parts():
    """`help` lists the real ones, and an unknown one is told what there is."""
    with pytest.raises(
        TypeError, match=r"Lengths\(\).*'lengths'; it takes query_lengths, key_len"
    ):
        masks.Lengths(lengths=3)
    with pytest.raises(TypeError, match=r"Segments\(\).*'ids'; it takes query_ids, key_ids\."):
        masks.Segments(ids=3)
    listed = re.findall(r"^    (\w+)\((.*?)\)  ", masks.__doc__, re.M)
    assert {name for name, _ in listed} == set(masks.__all__) - {"Mask"}
    for name, parts in listed:
        parameters = inspect.signature(getattr(masks, name)).parameters
        assert all(part.split("=")[0] in parameters for part in parts.split(", "))
    with pytest.raises(ValueError, match="`Lengths` needs `query_lengths` or `key_lengths`"):
        masks.Lengths().array(3)


def test_what_is_no_mask():
    with pytest.raises(TypeError, match="not with `and`"):
        _ = masks.Causal() and masks.Window(3)
    with pytest.raises(ValueError, match=r"`Window\(-3, 0\)` sees nothing"):
        masks.Window(-3)
    assert masks.Window(-1, 2).array(2, 4).tolist() == [
        [[False, True, True, False]] * 1 + [[False, False, True, True]]
    ]
    q = np.zeros((2, 1, 4))
    for mask, message in (
        (masks.Causal, "got the class Causal: call it"),
        ("causal", "one of softjax.masks or a bool array, got 'causal'"),
        (lambda at: at.key > 0, r"masks.Function\(fn\)"),
    ):
        with pytest.raises(TypeError, match=message):
            sj.attention(q, q, q, mask=mask)


LENGTHS = np.array([7, 3])


def test_one_length_is_that_of_the_sequence():
    """Given alone, it hides keys too; queries and keys that differ in number need two."""
    alone, both = masks.Lengths(LENGTHS), masks.Lengths(LENGTHS, LENGTHS)
    np.testing.assert_array_equal(alone.array(9, batch=(2,)), both.array(9, batch=(2,)))
    inside = np.arange(9) < LENGTHS[:, None]
    expected = inside[:, None, :, None] & inside[:, None, None, :]
    np.testing.assert_array_equal(alone.array(9, batch=(2,)), expected)
    by_name = masks.Lengths(query_lengths=LENGTHS)
    np.testing.assert_array_equal(by_name.array(9, batch=(2,)), expected)
    keys_alone = masks.Lengths(key_lengths=LENGTHS).array(5, 9, batch=(2,))
    expected = np.broadcast_to(inside[:, None, None], (2, 1, 5, 9))
    np.testing.assert_array_equal(keys_alone, expected)
    with pytest.raises(ValueError, match=r"equally many, got 5 and 9: give `key_lengths` too"):
        alone.array(5, 9, batch=(2,))
    with pytest.raises(ValueError, match=r"one per sequence, .*`batch` is the shape of the"):
        alone.array(9)


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_three_axes_that_may_be_per_head_or_per_sequence(name):
    """Refused where there are as many sequences as heads, and taken as per head elsewhere."""
    q, k = np.zeros((4, 2, 4, 3)), np.zeros((4, 5, 4, 3))
    values = np.random.default_rng(0).standard_normal((4, 5, 4, 3))
    keep = np.random.default_rng(1).random((4, 2, 5)) < 0.6
    keep[..., 0] = True
    as_bias = lambda keep: keep if name == "mask" else np.where(keep, 0.0, -np.inf)
    call = lambda keep, n=4: sj.attention(
        q[:n], k[:n], values[:n], **{name: jnp.asarray(as_bias(keep))}
    )
    wanted = r"per head or per sequence.*4 each.*\(1, 4, 2, 5\) or \(4, 1, 2, 5\)"
    with pytest.raises(ValueError, match=wanted):
        call(keep)
    by_head, by_sequence = call(keep[None]), call(keep[:, None])
    for n in range(4):
        weights = keep[n] / keep[n].sum(-1, keepdims=True)
        np.testing.assert_allclose(
            by_head[:, :, n], np.einsum("ts,bsh->bth", weights, values[:, :, n]), atol=1e-12
        )
        np.testing.assert_allclose(
            by_sequence[n], np.einsum("ts,snh->tnh", weights, values[n]), atol=1e-12
        )
    np.testing.assert_allclose(call(keep, 3), by_head[:3], atol=1e-12)


EQUAL = [
    lambda: masks.Causal(),
    lambda: masks.Causal(3) & ~masks.Window(2, None),
    lambda: masks.Segments(np.array([0, 0, 1])) | masks.Prefix(jnp.array(2)),
    lambda: masks.Lengths(np.array([3, 4])),
    lambda: masks.Dense(np.eye(3, dtype=bool)),
    lambda: masks.Function(np.equal),
]


def test_masks_of_equal_parts_are_equal():
    for i, make in enumerate(EQUAL):
        assert make() == make()
        assert hash(make()) == hash(make())
        assert [make() == other() for other in EQUAL] == [i == j for j in range(len(EQUAL))]
    assert masks.Causal(1) == masks.Causal(np.int64(1)) != masks.Causal(2)
    assert masks.Segments(np.array([0, 1])) != masks.Segments(np.array([0, 2]))
    assert masks.Function(lambda at: at.key > 0) != masks.Function(lambda at: at.key > 0)
    assert masks.Causal() & masks.Prefix(1) != masks.Causal() | masks.Prefix(1)
    assert masks.Causal() != 0


def test_a_mask_as_a_static_argument():
    """An equal one is not traced again, and a traced one can be compared."""
    traced = []

    def run(x, mask):
        traced.append(mask)
        inner = masks.Causal(x[0].astype(int))
        assert inner == inner != masks.Causal(x[0].astype(int))
        return mask.array(3)

    run = jax.jit(run, static_argnums=1)
    for _ in range(2):
        run(jnp.zeros(2), masks.Causal(1) & masks.Segments(np.array([0, 0, 1])))
    assert len(traced) == 1


def test_a_mask_without_fields_is_equal_to_itself_alone():
    class Own(masks.Mask):
        pass

    own = Own()
    assert own == own != Own()
    assert len({own, Own()}) == 2


def test_reprs():
    mask = ~masks.Causal() & (masks.Window(3, None) | masks.Prefix(np.array([1, 2])))
    assert repr(mask) == "(~Causal(offset=0) & (Window(left=3) | Prefix(length=[1, 2])))"
    assert repr(masks.Dense(np.zeros((3, 4), bool))) == "Dense(keep=bool[3, 4])"
    assert repr(masks.Function(test_reprs)) == "Function(keep=test_reprs)"
    shown = []
    jax.jit(lambda n: shown.append(repr(masks.Causal(n))))(np.zeros(2, "int32"))
    assert shown == ["Causal(offset=int32[2])"]
