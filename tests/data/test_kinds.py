"""Texts of other kinds: windows for a search and for its validation do not meet."""

import numpy as np
import pytest

from longrope.data.kinds import KINDS, kind_documents, windows_of_kinds
from longrope.models.bundled import BUNDLED
from longrope.models.load import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(BUNDLED))


def places(document, window):
    """Start of a window in the ids of its text."""
    size = len(window) - 1
    found = [
        start
        for start in range(len(document) - size + 1)
        if document.ids[start] == window[1] and (document.ids[start:][:size] == window[1:]).all()
    ]
    assert len(found) == 1
    return found[0]


def test_a_window_of_each_kind_and_others_from_the_second_half(tokenizer):
    searched, validated = windows_of_kinds(tokenizer, 2048, 256, seed=0, bos=[0])
    assert tuple(searched) == tuple(validated) == KINDS
    for document in kind_documents(tokenizer):
        half = len(document) // 2
        assert len(searched[document.name]) == 2049
        assert places(document, searched[document.name]) + 2048 <= half
        starts = [places(document, window) for window in validated[document.name]]
        assert len(starts) == 2
        assert min(starts) >= half
        assert abs(starts[0] - starts[1]) >= 2048
    again, _ = windows_of_kinds(tokenizer, 2048, 256, seed=0, bos=[0])
    assert all((again[kind] == searched[kind]).all() for kind in KINDS)
    other, _ = windows_of_kinds(tokenizer, 2048, 256, seed=1, bos=[0])
    assert any((other[kind] != searched[kind]).any() for kind in KINDS)


def test_kinds_are_joined_for_a_length_that_none_has(tokenizer):
    total = sum(len(document) // 2 for document in kind_documents(tokenizer))
    searched, validated = windows_of_kinds(tokenizer, total, 4096, seed=0, bos=[])
    assert list(searched) == list(validated) == ["other kinds"]
    assert len(searched["other kinds"]) == total
    shorter, _ = windows_of_kinds(tokenizer, 10 * total, 4096, seed=0, bos=[])
    assert total <= len(shorter["other kinds"]) < 1.01 * total


def test_texts_no_longer_than_the_original_length_are_left_out(tokenizer):
    assert windows_of_kinds(tokenizer, 10**7, 10**6, seed=0, bos=[]) == ({}, {})
    assert np.size(windows_of_kinds(tokenizer, 512, 10**6, seed=0, bos=[])[0]["prose"]) == 512
