"""Train the model that ships with longrope, from nothing, in under an hour on 2 cores.

    python scripts/train_bundled.py --out src/longrope/models/bundled

Text: the Python library of the machine, less the packages of
``longrope.data.stdlib.HELD_OUT``, and a share of generated retrieval documents so
that passkey and needle questions work inside the 256 tokens. Every training
window is BOS and 255 tokens of one document.
"""

import argparse
import json
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longrope.data.stdlib import HELD_OUT, library_texts

WINDOW = 256
RETRIEVAL_SHARE = 0.25
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"

_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there.\n"
)
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
_THINGS = (
    "magic number",
    "secret code",
    "pass key",
    "door code",
    "room number",
    "lucky number",
    "serial number",
    "ticket number",
    "access code",
    "user id",
    "account number",
    "flight number",
)
_PLACES = ("London", "Paris", "Tokyo", "Berlin", "Madrid", "Rome", "Cairo", "Lima", "Oslo", "Delhi")
_PEOPLE = ("Seoul", "Boston", "Denver", "Dallas", "Alice", "Bob", "Carol", "David", "Emma", "Frank")
_OWNERS = (*_PLACES, *_PEOPLE, "Grace", "Henry")


def training_texts() -> dict[str, str]:
    texts = library_texts(held_out=False)
    tests = Path(sysconfig.get_path("stdlib")) / "test"  # not every installation has it
    for file in sorted(tests.glob("test_*.py")):
        module = file.stem.removeprefix("test_")
        if not any(module.startswith(name) for name in HELD_OUT):
            texts[f"test/{file.stem}"] = file.read_text(encoding="utf-8", errors="replace")
    return texts


def retrieval(rng: random.Random, texts: list[str]) -> tuple[str, str]:
    """One retrieval document: (everything up to the answer, the answer)."""
    digits = "".join(rng.choice("0123456789") for _ in range(rng.choice((5, 5, 5, 4, 6, 7))))
    if rng.random() < 0.5:  # the LongRoPE paper's passkey prompt
        needle = f"The pass key is {digits}. Remember it. {digits} is the pass key.\n"
        question = "What is the pass key? The pass key is"
    else:
        thing, owner = rng.choice(_THINGS), rng.choice(_OWNERS)
        needle = f"The {thing} of {owner} is {digits}.\n"
        question = f"What is the {thing} of {owner}? The {thing} of {owner} is"
    if rng.random() < 0.5:
        filler = [_FILLER] * rng.randrange(0, 5)
    else:
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - 600))
        lines = text[start : start + rng.randrange(60, 560)].split("\n")
        filler = [line + "\n" for line in lines]
    filler.insert(rng.randrange(len(filler) + 1), needle)
    task = _TASK if rng.random() < 0.6 else ""
    return task + "".join(filler) + question, f" {digits}."


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    questions = ["".join(retrieval(rng, texts)) for _ in range(2000)]
    tokenizer.train_from_iterator(texts + questions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=WINDOW,
    )


class Batches:
    """Endless training windows: (inputs, targets), targets −100 where nothing is to learn."""

    def __init__(self, texts: dict[str, str], tokenizer: PreTrainedTokenizerFast, seed: int):
        self.texts = list(texts.values())
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self.documents = [torch.tensor(self.encode(text)) for text in self.texts]
        self.documents = [ids for ids in self.documents if len(ids) > WINDOW]
        self.weights = [len(ids) for ids in self.documents]
        self.rng = random.Random(seed)
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id

    def text_window(self) -> torch.Tensor:
        (ids,) = self.rng.choices(self.documents, self.weights)
        start = self.rng.randrange(len(ids) - WINDOW + 1)
        return torch.cat([torch.tensor([self.bos]), ids[start : start + WINDOW]])

    def retrieval_window(self) -> torch.Tensor:
        while True:
            prompt, answer = retrieval(self.rng, self.texts)
            ids = [self.bos, *self.encode(prompt), *self.encode(answer)]
            if len(ids) <= WINDOW + 1:
                return torch.tensor(ids + [self.pad] * (WINDOW + 1 - len(ids)))

    def next(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        asked = round(size * RETRIEVAL_SHARE)
        rows = [self.retrieval_window() for _ in range(asked)]
        rows += [self.text_window() for _ in range(size - asked)]
        ids = torch.stack(rows)
        targets = ids[:, 1:].clone()
        targets[targets == self.pad] = -100
        return ids[:, :-1], targets


def schedule(step: int, steps: int, peak: float) -> float:
    warmup = 100
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--minutes", type=float, default=55.0, help="the schedule is fitted to this"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    texts = training_texts()
    tokenizer = train_tokenizer(list(texts.values()), vocabulary=1536)
    batches = Batches(texts, tokenizer, args.seed)
    print(f"{len(texts)} documents, {sum(batches.weights):,} tokens", flush=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    compiled = torch.compile(model)  # halves the time of a step on CPU
    started, smooth, steps = time.monotonic(), None, args.steps
    step = 0
    while step < steps:
        if step == 60:  # fit the schedule to the time
            fitted = int(60 * args.minutes * 60 / (time.monotonic() - started))
            steps = min(args.steps, fitted)
            print(f"{steps} steps", flush=True)
        ids, targets = batches.next(args.batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = compiled(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps, args.lr)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        step += 1
        if step % 20 == 0:
            print(
                f"step {step}/{steps} loss {smooth:.4f} {time.monotonic() - started:.0f}s",
                flush=True,
            )
        if step % 500 == 0:
            model.save_pretrained(args.out / "partial")
    # Half the size on disk; computed in float32, which no CPU is slow in.
    model.to(torch.bfloat16).save_pretrained(args.out)
    model.config.dtype = torch.float32
    model.config.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "steps": steps,
        "tokens": steps * args.batch * WINDOW,
        "loss": round(smooth or 0.0, 4),
        "seconds": round(time.monotonic() - started),
        "seed": args.seed,
        "lr": args.lr,
        "batch": args.batch,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "held_out": list(HELD_OUT),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
