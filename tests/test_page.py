"""What the pages say of results is what the tables of runs say."""

import re
import runpy

import pytest
from data_helpers import ROOT

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
