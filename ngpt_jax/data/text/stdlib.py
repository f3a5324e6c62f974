"""The source code of the running Python's standard library: text that is on every machine.

The same build of Python gives the same text everywhere.
"""

import collections
import functools
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ngpt_jax.config import ConfigError, SourceConfig
from ngpt_jax.data.list_files import stamp
from ngpt_jax.data.text.held_out import hold_out, text_digest
from ngpt_jax.data.text.units import TextSource, Unit

# Tests, data written as code, packages installed later, and what some machines lack.
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"),
    *("__pycache__", "idlelib", "lib2to3", "distutils", "turtledemo", "macholib"),
}
# Distributions rewrite these or ship them apart: the text would depend on the machine.
_SKIPPED_MODULES = {"ensurepip", "msilib", "site", "sysconfig", "tkinter", "turtle"}


def open_stdlib(config: SourceConfig, prefix: str, download: bool, cache: str) -> TextSource:
    """As :func:`ngpt_jax.data.text.sources.open_source`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = stdlib_files(root)
    if len({_module(file, root) for file in files}) < 2:
        raise ConfigError(
            f"{prefix}source=stdlib: this Python has no source files below {str(root)!r} (zipped or"
            f" stripped?); use {prefix}source=text with {prefix}paths."
        )
    stamps = "\n".join([f"held out {config.held_out}", *(stamp(epath.Path(f)) for f in files)])
    size = sum(file.stat().st_size for file in files)
    texts_by_set = functools.cache(lambda: stdlib_texts(root, config.held_out))

    def unit(name: str) -> Unit:
        def read() -> Iterator[tuple[str, int]]:
            texts = texts_by_set()[name]
            return ((text, size * i // len(texts)) for i, text in enumerate(texts, start=1))

        # Held-out modules are not named: then the share that is held out is compared.
        return Unit(stamps, size, read, str(root) if name == "train" else None)

    return TextSource([unit("train")], {"stdlib": [unit("stdlib")]}, f"{prefix}source")


def stdlib_files(root: Path) -> list[Path]:
    """The .py files to read below ``root``, sorted by path; symbolic links are not followed."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    # Python's own list of module names leaves out what the build generates (_sysconfigdata*,
    # config-*) and what others add (sitecustomize).
    known = sys.stdlib_module_names - _SKIPPED_MODULES
    files = [f for f in files if _module(f, root) in known and not f.is_symlink()]
    return sorted(files, key=lambda f: f.relative_to(root).as_posix())


def _module(file: Path, root: Path) -> str:
    """json/decoder.py -> json, ast.py -> ast."""
    return file.relative_to(root).parts[0].removesuffix(".py")


def stdlib_texts(root: Path, held_out: float) -> dict[str, list[str]]:
    """Documents, one a source file: "train", and whole top-level modules held out as "stdlib".

    Args:
      root: folder of the standard library.
      held_out: share of the bytes to hold out. The sha256 of their names decides which modules
        are, so that Python versions agree on all but one or two.
    """
    texts: dict[Path, str] = {}
    for file in stdlib_files(root):
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            texts[file] = text
    keys = {file: text_digest(_module(file, root)) for file in texts}
    sizes: dict[str, int] = collections.Counter()
    for file, text in texts.items():
        sizes[keys[file]] += len(text.encode())
    held = hold_out(sizes, held_out)
    out: dict[str, list[str]] = {"train": [], "stdlib": []}
    for file, text in texts.items():
        out["stdlib" if keys[file] in held else "train"].append(text)
    return out
