"""The decorator of every public function: it refuses bad arguments by name, and jits."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np

from softjax._mesh import vary

Function = TypeVar("Function", bound=Callable[..., Any])
NONNEGATIVE = (0.0, math.inf)
POSITIVE = (math.ulp(0.0), math.inf)
PROBABILITY = (0.0, 1.0)


def named(function: Function) -> Function:
    """Tells which arguments there are, where one is given that is none of them."""
    title, parameters = function.__name__, inspect.signature(function).parameters
    names = ", ".join(parameters)
    by_place = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(by_place):
            others = ", ".join(n for n in parameters if n not in by_place)
            raise TypeError(
                f"{title}() takes {', '.join(by_place)} by position, got {len(args)} arguments"
                + (f"; what follows is named: {others}." if others else ".")
            )
        for name in kwargs:
            if name not in parameters:
                raise TypeError(
                    f"{title}() got an unexpected keyword argument {name!r}; it takes {names}."
                )
        return function(*args, **kwargs)

    return cast(Function, call)


def api(
    *static: str,
    refuse: Callable[[dict[str, Any]], None] | None = None,
    **ranges: tuple[float, float],
) -> Callable[[Function], Function]:
    """Jits a public function, with some arguments static, and refuses bad numbers first.

    Only the caller's side of `jit` sees Python numbers: those for the arguments that
    `ranges` names are refused outside of theirs, and `refuse` may look at all arguments.
    (What an array holds cannot be checked; what comes of it is in the docstrings.)
    """

    def decorate(function: Function) -> Function:

        @functools.partial(jax.jit, static_argnames=static)
        @functools.wraps(function)
        def jitted(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = vary((args, kwargs))
            return function(*args, **kwargs)

        parameters = inspect.signature(function).parameters
        names = tuple(parameters)
        numbers = {n for n, p in parameters.items() if type(p.default) in (int, float)}
        numbers |= {n for n in ranges if parameters[n].default is not None}
        numbers -= set(static)

        @named
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            for name in numbers & given.keys():
                if given[name] is None or isinstance(given[name], (bool, np.bool_)):
                    raise TypeError(f"`{name}` must be a number, got {given[name]}.")
            for name, (low, high) in ranges.items():
                value = given.get(name)
                if isinstance(value, (int, float, np.number)) and not low <= value <= high:
                    bounds = f"in [{low:g}, {high:g}]"
                    wanted = "positive" if low == POSITIVE[0] else bounds
                    raise ValueError(f"`{name}` must be {wanted}, got {value}.")
            if isinstance(given.get("axis"), list):
                raise TypeError(f"`axis` must be an int, a tuple or None, got {given['axis']}.")
            for name, value in given.items():
                _check_kind(name, value, name in static)
            if refuse is not None:
                refuse(given)
            return jitted(*args, **kwargs)

        return cast(Function, call)

    return decorate


def _check_kind(name: str, value: Any, is_static: bool) -> None:
    kind = type(value)
    if is_static and isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"`{name}` must be known while tracing, got a tracer: name it in `static_argnames`"
            " of `jit`, or bind it beforehand."
        )
    if is_static and kind.__hash__ is None:
        raise TypeError(f"`{name}` must be hashable, got {kind.__name__}.")
    if not is_static and (callable(value) or isinstance(value, (str, bytes))):
        raise TypeError(f"`{name}` must be an array or a number, got {kind.__name__}.")
