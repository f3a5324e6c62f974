"""The sources of data: one entry for each value of ``data.source`` except mixture.

A new source is an entry here, a module of ngpt_jax/data/text with a function that opens it, a line
for that function in ngpt_jax/data/text/sources.py, and tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Facts about a source.

    Attributes:
      meaning: for --help_config.
      reads: the fields of SourceConfig that it reads.
      is_named: whether the fields of a SourceConfig say where the data are.
      needs: what they have to name, for messages; {name} and {flag} stand before names of fields.
    """

    meaning: str
    reads: tuple[str, ...]
    is_named: Callable[[Any], bool] = lambda config: bool(config.paths)
    needs: str = "{name}paths"


SOURCES = {
    "stdlib": Source(
        "the running Python's own source code", ("held_out",), is_named=lambda config: True
    ),
    "text": Source(
        "files",
        ("paths", "eval_paths", "text_key", "held_out"),
        needs="{name}paths, e.g. {flag}paths=book.txt",
    ),
    "tfds": Source(
        "TensorFlow Datasets",
        ("paths", "text_key", "held_out", "tfds_name", "tfds_split", "tfds_eval_split"),
        is_named=lambda config: bool(config.paths or config.tfds_name) and len(config.paths) < 2,
        needs="{name}tfds_name, or the folder of one data set in {name}paths, or both",
    ),
    "array_record": Source(
        "text or token ids",
        ("paths", "eval_paths", "held_out", "token_dtype"),
        needs="{name}paths, e.g. {flag}paths=DIR",
    ),
    "bin": Source(
        "token ids of nanoGPT, llm.c or data.prepare",
        ("paths", "eval_paths", "held_out", "token_dtype"),
        needs="{name}paths, e.g. {flag}paths=train.bin",
    ),
}
