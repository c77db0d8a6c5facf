"""Checks of arguments: arrays and their dtypes, axes, shapes, masks and labels.

Every public function passes its arguments through these checks first. An error names the
argument, what came and what was wanted. One policy for dtypes and one for masks holds for all.
"""

import functools
import operator
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from softjax._mesh import AxisName, names_of
from softjax._slices import AlongAxes

Axis = int | tuple[int, ...] | None
Leaf = TypeVar("Leaf")


def check_int(value: int, *, name: str, least: int | None = None) -> int:
    """A static int; bools and floats are refused."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    return int(value)


def check_flag(value: bool, *, name: str) -> bool:
    """A static bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


class Problem(NamedTuple):
    """Logits in their computing dtype, the axes of a slice, and the options of a map."""

    logits: Array  # [*shape]; -inf where dropped
    axes: tuple[int, ...]  # the axes of a slice, sorted and not negative
    temperature: Array | None  # broadcasts against [*shape]; None stands for 1
    dtype: jnp.dtype  # of the result
    mesh_axes: tuple[str, ...] = ()  # over which slices are spread

    @property
    def slices(self) -> AlongAxes:
        return AlongAxes(self.axes, self.mesh_axes)


def prepare(
    logits: ArrayLike,
    *,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    name: str = "logits",
    axis_name: AxisName = None,
) -> Problem:
    """Checks and promotes the arguments that every map shares."""
    logits, out_dtype = to_float(logits, name=name)
    axes = resolve_axes(axis, logits.ndim)
    if where is not None:
        logits = jnp.where(mask(where, logits.shape, name=name), logits, -jnp.inf)
    if is_static_one(temperature):
        temperature = None
    if temperature is not None:
        temperature = per_slice(temperature, logits, axes, name="temperature")
    return Problem(logits, axes, temperature, out_dtype, names_of(axis_name))


def check_same_shape(problem: Problem, like: Problem, *, name: str, other: str) -> None:
    """Raises an error unless both have logits of one shape; `other` names those of `like`."""
    if problem.logits.shape != like.logits.shape:
        raise ValueError(
            f"`{name}` of shape {problem.logits.shape} must have the shape"
            f" {like.logits.shape} of `{other}`."
        )


def nan_unless_positive(option: Array) -> Array:
    """The option, or NaN where it is not positive: values in an array cannot be refused."""
    return jnp.where(option > 0, option, jnp.nan)


def nan_outside(option: Array, low: float, high: float | None = None) -> Array:
    """The option, or NaN where it is outside of [low, high], where None stands for no end."""
    inside = option >= low
    if high is not None:
        inside &= option <= high
    return jnp.where(inside, option, jnp.nan)


def is_static_one(temperature: ArrayLike | None) -> bool:
    """Whether it is the default 1.0, which `api` keeps from `jit` as a Python number."""
    return temperature is None or (isinstance(temperature, float) and temperature == 1)


def is_static_zero(option: ArrayLike | None) -> bool:
    """Whether it is the default 0.0, which `api` keeps from `jit` as a Python number."""
    return isinstance(option, float) and option == 0


def as_given(x: Any, *, name: str, functions: bool = False) -> Any:
    """The array, number, or tree of them that was given, refused if JAX cannot hold it.

    An object with `__jax_array__` (a parameter of a neural network library, for example) stands
    for its array. Integers that are wider than JAX's are refused if one does not fit, because
    JAX would take it for another number. With `functions`, anything but an array is unchanged.
    """
    if x is None:
        return x
    if isinstance(x, (jax.Array, float, complex, np.ndarray, np.generic, int)):
        if not fits(x):
            dtype = jax.dtypes.canonicalize_dtype(getattr(x, "dtype", np.dtype("int64")))
            raise ValueError(
                f"`{name}` holds a number that {dtype} cannot hold, as wide as JAX's integers"
                " are now: give smaller ones or floats, or set `jax_enable_x64`."
            )
        if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "OSUMm":
            raise TypeError(f"`{name}` must hold numbers, got {x.dtype}.")
        return x
    if _stands_for_an_array(x):
        return as_given(x.__jax_array__(), name=name)
    is_function = callable(x) or isinstance(x, (str, bytes))
    if is_function or jax.tree_util.all_leaves([x]):
        if functions:
            return x
        wanted = "a key of jax.random" if name == "key" else "an array or a number"
        raise TypeError(f"`{name}` must be {wanted}, got {type(x).__name__}.")
    leaves, structure = jax.tree.flatten(x, is_leaf=_stands_for_an_array)
    held = [as_given(leaf, name=name, functions=functions) for leaf in leaves]
    if all(map(operator.is_, held, leaves)):
        return x
    return jax.tree.unflatten(structure, held)


