import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.rope.rescale import Rescale, default_attention_factor

REFERENCE = Path(__file__).parents[3] / "shared" / "reference-factors"


def make(**changes) -> Rescale:
    fields = {
        "factors": (1.0, 1.5, 2.0, 8.0),
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 2048,
        "attention_factor": 1.17,
        "start_tokens": 4,
        "base_factors": (1.0, 1.0, 1.0, 2.0),
        "searched_documents": ("d",),
        "provenance": {"method": "test"},
    }
    return Rescale(**fields | changes)


positive = st.floats(1e-3, 1e6, allow_nan=False, allow_infinity=False)


@given(
    factors=st.lists(positive, min_size=1, max_size=128),
    theta=positive,
    attention=positive,
    tokens=st.integers(0, 256),
)
def test_json_is_exact(tmp_path_factory, factors, theta, attention, tokens):
    path = tmp_path_factory.getbasetemp() / "rescale.json"
    before = make(
        factors=factors,
        base_factors=factors,
        rope_theta=theta,
        attention_factor=attention,
        start_tokens=tokens,
    )
    before.save(path)
    after = Rescale.load(path)
    assert after == before
    assert after.to_json() == before.to_json()


def test_json_has_the_fields_that_others_rely_on():
    assert set(make().to_json()) == {
        "schema",
        "factors",
        "start_tokens",
        "attention_factor",
        "original_max_position_embeddings",
        "max_position_embeddings",
        "rope_theta",
        "base_factors",
        "searched_documents",
        "provenance",
    }


@pytest.mark.parametrize("key", sorted(make().applied()))
def test_missing_key_is_named(key):
    data = make().to_json()
    del data[key]
    with pytest.raises(ValueError, match=f"'{key}'"):
        Rescale.from_json(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda": 1}, "'lambda'"),
        ({"schema": 2}, "schema is 2"),
        ({"factors": [1.0, "2"]}, "^factors must .*list"),
        ({"factors": []}, "factors is empty"),
        ({"factors": [1.0, -2.0]}, r"factors\[1\] is -2.0"),
        ({"factors": [math.nan]}, r"factors\[0\] is nan"),
        ({"start_tokens": -1}, "start_tokens is -1"),
        ({"start_tokens": 1.5}, "start_tokens is 1.5"),
        ({"attention_factor": 0}, "attention_factor is 0"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"max_position_embeddings": 128}, "max_position_embeddings is 128"),
        ({"base_factors": [1.0]}, "base_factors has 1 numbers"),
        ({"base_factors": [1.0, 1.0, 1.0, 0.0]}, r"base_factors\[3\] is 0.0"),
        ({"base_factors": "1"}, "base_factors must .*list"),
        ({"searched_documents": [1]}, "searched_documents must .*list"),
        ({"provenance": []}, "provenance"),
    ],
)
def test_wrong_value_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Rescale.from_json(make().to_json() | changes)


def test_provenance_is_a_note():
    data = make().to_json()
    del data["provenance"]
    without = Rescale.from_json(data)
    assert without == make()
    assert without.to_json() == make().to_json() | {"provenance": {}}


def test_older_files_have_two_of_the_fields_in_their_provenance():
    old = {"base_factors": [1.0, 1.0, 1.0, 2.0], "documents": ["d"]}
    found = Rescale.from_json(make().applied() | {"provenance": old})
    assert found.to_json() == make().to_json() | {"provenance": old}


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b""])
def test_other_files_are_refused_by_path(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.json"):
        Rescale.load(path)


def test_inv_freq_is_the_formula():
    rescale = make()
    expected = [1 / (f * 10000 ** (2 * i / 8)) for i, f in enumerate(rescale.factors)]
    np.testing.assert_allclose(rescale.inv_freq, expected, rtol=1e-15)


def test_default_attention_factor():
    assert default_attention_factor(4096, 131072) == pytest.approx(1.1902380714238083)
    assert default_attention_factor(4096, 4096) == 1


def test_csv_with_a_row_per_layer(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("1.0,1.5,2\n1.0,1.5,2\n")
    rescale = Rescale.from_csv(
        path,
        rope_theta=1e4,
        original_max_position_embeddings=4096,
        max_position_embeddings=8192,
    )
    assert rescale.factors == (1.0, 1.5, 2.0)
    assert rescale.attention_factor == default_attention_factor(4096, 8192)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2\n1,3\n", "row 2 differs"),
        ("a,b\n", r"f\.csv: .*table"),
        ("\n", "no numbers"),
        ("1,-2\n", r"factors\[1\]"),
    ],
)
def test_csv_refusals(tmp_path, content, message):
    path = tmp_path / "f.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Rescale.from_csv(
            path,
            rope_theta=1e4,
            original_max_position_embeddings=4096,
            max_position_embeddings=8192,
        )


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the authors' factor files are not here")
def test_every_reference_file_is_read():
    files = sorted(REFERENCE.glob("*.csv"))
    assert len(files) == 30
    for file in files:
        rescale = Rescale.from_csv(
            file,
            rope_theta=1e4,
            original_max_position_embeddings=4096,
            max_position_embeddings=2097152,
        )
        numbers = [float(cell) for cell in file.read_text().splitlines()[0].split(",")]
        assert rescale.factors == tuple(numbers)
        assert rescale.rotary_dim == 128
