"""A fine-tuning of six steps on a micro-model."""

from transformers import AutoModelForCausalLM

from longrope.data.windows import load_documents
from longrope.distributed import Ranks
from longrope.execution import ExecutionConfig
from longrope.models.load import load_model
from longrope.train.config import FinetuneConfig
from longrope.train.dataset import LongContextDataset
from longrope.train.trainer import finetune

LENGTH = 128
FAST = FinetuneConfig(
    steps=6, batch=2, learning_rate=1e-3, warmup=2, precision="float32", save_every=2
)
TAUGHT = FAST.model_copy(update={"distill": True})


def train(checkpoint, texts, out, settings=FAST, ranks=None, dtype="float32", **changes):
    loaded = load_model(str(checkpoint), ExecutionConfig(dtype=dtype))
    documents = load_documents(loaded.tokenizer, [str(texts)])
    windows = (
        {"short": 1.5, "short_length": 64, "batch": settings.batch} if settings.distill else {}
    )
    pieces = LongContextDataset(
        documents, loaded.tokenizer, LENGTH, settings.steps * settings.batch, **windows
    )
    rescale = loaded.info.rescale("yarn", 256)
    short = loaded.info.rescale("none", 64).replace(attention_factor=1.2)
    teacher = load_model(str(checkpoint)) if settings.distill else None
    return (
        finetune(
            loaded,
            rescale,
            short,
            pieces,
            settings,
            out,
            ranks or Ranks(),
            teacher=teacher,
            **changes,
        ),
        loaded,
        pieces,
    )


def weights(out):
    return AutoModelForCausalLM.from_pretrained(out / "model").state_dict()
