"""Train a small Llama on prose, as a second model beside the bundled one.

    python benchmarks/texts.py --out texts
    python benchmarks/micro_model.py --texts texts --out micro

It is trained on Shakespeare and four of Austen's novels, in windows of 256 tokens. The other texts
are held out. Unlike the bundled model it has grouped-query attention, an untied head, another
θ and another tokenizer, and it has never seen a passkey prompt.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TRAINED_ON = (
    "shakespeare",
    "austen-emma",
    "austen-mansfieldpark",
    "austen-prideprejudice",
    "austen-sensesensibility",
)
WINDOW, VOCABULARY, LEARNING_RATE, WARMUP = 256, 2048, 3e-3, 50


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_model() -> LlamaForCausalLM:
    """Return an untrained model of 2.6 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rope_theta=20_000.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=48)
    args = parser.parse_args()
    texts = [(args.texts / f"{name}.txt").read_text(encoding="utf-8") for name in TRAINED_ON]
    tokenizer = train_tokenizer(texts)
    stream = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, args.steps, pct_start=WARMUP / args.steps
    )
    started = time.monotonic()
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(stream) - WINDOW, (args.batch,))
        ids = torch.stack([stream[start : start + WINDOW] for start in starts])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps:
            seconds = round(time.monotonic() - started)
            print(f"step {step} of {args.steps}: loss {loss.item():.4f}, {seconds} s", flush=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    figures = {
        "steps": args.steps,
        "tokens": args.steps * args.batch * WINDOW,
        "loss": round(loss.item(), 4),
        "seconds": round(time.monotonic() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": len(stream),
        "texts": TRAINED_ON,
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
