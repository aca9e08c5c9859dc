"""Shape annotations become checks here, and checks of values become their second stage."""

import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, overload

import torch
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor

__all__ = ["ValueCheck", "typechecked"]

P = ParamSpec("P")
R = TypeVar("R")
#: Gets a function's arguments by their names, reads tensors on the host, and raises a sentence.
ValueCheck = Callable[[Mapping[str, Any]], None]

# YAML and command lines write `kl_coef: 0`; the numeric tower accepts an int where a float is meant.
_CONF = BeartypeConf(is_pep484_tower=True)


class _Thread(threading.local):
    """Whether this thread is inside a function whose values have been checked already."""

    values_are_checked = False


_THREAD = _Thread()


@overload
def typechecked(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def typechecked(
    *, values: tuple[ValueCheck, ...], on_device: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def typechecked(function: Any = None, /, *, values: tuple[ValueCheck, ...] = (), on_device: bool = True) -> Any:
    """Check the arguments of a public function: shapes and dtypes against its annotations, then values.

    A tensor that does not fit is a :class:`jaxtyping.TypeCheckError` (a ``TypeError``) that names the argument, what it
    should be, what it was and what to pass instead. A name that a ``Literal`` does not have is a ``ValueError``. This
    costs about 6 µs plus 6 µs per tensor a call. Nothing is checked under ``torch.compile``, where checks would break
    the graph; with ``JAXTYPING_DISABLE=1`` shapes are not checked either.

    Args:
        function: What to check, where the decorator is used without arguments.
        values: The checks of the stage after the shapes. They run in the outermost call only: what a function hands on
            to others has been checked, or was computed here.
        on_device: Whether they also look at tensors of an accelerator, and so wait for it. False for functions that
            run at every optimizer step.
    """
    if function is None:
        return functools.partial(_decorated, values=values, on_device=on_device)
    return _decorated(function, values=(), on_device=on_device)


def _decorated(function: Callable[P, R], *, values: tuple[ValueCheck, ...], on_device: bool) -> Callable[P, R]:
    staged = _with_values_checked(function, values, on_device) if values else function
    checked = jaxtyped(typechecker=beartype(conf=_CONF))(staged)
    # Of a sequence, beartype checks one item, drawn from Python's global generator: training must not notice.
    has_sequence = any(map(_names_sequence, function.__annotations__.values()))
    guard = _random_state_kept if has_sequence else nullcontext

    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            with guard():
                return checked(*args, **kwargs)
        except TypeCheckError as error:
            message = _explain(function, args, kwargs)
            if message is None:
                raise
            raise (ValueError if isinstance(message, _UnknownChoice) else TypeCheckError)(message) from error

    # torch.compile counts recompilations by code object: without its own, the ninth wrapped function hits the limit.
    wrapper.__code__ = wrapper.__code__.replace(co_name=f"typechecked_{function.__name__}")
    return functools.wraps(function)(wrapper)


def _with_values_checked(function: Callable[P, R], checks: tuple[ValueCheck, ...], on_device: bool) -> Callable[P, R]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def staged(*args: P.args, **kwargs: P.kwargs) -> R:
        if _THREAD.values_are_checked:
            return function(*args, **kwargs)
        arguments = signature.bind(*args, **kwargs).arguments
        if on_device or all(value.device.type == "cpu" for value in arguments.values() if isinstance(value, Tensor)):
            for check in checks:
                check(arguments)
        _THREAD.values_are_checked = True
        try:
            return function(*args, **kwargs)
        finally:
            _THREAD.values_are_checked = False

    return staged


class _UnknownChoice(str):
    """A message about a name that is none of its options."""

    __slots__ = ()


def _names_sequence(annotation: Any) -> bool:
    is_sequence = inspect.isclass(get_origin(annotation)) and issubclass(get_origin(annotation), Sequence)
    return is_sequence or any(map(_names_sequence, get_args(annotation)))


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _explain(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Say in one sentence which argument is wrong, or None when the arguments look right (a bug of ours, then)."""
    bound = inspect.signature(function).bind(*args, **kwargs).arguments
    sizes: dict[str, tuple[int, str]] = {}  # axis name -> its size and the argument that set it
    for argument, value in bound.items():
        annotation = function.__annotations__.get(argument)
        problem = _mismatch(argument, value, annotation, sizes)
        if problem is not None:
            return type(problem)(f"{function.__name__}: {problem}")
    return None


def _mismatch(argument: str, value: Any, annotation: Any, sizes: dict[str, tuple[int, str]]) -> str | None:
    options = get_args(annotation) if get_origin(annotation) is not Literal else (annotation,)
    shapes = [option for option in options or (annotation,) if hasattr(option, "dim_str")]
    if value is None and type(None) in options:
        return None
    if not shapes:
        literals = [option for option in (annotation, *options) if get_origin(option) is Literal]
        if literals and value not in get_args(literals[0]):
            return _UnknownChoice(
                f"{argument} must be one of {', '.join(map(repr, get_args(literals[0])))}, got {value!r}"
            )
        if isinstance(annotation, type) and annotation is not Any and not isinstance(value, annotation):
            numeric = annotation is float and isinstance(value, int)
            return None if numeric else f"{argument} must be of type {annotation.__name__}, got {value!r}"
        return None
    wanted = shapes[0]
    expected = f"{argument} must be {wanted.__name__.split('[')[0]}[Tensor, {wanted.dim_str.strip()!r}]"
    if not isinstance(value, Tensor):
        return None if len(options) > len(shapes) else f"{expected}, got {type(value).__name__}; pass a torch.Tensor"
    actual = f"got {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    names = wanted.dim_str.split()
    if not any("..." in name or name.startswith("*") for name in names):
        known = [f"{name}={sizes[name][0]} (from {sizes[name][1]})" for name in names if name in sizes]
        where = f" with {', '.join(known)}" if known else ""
        if len(names) != value.ndim:
            axes = "1 axis" if len(names) == 1 else f"{len(names)} axes"
            return f"{expected}{where}, {actual}: it needs {axes}{_rank_remedy(names, value)}"
        for name, size in zip(names, value.shape, strict=True):
            if name.isdigit() and int(name) != size:
                return f"{expected}, {actual}"
            if name in sizes and sizes[name][0] != size:
                return f"{expected}{where}, {actual}; align it with {sizes[name][1]}, nothing is broadcast"
    if str(value.dtype).removeprefix("torch.") not in wanted.dtypes:
        return f"{expected}, {actual}; {_dtype_remedy(argument, wanted)}"
    for name, size in zip(names, value.shape, strict=False):
        if name.isidentifier():
            sizes.setdefault(name, (size, argument))
    return None


def _dtype_remedy(argument: str, wanted: Any) -> str:
    if "bool" in wanted.dtypes:
        return f"pass {argument}.bool()"
    if "float32" in wanted.dtypes:
        return f"pass {argument}.float()"
    return f"pass {argument}.long()"


def _rank_remedy(names: Sequence[str], value: Tensor) -> str:
    if names == ["batch", "time"] and value.ndim == 1:
        return "; one value per response becomes one per token with value[:, None].expand_as(mask)"
    if names == ["batch"] and value.ndim == 2:
        return "; pass one value per response, not one per token"
    return ""
