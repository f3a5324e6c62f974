"""What the documentation says holds: README's limits, links, every command, the Python blocks.

The commands of a page run in the order of the page, in a folder of their own that has what they
name: texts, tokenizers, trained runs. What takes hours or hardware runs in a short form. Run as a
program, this file is the server that the commands are forked from, so that each does not import
jax again.
"""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

from ngpt_jax.errors import install_hint

ROOT = Path(__file__).parents[1]


def tracked(pattern):
    done = subprocess.run(
        ["git", "ls-files", "-z", pattern], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return sorted(Path(name) for name in done.stdout.split("\0") if name)


PAGES = tracked("*.md")
EXPERIMENTS = [path for path in tracked("experiments/*.py") if path.parent.name == "experiments"]
PAGE = pytest.mark.parametrize("page", PAGES, ids=str)
DOCUMENTS = pytest.mark.parametrize("path", [*PAGES, *EXPERIMENTS], ids=str)

# How the commands are run: the longest of these beginnings that fits says what is added to the
# command ({n} is another number each time), or which test runs it, or that it is not of this
# package. A later flag takes the place of an earlier one of the same name.
TINY = (
    " --workdir=runs/short{n} --config.model.layers=1 --config.model.width=16"
    " --config.model.context=64 --config.train.steps=2 --config.train.batch_size=2"
    " --config.eval.batches=1 --config.eval.batch_size=64 --config.sample.tokens=8"
    " --config.data.held_out=0.002"
)
OWT = " --dry_run --config.data.tokenizer=llama2.json"  # that of the tests' own owt_llama2


class ByTest(NamedTuple):
    name: str


class NotOurs(NamedTuple):
    why: str


HOW = {
    "python -c": "",
    "python -m ngpt_jax ": "",
    "python experiments/prose.py": "",
    "python experiments/page.py": ByTest(
        "test_page.py::test_the_marked_parts_are_those_of_the_results"
    ),
    "python -m ngpt_jax.main": " --dry_run",
    "python -m ngpt_jax.main --help_config": "",
    "python -m ngpt_jax.main --config=experiments/quickstart.py": TINY,
    "python -m ngpt_jax.main --config=experiments/quickstart.py:gpt": " --dry_run",
    "python -m ngpt_jax.main --config=experiments/quickstart.py --print_config": "",
    "python -m ngpt_jax.main --config=experiments/0_5b.py --workdir": OWT,
    "python -m ngpt_jax.main --config=experiments/0_5b.py:gpt --workdir": OWT,
    "python -m ngpt_jax.main --config=quickstart": TINY,
    "python -m ngpt_jax.main --config=quickstart --workdir=runs/shakespeare_char": ByTest(
        "test_nanogpt.py::test_characters_as_prepared_for_nanogpt"
    ),
    "python -m ngpt_jax.main --config=124m --workdir=runs/owt": ByTest(
        "test_nanogpt.py::test_openwebtext_as_prepared_for_nanogpt"
    ),
    "python -m ngpt_jax.data.corpora prose": ByTest("test_prose.py::test_the_corpus_itself"),
    "python -m ngpt_jax.data.prepare": "",
    "python -m ngpt_jax.data.prepare --config": ByTest(
        "test_hub.py::test_the_data_of_an_experiment_are_prepared_for_machines_without_a_network"
    ),
    "python -m ngpt_jax.data.prepare --source=text --paths=openwebtext": " --out=owt{n}",
    "python -m ngpt_jax.data.prepare --source=hub": " --out=hub{n}",
    "python -m ngpt_jax.data.train_tokenizer": "",
    "python -m ngpt_jax.tools.aot": " --config=experiments/1b.py:debug,stdlib --topology=local",
    "python -m ngpt_jax.tools.aot --config=experiments/124m.py --topology=h100:8": ByTest(
        "test_aot_gpu.py::test_eight_h100_on_two_hosts"
    ),
    "python -m ngpt_jax.tools.aot --config=experiments/1b.py:ctx8k": ByTest(
        "test_aot.py::test_the_search_ends_at_the_most_that_leaves_some_memory"
    ),
    "python -m ngpt_jax.tools.aot --config=experiments/1b.py --topology=v5e:4x4 --slices=2": ByTest(
        "test_aot.py::test_replicas_lie_across_slices"
    ),
    "python -m ngpt_jax.tools.benchmark": (
        " --steps=3 --warmup=1 --config.model.layers=1 --config.model.width=64"
        " --config.model.context=64 --config.model.vocab_size=512"
    ),
    "python -m ngpt_jax.tools.benchmark --config": (
        " --config=experiments/124m.py:debug,stdlib --steps=3 --warmup=1 --config.model.layers=1"
        " --config.model.vocab_size=512"
    ),
    "python -m ngpt_jax.tools.benchmark_data": " --paths=book.txt --workers=2 --rounds=1",
    "python -m ngpt_jax.tools.benchmark_decode": (
        " --prompt=16 --tokens=64 --rounds=1 --config.model.layers=1 --config.model.width=48"
        " --config.model.heads=4 --config.model.vocab_size=512"
    ),
    "python -m ngpt_jax.tools.compare": " --dry_run",
    "python -m ngpt_jax.tools.compare --experiment=experiments/fair.py": ByTest(
        "test_fair.py::test_the_budgets_are_what_the_file_says"
    ),
    "python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py --report_only": "",
    "python -m ngpt_jax.tools.compare --experiment=experiments/speedup.py --check": ByTest(
        "test_compare.py::test_a_run_made_again_is_compared_to_the_last_bit"
    ),
    "python -m ngpt_jax.tools.convert": "",
    "python -m ngpt_jax.tools.convert --workdir=runs/ngpt --to_reference": ByTest(
        "test_convert_torch.py::test_command_on_the_authors_layout"
    ),
    "python -m ngpt_jax.tools.convert --from_reference": ByTest(
        "test_convert_torch.py::test_command_on_the_authors_layout"
    ),
    "python -m ngpt_jax.tools.diagnose": " --windows=1",
    "python -m ngpt_jax.tools.duel": TINY,
    "python -m ngpt_jax.tools.evaluate": "",
    "python -m ngpt_jax.tools.evaluate --workdir=runs/1b --tasks=hellaswag --tasks_dir=evals"
    " --harness": ByTest("test_harness.py::test_the_command_with_the_harness"),
    "python -m ngpt_jax.tools.length": " --windows=1 --factor=2",
    "python -m ngpt_jax.tools.runs": "",
    "python -m ngpt_jax.tools.sample": " --tokens=8",
    "python tests/torture.py": ByTest(
        "test_torture.py::test_a_run_that_is_killed_again_and_again"
    ),
    "python tests/soak.py": " --help",
    "pytest": NotOurs("the tests themselves"),
    "git clone": NotOurs("git"),
    "cd ngpt_jax": NotOurs("the shell"),
    "export": NotOurs("the shell"),
    "gcloud compute tpus tpu-vm create": NotOurs("a TPU, and an account at Google"),
    "gcloud compute tpus tpu-vm ssh": NotOurs("the same; what it runs there is in the list too"),
    "python -m uv": NotOurs("uv's commands"),
    "sbatch": NotOurs("a cluster with SLURM"),
}  # fmt: skip


# ------------------------------------------------------------------------------- reading the pages


def blocks(page):
    """(language, text) of each block of code between fences."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.M | re.S)


def python_blocks(page):
    return [text for language, text in blocks(page) if language == "python"]


def frameworks(text):
    """The frameworks that a block of Python imports."""
    return re.findall(r"^(?:import|from) (flax|equinox)\b", text, re.M)


def prose(page):
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)


@functools.cache
def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def shell_commands(text):
    """The argument lists of the commands in a text of the shell, those given to others too."""
    out, pending = [], ""
    for line in text.splitlines(keepends=True):
        pending += line
        if pending.endswith("\\\n"):
            pending = pending[:-2].rstrip() + " "
            continue
        try:
            words = shlex.shlex(pending, posix=True, punctuation_chars="&|;")
            words.whitespace_split = True
            words = list(words)
        except ValueError:  # within quotes
            continue
        pending = ""
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";")), len(words))
            out += [words[:end]] if end else []
            out += [
                inner for word in words[:end] if word.startswith("--command=")
                for inner in shell_commands(word.removeprefix("--command="))
            ]  # fmt: skip
            words = words[end + 1 :]
    assert not pending, f"an open quote: {pending}"
    return out


def commands(path):
    """The argument lists of all commands of a page, or of an experiment's docstring."""
    if path.suffix == ".py":
        lines = ast.get_docstring(ast.parse(read(path))).replace("\\\n", "")
        found = re.findall(r"^ {2,}((?:python|XLA_FLAGS=).*)", lines, re.M)
        found += re.findall(r": (python .*)", lines)
        return [command for text in found for command in shell_commands(text)]
    texts = [text for language, text in blocks(path) if language == "bash"]
    spans = re.findall(r"`([^`]+)`", re.sub(r"\s+", " ", prose(path)))
    texts += [span for span in spans if COMMAND.match(span)]
    return [command for text in texts for command in shell_commands(text)]


COMMAND = re.compile(r"(\w+=\S+ )*(python3?|pip|pytest|srun|gcloud|git) \S")


def split_environment(command):
    """(variables, the rest as one runs it here): srun starts it, a folder's Python is Python."""
    count = next((i for i, word in enumerate(command) if not re.match(r"\w+=", word)), 0)
    variables = dict(word.split("=", 1) for word in command[:count])
    rest = command[count:]
    if rest[0] == "srun":
        rest = rest[next(i for i, word in enumerate(rest) if not word.startswith("-") and i) :]
    if re.fullmatch(r"(.*/)?python3?", rest[0]):
        rest = ["python", *rest[1:]]
    return variables, rest


def how(command):
    """The entry of HOW for a command, without variables; None where there is none."""
    text = " ".join(command)
    fitting = [start for start in HOW if f"{text} ".startswith(start)]
    return HOW[max(fitting, key=len)] if fitting else None


# ------------------------------------------------------------------------------------------ README


def test_the_readme_is_one_page():
    text = read(Path("README.md"))
    lines = text.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 110
    assert len(text.split()) <= 1500
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures
    for name in map(Path, pictures):
        assert name in tracked(str(name))
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert (ROOT / name).stat().st_size < 200_000


def test_the_rooms_have_their_pages():
    rooms = "data training parallel aot inference evaluation optim model study".split()
    assert {Path("experiments/README.md"), *(Path(f"ngpt_jax/{r}/README.md") for r in rooms)} <= {
        *PAGES
    }


def test_the_map_has_every_room():
    text = read(Path("README.md"))
    for path in (ROOT / "ngpt_jax").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in text
        elif path.suffix == ".py" and path.name != "__init__.py":
            assert f"`{path.name}`" in text


# ------------------------------------------------------------------------------------- every page


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@PAGE
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page.parent / name).resolve() if name else ROOT / page
        assert path.is_relative_to(ROOT), target
        where = path.relative_to(ROOT)
        assert tracked(str(where)), f"{target}: not in the repository"
        if anchor:
            assert anchor in anchors(where), target


