"""Checks of what a Python caller gives. Each ConfigError names the argument."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ngpt_jax.config import ConfigError
from ngpt_jax.config.facts import whole_number
from ngpt_jax.decoding.sampling import Sampling

Ids = Sequence[int] | np.ndarray
Prompt = str | Ids


def integer(name: str, value: Any, least: int = 0) -> int:
    """A whole number, numpy's and JAX's too, from ``least`` on."""
    number = whole_number(value)
    if number is None:
        raise ConfigError(f"{name} must be a whole number, got {_show(value)}.")
    if number < least:
        what = "be positive" if least == 1 else f"be at least {least}"
        raise ConfigError(f"{name} must {what}, got {number}.")
    return number


def _number(name: str, value: Any) -> float:
    array = np.asarray(value) if not isinstance(value, str | bytes | bool) else None
    if array is None or array.ndim or array.dtype.kind not in "iuf":
        raise ConfigError(f"{name} must be a number, got {_show(value)}.")
    return float(array)


def _show(value: Any) -> str:
    return f"{' '.join(repr(value).split()):.60} ({type(value).__name__})"


def sampling(temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> Sampling:
    """How to draw tokens; raises ConfigError for values out of range."""
    k = whole_number(top_k)
    if k is None:
        raise ConfigError(f"top_k must be a whole number, got {_show(top_k)}.")
    how = Sampling(
        _number("temperature", temperature), k, _number("top_p", top_p), _number("min_p", min_p)
    )
    if (problem := how.problem()) is not None:
        raise ConfigError(f"{problem}.")
    return how


def stop_strings(stop: Any) -> tuple[str, ...]:
    """Stop strings from one, from a list of them, or from None: there is none."""
    if stop is None or isinstance(stop, str):
        stops = () if stop is None else (stop,)
    elif isinstance(stop, Sequence | set | frozenset) and not isinstance(stop, bytes):
        stops = tuple(stop)
    else:
        raise ConfigError(f"stop must be a text or a list of texts, got {_show(stop)}.")
    for text in stops:
        if not isinstance(text, str):
            raise ConfigError(f"stop must hold texts, got {_show(text)}.")
    if "" in stops:
        raise ConfigError("A stop string is empty; leave it out.")
    return stops


def as_list(name: str, prompts: Any) -> tuple[list[Any], bool]:
    """Prompts as a list, and whether it was a single prompt: a text, or a row of token ids."""
    if isinstance(prompts, str):
        return [prompts], True
    prompts = _listed(name, prompts)
    if isinstance(prompts, np.ndarray):
        one = prompts.ndim == 1 and prompts.dtype.kind not in "OUT"
    else:
        first = prompts[0] if len(prompts) else ""
        one = getattr(first, "ndim", int(hasattr(first, "__len__"))) == 0  # a number
    return ([prompts] if one else list(prompts)), one


def _listed(name: str, values: Any) -> Any:
    """A sequence or an array with at least one axis; arrays of other libraries become numpy's."""
    if hasattr(values, "__array__"):
        values = np.asarray(values)
        if values.ndim:
            return values
    elif isinstance(values, Sequence) and not isinstance(values, str | bytes | bytearray):
        return values
    raise ConfigError(f"{name} must be a text, token ids, or a list of them, got {_show(values)}.")


def token_ids(name: str, values: Any, vocab_size: int, what: str = "A prompt") -> list[int]:
    """A row of token ids, each of which the model knows."""
    values = _listed(name, values)
    if isinstance(values, np.ndarray):
        if values.size and (values.ndim > 1 or values.dtype.kind not in "iuO"):
            raise ConfigError(
                f"{name}: token ids must be a row of whole numbers, got an array"
                f" {values.shape} of {values.dtype}."
            )
        values = values.reshape(-1).tolist()
    ids = []
    for value in values:
        if (i := whole_number(value)) is None:
            raise ConfigError(f"{name}: a token id must be a whole number, got {_show(value)}.")
        if not 0 <= i < vocab_size:
            raise ConfigError(
                f"{what} holds the token id {i}; the model knows 0 to {vocab_size - 1}."
            )
        ids.append(i)
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
