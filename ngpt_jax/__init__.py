"""nGPT, the normalized transformer (arXiv 2410.01131), in JAX and Flax.

Importing this package loads nothing: take what you need, for example
``from ngpt_jax.projection import keep_params_on_sphere``. ``ngpt_jax.load(workdir)`` loads a
trained model, see :func:`ngpt_jax.inference.loading.load`.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from ngpt_jax.inference.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