@PAGE
def test_files_that_are_named_exist(page):
    folders = (page.parent, Path(), Path("ngpt_jax"), Path("experiments"))
    for name in re.findall(r"`((?:\w+/)*[a-z\d_]+\.py)`(?!\])", prose(page)):
        assert any((ROOT / folder / name).is_file() for folder in folders), name


@DOCUMENTS
def test_no_path_outside_the_repository(path):
    text = read(path) if path.suffix == ".md" else ast.get_docstring(ast.parse(read(path)))
    for name in re.findall(r"(?:\.\./)+[\w./-]*", text):
        assert (ROOT / path.parent / name).resolve().is_relative_to(ROOT), name
    assert not re.findall(r"(?<![\w.:/])[/~]/?[a-z][\w.-]*/[\w./-]*", text)


@PAGE
def test_code_says_what_it_is(page):
    """So that no command is missed: all code is between fences, commands in blocks of bash."""
    assert {language for language, _ in blocks(page)} <= {"bash", "python", "text"}
    for language, text in blocks(page):
        if language == "text":
            assert not any(COMMAND.match(line) for line in text.splitlines())
    assert not re.search(r"^( {4}|\t)(\$ )?(python|pip|pytest|gcloud|srun)\b", prose(page), re.M)


# --------------------------------------------------------------------------------- every command


