"""What every command shares: flags, overrides, output paths, and errors in one line."""

import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from ngpt_jax.errors import ConfigError, mend_output, tell
from ngpt_jax.files import is_remote, reason, write_atomically


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Separates ``--config.a.b=value`` or ``--config.a.b value`` from the other arguments.

    Returns:
      The other arguments, and (dotted name, text) for each override.
    """
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not name.startswith(("--config.", "-config.")):
            rest.append(argument)
            continue
        if not equals:
            text = next(arguments, "--")
            if text.startswith("--"):
                raise ConfigError(f"{name} needs a value: {name}=value.")
        _check_value(name, text)
        overrides.append((name.split(".", 1)[1], text))
    return rest, overrides


def _check_value(flag: str, value: Any) -> None:
    """Refuses an empty value, as of --workdir=$OUT without OUT, and a ~user that there is not.

    Only a prompt can be empty, and only it and what ends a text begin as they like.
    """
    name = flag.rpartition(".")[2].lstrip("-")
    if name == "prompt":
        return
    values = value if isinstance(value, list) else [value]
    if not values or "" in values:
        raise ConfigError(f"{flag} is empty; give it a value, or leave it out.")
    for text in values if name != "stop" else ():
        if str(text).startswith("~") and os.path.expanduser(text).startswith("~"):
            raise ConfigError(f"{flag}={text}: there is no such home folder; write the path.")


def refuse_overrides(overrides: Sequence[tuple[str, str]]) -> None:
    """For commands that read no config; raises ConfigError."""
    for name, _ in overrides:
        raise ConfigError(f"--config.{name} is a flag of training, not of this; see --help.")


def _fail(message: str) -> NoReturn:
    tell(f"error: {message}")
    sys.exit(2)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        _fail(str(e).splitlines()[0])
    except SystemExit:  # absl has printed the help that was asked for, and would exit with 1
        sys.exit(0)


def check_output(**files: str | None) -> None:
    """Raises ConfigError before work starts if the folder of a file to write does not exist.

    Args:
      **files: path or None, by the name of its flag.
    """
    for flag, file in files.items():
        if file and not Path(file).parent.is_dir():
            raise ConfigError(f"--{flag}={file}: there is no folder {Path(file).parent}.")


def write_json(file: str | None, value: Any) -> None:
    """Writes a value as JSON to the file that a flag names, if it does."""
    if file:
        write_atomically(Path(file), json.dumps(value, indent=2) + "\n")


def output_folder(workdir: str, out: str | None, name: str) -> Path:
    """Makes and returns the folder for results about a run: --out, or WORKDIR/name by default."""
    if out is None and is_remote(workdir):
        raise ConfigError(f"--out is needed: results cannot be written to {workdir}.")
    folder = Path(out or Path(workdir) / name).expanduser()
    check_output(out=str(folder))
    try:
        folder.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise ConfigError(f"--out={folder} cannot be written: {reason(e)}.") from e
    return folder


def _backend_problem() -> str:
    """Why jax has no devices, where that may be what an error came from; or nothing."""
    jax = sys.modules.get("jax")
    if jax is None:
        return ""
    try:
        jax.devices()
        return ""
    except Exception as e:  # bare AssertionErrors too
        why = f" ({reason(e)})" if str(e) else ""
        platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return (
            f"JAX_PLATFORMS={platforms}: jax finds no such device here{why}; unset JAX_PLATFORMS,"
            " or install jax for the device (jax[cuda13], jax[tpu])."
        )
    return f"jax cannot start its devices{why}; JAX_PLATFORMS=cpu does without them."


def run_command(command: Callable[..., int | None], arguments: int = 0) -> NoReturn:
    """Parses the flags, runs ``command(overrides)`` and exits with the code that it returns.

    The command is given up to ``arguments`` words more, those that are no options.

    A wrong flag, a ConfigError or a backend that jax cannot start is printed in one line, and the
    exit code is 2. --help prints the docstring and the flags of the command's module, and the exit
    code is 0. Ctrl-C ends a command that does not handle it, with exit code 130.
    """
    mend_output()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no notes of XLA about the CPU

    def checked(argv: list[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax logs much of what it reads and writes
        for name in flags.FLAGS:
            if flags.FLAGS[name].present:
                _check_value(f"--{name}", flags.FLAGS[name].value)
        if len(argv) > 1 + arguments:
            unexpected = argv[1 + arguments]
            raise ConfigError(f"Unexpected argument {unexpected!r}; options begin with --.")
        return command(overrides, *argv[1:])

    try:
        rest, overrides = split_overrides(sys.argv)
        app.run(checked, argv=rest, flags_parser=_parse_flags)
    except ConfigError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        # Python flushes stdout at exit, which would fail again: let it go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if e.errno == errno.EPIPE:  # the reader has gone, as in `| head`
            sys.exit(1)
        _fail(f"{reason(e)}{'' if e.filename is None else f': {e.filename}'}.")
    except Exception:
        if problem := _backend_problem():
            _fail(problem)
        raise
    raise AssertionError("app.run exits")
