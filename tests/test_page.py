"""What the pages say of results is what the tables of runs say."""

import re
import runpy

import pytest
from data_helpers import ROOT
from test_compare import made_up_loss, made_up_rows

PAGE = runpy.run_path(str(ROOT / "experiments" / "page.py"))


@pytest.mark.parametrize("name", PAGE["PAGES"])
def test_the_marked_parts_are_those_of_the_results(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert PAGE["filled"](text) == text, "python experiments/page.py writes them anew"
    marks = re.findall(r"<!-- (page\.py: \w+|end) -->", text)
    assert marks and marks[1::2] == ["end"] * (len(marks) // 2) and len(marks) % 2 == 0


def test_every_part_stands_on_a_page():
    texts = "".join((ROOT / name).read_text(encoding="utf-8") for name in PAGE["PAGES"])
    assert sorted(re.findall(r"<!-- page\.py: (\w+) -->", texts)) == sorted(PAGE["BLOCKS"])


def test_a_number_that_was_changed_by_hand_is_seen():
    text = "a\n<!-- page.py: recipes_table -->\n| 1.2 |\n<!-- end -->\nb"
    new = PAGE["filled"](text)
    assert new.startswith("a\n<!-- page.py: recipes_table -->\n| recipe |") and new.endswith("\nb")
    assert PAGE["filled"](new) == new


@pytest.fixture
def with_more(monkeypatch):
    """The page's blocks where variants of fair.py have made-up results of some models."""
    inside = PAGE["_fair"].__wrapped__.__globals__
    real = inside["_load"]

    def with_more(models, timed_on):
        def load(name, variant=""):
            study, rows = real(name, variant)
            if (name, variant) in (("fair", "long"), ("fair", "context"), ("fair", "width")):
                best = {model: ladder[1] for model, ladder in study.ladders.items()}
                rows = made_up_rows(study, lambda p: made_up_loss(p, best))
                rows = [row | {"cpu": timed_on, "cores": 1, "devices": "1 x cpu",
                               "seconds": row["steps"] / 10, "flops": row["steps"] * 2.92e9,
                               "parameters": 420} for row in rows]  # fmt: skip
                rows = [row for row in rows if row["model"] in models]
            return study, rows

        monkeypatch.setitem(inside, "_load", load)
        PAGE["_fair"].cache_clear()
        return {name: PAGE["BLOCKS"][name]() for name in PAGE["BLOCKS"]}

    yield with_more
    PAGE["_fair"].cache_clear()


def test_the_page_of_studies_that_have_begun(with_more):
    """Results of single models, and times of another machine, leave gaps and no errors."""
    for models in (["ngpt"], ["ngpt", "gpt_qk"], ["ngpt", "gpt_qk", "ngpt_muon"]):
        blocks = with_more(models, "another CPU")
        assert blocks["fair_state"].count("**Not complete**") == 3
        assert "with Muon" in blocks["growth_part"]
        both = len(models) > 1
        assert ("not measured yet" in blocks["context_part"]) == (not both)
        assert blocks["context_part"].count("with Muon") == 0
        assert blocks["numbers"].count("| speed-up, ") == 4


def test_the_page_of_complete_studies(with_more, monkeypatch):
    drawn = {}
    monkeypatch.setattr(PAGE["plots"], "save", lambda fig, path: None)
    monkeypatch.setattr(PAGE["plots"], "write_csv",
                        lambda path, columns, rows: drawn.update({path.name: rows}))  # fmt: skip
    blocks = with_more(list(PAGE["_ARMS"]), "another CPU")
    assert "Not complete" not in blocks["fair_state"]
    for part in ("growth_part", "context_part", "width_part"):
        text = " ".join(blocks[part].split())
        assert text.count("with Adam it is") == text.count("with Muon it is") > 0
    assert PAGE["growth"]() and PAGE["context"]()
    # Other widths and contexts are no points of the growth's lines.
    assert {row["setting"] for row in drawn["growth.csv"]} == {"stdlib128", "prose128"}
    assert {row["setting"] for row in drawn["context.csv"]} == {"prose128", "prose1024"}