def test_what_is_written_to_the_shell_is_understood():
    text = "A=1 python -m x --a='b c' \\\n  --d  # why\npip install . && python -c \"\nx = '&&'\"\n"
    assert shell_commands(text) == [
        ["A=1", "python", "-m", "x", "--a=b c", "--d"],
        ["pip", "install", "."],
        ["python", "-c", "\nx = '&&'"],
    ]
    assert shell_commands('g --command="cd x && pip y"')[1:] == [["cd", "x"], ["pip", "y"]]
    assert split_environment(["srun", "--n=1", "/b/python3", "-m"]) == ({}, ["python", "-m"])


class Server:
    """Runs commands, each in a fork of a process that has imported what is slow to import.

    Args:
      cache: folder of compiled programs, which the commands share.
      hub: address of a stand-in for the Hugging Face Hub.

    ``done`` lists the commands that ran.
    """

    def __init__(self, cache, hub):
        environment = {
            "HF_ENDPOINT": hub,
            "HF_HUB_OFFLINE": "0",  # which another test of this process may have set
            "HF_HOME": str(cache / "hf"),
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        self.done = []
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | environment,
        )  # fmt: skip

    def run(self, folder, command, variables):
        """Runs a command of python; an AssertionError with its output where it fails."""
        job = {"folder": str(folder), "command": command[1:], "variables": variables}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())
        output = (folder / "output.txt").read_text(errors="replace")
        assert code == 0, f"{shlex.join(command)}\nexit code {code}\n{output[-3000:]}"

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def serve():
    for slow in ("jax", "flax.linen", "optax", "orbax.checkpoint", "grain"):
        importlib.import_module(slow)
    for line in sys.stdin:
        job = json.loads(line)
        if not (child := os.fork()):
            os._exit(run_here(job))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run_here(job):
    """Makes this process the one of a command; its exit code."""
    os.chdir(job["folder"])
    os.environ |= job["variables"]
    with open(os.devnull) as nothing, open("output.txt", "w") as file:
        for number, stream in enumerate((nothing, file, file)):
            os.dup2(stream.fileno(), number)
    first, *rest = job["command"]
    code = 0
    try:
        if first == "-c":
            exec(rest[0], {"__name__": "__main__"})
        elif first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    from data_helpers import json_lines
    from hub_server import serving
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some words"], vocab_size=300, special_tokens=["<|endoftext|>"])
    text = json_lines(*(f"{i} some words\n" * 200 for i in range(40))).encode()
    with serving() as (hub, url):
        tokenizer = {"tokenizer.json": bpe.to_str().encode()}
        hub.add("model", "hf-internal-testing/llama-tokenizer", tokenizer)
        hub.add("dataset", "Skylion007/openwebtext", {"train.jsonl": text})
        server = Server(tmp_path_factory.mktemp("compiled"), url)
        yield server
        server.close()


