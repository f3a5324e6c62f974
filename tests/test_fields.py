"""The facts on config fields, and what is derived from them."""

import dataclasses
import typing
from pathlib import Path

import pytest

from ngpt_jax import config as config_lib
from ngpt_jax.config import Config, ConfigError, DataConfig, convert, facts
from ngpt_jax.config.experiment import load_config
from ngpt_jax.config.fields import MixtureConfig
from ngpt_jax.config.presets import PRESETS
from ngpt_jax.study import plan, results
from ngpt_jax.training import workdir

ROOT = Path(__file__).parents[1]
EVERY = Config(data=DataConfig(mixture={"web": MixtureConfig()}))
FIELDS = {f.name: f for f in convert.fields(EVERY)}


def test_a_field_without_its_facts_is_an_error_at_import():
    with pytest.raises(TypeError, match=r"missing 1 required .* 'effect'"):
        facts.field(1, facts.POSITIVE, meaning="no effect given")
    with pytest.raises(TypeError, match=r"missing 1 required .* 'allowed'"):
        facts.field(1, effect=facts.OWN, meaning="no values given")


def test_every_field_has_facts_that_fit_its_type():
    assert len(FIELDS) > 100
    for name, f in FIELDS.items():
        plain = next((a for a in typing.get_args(f.type) if a is not type(None)), f.type)
        assert f.help.strip(), name
        if plain in (int, float):
            any_number = name.endswith(".init")
            assert (f.allowed is facts.ANY) == any_number, name
        assert not f.allowed.choices or plain is str, name
        if f.value is not None:
            assert f.allowed.holds(f.value), name
        assert f.effect in (facts.OWN, facts.SCHEDULE, facts.FREE, facts.NEUTRAL), name


def test_the_values_of_presets_are_allowed():
    for kind, preset in PRESETS.items():
        for name, value in preset.items():
            assert FIELDS[name].value is None
            assert callable(value) or FIELDS[name].allowed.holds(value), (kind, name)
    old = {name for name, f in FIELDS.items() if f.always_in_digest}
    assert all(old <= set(preset) for preset in PRESETS.values())


def test_choices_and_bounds_are_checked():
    free = (facts.ANY, facts.FOLDER, facts.TEXT)
    limited = {n: f for n, f in FIELDS.items() if f.allowed not in free}
    assert len(limited) > 70
    for name, f in limited.items():
        value = "nothing" if f.allowed.choices else -7 if f.type in (int, int | None) else -7.0
        with pytest.raises(ConfigError, match=f"^{name} must .*, got {value!r}"):
            set_field(name, value)


def set_field(name, value):
    values = config_lib.to_config_dict(EVERY)
    values.data.source = "mixture"
    *path, leaf = name.split(".")
    node = values
    for part in path:
        node = node[part]
    node[leaf] = value
    return config_lib.from_config_dict(values)


def test_one_mesh_axis_of_each_can_be_the_rest():
    for axis in ("data", "fsdp", "tensor", "context"):
        config = {"mesh": {"fsdp": 1} | {axis: -1}, "train": {"steps": 1}}
        assert getattr(config_lib.from_config_dict(config).mesh, axis) == -1


def test_a_change_on_resume_follows_the_field():
    for name, f in FIELDS.items():
        found = workdir.changes(EVERY, changed(EVERY, name.split("."), "another value"))
        said = [f"{name}: {f.value!r} -> 'another value'"]
        assert {k: v for k, v in found.items() if v} == {f.effect.resume: said}


def test_the_digest_has_the_fields_that_can_change_the_loss():
    config = config_lib.from_config_dict(
        {"train": {"steps": 10}, "data": {"source": "mixture", "mixture": {"web": {}}}}
    )
    before = results.digest(config)
    for name, f in FIELDS.items():
        value = "gpt" if name == "model.kind" else "another value"
        other = results.digest(changed(config, name.split("."), value))
        assert (other != before) == f.effect.loss, name


def changed(section, path, value):
    head, *rest = path
    old = section[head] if isinstance(section, dict) else getattr(section, head)
    new = changed(old, rest, value) if rest else value
    if isinstance(section, dict):
        return section | {head: new}
    return dataclasses.replace(section, **{head: new})


def test_a_new_field_of_presets_leaves_digests_as_they_are():
    """The kind's value is the default, but for fields that older tables have always had."""
    values = {"train": {"steps": 10}, "model": {}, "optimizer": {}}
    for kind, preset in PRESETS.items():
        values["model"] = {"kind": kind}
        plain = results.digest(config_lib.from_config_dict(values))
        same = config_lib.from_config_dict(values | {"optimizer": {"project": kind == "ngpt"}})
        assert results.digest(same) == plain
        without = dataclasses.replace(same.model, qk_norm=not preset["model.qk_norm"])
        assert results.digest(dataclasses.replace(same, model=without)) != plain
    off = config_lib.from_config_dict({"train": {"steps": 10}, "optimizer": {"project": False}})
    on = config_lib.from_config_dict({"train": {"steps": 10}})
    assert results.digest(off) != results.digest(on)


def test_a_study_does_not_set_what_its_points_set():
    study = plan.Study(models={"a": {}}, settings={"b": {}}, budgets=(5,))
    point = plan.due(study, {})[0]
    by_points = {name for name, _ in plan.overrides_of(study, point)} | {"train.tokens"}
    assert {name for name, f in FIELDS.items() if f.set_by_study} == by_points
    for name in by_points:
        with pytest.raises(ConfigError, match=f"{name} is set by the study itself"):
            plan.check(dataclasses.replace(study, models={"a": {name: 3}}))


def test_a_field_by_its_name():
    assert convert.field_named("data.mixture.web.weight") == FIELDS["data.mixture.web.weight"]
    assert convert.field_named("model.s_z.init").value == 1.0
    for name in ("model", "model.s_z", "data.mixture.web", "data.mixture.web.tokenizer", "steps"):
        assert convert.field_named(name) is None


# Runs that are due in a table that was cut off: it has one rate a ladder.
DUE = {"speedup-long": 6}
PUBLISHED = sorted(path.parent.name for path in ROOT.glob("experiments/*/results.csv"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_are_still_their_studies(name, monkeypatch):
    """Every row is asked for, has the digest of today, and no other row is missing."""
    monkeypatch.chdir(ROOT)
    file, _, variant = name.partition("-")
    experiment = f"experiments/{file}.py{variant and ':' + variant}"
    assert results.default_folder(experiment) == Path("experiments") / name
    study, path = results.load_study(experiment), Path("experiments") / name / "results.csv"
    rows = results.read(path)
    results.check_rows(experiment, study, rows, path)
    assert results.in_study(study, rows) == rows
    due = plan.due(study, results.losses_of(study, rows))
    assert len(due) == DUE.get(name, 0)


def test_there_are_published_tables():
    assert len(PUBLISHED) == 17


def test_overrides_take_any_choice_and_none():
    config = {"train": {"steps": 1}}
    values = config_lib.default_config()
    values.update(config)
    assert load_config(values, [("model.residual", "None")]).model.residual == "lerp"
    assert load_config(values, [("model.residual", "slerp")]).model.residual == "slerp"
