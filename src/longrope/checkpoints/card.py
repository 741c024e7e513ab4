"""Write the model card of an export: results, and how to load it in each engine."""

from typing import Any

from longrope.checkpoints.manifest import Manifest
from longrope.labels import RESULT, WITHOUT, as_markdown


def model_card(manifest: Manifest, results: dict[str, Any] | None = None) -> str:
    """Return the model card of an export: the Markdown of its ``README.md``.

    Args:
        results: content of the run's ``results.json``; adds perplexity and passkey accuracy.
    """
    parts = [_front(manifest), _what(manifest)]
    if results:
        parts.append(_results(results, manifest.static))
    parts += [_gguf(manifest) if manifest.format.startswith("gguf") else _huggingface(manifest)]
    parts.append(_factors(manifest))
    return "\n\n".join(parts) + "\n"


def _front(manifest: Manifest) -> str:
    return "---\ntags: [longrope, long-context]\nlibrary_name: " + (
        "gguf\n---" if manifest.format.startswith("gguf") else "transformers\n---"
    )


def _what(manifest: Manifest) -> str:
    long, boundary = manifest.pair.long, manifest.pair.recovery_length
    lines = [
        f"# {as_markdown(manifest.source)}, extended to {long.max_position_embeddings:,} tokens",
        "The rotary position embedding is rescaled by "
        "[LongRoPE](https://arxiv.org/abs/2402.13753), from "
        f"{long.original_max_position_embeddings:,} tokens {long.scale:g}×.",
    ]
    if manifest.switches:
        lines.append(
            f"Short factors are for sequences of up to {boundary:,} tokens, generated ones "
            "included; long factors beyond."
        )
    else:
        lines.append("One set of factors serves every length: no engine switches.")
    if manifest.folded is not None:
        lines.append(
            f"The attention factor is {long.attention_factor:.6g}; engines compute "
            f"{manifest.folded:.6g} by themselves, and the query projections hold the rest."
        )
    else:
        lines.append(f"The attention factor is {long.attention_factor:.6g}.")
    return "\n\n".join(lines)


def _results(results: dict[str, Any], static: bool) -> str:
    """Return the model card's table of results; a static export has only the long factors'."""
    short = {r["length"]: r for r in results["perplexity"] if r["method"] == WITHOUT}
    rows = [r for r in results["perplexity"] if r["method"] == RESULT]
    if static:
        rows = [short.get(r["length"], r) for r in rows]
    keys: dict[int, list[int]] = {}
    for row in results["passkey"]:
        if row["method"] == RESULT and not (static and row["length"] in short):
            found = keys.setdefault(row["length"], [0, 0])
            found[0] += row["correct"]
            found[1] += row["trials"]
    lines = ["| tokens | perplexity | passkey |", "|---|---|---|"]
    for row in rows:
        right = "/".join(map(str, keys[row["length"]])) if row["length"] in keys else ""
        lines.append(f"| {row['length']:,} | {row['perplexity']:.2f} | {right} |")
    before = next(
        (
            f"\n\nThe original model on the same tokens, at {r['length']:,}: {r['perplexity']:.2f}."
            for r in results["perplexity"]
            if r["method"] == "none" and r["length"] == results["original_length"]
        ),
        "",
    )
    return "\n".join(lines) + before


def _huggingface(manifest: Manifest) -> str:
    target, boundary = manifest.pair.long.max_position_embeddings, manifest.written.recovery_length
    text = _ENGINES_DUAL if manifest.switches else _ENGINES_STATIC
    text = text.format(target=target, boundary=boundary)
    text += f"\n\n{UNKNOWN_KEYS}"
    ours, theirs = manifest.written.long.attention_factor, manifest.computed_attention_factor
    if abs(ours - theirs) >= 1e-6:
        text += _MLX.format(ours=ours, theirs=theirs)
    return text


def _gguf(manifest: Manifest) -> str:
    target, boundary = manifest.pair.long.max_position_embeddings, manifest.pair.recovery_length
    start = f"    llama-server -m model.gguf -c {target} -np 1"
    if not manifest.switches:
        return f"## llama.cpp\n\n{start}\n\nThe factors apply at every context."
    return (
        f"## llama.cpp\n\n{start}\n\nllama.cpp chooses when it is started: long factors iff the "
        f"context *of one slot* is more than {boundary:,} tokens. `-c {4 * boundary} -np 4` leaves "
        f"{boundary:,} to each slot, and so takes the short factors silently. Short "
        f"texts get the short factors only from a server of their own, `-c {boundary}`."
    )


def _factors(manifest: Manifest) -> str:
    sets = {"long": manifest.pair.long.factors, "short": manifest.pair.short.factors}
    if not manifest.switches:
        del sets["short"]
    lines = [f"- {name}: " + ", ".join(f"{x:.6g}" for x in row) for name, row in sets.items()]
    return "## Factors\n\n" + "\n".join(lines)


UNKNOWN_KEYS = (
    "When transformers loads the model, it may warn of unrecognized keys in `rope_parameters`: "
    "`short_mscale` and `long_mscale`. vLLM reads the attention factor from these; transformers "
    "reads it from `attention_factor`. The warning is harmless, in vLLM too."
)

_ENGINES_DUAL = """## Engines

- **transformers** 5, and 4 for most architectures: loads it as it is (`longrope verify DIR --engine
  transformers-legacy` asks version 4). It picks one set for a whole batch, and its `generate` keeps
  cached keys when a sequence passes {boundary:,} tokens (only Phi3 starts over), so what it writes
  beyond is wrong. Keep prompt and answer on one side, or use longrope's runtime:

      import longrope
      model = longrope.from_pretrained("this directory")

- **vLLM**: `vllm serve DIR --max-model-len {target}`. Without it the context is {boundary:,}. It
  chooses when it is started: long factors for every request iff `--max-model-len` is more than
  {boundary:,}.
- **mlx-lm**: always the long factors, also for short texts.
- **SGLang**: chooses for a batch, and not again for cached keys.
- `longrope verify DIR --engine vllm --engine-python ENV/bin/python` (or mlx, or transformers, which
  needs no other Python) shows which factors it applies.
- Where short texts matter less than simplicity: `longrope export --format hf-static`."""

_ENGINES_STATIC = """## Engines

The same factors at every length, so nothing switches. Short texts pay for it: they have no factors
of their own.

- **transformers** and **mlx-lm** load it as it is.
- **vLLM**: `vllm serve DIR --max-model-len {target}`. Without it the context is {boundary:,}.
- **SGLang**: `python -m sglang.launch_server --model-path DIR --context-length {target}`.
- `longrope verify DIR --engine vllm --engine-python ENV/bin/python` (or mlx, or transformers, which
  needs no other Python) shows which factors it applies."""

_MLX = """

**Attention factor and mlx-lm**: transformers, vLLM and SGLang read {ours:.6g} from `config.json`.
mlx-lm reads no field for it and computes {theirs:.6g}, which changes its output. Use
`longrope export --fold-attention-factor` for mlx-lm."""