@pytest.fixture(scope="module")
def prepared(server, tmp_path_factory):
    """A folder with all that the pages name: experiments, texts, tokenizers, tasks, runs."""
    from data_helpers import json_lines, write, write_bin
    from test_tokenizers import write_gpt2
    from tokenizers import ByteLevelBPETokenizer

    home = tmp_path_factory.mktemp("docs")
    results = shutil.ignore_patterns("speedup-*", "*.html", "*.png")
    shutil.copytree(ROOT / "experiments", home / "experiments", ignore=results)
    (home / "tests").symlink_to(ROOT / "tests")
    sentence = "The normalized transformer moves along a sphere, step {} of many.\n"
    book = "".join(sentence.format(i) for i in range(400))
    for name in ("book.txt", "books/one.txt", "books/two.txt", "books/three.txt",
                 "data/shakespeare_char/input.txt"):  # fmt: skip
        write(home / name, name + book)
    lines = json_lines(*(f"{i} {book[:2000]}" for i in range(40)))
    for name in ("openwebtext/a.jsonl.gz", "corpus/a.jsonl.gz",
                 "prose.train.jsonl.gz", "prose.val.jsonl.gz"):  # fmt: skip
        write(home / name, lines)
    for name in ("train.bin", "val.bin"):
        write_bin(home / name, [i % 250 for i in range(40_000)])
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([book], vocab_size=300, special_tokens=["<|endoftext|>"])
    for name in ("tokenizer.json", "llama2.json"):
        bpe.save(str(home / name))
    write_gpt2(home / "gpt2")
    choice = {"id": 1, "context": "The sphere", "continuations": [" turns", " moves"], "label": 1}
    for name in ("lambada_openai", "hellaswag", "arc_easy", "winogrande"):
        write(home / "evals" / f"{name}.jsonl", json.dumps(choice) + "\n")
    (home / "DISK").symlink_to(".")  # "storage that all hosts share"

    def run(*command):
        server.run(home, ["python", "-m", *command], {})

    run("ngpt_jax.data.prepare", "--source=text", "--paths=openwebtext", "--out=owt_llama2",
        "--tokenizer=llama2.json")  # fmt: skip
    speedup = home / "experiments" / "speedup" / "runs"
    for kind, variants, study in (
        ("ngpt", "debug", "prose512-ngpt-4000-0.007-seed0"),
        ("gpt", "debug,gpt", "prose512-gpt-4000-0.006-seed0"),
    ):
        run("ngpt_jax.main", f"--config=experiments/quickstart.py:{variants}",
            f"--workdir=runs/{kind}", "--config.model.layers=1", "--config.model.context=64",
            "--config.train.steps=3", "--config.sample.tokens=0",
            "--config.data.source=text", "--config.data.paths=books",
            "--config.data.eval_paths=val=book.txt")  # fmt: skip
        speedup.mkdir(exist_ok=True)
        (speedup / study).symlink_to(home / "runs" / kind)
    for name in ("quickstart", "1b", "prose", "books", "owt"):
        (home / "runs" / name).symlink_to("ngpt")
    return home


