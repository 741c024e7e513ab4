"""The options of the command line are the fields of the configurations, with their defaults."""

import shlex

import pytest
import typer

from longrope.cli import app
from longrope.cli.extend import ExtensionOptions
from longrope.cli.options import ScalingOptions
from longrope.evaluate.settings import BenchmarkConfig, PerplexityConfig, RetrievalConfig
from longrope.execution import ExecutionConfig
from longrope.search.settings import EvolutionSearchConfig, GradientSearchConfig


def options(verb: str) -> dict:
    command = typer.main.get_command(app)
    for part in verb.split():
        command = command.commands[part]
    return {parameter.name: parameter for parameter in command.params}


@pytest.mark.parametrize(
    ("verb", "model", "without"),
    [
        ("search", GradientSearchConfig, ()),
        ("search", EvolutionSearchConfig, ()),
        ("search", ExecutionConfig, ()),
        ("extend", ExecutionConfig, ()),
        ("extend", ExtensionOptions, ()),
        *((verb, ScalingOptions, ()) for verb in ("inspect", "search", "generate", "export")),
        ("evaluate passkey", ScalingOptions, ()),
        ("plan", ExtensionOptions, ()),
        ("compare", ExecutionConfig, ("sequence_parallel",)),
        ("generate", ExecutionConfig, ("offload_activations", "sequence_parallel")),
        ("evaluate perplexity", ExecutionConfig, ()),
        ("evaluate perplexity", PerplexityConfig, ()),
        ("evaluate passkey", RetrievalConfig, ()),
        ("evaluate needle", RetrievalConfig, ()),
        ("evaluate benchmarks", BenchmarkConfig, ("ruler_lengths",)),
    ],
)
def test_a_verb_has_an_option_for_each_field(verb, model, without):
    found = options(verb)
    for name, field in model.model_fields.items():
        if name in without:
            assert name not in found
            continue
        option = found[name]
        assert option.opts == ["--" + name.replace("_", "-")]
        if name in ("lengths", "tasks"):  # comma-separated, and required
            assert option.required
            continue
        assert field.description.rstrip(".") in option.help
        assert option.default is (False if field.annotation is bool else None)
        if field.default not in (None, False) and name != "algorithm":
            assert f"default {field.default}" in option.help


def test_every_option_of_every_verb_has_help():
    command = typer.main.get_command(app)
    verbs = command.commands | command.commands["evaluate"].commands
    for name, verb in verbs.items():
        for parameter in verb.params:
            assert getattr(parameter, "help", "group"), (name, parameter.name)


def test_every_verb_s_examples_are_commands():
    program = typer.main.get_command(app)
    group = program.commands["evaluate"]
    verbs = {(name,): verb for name, verb in program.commands.items() if verb is not group}
    verbs |= {("evaluate", name): verb for name, verb in group.commands.items()}
    for name, verb in verbs.items():
        title, *lines = (verb.epilog or "").split("\n\n")
        assert title == "Examples:", name
        assert len(lines) == 2, name
        for line in lines:
            words = shlex.split(line)
            assert words[: len(name) + 1] == ["longrope", *name]
            verb.make_context(line, words[len(name) + 1 :])  # raises where it does not parse
