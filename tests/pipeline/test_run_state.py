"""The directory of a run that was killed while it started."""

import os

import pytest

from kills import killed_at
from longrope.pipeline import extend as pipeline
from longrope.pipeline.recipe import load_recipe

STARTED = [".lock", "choices.json", "model.sha256", "recipe.yaml", "splits.json"]


class Started(Exception):
    pass


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_of_the_start_blocks_nothing(every, arguments, tmp_path, monkeypatch):
    """Each start finds what the ones before left, and the last one leaves no more than a whole."""

    def stop(run, stage):
        raise Started

    recipe, out, steps = load_recipe(arguments[1]), tmp_path / "run", every // 2
    monkeypatch.setitem(pipeline._WORK, "search", stop)

    def start(place=out):
        with pytest.raises(Started):
            pipeline.extend(recipe, place)

    start(tmp_path / "whole")  # and the tokens are cached
    while killed_at(steps, start):
        steps += every
    assert steps > 15
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole")) == STARTED
    for name in STARTED:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
