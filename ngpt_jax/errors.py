"""The one error that a user is meant to see, and how to install what is missing."""


class ConfigError(ValueError):
    """Bad input of the user's: one line that names the field and the mend."""


def install_hint(extra: str) -> str:
    """How to install what an extra of pyproject.toml holds: the package is in no registry."""
    return f"pip install '.[{extra}]' in the clone of ngpt_jax"
