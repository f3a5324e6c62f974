"""The one error that a user is meant to see."""


class ConfigError(ValueError):
    """Bad input of the user's: one line that names the field and the mend."""
