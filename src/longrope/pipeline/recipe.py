"""The recipe of an extension: every setting of `longrope extend`, read from a YAML file."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    SerializationInfo,
    ValidationError,
    model_serializer,
    model_validator,
)

from longrope.base_config import Config
from longrope.errors import shortened
from longrope.evaluate.settings import BenchmarkConfig, RetrievalConfig
from longrope.execution import ExecutionConfig
from longrope.files.atomic import write_atomically
from longrope.files.parse import parse_yaml, read_json, read_yaml
from longrope.models.bundled import BUNDLED
from longrope.rope.methods import METHODS
from longrope.search.settings import GradientSearchConfig, SearchConfig, describe_error
from longrope.train.config import FinetuneConfig
from longrope.units import parse_length

RECIPES = Path(__file__).parent / "recipes"
_Positive = Annotated[int, Field(ge=1)]
_Count = Annotated[int, Field(ge=0)]


class Search(Config):
    """Recipe section of one search.

    In YAML, the options of the search configuration stand beside ``method``.

    Args:
        method: ``search``, or a known method whose factors are used without a search; of the
            second search also ``yarn-log``.
    """

    method: str = "search"
    config: SearchConfig = GradientSearchConfig()

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        own = {name for name in cls.model_fields if name != "config"}
        options = {name: value for name, value in content.items() if name not in own}
        own_values = {name: value for name, value in content.items() if name in own}
        return own_values | {"config": options}

    @model_serializer
    def _flatten(self, info: SerializationInfo) -> dict[str, Any]:
        names = self.model_fields_set if info.exclude_unset else set(type(self).model_fields)
        own = {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name in names and name != "config"
        }
        return own | self.config.model_dump(exclude_unset=info.exclude_unset)


class FinalFinetune(Config):
    """Recipe section of the final fine-tuning, under the target's factors. Not in the paper.

    Args:
        steps: optimiser steps after the second search; 0 leaves it out.
        sequence_length: tokens of its sequences. Default: as in the first fine-tuning.
    """

    steps: _Count = 0
    sequence_length: str | None = None


class Finetune(FinetuneConfig):
    """Recipe section of fine-tuning: the training configuration and the lengths to train at.

    Args:
        enabled: whether to train; null trains where the target is beyond 8 times the original.
        length: training length, such as 128k or 8x. Default: an eighth of the target.
        sequence_length: tokens of a training sequence. In a shorter one than the training length,
            positions jump once, at random, and reach beyond that length (PoSE, arXiv 2309.10400).
            Default: the training length.
        reach: largest position in such sequences, as a multiple of the length that is trained
            for. Training beyond that length avoids an untrained edge there.
        through: a shorter length to train at first (the paper trains at 128k before 256k).
        through_steps: steps at that length.
        final: a last fine-tuning, on sequences whose positions reach beyond the target.
    """

    enabled: bool | None = None
    length: str | None = None
    sequence_length: str | None = None
    reach: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.25
    through: str | None = None
    through_steps: _Positive = 400
    final: FinalFinetune = FinalFinetune()


class Recovery(Search):
    """Recipe section of the two searches for the short context.

    Args:
        method: only ``search``.
        enabled: whether to search short factors for the original length.
    """

    enabled: bool = True


class Evaluate(Config):
    """Recipe section of the final evaluation. It may be changed in a finished run.

    RULER's texts have the evaluation lengths unless ``benchmarks.ruler_lengths`` says otherwise.

    Recovery is compared with the unscaled model, so that is measured at the short lengths even
    without ``none`` among the methods.

    Args:
        lengths: lengths to evaluate at, such as 4k. Default: doublings from the original length
            to the target.
        documents: number of held-out documents for perplexity.
        passkey_trials: passkey prompts for each length up to the training length.
        passkey_trials_beyond: passkey prompts for each length beyond the training length.
        passkey_trials_others: passkey prompts for each length under the known methods.
        needle_trials: needle prompts for each length.
        digits: digits of the hidden number.
        methods: known methods to measure on the original weights.
        fine_tuned_methods: known methods to measure on the fine-tuned weights. They separate the
            effect of the factors from that of the training text.
    """

    methods: tuple[str, ...] = ("none", "pi", "ntk", "yarn")
    fine_tuned_methods: tuple[str, ...] = ("yarn", "ntk")
    lengths: tuple[str, ...] = ()
    documents: _Positive = 10
    passkey_trials: _Count = 0
    passkey_trials_beyond: _Count = 0
    passkey_trials_others: _Count = 0
    needle_trials: _Count = 0
    digits: _Positive = RetrievalConfig().digits
    benchmarks: BenchmarkConfig = BenchmarkConfig()


class Recipe(Config):
    """Recipe: all settings of a run of ``longrope extend``.

    The keys that are not given are chosen by ``effort`` from the model and the text
    (:mod:`longrope.pipeline.effort`). ``execution`` says where and how the model computes;
    training does not offload its weights.

    Args:
        model: directory, hub id or GGUF file of the model to extend.
        target: target length in tokens, such as 131072, 128k or 64x.
        effort: how much to search, train and measure.
        data: text, JSON, JSONL, CSV, TSV or Parquet files, directories of such files, hub datasets,
            ``python-library`` or ``python-library-held-out``.
        eval_data: held-out text. Default: a part of ``data``.
        other_data: text of another kind to measure perplexity on as well. Default: held-out
            packages of the Python library, unless the data is the Python library.
        field: text field in JSON, JSONL, CSV, TSV, Parquet and datasets.
        seed: random seed.
        rope_scaling: for a model with RoPE scaling: keep it, or replace it.
        original_length: original context length in tokens, if the config is wrong.
        start_tokens: start tokens left unscaled (n̂); only longrope applies them.
        attention_factor: attention factor of every stage. Default: √(1 + ln s / ln L).
    """

    model: str = "bundled"
    target: str
    effort: Literal["quick", "standard", "paper"] = "standard"
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    other_data: tuple[str, ...] | None = None
    field: str = "text"
    seed: _Count = 0
    rope_scaling: Literal["keep", "replace"] | None = None
    original_length: _Positive | None = None
    start_tokens: _Count = 0
    attention_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    search: Search = Search()
    finetune: Finetune = Finetune()
    second_search: Search = Search()
    recovery: Recovery = Recovery.model_validate({})
    evaluate: Evaluate = Evaluate()
    execution: ExecutionConfig = ExecutionConfig()

    def section(self, stage: str) -> tuple[str, Search]:
        """Return the recipe's key and section for a search stage.

        ``search`` is also the section of ``through-search``, ``recovery`` of both its lengths.
        """
        key = "second_search" if stage == "second-search" else stage.partition("-")[0]
        key = "search" if key == "through" else key
        return key, getattr(self, key)

    def check(self) -> None:
        """Refuse recipe values that no stage can work with.

        Raises:
            ValueError: names the field, its value and what it may be.
        """
        for name in ("search", "second_search", "recovery"):
            section = getattr(self, name)
            kinds = ("search", *METHODS) if name != "recovery" else ("search",)
            if name == "second_search":
                kinds = (*kinds, "yarn-log")
            if section.method not in kinds:
                raise ValueError(f"{name}.method is {section.method!r}; choose {', '.join(kinds)}")
        for key in ("methods", "fine_tuned_methods"):
            for method in getattr(self.evaluate, key):
                if method not in METHODS:
                    raise ValueError(
                        f"evaluate.{key}: no method {method!r}; there are {', '.join(METHODS)}"
                    )

    def check_training(self) -> None:
        """Refuse training settings that contradict each other.

        Raises:
            ValueError: names the fields, their values and the remedy.
        """
        tuning = self.finetune
        if tuning.answer_share and not tuning.passkey_share:
            raise ValueError(
                f"finetune.answer_share is {tuning.answer_share:g} and finetune.passkey_share is "
                "0: there are no answers; give a share of passkey prompts, such as 0.1"
            )
        if tuning.distill and not tuning.short_share:
            raise ValueError(
                "finetune.distill is true and finetune.short_share is 0: only short windows learn "
                "from the model as it came; give a share of them, such as 0.25"
            )
        if tuning.final.sequence_length and not tuning.final.steps:
            raise ValueError(
                f"finetune.final.sequence_length is {tuning.final.sequence_length!r} and "
                "finetune.final.steps is 0: nothing is trained after the second search; give "
                "steps, such as 100"
            )

    @property
    def other_sources(self) -> tuple[str, ...]:
        """Sources of the text of another kind."""
        if self.other_data is not None:
            return self.other_data
        from_library = any(s.startswith("python-library") for s in self.data + self.eval_data)
        return () if from_library else ("python-library-held-out",)

    def given(self) -> dict[str, Any]:
        """Return the recipe's keys that were given, without those left at their defaults."""
        return self.model_dump(exclude_unset=True)

    def save(self, path: Path) -> None:
        """Write the resolved recipe: every key, also those left at their defaults."""
        write_atomically(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def load_recipe(source: str | Path, **changes: Any) -> Recipe:
    """Read a recipe from a YAML file, or a shipped recipe by its name, such as ``bundled``.

    ``changes`` replace keys of the recipe where they are not None.

    Raises:
        ValueError: no such file, not YAML, a key twice, an unknown key or a value out of range.
    """
    path = RECIPES / f"{source}.yaml"
    if not path.exists():
        path = Path(source)
    try:
        content = read_yaml(path)
        return make_recipe(content | {k: v for k, v in changes.items() if v is not None})
    except OSError as error:
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ValueError(
            f"recipe={str(source)!r}: {error.strerror}; give a YAML file, or one of {names}"
        ) from None
    except ValueError as error:
        what = str(error).removeprefix(str(path)).removeprefix("recipe")
        raise ValueError(
            f"recipe={str(source)!r}{what if what[:1] in ': ' else f': {what}'}"
        ) from None


def resolve_recipe(
    source: str | None,
    model: str | None,
    *,
    settings: Sequence[str] = (),
    finetune: Mapping[str, Any] | None = None,
    execution: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Recipe:
    """Return the recipe for the options of a command: from a file, shipped, or all defaults.

    Args:
        settings: further changes, each as ``KEY=VALUE`` with dots in the key.
        finetune: keys of that section to change, where they are not None.
        execution: keys of that section to change, where they are not None.
        changes: other keys of the recipe to change, where they are not None.

    Raises:
        ValueError: no target, or anything that :func:`load_recipe` raises for.
    """
    if source is None and model in (None, "bundled"):
        source = _of_bundled(changes.get("target"))
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= {} if model is None else {"model": model}
    if "data" in changes and source and (RECIPES / f"{source}.yaml").exists():
        changes.setdefault("eval_data", ())  # a shipped recipe's belongs to its own data
    if source is not None:
        recipe = load_recipe(source, **changes)
    elif "target" not in changes:
        raise ValueError("target is missing; give the tokens to reach, such as 8x or 128k")
    else:
        recipe = make_recipe(changes)
    content = recipe.given()
    for section, given in (("finetune", finetune), ("execution", execution)):
        given = {name: value for name, value in (given or {}).items() if value is not None}
        content[section] = content.get(section, {}) | given
    for setting in settings:
        _set(content, setting)
    return make_recipe(content)


def _set(content: dict[str, Any], setting: str) -> None:
    """Change one key of a recipe's content by ``KEY=VALUE``, such as ``finetune.steps=400``."""
    key, equals, value = setting.partition("=")
    *sections, name = key.strip().split(".")
    place: Any = content
    for section in sections:
        place = place.setdefault(section, {}) if isinstance(place, dict) else None
    if not equals or not isinstance(place, dict):
        raise ValueError(f"set={setting!r}: give KEY=VALUE, such as finetune.steps=400")
    if name == "algorithm" and len(sections) == 1:  # the other algorithm's options do not apply
        shared = {"method", "enabled", "windows", "passkey_prompts", "max_factor"}
        for other in set(place) - shared:
            del place[other]
    try:
        place[name] = parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"set={setting!r}: its value is not valid YAML ({error})") from None


def leaves(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a recipe's content to dotted keys."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        inner = isinstance(value, Mapping)
        found |= leaves(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def _of_bundled(target: str | None) -> str:
    """Return the name of the shipped recipe that extends the bundled model to a target.

    512x requires other training than 64x.
    """
    config = read_json(BUNDLED / "config.json")
    original = config["max_position_embeddings"]
    if target is not None:
        for file in RECIPES.glob("bundled-*.yaml"):
            made_for = file.stem.removeprefix("bundled-")
            if parse_length(made_for, original) == parse_length(target, original):
                return file.stem
    return "bundled"


def make_recipe(content: dict[str, Any]) -> Recipe:
    """Make a recipe from its keys and values, and check it.

    Raises:
        ValueError: an unknown key or a value out of range; names it.
    """
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"][1:2] == ("config",):
            name = str(first["loc"][0])
            section = Recovery if name == "recovery" else Search
            own = [key for key in section.model_fields if key != "config"]
            raise ValueError(
                "recipe: " + describe_error(first, lambda key: f"{name}.{key}", own)
            ) from None
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            section: Any = Recipe
            for part in first["loc"][:-1]:
                section = section.model_fields[part].annotation
            close = difflib.get_close_matches(str(first["loc"][-1]), section.model_fields, 1)
            meant = f"did you mean {close[0]!r}? There are " if close else "there are "
            known = ", ".join(section.model_fields)
            raise ValueError(f"recipe: no key {key!r}; {meant}{known}") from None
        value = shortened(first["input"])
        raise ValueError(f"recipe: {key} is {value}: {first['msg'].lower()}") from None
    recipe.check()
    return recipe
