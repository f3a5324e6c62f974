"""Repositories of the Hugging Face Hub: what is in them, and their files one at a time.

The environment of huggingface_hub counts: HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME.
"""

import contextlib
import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from ngpt_jax.config import ConfigError
from ngpt_jax.data.manifest import sha256_of
from ngpt_jax.data.text.units import Doing
from ngpt_jax.errors import tell
from ngpt_jax.files import reason, write_atomically, writing_cache

WAIT = 0.5  # seconds between two signs of life
_PATIENCE = 10.0  # seconds that the hub has for an answer
_SILENCE = 8.0  # seconds after which the user is told
_COMMIT = re.compile("[0-9a-f]{40}")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Attributes:
      kind: dataset or model.
      name: OWNER/NAME.
      commit: 40 hexadecimal digits.
      files: by path, size in bytes and hash: the sha256 of large files, the git hash of others.
      configs: of a data set, as its card has them.
      note: a line for the user; or nothing.
    """

    kind: str
    name: str
    commit: str
    files: Mapping[str, tuple[int, str]]
    configs: list[Any]
    note: str = ""


def find_repository(kind: str, spec: str, cache: str, field: str) -> Repository:
    """The repository OWNER/NAME[@REVISION] at the commit that this machine used first.

    Without a revision, or with one that moves, the first use pins the commit in ``cache``. Later
    uses stay there and tell of a newer one; then they need no network.

    Args:
      kind: dataset or model.
      spec: OWNER/NAME, or OWNER/NAME@REVISION: a branch, a tag or a commit.
      cache: folder of the pins.
      field: that gave ``spec``, for messages.

    Raises ConfigError.
    """
    name, _, revision = spec.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or spec.endswith("@"):
        raise ConfigError(
            f"{field} = {spec!r}: name a {_WORD[kind]} as OWNER/NAME, perhaps @COMMIT."
        )
    pin = Path(cache).expanduser() / "hub" / f"{kind}s--{spec.replace('/', '--')}.json"
    pinned = _read_pin(pin)
    from huggingface_hub import constants  # reads the environment

    if pinned is not None and (_COMMIT.fullmatch(revision) or constants.HF_HUB_OFFLINE):
        return pinned
    try:
        newest = _again(lambda: _ask(kind, name, revision), 4 if pinned is None else 2)
    except Exception as e:
        if pinned is None or _refused(e):
            raise _problem(e, kind, name, revision, field) from e
        note = (
            f"{name}: the hub cannot be reached, so commit {pinned.commit[:12]} is used, as before"
        )
        return dataclasses.replace(pinned, note=note)
    if pinned is not None:
        if pinned.commit == newest.commit:
            return pinned
        note = (
            f"{name} has changed: this uses commit {pinned.commit[:12]}, as before; for the newest"
            f" give {name}@{newest.commit}"
        )
        return dataclasses.replace(pinned, note=note)
    with writing_cache(cache):
        pin.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(pin, json.dumps(dataclasses.asdict(newest)) + "\n")
    return newest


def fetch(repo: Repository, path: str, folder: Path, field: str, doing: Doing) -> Path:
    """A file of a repository, on this disk.

    A file that huggingface_hub has in its own cache is read there. Another one is fetched into
    ``folder``, where it takes the place of all that was there. What broke is tried again.

    Args:
      repo: of the file.
      path: in the repository.
      folder: for this file alone.
      field: that gave the repository, for messages.
      doing: called at least twice a second with what is being done; may raise, to stop.

    Raises ConfigError.
    """
    import huggingface_hub as hf

    found = hf.try_to_load_from_cache(repo.name, path, revision=repo.commit, repo_type=repo.kind)
    if isinstance(found, str):
        return Path(found)
    size, digest = repo.files[path]
    for file in list(folder.rglob("*")):  # an earlier file, and what a killed program has left
        if file.is_file() and file != folder / path and file.suffix != ".metadata":
            file.unlink()
    result: list[BaseException | Path] = []
    job = threading.Thread(target=_fetch, args=(repo, path, folder, digest, result), daemon=True)
    job.start()  # a daemon, as nothing can stop a download but the end of the program
    while job.is_alive():
        doing(f"fetching {path}, {_size_of(folder) / 1e6:,.0f} of {size / 1e6:,.0f} MB")
        job.join(WAIT)
    if isinstance(result[0], Path):
        return result[0]
    raise _problem(result[0], repo.kind, repo.name, repo.commit, field) from result[0]


def fetch_kept(repo: Repository, path: str, field: str) -> Path:
    """A small file of a repository, in the cache of huggingface_hub; raises ConfigError."""
    import huggingface_hub as hf

    where: dict[str, Any] = {"revision": repo.commit, "repo_type": repo.kind}
    found = hf.try_to_load_from_cache(repo.name, path, **where)
    if isinstance(found, str):
        return Path(found)
    hf.utils.disable_progress_bars()
    try:
        return Path(_again(lambda: hf.hf_hub_download(repo.name, path, **where), 4))
    except Exception as e:
        raise _problem(e, repo.kind, repo.name, repo.commit, field) from e


def _read_pin(file: Path) -> Repository | None:
    try:
        values = json.loads(file.read_text())
        files = {path: (int(size), str(digest)) for path, (size, digest) in values["files"].items()}
        return Repository(**values | {"files": files})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # as if it were not there


def _ask(kind: str, name: str, revision: str) -> Repository:
    """Asks the hub what is in a repository."""
    import huggingface_hub as hf

    info: Any = hf.HfApi().repo_info(
        name, revision=revision or None, repo_type=kind, files_metadata=True, timeout=_PATIENCE
    )
    files = {
        s.rfilename: (s.size or 0, (s.lfs.sha256 if s.lfs else s.blob_id) or info.sha)
        for s in info.siblings or ()
    }
    card = info.card_data.to_dict() if info.card_data else {}
    return Repository(kind, name, info.sha, files, card.get("configs") or [])


def _fetch(
    repo: Repository, path: str, folder: Path, digest: str, result: list[BaseException | Path]
) -> None:
    """Fetches a file, in a thread of its own: the result is appended."""
    import huggingface_hub as hf

    def once() -> Path:
        file = Path(
            hf.hf_hub_download(
                repo.name, path, revision=repo.commit, repo_type=repo.kind, local_dir=folder
            )
        )
        if len(digest) == 64 and sha256_of(epath.Path(file)) != digest:
            file.unlink()
            raise ConnectionError(f"{path} is not what the hub says it is")
        return file

    hf.utils.disable_progress_bars()
    try:
        result.append(_again(once, 6, lambda line: None))  # fetch tells
    except BaseException as e:
        result.append(e)


def _again(fn: Callable[[], T], tries: int, say: Callable[[str], None] = tell) -> T:
    """What ``fn`` returns, tried again where the network or the hub fails for a while."""
    start = time.monotonic()
    for number in range(1, tries):
        try:
            return fn()
        except Exception as e:
            if _refused(e):
                raise
            headers = getattr(getattr(e, "response", None), "headers", {})
            asked = str(headers.get("Retry-After", ""))  # seconds, or a date, which is left alone
            wait = max(WAIT * 2**number, min(float(asked if asked.isdigit() else 0), 300.0))
            if time.monotonic() - start + wait > _SILENCE:
                say(f"the Hugging Face Hub: {reason(e)}; trying again in {wait:.0f} s")
            time.sleep(wait)
    return fn()


def _size_of(folder: Path) -> int:
    """Bytes in a folder whose files come and go."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(where, name)).st_size
    return total


