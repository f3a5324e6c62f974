"""What plots have in common: looks of models, ticks, legends."""

import itertools

import matplotlib
import pytest

from ngpt_jax import plots

matplotlib.use("agg")  # no display
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    pyplot.close("all")


def test_a_model_looks_the_same_in_every_figure():
    study = plots.looks(["gpt", "gpt_qk", "ngpt", "ngpt+slow"])
    assert study["ngpt"] == ("#0072B2", "o") and study["gpt"] == ("#D55E00", "s")
    for other in (["nGPT a", "GPT b"], ["GPT b", "nGPT a"]):
        found = plots.looks(other)
        assert found["nGPT a"] == study["ngpt"] and found["GPT b"] == study["gpt"]
    assert plots.looks(["gpt"])["gpt"] == study["gpt"]
    assert plots.looks(["nGPT a", "nGPT b"])["nGPT b"] not in list(study.values())[:3]
    many = plots.looks([f"model{i}" for i in range(40)])
    assert len(set(many.values())) == 40
    assert not set(many.values()) & {study["ngpt"], study["gpt"], study["gpt_qk"]}


@pytest.mark.parametrize(
    ("limits", "values", "labels"),
    [
        ((0.9, 17_000), (), ["1", "10", "100", "1,000", "10,000"]),
        ((1, 60), (), ["1", "3", "10", "30"]),
        ((3.5, 70), (), ["5", "10", "20", "50"]),
        ((1.2, 1.7), (), ["1.2", "1.35", "1.5", "1.65"]),
        ((1e-3, 1e9), (), ["0.001", "0.1", "10", "1,000", "100,000", "10M", "1G"]),
        ((450, 4500), (500, 1000, 2000, 4000), ["500", "1,000", "2,000", "4,000"]),
        ((1e12, 9e12), (1.46e12, 2.92e12, 5.84e12), ["1.46T", "2.92T", "5.84T"]),
        ((1, 1024), [2**i for i in range(11)], ["1", "4", "16", "64", "256", "1,024"]),
        ((90, 110), (100,), ["100"]),
    ],
)
def test_ticks_of_logarithmic_axes_are_plain_numbers_that_do_not_overlap(limits, values, labels):
    for name in ("xaxis", "yaxis"):
        fig, (panel,) = plots.figure()
        panel.plot(limits, limits)
        panel.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
        axis = getattr(panel, name)
        plots.log_ticks(axis, values)
        fig.draw_without_rendering()
        assert [tick.get_text() for tick in axis.get_ticklabels()] == labels
        assert not axis.get_ticklabels(minor=True)
        boxes = [tick.get_window_extent() for tick in axis.get_ticklabels()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
        assert tuple(axis.get_view_interval()) == limits


def test_a_legend_is_no_wider_than_its_figure():
    fig, axes = plots.figure(1, 2)
    for panel in axes:
        for i in range(4):
            panel.plot([0, 1], label=f"{i}: GPT prose512-gpt-4000-0.006-seed0, rate of the step")
    plots.legend(fig, axes)
    fig.draw_without_rendering()
    (legend,) = fig.legends
    assert len(legend.get_texts()) == 4
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= fig.bbox.x1
