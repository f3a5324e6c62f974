"""Checks of what a Python caller gives. Each ConfigError names the argument."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.config.facts import whole_number
from ngpt_jax.decoding.sampling import Sampling

Ids = Sequence[int] | np.ndarray
Prompt = str | Ids


def whole(name: str, value: Any) -> int:
    """A whole number, numpy's and JAX's too; truth values are not."""
    number = whole_number(value)
    if number is None:
        raise ConfigError(f"{name} must be a whole number, got {_show(value)}.")
    return number


def integer(name: str, value: Any, least: int = 0) -> int:
    """A whole number from ``least`` on."""
    number = whole(name, value)
    if number < least:
        what = "be positive" if least == 1 else f"be at least {least}"
        raise ConfigError(f"{name} must {what}, got {number}.")
    return number


def _number(name: str, value: Any) -> float:
    array = None if isinstance(value, str | bytes) else np.asarray(value)
    if array is None or array.ndim or array.dtype.kind not in "iuf":
        raise ConfigError(f"{name} must be a number, got {_show(value)}.")
    return float(array)


def _show(value: Any) -> str:
    return f"{' '.join(repr(value).split()):.60} ({type(value).__name__})"


def sampling(temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> Sampling:
    """How to draw tokens; raises ConfigError for values out of range."""
    how = Sampling(
        _number("temperature", temperature),
        whole("top_k", top_k),
        _number("top_p", top_p),
        _number("min_p", min_p),
    )
    if (problem := how.problem()) is not None:
        raise ConfigError(f"{problem}.")
    return how


def stop_strings(stop: Any) -> tuple[str, ...]:
    """Stop strings from one, from several, or from None: there is none."""
    try:
        stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    except TypeError:
        stops = (stop,)
    for text in stops:
        if not isinstance(text, str):
            raise ConfigError(f"stop must be a text or a list of texts, got {_show(text)}.")
        if not text:
            raise ConfigError("A stop string is empty; leave it out.")
    return stops


def as_list(name: str, prompts: Any) -> tuple[list[Any], bool]:
    """Prompts as a list, and whether it was a single prompt: a text, or a row of token ids."""
    if isinstance(prompts, str):
        return [prompts], True
    prompts = _listed(name, prompts)
    first = prompts[0] if prompts else ""
    scalar = getattr(first, "ndim", int(hasattr(first, "__len__"))) == 0
    one = scalar and not isinstance(first, str)
    return ([prompts] if one else prompts), one


def _listed(name: str, values: Any) -> list[Any]:
    """A list from a sequence, or from an array of any library."""
    if hasattr(values, "__array__"):
        values = np.asarray(values).tolist()  # a number where there is no axis
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray):
        raise ConfigError(
            f"{name} must be a text, token ids, or a list of them, got {_show(values)}."
        )
    return list(values)


def token_ids(name: str, values: Any, vocab_size: int, what: str = "A prompt") -> list[int]:
    """A row of token ids, each of which the model knows."""
    ids = [whole(f"{name}: a token id", value) for value in _listed(name, values)]
    if ids and not 0 <= (bad := min(ids) if min(ids) < 0 else max(ids)) < vocab_size:
        raise ConfigError(
            f"{what} holds the token id {bad}; the model knows 0 to {vocab_size - 1}."
        )
    return ids


def id_rows(name: str, rows: Any, vocab_size: int) -> list[list[int]]:
    """Rows of token ids, see :func:`token_ids`."""
    return [token_ids(name, row, vocab_size, "A row") for row in _listed(name, rows)]


def overrides(values: Any) -> list[tuple[str, str]]:
    """Fields of the config, by dotted name, with their values as a command line has them."""
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(
            f'overrides must be like {{"model.dtype": "bfloat16"}}, got {_show(values)}.'
        )
    return [(str(name), str(value)) for name, value in (values or {}).items()]