_WORD = {"dataset": "data set", "model": "repository"}
_OWN_FILES = {
    "dataset": "give text of your own (data.source=text, data.paths=FILES)",
    "model": "give a tokenizer's file (data.tokenizer=FILE)",
}


def _refused(error: BaseException) -> bool:
    """Whether the hub has answered, and another try would get the same answer."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return error.response.status_code in (400, 401, 403, 404, 410, 416)
    return isinstance(error, errors.OfflineModeIsEnabled | errors.EntryNotFoundError) and not (
        isinstance(error, errors.LocalEntryNotFoundError)
    )


def _problem(error: BaseException, kind: str, name: str, revision: str, field: str) -> ConfigError:
    """What went wrong, and what to do, in one line."""
    from huggingface_hub import constants, errors

    url = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    what, own = f"{field}: the {_WORD[kind]} {name!r} of the Hugging Face Hub", _OWN_FILES[kind]
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "check HF_TOKEN" if os.environ.get("HF_TOKEN") else "set HF_TOKEN if it is private"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return ConfigError(f"{what} is gated: accept its terms at {url}, and set HF_TOKEN.")
    if isinstance(error, errors.RevisionNotFoundError):
        return ConfigError(f"{what} has no revision {revision!r}; see {url}.")
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return ConfigError(f"{what} has lost a file since commit {revision[:12]}; give another.")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return ConfigError(f"{what} is not there, or not for you; see {url}, or {token}.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConfigError(f"{what} is not on this machine; unset HF_HUB_OFFLINE, or {own}.")
    if isinstance(error, OSError) and error.errno is not None:  # a full disk
        return ConfigError(f"{what} cannot be fetched: {reason(error)}.")
    return ConfigError(
        f"{what} cannot be fetched ({reason(error)}); run the same command again to resume,"
        f" or {own}."
    )
