"""The sources of text: what ``data.source`` opens.

A new source is a line in the table of :mod:`ngpt_jax.config.sources` (which fields it reads), a
module here with a function that opens it, and a line in ``OPENERS``.
"""

from collections.abc import Callable

from ngpt_jax.config import DataConfig, SourceConfig
from ngpt_jax.data.text.hub import open_hub
from ngpt_jax.data.text.prose import open_prose
from ngpt_jax.data.text.stdlib import open_stdlib
from ngpt_jax.data.text.text_files import open_array_record, open_text_files
from ngpt_jax.data.text.tfds import open_tfds
from ngpt_jax.data.text.units import TextSource

OPENERS: dict[str, Callable[[SourceConfig, str, bool, str], TextSource]] = {
    "stdlib": open_stdlib,
    "prose": open_prose,
    "text": open_text_files,
    "tfds": open_tfds,
    "hub": open_hub,
    "array_record": open_array_record,
}


def open_source(
    config: SourceConfig, prefix: str = "data.", download: bool = True, cache: str | None = None
) -> TextSource:
    """Finds the units of a source of text without reading their documents.

    Args:
      config: checked; its source is one of ``OPENERS``.
      prefix: of the names of its fields in messages.
      download: fetches a data set that is not on this machine; False: it then has no units.
      cache: folder for what is fetched; None: the default of data.cache.

    Raises ConfigError: files or splits that are missing or cannot be read.
    """
    return OPENERS[config.source](config, prefix, download, cache or DataConfig().cache)
