"""Shapes and types of all calls are checked while tests run: an axis has one size within a call.

`jaxtyping.jaxtyped` checks a call's arguments twice, and tells in its error which was wrong: small
fits then took two to three times as long as unchecked ones. This takes a quarter longer. An int
will do where a float is asked for (PEP 484).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError))
_jaxtyped = jaxtyping.jaxtyped  # as a context too, of the axes' sizes so far


def install(package: str) -> None:
    """Check all functions of a package that is imported from now on."""
    jaxtyping.jaxtyped = checked  # what the hook decorates functions with
    jaxtyping.install_import_hook(package, None)


def checked(target: Any = None, *, typechecker: None = None) -> Any:
    """Check the calls of a function, property or method, or of a dataclass's `__init__`."""
    if target is None:
        return checked
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target):
            target.__init__ = checked(target.__init__)
        return target
    if isinstance(target, classmethod | staticmethod):
        return type(target)(checked(target.__func__))
    if isinstance(target, property):
        parts = (target.fget, target.fset, target.fdel)
        return property(*(part and checked(part) for part in parts))
    return _function(target) if getattr(target, "__annotations__", None) else target


def _function(function: Callable) -> Callable:
    if inspect.isgeneratorfunction(function):  # beartype checks its arguments at the first item
        return _jaxtyped(function, typechecker=_check)
    call, has_axes = None, False

    @functools.wraps(function)
    def checked_function(*args, **kwargs):
        nonlocal call, has_axes
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if call is None:  # what is never called need not be made ready: that takes 1 ms
            has_axes = any(_has_axes(hint, function) for hint in function.__annotations__.values())
            function.__annotations__ = {
                name: _resolved(hint, function) for name, hint in function.__annotations__.items()
            }
            call = _check(function)
        if not has_axes:
            return call(*args, **kwargs)
        with _jaxtyped("context"):
            return call(*args, **kwargs)

    return checked_function


def _resolved(hint: Any, function: Callable) -> Any:
    """Return what a hint's text stands for; anything, where only a type checker imports that."""
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, function.__globals__)
    except NameError:
        return Any


def _has_axes(hint: Any, function: Callable) -> bool:
    """Say whether a hint names axes (`Float[Tensor, "token"]`), itself or by an alias."""
    names = re.findall(r"\w+", str(hint))
    aliases = (getattr(function, "__globals__", {}).get(name) for name in names)
    return bool(re.search("[\"']", str(hint))) or any(_is_array(alias) for alias in aliases)


def _is_array(alias: object) -> bool:
    return isinstance(alias, type) and issubclass(alias, jaxtyping.AbstractArray)