@DOCUMENTS
def test_every_command_is_known(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for variables, command in map(split_environment, commands(path)):
        assert {*variables} <= {"XLA_FLAGS"}
        if command[:2] == ["pip", "install"]:  # .ci/run installs what the tests need
            wanted = re.fullmatch(r"\.(?:\[([\w,]+)\])?|uv|nvidia-cudnn-cu13", command[2])
            assert {*(wanted[1] or "test").split(",")} <= {*project["optional-dependencies"]}
            continue
        found = how(command)
        assert found is not None, f"{shlex.join(command)}: HOW does not say how it is run"
        if isinstance(found, ByTest):
            file, _, test = found.name.partition("::")
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.M), found


@pytest.mark.slow
@DOCUMENTS
def test_every_command_runs(path, request, tmp_path):
    todo = [
        (*split_environment(command), found)
        for command in commands(path)
        if isinstance(found := how(split_environment(command)[1]), str)
    ]
    absent = set()
    if path.suffix == ".md":
        for text in python_blocks(path):
            missing = {name for name in frameworks(text) if not importlib.util.find_spec(name)}
            absent |= missing
            todo += [] if missing else [({}, ["python", "-c", text], "")]
    if not todo:
        return
    prepared, server = map(request.getfixturevalue, ("prepared", "server"))
    folder = tmp_path / "page"
    shutil.copytree(prepared, folder, symlinks=True)
    for n, (variables, command, more) in enumerate(todo):
        if (variables, command) not in server.done:  # on another page
            more = shlex.split(more.format(n=n))
            server.run(folder, command + more, {"NGPT_PROSE": str(folder), **variables})
            server.done.append((variables, command))
    if absent:
        pytest.skip(f"all but the blocks that need {absent} ran: pip install '.[test]'")


RUN_BLOCKS = """
import sys
for text in sys.argv[1:]:
    exec(text, {"__name__": "__main__"})
"""


def test_plain_examples_need_jax_and_optax_alone(tmp_path):
    """In an interpreter that finds jax, optax, what these require, and a copy of three files."""
    todo, seen = ["jax", "optax"], set()
    while todo:
        distribution = importlib.metadata.distribution(todo.pop())
        if (name := distribution.name) in seen:
            continue
        seen.add(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(distribution.locate_file(top))
        for line in distribution.requires or []:
            if "extra ==" not in line:
                todo.append(re.match(r"[\w.-]+", line)[0])
    assert "flax" not in seen and len(seen) < 20
    (tmp_path / "ngpt_jax").mkdir()
    for name in ("__init__", "projection", "directions", "sphere"):
        shutil.copy(ROOT / f"ngpt_jax/{name}.py", tmp_path / "ngpt_jax")
    page = Path("ngpt_jax/optim/README.md")
    part = re.search(r"^## In your project\n(.*?)^## ", read(page), re.M | re.S)[1]
    plain = [text for text in python_blocks(page) if text in part and not frameworks(text)]
    assert len(plain) >= 3
    done = subprocess.run(
        [sys.executable, "-S", "-c", RUN_BLOCKS, *plain], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_hint_names_a_package_that_is_in_no_registry():
    for file in [ROOT / "README.md", *(ROOT / "ngpt_jax").rglob("*.py"), *ROOT.rglob("*/*.md")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"pip install +'?ngpt[-_]jax\b", text), file


def test_the_hint_names_an_extra_that_there_is():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {
        extra
        for file in (ROOT / "ngpt_jax").rglob("*.py")
        for extra in re.findall(r"install_hint\('(\w+)'\)", file.read_text(encoding="utf-8"))
    }
    assert named and named <= extras.keys()
    assert install_hint("torch") == "pip install '.[torch]' in the clone of ngpt_jax"


if __name__ == "__main__":
    serve()
