"""Fields, overrides, experiment files, and what bad input is told."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from ngpt_jax import config as config_lib
from ngpt_jax.config import ConfigError, convert, experiment
from ngpt_jax.config.command import split_overrides
from ngpt_jax.config.experiment import describe, load_config
from ngpt_jax.config.resolve import resolve
from ngpt_jax.study import results

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "experiments/quickstart.py")


def load(*overrides, spec=QUICKSTART):
    return load_config(spec, split_overrides(overrides)[1])


def test_defaults_are_resolved():
    config = load()
    assert (config.model.head_dim, config.model.kv_heads, config.model.mlp_width) == (32, 4, 512)
    assert config.model.qk_norm is True
    paper = load("--config.model.alpha_a.scale=None")
    assert paper.model.alpha_a.scale == 128**-0.5
    assert (config.optimizer.weight_decay, config.optimizer.warmup_steps) == (0.0, 0)
    own = "optimizer.warmup_share", "optimizer.weight_decay", "model.qk_norm"
    gpt = load(*(f"--config.{name}=None" for name in own), spec=QUICKSTART + ":gpt")
    assert gpt.model.qk_norm is False
    assert gpt.optimizer.weight_decay == 0.1
    assert gpt.optimizer.warmup_steps == gpt.train.steps // 10
    part = load("--config.optimizer.warmup_share=0.05", "--config.train.steps=750")
    assert part.optimizer.warmup_steps == round(0.05 * 750)


def test_resolving_twice_changes_nothing():
    config = load()
    assert resolve(config) == config
    import json

    assert config_lib.from_config_dict(json.loads(config_lib.to_json(config))) == config


@pytest.mark.parametrize("kind", [dict, ml_collections.ConfigDict])
def test_an_override_may_have_another_type_than_the_value_of_the_file(kind):
    values = kind({"train": {"steps": 5}, "optimizer": {"weight_decay": 0, "recipe": "adamw"}})
    config = load_config(values, [("optimizer.weight_decay", "0.1"), ("model.kind", "gpt")])
    assert config.optimizer.weight_decay == 0.1 and values["optimizer"]["weight_decay"] == 0
    if kind is ml_collections.ConfigDict:  # what follows from a field follows from its override
        values.optimizer.warmup_steps = values.train.get_ref("steps") // 5
        assert load_config(values, [("train.steps", "50")]).optimizer.warmup_steps == 10
    for section, name in (({"data": None}, "data.source"), ({"train": 5}, "train.steps")):
        with pytest.raises(ConfigError, match=f"{name[:4]}.* is a section of fields, got"):
            load_config(kind(section), [(name, "7")])


def test_overrides_of_every_type():
    config = load(
        "--config.model.layers=3", "--config.optimizer.learning_rate=1", "--config.model.kv_heads",
        "2", "--config.train.steps=None", "--config.train.tokens=1_000_000",
        "--config.model.normalize_on_read=1",
        "--config.data.source=text", "--config.data.paths=a.txt", "--config.data.paths=b.txt",
        "--config.model.s_z.init=3.5", "--config.model.scan_layers=False",
    )  # fmt: skip
    assert config.model.layers == 3
    assert config.optimizer.learning_rate == 1.0
    assert config.model.normalize_on_read is True
    assert config.model.scan_layers is False
    assert config.model.kv_heads == 2
    assert config.train.steps == -(-1_000_000 // 2048)
    assert config.data.paths == ("a.txt", "b.txt")
    assert load("--config.data.paths=a.txt", "--config.data.paths=None").data.paths == ()
    assert config.model.s_z.init == 3.5


def test_variants_combine_in_order():
    config = load(spec=QUICKSTART + ":gpt,debug")
    assert config.model.kind == "gpt"
    assert config.model.width == 32


@pytest.mark.parametrize(
    "spec", ["quickstart.py", "124m.py", "0_5b.py", "1b.py", "0_5b.py:gpt,ctx4k", "1b.py:ctx8k",
             "1b.py:debug,stdlib", "0_5b.py:gpt,debug,stdlib", "124m.py:gpt",
             "124m.py:debug,stdlib"]
)  # fmt: skip
def test_every_experiment_loads(spec):
    config = load(spec=str(ROOT / "experiments" / spec))
    if "debug" in spec and "quickstart" not in spec:
        model = config.model
        sizes = (model.heads, model.kv_heads, model.head_dim, model.width, model.mlp_width)
        assert all(size % 8 == 0 for size in sizes)


def test_the_papers_models():
    for name, layers, width, heads, batch in (
        ("0_5b", 24, 1024, 16, 512),
        ("1b", 36, 1280, 20, 512),
    ):
        config = load(spec=str(ROOT / f"experiments/{name}.py"))
        m = config.model
        assert (m.layers, m.width, m.heads, m.head_dim) == (layers, width, heads, 64)
        assert (m.mlp_width, m.context, config.train.batch_size) == (4 * width, 1024, batch)
        assert (m.s_z.init, m.alpha_a.init, m.s_qk.scale) == (1.0, 0.05, width**-0.5)
        for variant, context in (("ctx4k", 4096), ("ctx8k", 8192)):
            other = load(spec=str(ROOT / f"experiments/{name}.py:{variant}"))
            assert other.model.context == context


def test_describe_lists_every_field_with_type_and_meaning():
    text = describe(load("--config.optimizer.learning_rate=0.01"))
    line = next(row for row in text.splitlines() if "optimizer.learning_rate" in row)
    assert "learning_rate = 0.01 " in line
    assert "# float > 0: peak (default: 0.001)" in line
    assert len(text.splitlines()) == len(list(convert.fields(config_lib.Config())))
    assert all("# " in line and line.split("# ")[1].strip() for line in text.splitlines())
    for shown in (
        "# 'add', 'lerp', 'slerp', 'exp' or None: how a block's output f moves",
        "# int > 0 or None: key and value heads",
        "# float in [0, 1): Adam's decay of the first moment",
        "# bool or None: normalize q and k per head; None: the kind's",
        "# strings: files, folders or globs",
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.widht=64", r"Unknown field --config.model.widht. Did you mean model.width\?"),
        ("learning_rate=1", r"Unknown field.*Did you mean optimizer.learning_rate\?"),
        ("model=3", r"Unknown field --config.model"),
        ("model.width=wide", r"--config.model.width wants a value of type int, got 'wide'"),
        ("model.width=1e3", r"--config.model.width wants a value of type int"),
        ("model.scan_layers=maybe", r"--config.model.scan_layers wants a value of type bool"),
        ("optimizer.learning_rate=fast", r"wants a value of type float"),
        ("model.layers=None", r"--config.model.layers wants a value of type int"),
        ("model.heads=3", r"model.width = 128 is not divisible by model.heads = 3"),
        ("model.kv_heads=3", r"model.heads = 4 is not divisible by model.kv_heads = 3"),
        ("model.head_dim=7", r"model.head_dim = 7 must be even"),
        (
            "model.kind=ngtp",
            r"model.kind must be one of ngpt, gpt, got 'ngtp'. Did you mean ngpt\?",
        ),
        ("model.layers=0", r"model.layers must be positive"),
        ("model.dtype=float16", r"model.dtype must be one of .*'float16'. Did you mean bfloat16\?"),
        (
            "model.residual=slrep",
            r"must be one of add, lerp, slerp, exp, got.* Did you mean slerp\?",
        ),
        ("model.s_z.form=vectr", r"model.s_z.form must be one of .* Did you mean vector\?"),
        ("data.source=openwebtext", r"data.source must be one of stdlib, prose, text"),
        ("data.source=text", r"data.source=text needs data.paths"),
        (
            "data.paths=x.txt",
            r"data.paths is for data.source=prose, text, .*, array_record, bin, not stdlib; leave",
        ),
        ("data.held_out=1", r"data.held_out must lie between 0 and 1"),
        (
            "optimizer.schedule=linear",
            r"optimizer.schedule must be one of cosine, wsd, wsd_sqrt",
        ),
        ("optimizer.warmup_share=0.9999", r"optimizer.warmup_steps = 900 must be below"),
        ("optimizer.warmup_share=1", r"optimizer.warmup_share must lie in \[0, 1\)"),
        ("optimizer.b2=2", r"optimizer.b2 must lie in \[0, 1\)"),
        ("train.steps=None", r"Give the length of the run: train.steps or train.tokens"),
        ("train.tokens=5", r"train.steps = 900 and train.tokens = 5"),
        ("train.steps=0", r"train.steps must be positive"),
        ("train.tokens=0", r"train.tokens must be positive, got 0"),
        ("train.batch_size=-1", r"train.batch_size must be positive"),
        *(
            (
                f"{section}.seed={seed}",
                rf"{section}.seed must be a whole number from 0 to 429496",
            )
            for section in ("train", "data", "sample")
            for seed in (-1, 2**32, 2**64 + 1)
        ),
    ],
)
def test_bad_fields(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(f"--config.{override}")
    assert "\n" not in str(error.value)


def test_two_lengths_of_the_warm_up_disagree():
    message = r"warmup_steps = 500 and warmup_share = 0.1 \(90 steps\) disagree; set one"
    with pytest.raises(ConfigError, match=message):
        load("--config.optimizer.warmup_steps=500", spec=QUICKSTART + ":paper")


def test_bad_command_lines_and_files(tmp_path):
    with pytest.raises(ConfigError, match="needs a value"):
        split_overrides(["--config.model.width"])
    with pytest.raises(ConfigError, match=r"no file 'nowhere.py'"):
        load(spec="nowhere.py")
    with pytest.raises(ConfigError, match=r"Unknown variant 'gtp'.*Did you mean gpt\?"):
        load(spec=QUICKSTART + ":gtp")
    for text, message in [
        ("x = 1", "get_config"),
        ("def get_config(v): raise RuntimeError('boom\\nmore')", "boom"),
        ("from ngpt_jax.config import default_config\n"
         "def get_config(v):\n  c = default_config()\n  c.model.widht = 3\n  return c",
         r"unknown field widht. Did you mean width\?"),
        ("from ngpt_jax.config import default_config\n"
         "def get_config(v):\n  c = default_config()\n  c.sampel.tokens = 3\n  return c",
         r"unknown field sampel. Did you mean sample\?"),
        ("def get_config(v): pass", "returns no config"),
        ("def get_config(v):\n  return {'model': 3}", "model is a section"),
        ("def get_config(v):\n  return {'model': {'layers': '2'}}", "model.layers must be of type"),
        ("def get_config(v:", "never closed"),
    ]:  # fmt: skip
        path = tmp_path / "experiment.py"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            load(spec=str(path))
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 250
    path.write_text("def get_config(v): return {'train': {'steps': 3}}")
    assert load("--config.model.width=64", spec=str(path)).model.width == 64


def run_module(module, *arguments, **options):
    """A command that is expected to refuse its input."""
    options = {"cwd": ROOT, "env": os.environ | {"JAX_PLATFORMS": "cpu"}} | options
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: Give an experiment"),
        (("--config=nowhere.py",), "error: --config: no file"),
        (("--config=" + QUICKSTART, "--wokdir=x"), "error: Unknown command line flag 'wokdir'"),
        (("--config=" + QUICKSTART, "extra"), "error: Unexpected argument 'extra'"),
        (("--config=" + QUICKSTART, "--config.model.heads=3"), "error: model.width = 128"),
    ],
)
def test_the_command_answers_bad_input_with_one_line(arguments, message):
    done = run_module("ngpt_jax.main", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


COMMANDS = ["ngpt_jax.main", "ngpt_jax.data.prepare", "ngpt_jax.data.train_tokenizer"] + [
    f"ngpt_jax.tools.{path.stem}"
    for path in sorted((ROOT / "ngpt_jax/tools").glob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_no_error(module):
    """It has the module's docstring, with its example, and the module's own flags."""
    options = ["--help", "--helpshort", "--helpfull"] if module == "ngpt_jax.main" else ["--help"]
    for option in options:
        done = subprocess.run(
            [sys.executable, "-m", module, option],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        example, *own_flags = done.stdout.split("\nflags:\n")
        assert re.search(rf"python -m {module}\s", example)
        assert "\n  --" in own_flags[0] if module != "ngpt_jax.tools.runs" else not own_flags


SPEAKS = """
from ngpt_jax.config import command
command.run_command(lambda overrides: print("x" * 1_000_000, flush=True))
"""


def test_a_command_whose_output_cannot_be_written():
    """A full disk gets one line; a reader that went away (`| head`) none."""
    command = [sys.executable, "-c", SPEAKS]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (2, "error: No space left on device.\n")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(), said) == (1, "")


def test_the_largest_seed_is_not_another_one():
    import jax
    import numpy as np

    load("--config.train.seed=4294967295", "--config.data.seed=4294967295")
    keys = {np.asarray(jax.random.key_data(jax.random.key(s))).tobytes() for s in (0, 2**32 - 1)}
    assert len(keys) == 2


def test_a_seed_flag_that_is_too_large():
    done = run_module("ngpt_jax.tools.sample", "--workdir=nowhere", "--seed=4294967296")
    assert done.stderr == (
        "error: --seed must be a whole number from 0 to 4294967295, got 4294967296.\n"
    )


@pytest.mark.parametrize(
    ("module", "arguments", "flag"),
    [
        ("ngpt_jax.main", ("--workdir=",), "--workdir"),
        ("ngpt_jax.main", ("--workdir", ""), "--workdir"),
        ("ngpt_jax.main", ("--config=",), "--config"),
        ("ngpt_jax.main", ("--config.data.cache=",), "--config.data.cache"),
        ("ngpt_jax.main", ("--config.data.eval_paths=",), "--config.data.eval_paths"),
        ("ngpt_jax.main", ("--config.init_from", ""), "--config.init_from"),
        ("ngpt_jax.main", ("--coordinator_address=",), "--coordinator_address"),
        ("ngpt_jax.data.prepare", ("--out=o", "--paths="), "--paths"),
        ("ngpt_jax.data.prepare", ("--out=",), "--out"),
        ("ngpt_jax.tools.evaluate", ("--workdir=x", "--tasks="), "--tasks"),
        ("ngpt_jax.tools.evaluate", ("--workdir=x", "--out="), "--out"),
        ("ngpt_jax.tools.compare", ("--experiment=" + QUICKSTART, "--out="), "--out"),
        ("ngpt_jax.tools.convert", ("--workdir=x", "--to_hf="), "--to_hf"),
        ("ngpt_jax.tools.sample", ("--workdir=x", "--stop="), "--stop"),
    ],
)
def test_an_empty_value_is_never_a_default(module, arguments, flag, tmp_path):
    arguments = ("--config=" + QUICKSTART, *arguments) if module == "ngpt_jax.main" else arguments
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = run_module(module, *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert done.stderr == f"error: {flag} is empty; give it a value, or leave it out.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("ngpt_jax.main", ("--config=" + QUICKSTART, "--workdir=~nosuch/runs")),
        ("ngpt_jax.main", ("--config=" + QUICKSTART, "--config.data.cache=~nosuch")),
        ("ngpt_jax.tools.benchmark_data", ("--paths=a", "--paths=~nosuch/b")),
    ],
)
def test_a_home_that_there_is_not_is_refused(module, arguments, tmp_path):
    done = run_module(module, *arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    problem = f"{arguments[-1]}: there is no such home folder; write the path."
    assert (done.returncode, done.stderr) == (2, f"error: {problem}\n")
    assert not list(tmp_path.iterdir())


def test_only_a_prompt_can_be_empty():
    assert load("--config.sample.prompt=").sample.prompt == ""
    for name in ("tokenizer", "text_key", "end_of_document", "tfds_name"):
        with pytest.raises(ConfigError, match=rf"data.{name} must not be empty, got ''"):
            config_lib.from_config_dict({"train": {"steps": 1}, "data": {name: ""}})


def test_paths_with_a_colon(tmp_path):
    folder = tmp_path / "12:30:05"
    folder.mkdir()
    for name in ("e.py", "a:b.py"):
        shutil.copy(QUICKSTART, folder / name)
        assert load(spec=str(folder / name)).model.kind == "ngpt"
        assert load(spec=f"{folder / name}:gpt").model.kind == "gpt"
        assert load(spec=f"{folder / name}:").model.kind == "ngpt"
        assert experiment.run_name(f"{folder / name}:gpt,debug") == f"{name[:-3]}-gpt-debug"
    assert results.default_folder(f"{folder}/e.py:gpt") == folder / "e-gpt"
    with pytest.raises(ConfigError, match=r"no file '.*/12:30:05/gone.py'"):
        load(spec=f"{folder}/gone.py")


def test_a_file_can_import_its_siblings(tmp_path):
    """Also inside of its functions; the siblings of another file are others."""
    for steps in (3, 5):
        folder = tmp_path / str(steps)
        (folder / "shared").mkdir(parents=True)
        (folder / "common.py").write_text(f"STEPS = {steps}")
        (folder / "shared/__init__.py").write_text("")
        (folder / "shared/width.py").write_text(f"WIDTH = {16 * steps}")
        (folder / "e.py").write_text(
            "import shutil\nfrom common import STEPS\n"
            "def get_config(v):\n"
            "  from shared.width import WIDTH\n"
            "  return {'train': {'steps': STEPS}, 'model': {'width': WIDTH}}\n"
            "def get_study(v):\n"
            "  import common\n"
            "  from ngpt_jax.study.plan import Study\n"
            "  return Study(settings={'a': {}}, models={'m': {}}, budgets=(common.STEPS,))\n"
        )
    (tmp_path / "link.py").symlink_to(tmp_path / "5/e.py")
    before = list(sys.path)
    for spec, steps in (("3/e.py", 3), ("5/e.py", 5), ("link.py", 5)):
        config = load(spec=str(tmp_path / spec))
        assert (config.train.steps, config.model.width) == (steps, 16 * steps)
        assert results.load_study(str(tmp_path / spec)).budgets == (steps,)
    assert sys.path == before
    assert "common" not in sys.modules
    assert "shared.width" not in sys.modules


def test_installed_packages_below_the_folder_are_imported_once(tmp_path, monkeypatch):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/installed_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "venv")
    code = "import installed_package\ndef get_config(v):\n  return {'train': {'steps': 2}}\n"
    (tmp_path / "e.py").write_text(code)
    load(spec=str(tmp_path / "e.py"))
    assert sys.modules.pop("installed_package")
