"""LoRA fine-tuning."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

import longrope.train.trainer as finetune_module
from longrope.execution import ExecutionConfig
from longrope.models.load import load_model
from small_training import FAST, train, weights


def test_lora_trains_embeddings_and_norms_too_and_leaves_a_plain_checkpoint(
    checkpoints, texts, tmp_path
):
    settings = FAST.model_copy(update={"lora": 2, "steps": 3})
    lines, _, _ = train(checkpoints("llama"), texts, tmp_path, settings)
    assert len(lines) == 3
    before = AutoModelForCausalLM.from_pretrained(checkpoints("llama")).state_dict()
    after = weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("embed_tokens", "input_layernorm", "model.norm", "q_proj", "down_proj"):
        assert any(part in name for name in changed), part
    update = after["model.layers.1.self_attn.q_proj.weight"].double()
    update -= before["model.layers.1.self_attn.q_proj.weight"].double()
    assert torch.linalg.matrix_rank(update, atol=1e-5) <= 2


def test_the_same_seed_draws_the_same_adapters(checkpoints, texts, tmp_path):
    settings = FAST.model_copy(update={"lora": 2, "steps": 3})
    torch.manual_seed(1)  # another state of the global generator
    one = train(checkpoints("llama"), texts, tmp_path / "one", settings)[0]
    torch.manual_seed(2)
    assert train(checkpoints("llama"), texts, tmp_path / "two", settings)[0] == one


def test_lora_keeps_tied_embeddings_tied(texts, tmp_path, monkeypatch):
    """The bundled model's embeddings are tied to its head; untied, one would be lost."""
    trained = {}

    def keep(model, *others):
        ids = torch.arange(100, 160)[None]
        with torch.no_grad():
            trained["at"] = model.eval()(input_ids=ids).logits
        return saved(model, *others)

    saved = finetune_module._save
    monkeypatch.setattr(finetune_module, "_save", keep)
    settings = FAST.model_copy(update={"lora": 2, "steps": 3, "learning_rate": 1e-2})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        train("bundled", texts, tmp_path, settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert model.config.tie_word_embeddings
    before = load_model("bundled", ExecutionConfig(dtype="float32")).model.state_dict()
    assert not torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    with torch.no_grad():
        logits = model(input_ids=torch.arange(100, 160)[None]).logits
    torch.testing.assert_close(logits, trained["at"], atol=1e-4, rtol=1e-4)


def test_lora_on_a_sharded_model_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"finetune.lora is 8 and ACCELERATE_USE_FSDP is true"):
        finetune_module.require_lora(8)
