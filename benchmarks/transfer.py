"""Whether a search on one kind of text harms others: each kind is searched, all kinds are judged.

    python benchmarks/texts.py --out texts
    python benchmarks/micro_model.py --texts texts --out micro
    python benchmarks/transfer.py --texts texts --models bundled,micro --out runs/transfer

Prose is Austen, dialogue Shakespeare, code the Python library, and the manual Python's language
reference. What is judged on is neither searched nor validated on. Interrupted, it resumes.
"""

import argparse
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import record

from longrope.data.documents import Document
from longrope.data.encoding import bos_tokens
from longrope.data.stdlib import library_texts
from longrope.data.windows import TokenDocument, tokenize, with_bos
from longrope.distributed import Ranks
from longrope.files.stores import JsonlStore
from longrope.models.load import LoadedModel, load_model
from longrope.rope.rescale import Rescale
from longrope.search.objective import Objective
from longrope.search.problem import PUBLISHED
from longrope.search.run import SearchOptions, search_documents
from longrope.search.settings import make_search_config

KINDS = ("prose", "dialogue", "code", "manual")
JUDGED = 6  # windows of each kind
# A search as it was before it had validation, and as it is.
ARMS: dict[str, dict[str, Any]] = {
    "none": {"transfer": "none", "budget": 27},
    "validate": {"transfer": "validate", "budget": 27},
    "regularise": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="What texts.py wrote.")
    parser.add_argument("--models", default="bundled")
    parser.add_argument("--scales", default="4,8")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="transfer", help="Of the result's file.")
    args = parser.parse_args()
    rows = []
    for path in args.models.split(","):
        loaded = load_model(path)
        kept = JsonlStore(args.out / f"{Path(path).name}.jsonl")
        documents = {
            part: {kind: tokenize(found, loaded.tokenizer) for kind, found in texts.items()}
            for part, texts in parts(args.texts).items()
        }
        for scale in map(int, args.scales.split(",")):
            cases = itertools.product(args.arms.split(","), KINDS, map(int, args.seeds.split(",")))
            judge = Judge(loaded, documents["judged"], scale, kept)
            for arm, kind, seed in cases:
                out = args.out / Path(path).name / f"{arm}-{kind}-{scale}x-{seed}"
                options = SearchOptions(
                    f"{scale}x", out, seed=seed, config=make_search_config(ARMS[arm])
                )
                found = search_documents(loaded, documents["searched"][kind], options, Ranks())
                row = {"model": Path(path).name, "arm": arm, "searched": kind, "scale": scale}
                row |= {"seed": seed, "forwards": found.forwards, "accepted": accepted(found.best)}
                rows.append(row | {"judged": judge(found.best), "portable": judge(found.portable)})
    print(record.write(args.name, {"judged_windows": JUDGED * len(KINDS)} | vars(args), rows))
    for line in table(rows):
        print(line)


def accepted(rescale: Rescale) -> str:
    return str(rescale.provenance.get("chosen", "result"))


def parts(texts: Path) -> dict[str, dict[str, list[Document]]]:
    """The documents of each kind to search on and to judge on."""
    shakespeare = (texts / "shakespeare.txt").read_text()
    before = shakespeare[: shakespeare.index("MUCH ADO ABOUT NOTHING\n")]  # validated on
    manual = library_texts()["pydoc_topics"]
    searched = {
        "prose": {"emma": (texts / "austen-emma.txt").read_text()},
        "dialogue": {"shakespeare": before[300_000:1_500_000]},
        "code": {k: v for k, v in library_texts(held_out=False).items() if k != "pydoc_topics"},
        "manual": {"first half": manual[: len(manual) * 3 // 5]},
    }
    judged = {
        "prose": {"persuasion": (texts / "austen-persuasion.txt").read_text()},
        "dialogue": {"shakespeare": before[-500_000:]},
        "code": library_texts(held_out=True),
        "manual": {"second half": manual[len(manual) * 5 // 8 :]},
    }
    return {
        name: {kind: [Document(*item) for item in found.items()] for kind, found in part.items()}
        for name, part in (("searched", searched), ("judged", judged))
    }


class Judge:
    """Measures factors on windows of every kind, less the best published method's loss on each."""

    def __init__(
        self,
        loaded: LoadedModel,
        documents: dict[str, list[TokenDocument]],
        scale: int,
        kept: JsonlStore,
    ):
        assert loaded.info.original_max_position_embeddings
        self.kept, self.length = kept, scale * loaded.info.original_max_position_embeddings
        bos = bos_tokens(loaded.tokenizer)
        self.objectives = {
            kind: Objective(loaded.forward(), windows(documents[kind], self.length, bos))
            for kind in KINDS
        }
        published = {name: loaded.info.rescale(name, self.length) for name in PUBLISHED}
        self.published = {name: self.losses(rescale) for name, rescale in published.items()}

    def losses(self, rescale: Rescale) -> dict[str, list[float]]:
        key = json.dumps([self.length, rescale.applied()])
        if key not in self.kept:
            self.kept[key] = {k: f(rescale).window_losses for k, f in self.objectives.items()}
        return self.kept[key]

    def __call__(self, rescale: Rescale | None) -> dict[str, Any] | None:
        """Difference and standard error in nats, by kind and over all windows."""
        if rescale is None:
            return None
        ours, found = self.losses(rescale), {}
        for kind in (*KINDS, "all"):
            kinds = KINDS if kind == "all" else (kind,)
            best = min(
                ([x for k in kinds for x in losses[k]] for losses in self.published.values()),
                key=np.mean,
            )
            difference = np.subtract([x for k in kinds for x in ours[k]], best)
            error = difference.std(ddof=1) / math.sqrt(len(difference))
            found[kind] = [float(difference.mean()), float(error)]
        return found


def windows(documents: list[TokenDocument], length: int, bos: int | None) -> list[np.ndarray]:
    places = [(d, start) for d in documents for start in range(0, len(d) - length + 1, length)]
    random.Random(0).shuffle(places)
    return [with_bos(d.ids[start:][:length], bos) for d, start in places[:JUDGED]]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """By model, scale, arm and searched text: mean over seeds of the difference on each kind."""
    yield "| model | scale | transfer | searched | " + " | ".join(KINDS) + " | all | harmed |"
    yield "|---" * (len(KINDS) + 6) + "|"
    key = lambda row: (row["model"], row["scale"], row["arm"], row["searched"])  # noqa: E731
    for (model, scale, arm, searched), group in itertools.groupby(rows, key=key):
        judged = [row["judged"] for row in group]
        means = [np.mean([j[kind][0] for j in judged]) for kind in (*KINDS, "all")]
        harmed = sum(
            d > 0.01 and d > 2 * error for j in judged for k, (d, error) in j.items() if k != "all"
        )
        shown = " | ".join(f"{math.expm1(mean):+.1%}" for mean in means)
        yield f"| {model} | {scale}x | {arm} | {searched} | {shown} | {harmed} |"


if __name__ == "__main__":
    main()
