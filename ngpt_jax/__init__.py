"""nGPT, the normalized transformer (arXiv 2410.01131), in JAX and Flax.

Importing this package loads nothing: take what you need, for example
``from ngpt_jax.projection import keep_params_on_sphere``.
"""

__version__ = "0.1.0"
