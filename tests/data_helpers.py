"""What the tests of data share: files to read, and errors of one line."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from ngpt_jax.config import ConfigError, DataConfig
from ngpt_jax.data.text import sources

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def raises(pattern):
    """A ConfigError of one line."""
    return pytest.raises(ConfigError, match=r"\A(?=[^\n]*\Z)[^\n]*" + pattern)


def text_config(*paths, **fields):
    return DataConfig(source="text", paths=tuple(map(str, paths)), **fields)


def write(path, text):
    """A text file, packed by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(pack.get(path.suffix, bytes)(text.encode()))
    return path


def write_parquet(path, **columns):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_bin(path, tokens, dtype="<u2", header=None):
    """Token ids; with ``header`` = (magic, version) as llm.c writes them."""
    data = np.asarray(tokens).astype(dtype).tobytes()
    if header is not None:
        ints = np.zeros(256, "<i4")
        ints[:3] = (*header, len(tokens))
        data = ints.tobytes() + data
    path.write_bytes(data)
    return path


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def json_lines(*documents, key="text"):
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in documents)


def documents(config):
    """Texts to train on, and those of each held-out set, as a source gives them."""
    source = sources.open_source(config)

    def read(units):
        return [text for unit in units for text, _ in unit.read() if text]

    return read(source.train), {name: read(units) for name, units in source.held_out.items()}
