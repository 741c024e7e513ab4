"""The directory of a run: which stages are done, and the files they share."""

import dataclasses
import functools
import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, with_config
from typing_extensions import NotRequired, TypedDict

from longrope.distributed import Ranks
from longrope.files.atomic import is_temporary, write_atomically
from longrope.files.parse import content_of, read_json, read_yaml
from longrope.models.info import ModelInfo, inspect_model
from longrope.models.load import LoadedModel, load_model, load_tokenizer
from longrope.models.target_length import starting_point
from longrope.pipeline.costs import Stage
from longrope.pipeline.effort import Choice
from longrope.pipeline.plan import ContextPlan
from longrope.pipeline.recipe import Recipe, leaves, make_recipe
from longrope.pipeline.splits import Splits, split_documents
from longrope.progress import console
from longrope.rope.pair import RescalePair
from longrope.rope.rescale import Rescale
from longrope.units import duration

# Settings that may change in a started run: they do not affect search or training.
_FREE = ("evaluate", "execution")
# Of these sections, keys that do affect them.
_FIXED = ("execution.dtype",)
_CHOICES = "choices.json"


@with_config(ConfigDict(extra="allow"))
class _Record(TypedDict):
    """The record of a finished stage, in its ``done.json``; a recovery's has ``starts`` too."""

    seconds: NotRequired[float]
    forwards: NotRequired[float]
    tokens: NotRequired[int]
    starts: NotRequired[dict[str, Any]]


# Stages that run again when the evaluation changes.
_MEASURED = ("evaluate", "report")


