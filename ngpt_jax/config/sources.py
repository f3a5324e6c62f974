"""The sources of data: one entry for each value of ``data.source`` except mixture.

A new source of text is an entry here, a module of ngpt_jax/data/text with a function that opens it,
a line for that function in ngpt_jax/data/text/sources.py, and tests.
"""

from typing import NamedTuple


class Source(NamedTuple):
    """Facts about a source.

    Attributes:
      meaning: for --help_config.
      reads: the fields of SourceConfig that it reads, with spaces between.
      example: of ``paths``; None where it can do without them.
    """

    meaning: str
    reads: str
    example: str | None = None


TOKEN_FORMATS = ("bin", "array_record")  # sources that can hold token ids; prepare writes them

SOURCES = {
    "stdlib": Source("the running Python's own source code", "held_out"),
    "prose": Source("speeches and documentation, see ngpt_jax.data.corpora", "paths"),
    "text": Source("files", "paths eval_paths text_key held_out", "book.txt"),
    "tfds": Source(
        "TensorFlow Datasets", "paths text_key held_out tfds_name tfds_split tfds_eval_split"
    ),
    "hub": Source(
        "data sets of the Hugging Face Hub",
        "paths text_key held_out hub_config hub_split hub_eval_split", "OWNER/NAME",
    ),
    "array_record": Source("text or token ids", "paths eval_paths held_out token_dtype", "DIR"),
    "bin": Source(
        "token ids of nanoGPT, llm.c or data.prepare", "paths eval_paths held_out token_dtype",
        "train.bin",
    ),
}  # fmt: skip
