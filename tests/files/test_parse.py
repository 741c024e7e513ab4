import pytest
from typing_extensions import TypedDict

from longrope.files.parse import content_of, read_json, read_yaml

_HOSTILE = {
    "": "is not valid JSON",
    "[1, 2": "is not valid JSON",
    "[" * 100_000: "nested too deeply",
    '{"a": ' * 50_000: "nested too deeply",
    f'{{"n": {"9" * 400}}}': "an integer of 400 digits",
    f'{{"n": {"9" * 6000}}}': "an integer of 6000 digits",
    "[1]": r"its content is \[1\]: input should be a valid dict",
    '{"n": "x", "names": []}': "n is 'x'",
    '{"n": 1, "names": [1]}': "names.0 is 1",
    '{"n": 1}': "names is .*field required",
}


class _Content(TypedDict):
    n: int
    names: list[str]


@pytest.mark.parametrize("text", _HOSTILE, ids=range(len(_HOSTILE)))
def test_json_is_read_into_checked_values(text, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file}: .*{_HOSTILE[text]}") as caught:
        read_json(file, _Content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match=r"y\.json: No such file"):
        read_json(tmp_path / "y.json")
    file.write_text('{"n": 3, "names": ["a"]}')
    assert read_json(file, _Content) == {"n": 3, "names": ["a"]}
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.json: is not JSON \(not UTF-8"):
        read_json(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "\n".join(
                f"a{n}: &x{n} [{', '.join(9 * [f'*x{n - 1}'])}]" if n else "a0: &x0 [1]"
                for n in range(9)
            ),
            "aliases stand for more than",
        ),
        ("[" * 50_000, "nested too deeply"),
        ("a: 1\na: 2", "'a' stands twice, again in line 2"),
        ("a: !!bool maybe", "maybe"),
        ("a: 2021-99-99", "month must be in"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("- 1", "is not a mapping"),
        ("1: 2", "is not a mapping"),
    ],
)
def test_yaml_is_read_into_a_mapping(text, said, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^{file} .*{said}") as caught:
        read_yaml(file)
    assert "\n" not in str(caught.value)


def test_content_of_other_types_names_the_file(tmp_path):
    for wrong in (lambda: {}["key"], lambda: None + 1, lambda: [][3], lambda: 1 / 0, lambda: "".x):
        with (
            pytest.raises(ValueError, match=f"^{tmp_path}: is damaged .*run it again"),
            content_of(tmp_path, "run it again"),
        ):
            wrong()