class Run:
    """State of one run: its recipe, plan, directory, processes, and the model in memory."""

    def __init__(
        self,
        recipe: Recipe,
        info: ModelInfo,
        plan: ContextPlan,
        out: Path,
        ranks: Ranks,
        choices: Sequence[Choice] = (),
    ):
        self.recipe, self.info, self.plan = recipe, info, plan
        self.out, self.ranks, self.choices = out, ranks, choices
        self._loaded: tuple[tuple[str, bool], LoadedModel] | None = None
        self._remeasures = False

    def planned(self, recipe: Recipe, plan: ContextPlan, choices: Sequence[Choice]) -> "Run":
        """Return the run with its settings chosen and its stages planned."""
        run = Run(recipe, self.info, plan, self.out, self.ranks, choices)
        if "splits" in self.__dict__:  # the text is read already
            run.splits = self.splits
        return run

    def claim(self) -> bool:
        """Claim the run directory: write the resolved recipe, or check that it holds this run.

        Returns True if the directory was empty. A changed ``evaluate`` section is written later,
        by :meth:`remeasure`.

        Raises:
            ValueError: the directory holds another run or other files; names the differing keys.
        """
        file, now = self.out / "recipe.yaml", self.recipe.model_dump(mode="json")
        new = not file.exists()
        if not new:
            before = read_yaml(file)
            self._require_this_layout(before)
            there, here = leaves(before), leaves(now)
            default = leaves(Recipe(target=self.recipe.target).model_dump(mode="json"))
            differing = [
                f"{key} (there {there.get(key, 'not known')}, now {here.get(key, 'not known')})"
                for key in here | there
                if (key in _FIXED or key.partition(".")[0] not in _FREE)
                and there.get(key, default.get(key)) != here.get(key)
            ]
            if differing:
                raise ValueError(
                    f"{self.out} holds another run; it differs in {'; '.join(differing)}; give "
                    "another `out`"
                )
            self._remeasures = before["evaluate"] != now["evaluate"]
        elif any(
            entry.name not in (".lock", _CHOICES) and not is_temporary(entry.name)
            for entry in (self.out.iterdir() if self.out.exists() else ())
        ):
            raise ValueError(f"{self.out} is not empty and holds no run; give another `out`")
        if new:
            self._save()
        elif not self._remeasures:
            self.recipe.save(file)
        return new

    def _save(self) -> None:
        """Write the recipe of the run, and the settings in it that the effort chose."""
        content = [dataclasses.asdict(choice) for choice in self.choices]
        write_atomically(self.out / _CHOICES, json.dumps(content, indent=1) + "\n")
        self.recipe.save(self.out / "recipe.yaml")

    def _require_this_layout(self, recipe: dict[str, Any]) -> None:
        try:
            make_recipe(recipe)
        except ValueError as error:
            raise ValueError(
                f"{self.out} holds a run of an older version of longrope ({error}); give another "
                "`out`, or use that version"
            ) from None

    def unclaim(self) -> None:
        """Remove the files that identify the run from its directory, after it was refused."""
        for name in ("recipe.yaml", _CHOICES, "splits.json", "model.sha256"):
            (self.out / name).unlink(missing_ok=True)

    def remeasure(self) -> None:
        """Mark the run's evaluation as not done if the recipe's ``evaluate`` section changed."""
        if self._remeasures:
            for name in _MEASURED:
                (self.out / name / "done.json").unlink(missing_ok=True)
            self._save()
            self._remeasures = False

    def directory(self, name: str) -> Path:
        return self.out / name

    def done(self, name: str) -> bool:
        """Return whether a stage of the run is done, as rank 0's disk says."""
        anew = self._remeasures and name in _MEASURED
        return bool(self.ranks.broadcast((self.out / name / "done.json").exists() and not anew))

    def record(self, name: str) -> dict[str, Any]:
        """Read the record of a finished stage of the run, its ``done.json``."""
        return read_json(self.out / name / "done.json", _Record)

    def finish(self, stage: Stage, record: dict[str, Any]) -> None:
        """Mark a stage of the run as done, and wait for every process."""
        if self.ranks.first:
            file = self.out / stage.name / "done.json"
            write_atomically(file, json.dumps(record, indent=1) + "\n")
            console.print(f"{stage.name}: done in {duration(record['seconds'])}")
        self.ranks.gather(0.0)

    def original(self) -> LoadedModel:
        """Return the run's original model, loaded."""
        return self._load(self.recipe.model, offload=True)

    def trained(self) -> LoadedModel:
        """Return the run's model to export, loaded: fine-tuned if the plan trains."""
        return self.model_before("export")

    def model_before(self, stage: str, offload: bool = True) -> LoadedModel:
        """Return the model that a stage of the run starts from: original or last fine-tuned."""
        trained = self.plan.before(stage, "finetune")
        source = str(self.out / trained / "model") if trained else self.recipe.model
        return self._load(source, offload)

    def forget(self) -> None:
        """Free the run's model in memory, for example after training changed it."""
        self._loaded = None
        gc.collect()  # accelerate's prepared optimizer is in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def keep_splits(self) -> None:
        """Record the split of the documents in the run directory, or check that it is the same.

        Raises:
            ValueError: too little text, or other documents than this run started with.
        """
        splits, file = self.splits, self.out / "splits.json"
        now = {
            name: sorted(h for document in getattr(splits, name) for h in document.sha256)
            for name in ("search", "training", "evaluation")
        }
        if not self.ranks.first:
            return
        if file.exists():
            before = read_json(file, dict[str, list[str]])
            for name, hashes in now.items():
                if before.get(name) != hashes:
                    raise ValueError(
                        f"{self.out}: the {name} documents have changed since the run started "
                        f"({len(before.get(name, []))} then, {len(hashes)} now); restore `data`, "
                        "or give another `out`"
                    )
        write_atomically(file, json.dumps(now, indent=1) + "\n")

    def teacher(self) -> LoadedModel:
        """Load the run's original model as the teacher for distillation.

        It keeps its own RoPE scaling even where the extension replaces it.
        """
        scaling, info = self.info.rope_scaling, self.info
        if info.replaces_scaling and scaling and scaling["rope_type"] != "dynamic":
            info = inspect_model(
                self.recipe.model,
                rope_scaling="keep",
                original_length=self.recipe.original_length,
                trust_remote_code=self.recipe.execution.trust_remote_code,
            )
        return self._read(info, offload=False)

    def _load(self, source: str, offload: bool) -> LoadedModel:
        asked = source, offload and self.recipe.execution.offload_weights
        if self._loaded is None or self._loaded[0] != asked:
            self.forget()  # one model in memory at a time
            info = dataclasses.replace(self.info, source=source)
            loaded = self._read(info, offload)
            if source == self.recipe.model:
                self._require_same(loaded)
            self._loaded = asked, loaded
        return self._loaded[1]

    def _require_same(self, loaded: LoadedModel) -> None:
        """Record the model's fingerprint in the run directory, or check that it is the same.

        Raises:
            ValueError: finished stages used other weights or another config.
        """
        if not self.ranks.first:
            return
        file, now = self.out / "model.sha256", loaded.fingerprint()
        if file.exists() and file.read_text(encoding="utf-8").strip() != now:
            raise ValueError(
                f"{self.out}: the weights or the config of {self.recipe.model} have changed since "
                "the run started; restore them, or give another `out`"
            )
        write_atomically(file, now + "\n")

    def _read(self, info: ModelInfo, offload: bool) -> LoadedModel:
        execution = self.recipe.execution
        if not offload:
            execution = execution.model_copy(update={"offload_weights": False})
        return load_model(info.source, execution, info=info, group=self.ranks.group)

    @functools.cached_property
    def splits(self) -> Splits:
        """The run's documents, split for search, training and evaluation."""
        return split_documents(self.tokenizer, self.recipe, self.plan.target, self.plan.trained)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the run's model, loaded without the weights."""
        return load_tokenizer(self.recipe.model, self.recipe.execution.trust_remote_code)

    def attention_factor(self, length: int) -> float:
        """Return the run's attention factor for a length: the recipe's, or √(1 + ln s / ln L)."""
        return starting_point(self.info, length, self.recipe.attention_factor).attention_factor

    def rescale(self, name: str) -> Rescale:
        """Read the rescale that a search stage of the run found."""
        return Rescale.load(self.out / name / "rescale.json")

    @property
    def long(self) -> Rescale:
        """The run's rescale for the target length."""
        return self.rescale("second-search" if "second-search" in self.plan else "search")

    @property
    def pair(self) -> RescalePair:
        """The run's rescales for short and long sequences; equal without a recovery stage."""
        long = self.long
        if "recovery" in self.plan:
            return RescalePair(self.rescale("recovery"), long)
        return RescalePair(long.replace(max_position_embeddings=self.plan.original), long)


def recorded_choices(out: Path) -> list[Choice] | None:
    """Read the settings that the effort chose when the run in ``out`` started; None without one."""
    file = out / _CHOICES
    if not (file.exists() and (out / "recipe.yaml").exists()):
        return None
    with content_of(file, "restore it, or give another `out`"):
        return [Choice(**choice) for choice in read_json(file, list[dict[str, Any]])]