def _stands_for_an_array(x: Any) -> bool:
    return hasattr(type(x), "__jax_array__")


def fits(x: Any) -> bool:
    """Whether JAX holds the integers of `x` unchanged."""
    if isinstance(x, int):
        low, high = limits_of(np.int64) or (0, 0)
        return low <= x <= high
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "iu" and x.size:
        low, high = limits_of(x.dtype) or (0, 0)
        return x.dtype.itemsize < 8 or bool(low <= x.min() and x.max() <= high)
    return True


def limits_of(dtype: DTypeLike) -> tuple[int, int] | None:
    """The least and the largest integer of a dtype as JAX holds it; None for other dtypes."""
    return _limits(jax.dtypes.canonicalize_dtype(dtype))


@functools.cache
def _limits(dtype: np.dtype) -> tuple[int, int] | None:
    if not jnp.issubdtype(dtype, jnp.integer):
        return None
    limits = jnp.iinfo(dtype)
    return int(limits.min), int(limits.max)


def to_array(x: ArrayLike, *, name: str) -> Array:
    """An array from an array or a number; lists are refused."""
    x = as_given(x, name=name)
    if not isinstance(x, (jax.Array, np.ndarray, np.generic, bool, int, float)):
        kind = type(x).__name__
        hint = " (`jnp.asarray` makes one)" if kind in ("list", "tuple") else ""
        raise TypeError(f"`{name}` must be an array or a number, got {kind}{hint}.")
    return jnp.asarray(x)


def to_float(x: ArrayLike, *, name: str) -> tuple[Array, jnp.dtype]:
    """The array in its computing dtype, float32 or wider, and the dtype of the result.

    The result has the dtype of the array, with two exceptions: integers of any width become the
    default float, and floats of fewer than 16 bits become float32.
    """
    x = widened(to_array(x, name=name))
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"`{name}` must be real, got {x.dtype}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        if not (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_):
            raise TypeError(f"`{name}` must hold numbers, got {x.dtype}.")
        x = x.astype(jnp.result_type(float))
    wide = computing_dtype(x.dtype)
    return x.astype(wide), x.dtype


def widened(x: Leaf) -> Leaf:
    """Floats of fewer than 16 bits in float32, because several of their dtypes have no inf."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
        return x if x.dtype.itemsize >= 2 else cast(Leaf, x.astype(jnp.float32))
    return x


def computing_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for everything narrower; float64 stays."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def resolve_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """`axis` as sorted, distinct axes in [0, ndim)."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    for a in axes:
        if not isinstance(a, (int, np.integer)) or isinstance(a, bool):
            raise TypeError(f"`axis` must be an int, a tuple of ints or None, got {axis!r}.")
        if not -ndim <= a < ndim:
            raise ValueError(
                f"`axis` {axis} is out of range for an array of {ndim} dimensions."
            )
    resolved = sorted(int(a) % ndim for a in axes)
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"`axis` {axis} names an axis twice (array of {ndim} dimensions).")
    return tuple(resolved)


def resolve_one_axis(axis: Axis, ndim: int) -> int:
    """`axis` in [0, ndim); several axes are refused."""
    if axis is None or isinstance(axis, tuple):
        raise TypeError(f"`axis` must be one int, got {axis!r}.")
    return resolve_axes(axis, ndim)[0]


def mask(where: ArrayLike, shape: tuple[int, ...], *, name: str = "logits") -> Array:
    """`where` as a bool array of the given shape."""
    where = to_array(where, name="where")
    if where.dtype != jnp.bool_:
        raise TypeError(f"`where` must be bool (True keeps an entry), got {where.dtype}.")
    return broadcast(where, shape, name="where", target=name)


def broadcast(x: Array, shape: tuple[int, ...], *, name: str, target: str = "logits") -> Array:
    """`x` broadcast to `shape`, which it may not enlarge."""
    try:
        return jnp.broadcast_to(x, shape)
    except ValueError:
        shown = f"`{target}`" if target.isidentifier() else target
        raise ValueError(
            f"`{name}` of shape {x.shape} does not broadcast to the shape {shape} of {shown}."
        ) from None


