"""The decorator of every public function: it refuses bad arguments by name, and jits.

The checks of a function are made once, when it is decorated, because a call outside of `jit`
pays for all that happens here.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from softjax._inputs import as_given, fits, limits_of, widened
from softjax._mesh import Layout, call_on_mesh

Callee = TypeVar("Callee", bound=Callable[..., Any])
Check = Callable[[Any], Any]
Range = tuple[float, float]
NONNEGATIVE = (0.0, math.inf)
POSITIVE = (math.ulp(0.0), math.inf)
PROBABILITY = (0.0, 1.0)
PLAIN = frozenset({int, bool, str, type(None)})


def api(
    *static: str,
    jit: bool = True,
    spread: tuple[str, ...] = (),
    refuse: Callable[[dict[str, Any]], None] | None = None,
    layout: Callable[[dict[str, Any]], Layout | None] | None = None,
    **ranges: Range,
) -> Callable[[Callee], Callee]:
    """Makes a function public: its arguments are checked by name, then it is jitted.

    The arguments that `static` names are ints, flags, names or tuples of them, which are known
    while tracing; integers of NumPy and JAX become Python's there. All other arguments are
    arrays as `as_given` takes them. `ranges` names arguments that are numbers, and a Python
    number outside of its range is refused. This must happen before `jit`, which hides the
    number; the docstrings say what becomes of numbers in arrays, which are always hidden.
    `refuse` receives all arguments that were given. If the function has the option `axis_name`,
    each device holds a part of the arguments that `spread` names. If no `axis_name` is given,
    it becomes the `layout` of the arguments.

    With `jit=False` the arguments are only checked, and functions may be among them.
    """

    def decorate(function: Callee) -> Callee:
        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        num_by_place = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
        checks = {
            name: functools.partial(as_static, name)
            if name in static
            else _check_of(name, parameter.default, ranges.get(name), functions=not jit)
            for name, parameter in parameters.items()
        }
        by_place = tuple(checks[name] for name in names[:num_by_place])
        known = checks.keys()
        run = _jitted(function, static, spread, layout) if jit else function
        label_place = names.index("labels") if "labels" in known else 0
        # An option that is given as its default costs nothing, because it is left out: `jit`
        # would make an array of it, whose value is not known while tracing.
        numbers = {n: p.default for n, p in parameters.items() if type(p.default) is float}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(args) > num_by_place or not kwargs.keys() <= known:
                _refuse_call(function, len(args), num_by_place, kwargs)
            args = tuple([check(x) for check, x in zip(by_place, args, strict=False)])
            for name, value in tuple(kwargs.items()):
                kwargs[name] = checks[name](value)
                if name in numbers and _is_default(value, numbers[name]):
                    del kwargs[name]
            if "ignore_index" in kwargs:
                labels = args[label_place] if len(args) > label_place else kwargs.get("labels")
                _check_ignored(kwargs["ignore_index"], labels)
            if refuse is not None:
                refuse(dict(zip(names, args, strict=False)) | kwargs)
            return run(*args, **kwargs)

        return cast(Callee, call)

    return decorate


def _is_default(value: Any, default: float) -> bool:
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and type(value) is not bool and value == default


def _jitted(
    function: Callable[..., Any],
    static: tuple[str, ...],
    spread: tuple[str, ...],
    layout: Callable[[dict[str, Any]], Layout | None] | None,
) -> Callable[..., Any]:
    @functools.partial(jax.jit, static_argnames=static)
    @functools.wraps(function)
    def jitted(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = jax.tree.map(widened, (args, kwargs))
        # JAX sets the mesh of the context, even an empty one, when it differentiates, and it
        # caches traces by that mesh. Set it here too, because the derivative can then reuse
        # the traces of the value.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return call_on_mesh(function, args, kwargs, spread=spread, layout=layout)

    return jitted


def _refuse_call(
    function: Callable[..., Any], count: int, num_by_place: int, kwargs: dict[str, Any]
) -> NoReturn:
    """Raises an error that names the arguments of the function."""
    title, names = function.__name__, tuple(inspect.signature(function).parameters)
    if count > num_by_place:
        others = ", ".join(names[num_by_place:])
        raise TypeError(
            f"{title}() takes {', '.join(names[:num_by_place])} by position, got {count}"
            " arguments" + (f"; what follows is named: {others}." if others else ".")
        )
    name = next(name for name in kwargs if name not in names)
    raise TypeError(
        f"{title}() got an unexpected keyword argument {name!r}; it takes {', '.join(names)}."
    )


def _check_of(name: str, default: Any, bounds: Range | None, *, functions: bool) -> Check:
    """The check of an argument that is an array."""
    is_number = type(default) in (int, float) or (bounds is not None and default is not None)
    low, high = bounds or (-math.inf, math.inf)

    def check(value: Any) -> Any:
        kind = type(value)
        if (kind is float and low <= value <= high) or isinstance(value, jax.Array):
            return value  # Most arguments end here, because this test is short.
        if is_number and (value is None or kind in (bool, np.bool_)):
            raise TypeError(f"`{name}` must be a number, got {value}.")
        is_real = isinstance(value, (int, float, np.integer, np.floating))
        if is_real and bounds is not None and not low <= value <= high:
            wanted = "positive" if low == POSITIVE[0] else f"in [{low:g}, {high:g}]"
            raise ValueError(f"`{name}` must be {wanted}, got {value}.")
        if is_number and isinstance(value, (int, np.integer)) and not fits(value):
            return float(value)  # A large number of any kind is a number.
        return as_given(value, name=name, functions=functions)

    return check


def as_static(name: str, value: Any) -> Any:
    """An argument that is known while tracing; integers of any kind become Python's."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`{name}` must be known while tracing, got a tracer: name it in `static_argnames`"
            " of `jit`, or bind it beforehand."
        )
    if isinstance(value, (list, tuple)):
        return tuple(as_static(name, entry) for entry in value)
    if hasattr(kind, "__jax_array__"):
        return as_static(name, value.__jax_array__())
    if isinstance(value, (jax.Array, np.ndarray, np.generic)) and value.ndim == 0:
        if value.dtype == np.bool_:
            return bool(value)
        if jnp.issubdtype(value.dtype, np.integer):
            return int(value)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return tuple(value.tolist())
    if kind.__hash__ is None or isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be an int, a flag, a name or a tuple of these, got {kind.__name__}."
        )
    return value


def _check_ignored(index: Any, labels: Any) -> None:
    """Refuses an ignored label that no label can equal, because their dtype lacks it."""
    if type(index) is int and isinstance(labels, (jax.Array, np.ndarray, np.generic)):
        limits = limits_of(labels.dtype)
        if limits is not None and not limits[0] <= index <= limits[1]:
            raise ValueError(
                f"`ignore_index` must be a number that `labels` can hold, which JAX takes for"
                f" {jax.dtypes.canonicalize_dtype(labels.dtype)}, got {index}."
            )
