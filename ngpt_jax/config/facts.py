"""The facts that each field of a config must state, see fields.py.

The rest of the program derives from them what it says about a field: the checks (resolve.py),
--help_config (experiment.py), what may change when a run goes on (training/workdir.py), and the
digests of a study's rows (study/results.py).
"""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from ngpt_jax.errors import ConfigError


class Allowed(NamedTuple):
    """The values that a field takes, besides None."""

    must: str  # for an error: "FIELD must be positive, got 0."
    short: str  # for --help_config
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Allowed:
    """These strings alone."""
    quoted = ", ".join(map(repr, choices))  # 'none' is not None
    must = f"must be one of {', '.join(choices)}"
    return Allowed(must, quoted, choices.__contains__, choices)


def whole_number(value: Any) -> int | None:
    """The int that a value is, also one of numpy or JAX; None for anything else: True, 1.0, "1"."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


ANY = Allowed("", "", lambda value: True)
TEXT = Allowed("must not be empty", "", bool)
FOLDER = Allowed("must name a folder", "", bool)
POSITIVE = Allowed("must be positive", "> 0", lambda x: x > 0)
NOT_NEGATIVE = Allowed("must not be negative", ">= 0", lambda x: x >= 0)
FRACTION = Allowed("must lie in [0, 1]", "in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_1 = Allowed("must lie in [0, 1)", "in [0, 1)", lambda x: 0 <= x < 1)
BETWEEN_0_AND_1 = Allowed("must lie between 0 and 1", "in (0, 1)", lambda x: 0 < x < 1)
ANGLE = Allowed("must lie in (0, pi]", "in (0, pi]", lambda x: 0 < x <= math.pi)
SEED = Allowed(  # jax keeps only the lowest 32 bits of a seed
    f"must be a whole number from 0 to {2**32 - 1}",
    "from 0 to 2^32 - 1",
    lambda x: (n := whole_number(x)) is not None and 0 <= n < 2**32,
)
AXIS = Allowed("must be positive or -1", "> 0 or -1", lambda x: x > 0 or x == -1)


def check_seed(name: str, seed: Any) -> int:
    """The seed as an int; raises ConfigError, which says ``name``, if no field would take it."""
    if not SEED.holds(seed):
        raise ConfigError(f"{name} {SEED.must}, got {' '.join(repr(seed).split()):.60}.")
    return operator.index(seed)


class Effect(NamedTuple):
    """What a change of a field does to a run that goes on, and to the loss."""

    resume: str
    loss: bool  # whether it can change the loss; the digest of a study's row has these fields


OWN = Effect("the run's own", loss=True)  # a run cannot change it
SCHEDULE = Effect("schedule", loss=True)  # a run can change it, with --allow_schedule_change
FREE = Effect("free", loss=True)  # a run can change it
NEUTRAL = Effect("free", loss=False)  # the same; it decides where, how fast and what is written


def field(
    default: Any,
    allowed: Allowed,
    effect: Effect,
    meaning: str,
    *,
    set_by_study: bool = False,
    always_in_digest: bool = False,
    digest_default: Any = None,
) -> Any:
    """A field of a config's dataclass, with its facts as metadata.

    Args:
      default: None also where a preset fills the field in (presets.py).
      allowed: the values that it takes.
      effect: what a change of it does.
      meaning: for --help_config.
      set_by_study: a study gives the field a value in each of its runs.
      always_in_digest: the digest of a study's row has the field also at the value that the kind's
        preset gives, because published tables were made so.
      digest_default: the default in that digest, for the same reason; None: ``default``.
    """
    facts: dict[str, Any] = {"help": meaning, "allowed": allowed, "effect": effect}
    facts |= {"set_by_study": set_by_study, "always_in_digest": always_in_digest}
    facts |= {"digest_default": digest_default}
    return dataclasses.field(default=default, metadata=facts)


def section(factory: Callable[[], Any], meaning: str) -> Any:
    """A field that holds other fields."""
    return dataclasses.field(default_factory=factory, metadata={"help": meaning})