def per_slice(value: ArrayLike, logits: Array, axes: tuple[int, ...], *, name: str) -> Array:
    """An option of one number per slice, in the dtype of `logits`, with axes of size 1."""
    value, _ = to_float(value, name=name)
    value = value.astype(logits.dtype)
    wanted = AlongAxes(axes).kept_shape(logits.shape)
    full = (1,) * (logits.ndim - value.ndim) + value.shape
    for i in axes:
        if value.ndim <= logits.ndim and full[i] != 1:
            raise ValueError(
                f"`{name}` of shape {value.shape} varies along the axis {i} of slices"
                f" of {logits.shape}; give one value per slice, in the shape {wanted}."
            )
    broadcast(value, wanted, name=name, target=f"slices of {logits.shape}")
    return value.reshape(full)


def one_number(x: ArrayLike, *, name: str) -> Array:
    """A single real number, in its computing dtype."""
    number, _ = to_float(x, name=name)
    if number.ndim:
        raise ValueError(f"`{name}` must be one number, got the shape {number.shape}.")
    return number


def to_integers(x: ArrayLike, *, name: str, hint: str = "") -> Array:
    """An array of integers, of at least 32 bits so that a count does not wrap around."""
    x = to_array(x, name=name)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be integers, got {x.dtype}{hint}.")
    return x.astype(jnp.int32) if x.dtype.itemsize < 4 else x


def labels_of(
    labels: ArrayLike, shape: tuple[int, ...], axis: int, *, soft_hint: str = ""
) -> Array:
    """Integer labels, one per slice along `axis` of an array of the given shape."""
    labels = to_array(labels, name="labels")
    is_soft = labels.shape == shape and jnp.issubdtype(labels.dtype, jnp.floating)
    labels = to_integers(labels, name="labels", hint=soft_hint if is_soft else "")
    wanted = shape[:axis] + shape[axis + 1 :]
    if labels.shape != wanted:
        raise ValueError(
            f"`labels` must have the shape {wanted} of what they label, one per slice, got"
            f" {labels.shape}. (Several of one slice: `jax.vmap` over the labels alone.)"
        )
    return labels


def per_class(
    value: ArrayLike,
    num_classes: int | None,
    dtype: DTypeLike,
    *,
    name: str = "class_weights",
) -> Array:
    """An option of one number per class, `[num_classes]`, where None allows any number.

    Class weights are NaN where they are negative.
    """
    vector, _ = to_float(value, name=name)
    if vector.ndim != 1 or num_classes not in (None, vector.size):
        count = "a" if num_classes is None else f"for each of {num_classes}"
        classes = "class" if num_classes is None else "classes"
        raise ValueError(
            f"`{name}` must be a vector of one number {count} {classes}, got the shape"
            f" {vector.shape}."
        )
    vector = nan_outside(vector, 0) if name == "class_weights" else vector
    return vector.astype(dtype)


class Classes(NamedTuple):
    """Labels as classes, and which of the labels were no class."""

    labels: Array  # in [0, n)
    known: Array  # whether the label was in range, or ignored
    ignored: Array | None

    def finish(self, loss: Array) -> Array:
        """The loss, a constant NaN where the label is unknown, and 0 where it is ignored."""
        # A product with NaN would turn the cotangent 0 of a loss that does not count into NaN.
        loss = jnp.where(self.known, loss, jnp.nan)
        return loss if self.ignored is None else jnp.where(self.ignored, 0, loss)


def known_labels(labels: Array, num_classes: int, ignore_index: int | None) -> Classes:
    """Labels as classes in [0, num_classes)."""
    last, most = num_classes - 1, int(jnp.iinfo(labels.dtype).max)
    last = most if statically_greater(last, most) else last
    inside = (labels >= 0) & (labels <= last)
    ignored = None if ignore_index is None else equal(labels, ignore_index)
    known = inside if ignored is None else inside | ignored
    return Classes(jnp.where(inside, labels, 0), known, ignored)


def equal(labels: Array, index: int) -> Array:
    """Which labels equal `index`: none if their dtype cannot hold it, because == would wrap."""
    index = check_int(index, name="ignore_index")
    limits = jnp.iinfo(labels.dtype)
    held = limits.min <= index <= limits.max
    return labels == index if held else jnp.zeros(labels.shape, jnp.bool_)


def statically_greater(a: Any, b: Any) -> bool:
    """Whether a > b; False if that is open, as the sizes of an export may be."""
    return isinstance(a, int) and isinstance(b, int) and a > b
