"""The optimizer's recipes: one entry for each value of ``optimizer.recipe``.

A new recipe is an entry here, a function in ngpt_jax/optim/recipes.py, and a row in the table of
ngpt_jax/optim/README.md.
"""

from typing import NamedTuple


class Recipe(NamedTuple):
    """Facts about a recipe.

    Attributes:
      meaning: for --help_config.
      reads: the options of OptimizerConfig that it reads, with spaces between. Every recipe reads
        the learning rate, its schedule, the clipping and ``project``.
      momentum: of ``optimizer.momentum`` where it is read and not given.
    """

    meaning: str
    reads: str
    momentum: float | None = None


_ADAM = "b1 b2 eps"
_SPHERE = "tangent max_angle"

RECIPES = {
    "ngpt": Recipe("Adam, then the projection", f"{_ADAM} {_SPHERE} weight_decay"),
    "adamw": Recipe(
        "Adam and weight decay, the same steps as ngpt", f"{_ADAM} {_SPHERE} weight_decay"
    ),
    "muon": Recipe(
        "Muon for the matrices of the blocks, Adam for all else",
        f"{_ADAM} {_SPHERE} weight_decay momentum muon_heads", 0.95,
    ),
    "ngpt2026": Recipe(
        "gated Adam, with the preconditioned gradient of the logits and the logarithmic schedule",
        f"{_ADAM} {_SPHERE} gate eps_gate",
    ),
    "adamh": Recipe(
        "Adam with fixed norms of weights and of updates (Hyperball)", f"{_ADAM} adam_rate"
    ),
    "muonh": Recipe(
        "the same with Muon for the matrices of the blocks",
        f"{_ADAM} adam_rate momentum muon_heads", 0.95,
    ),
    "lion": Recipe("the sign of an average of gradients", f"b1 b2 {_SPHERE} weight_decay"),
    "sgd": Recipe("gradients with momentum", f"{_SPHERE} weight_decay momentum", 0.9),
}  # fmt: skip

# The options that some recipe does not read.
OPTIONS = tuple(dict.fromkeys(name for r in RECIPES.values() for name in r.reads.split()))


def reads(recipe: str | None, option: str) -> bool:
    """Whether a recipe reads an option of OPTIONS; False for what is no recipe."""
    return recipe in RECIPES and option in RECIPES[recipe].reads.split()
