"""Errors of the library name parameters; the program writes them as its options."""

import logging

import pytest

from longrope.cli.app import _as_options, _WithOptions


@pytest.mark.parametrize(
    ("verb", "message", "shown"),
    [
        ("search", "target is 64 tokens", "--target is 64 tokens"),
        ("search", "the target is 64", "the target is 64"),
        ("search", "give another `out`", "give another --out"),
        ("search", "use algorithm='evolution'", "use --algorithm evolution"),
        ("search", "data='a b.txt': no such file", "--data 'a b.txt': no such file"),
        ("search", """data="it's": no such file""", "--data it's: no such file"),
        ("search", "join them with pack=True", "join them with --pack"),
        ("search", "windows_per_step is 0", "--windows-per-step is 0"),
        ("evaluate passkey", "length is 40", "--lengths is 40"),
        (
            "evaluate benchmarks",
            "give a directory as `datasets`",
            "give a directory as --datasets",
        ),
        ("export", "format is 'onnx'", "--format is 'onnx'"),
        ("export", "out exists already; force=True", "out exists already; --force"),
        ("export", "give that file as `model`", "give that file as MODEL"),
        ("export", "in `short_factors`", "in --short-factors"),
        ("verify", "engine_python='/no' is", "--engine-python /no is"),
        # What the verb has no option for stays.
        ("extend", "use format='hf'", "use format='hf'"),
        ("extend", "see `finetune.lora`", "see `finetune.lora`"),
        ("inspect", "give another `out`", "give another `out`"),
        ("no-such-verb", "target is 64", "target is 64"),
        # Paths are no parameters.
        ("search", "/data='x' is not a file", "/data='x' is not a file"),
        ("search", "runs/out=True", "runs/out=True"),
    ],
)
def test_parameters_become_options(verb, message, shown):
    assert _as_options(message, verb.split()) == shown


def test_warnings_name_options_too():
    record = logging.LogRecord("longrope", logging.WARNING, "", 0, "set `%s`", ("out",), None)
    assert _WithOptions(["search"]).format(record) == "longrope: set --out"
