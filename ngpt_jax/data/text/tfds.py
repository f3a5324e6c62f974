"""Text of TensorFlow Datasets."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.data.list_files import parse_path, stamp
from ngpt_jax.data.open_files import RECORDS_AT_ONCE
from ngpt_jax.data.text.units import TextSource, Unit, decode_records, held_out_name
from ngpt_jax.files import matching, reason


def open_tfds(config: SourceConfig, prefix: str, download: bool, cache: str) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`; downloads with ``tfds_name`` alone."""
    builder = _builder(config, prefix, download)
    if not (download or builder.info.splits):  # the set is not on this machine
        return TextSource([], {}, f"{prefix}tfds_split")
    held_out = {}
    if (split := config.tfds_eval_split) is not None:
        if split == config.tfds_split:
            raise ConfigError(
                f"{prefix}tfds_eval_split is the split to train on; name another, or None."
            )
        unit = _unit(builder, split, config.text_key, prefix, "tfds_eval_split")
        held_out = {held_out_name(split): [unit]}
    train = _unit(builder, config.tfds_split, config.text_key, prefix, "tfds_split")
    return TextSource([train], held_out, f"{prefix}tfds_split")


def _unit(builder: Any, split: str, text_key: str, prefix: str, name: str) -> Unit:
    field = f"{prefix}{name}"
    if split not in builder.info.splits:
        known = ", ".join(builder.info.splits)
        raise ConfigError(f"{field}: {split!r} is none of the splits {known}.")
    if text_key not in (builder.info.features or {}):
        known = ", ".join(sorted(builder.info.features or ()))
        raise ConfigError(f"{prefix}text_key: {text_key!r} is none of {known}.")
    info = builder.info.splits[split]
    try:
        files = [stamp(epath.Path(file)) for file in info.filepaths]
    except OSError as e:
        raise ConfigError(f"{field}: {e.filename} cannot be read: {reason(e)}.") from e
    where, folder = f"{field}: split {split!r}", os.path.realpath(builder.data_dir)

    def records() -> Iterator[Any]:
        try:
            source = builder.as_data_source(split)
            for start in range(0, len(source), RECORDS_AT_ONCE):
                rows = range(start, min(start + RECORDS_AT_ONCE, len(source)))
                yield from (row[text_key] for row in source.__getitems__(rows))
        except Exception as e:  # tfds raises errors of many kinds
            raise ConfigError(
                f"{where} cannot be read: {reason(e)}; prepare the set anew, as array_record."
            ) from e

    mend = f"set {prefix}text_key, or prepare the set anew"
    stamps = "\n".join([text_key, *files])
    return Unit(
        stamps,
        info.num_examples,
        lambda: decode_records(records(), where, mend),
        f"{folder} {split}",
    )


def _builder(config: SourceConfig, prefix: str, download: bool) -> Any:
    """The builder of a set; with ``download`` the set is then on this machine."""
    import tensorflow_datasets as tfds  # takes a second

    folder = parse_path(config.paths[0], f"{prefix}paths") if config.paths else None
    field = f"{prefix}tfds_name" if config.tfds_name else f"{prefix}paths"
    try:
        if config.tfds_name is None:
            assert folder is not None
            return tfds.builder_from_directory(_set_folder(folder, field))
        builder = tfds.builder(config.tfds_name, data_dir=folder, file_format="array_record")
        if download:
            builder.download_and_prepare()  # does nothing where that was done before
        return builder
    except ConfigError:
        raise
    except Exception as e:  # of many kinds, most with a page of text
        name = config.tfds_name or str(folder)
        raise ConfigError(f"{field}: {name!r} cannot be opened with tfds: {reason(e)}.") from e


def _set_folder(folder: epath.Path, field: str) -> epath.Path:
    """The folder with dataset_info.json: the given one, or the only one below it."""
    below, folders = [], [folder]
    for _ in range(4):  # the folder itself, and at most NAME/CONFIG/VERSION
        above, folders = folders, []
        for some in above:
            with contextlib.suppress(PermissionError):
                entries = matching(some, "[!.]*")
                found = any(entry.name == "dataset_info.json" for entry in entries)
                below += [some] if found else []
                folders += [] if found else entries
    if len(below) != 1:
        told = f"{len(below)} data sets" if below else "no dataset_info.json"
        raise ConfigError(
            f"{field}: there is {told} below {str(folder)!r}; give the folder of one version."
        )
    return below[0]
