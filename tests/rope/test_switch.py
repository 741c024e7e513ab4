"""The short/long switch: each row by its own length, and exact across the boundary."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from conftest import RECOVERY, pair
from longrope.compat import cache_name
from longrope.rope.apply import rescaled
from longrope.rope.rotary import find_rotary
from longrope.rope.switch import remove_pair, switched

FAMILIES = ["llama", "mistral", "qwen2", "phi3", "gemma3", "gpt_neox", "cohere"]
FAMILIES += ["deepseek_v2", "gemma4", "lfm2", "qwen3_5"]


def logits(model, rescale, ids):
    with torch.no_grad(), rescaled(model, rescale):
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_one_set_up_to_the_recovery_length_and_the_other_beyond(micro_models, ids, family):
    model = micro_models(family)
    both = pair(model)
    plain = logits(model, None, ids)
    with torch.no_grad(), switched(model, both):
        at = model(input_ids=ids[:, :RECOVERY], use_cache=False).logits
        above = model(input_ids=ids[:, : RECOVERY + 1], use_cache=False).logits
    assert torch.equal(at, logits(model, both.short, ids[:, :RECOVERY]))
    assert torch.equal(above, logits(model, both.long, ids[:, : RECOVERY + 1]))
    assert (at - above[:, :RECOVERY]).abs().max() > 1e-3
    assert torch.equal(logits(model, None, ids), plain)


def test_a_compiled_model_switches_too(micro_models, ids):
    """At changing lengths and paddings, after it was compiled at others."""
    model = micro_models("llama")
    prompts = [ids[:, :length] for length in (RECOVERY - 9, RECOVERY + 20, RECOVERY - 4)]
    padded = torch.ones_like(ids)
    padded[0, :-5] = 0
    calls = [{"input_ids": prompt} for prompt in prompts]
    calls += [{"input_ids": ids, "attention_mask": mask} for mask in (padded, padded.flip(0))]
    with torch.no_grad(), switched(model, pair(model)):
        compiled = torch.compile(model, backend="eager")
        for call in calls:
            found = compiled(**call, use_cache=False).logits
            assert torch.equal(found, model(**call, use_cache=False).logits)


def test_a_multimodal_model(micro_models, ids):
    """Its decoder gets embeddings; rows are judged by the model's token ids and mask."""
    model, row = micro_models("gemma3_whole"), ids[:1, : RECOVERY - 5]
    both, padding = pair(model), torch.full((1, 9), 2)
    prompt = torch.cat([torch.cat([padding, row], dim=1), ids[1:, : RECOVERY + 4]])
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with switched(model, both):
        found = model.generate(prompt, attention_mask=mask, **options)
        with pytest.raises(ValueError, match="pixel_values"):
            model(input_ids=prompt, pixel_values=torch.zeros(1, 3, 28, 28))
        model(input_ids=prompt)
        with pytest.raises(ValueError, match="inputs_embeds"):
            find_rotary(model).owner(inputs_embeds=torch.zeros(2, 5, 64))
    for number, start in ((0, 9), (1, 0)):
        sequence = found[number : number + 1, start:]
        for end in range(prompt.shape[1] - start, sequence.shape[1]):
            expected = logits(model, both.choose(end), sequence[:, :end])[0, -1].argmax()
            assert sequence[0, end] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_crossing_with_a_cache_equals_no_cache(micro_models, ids, family):
    """Tokens and logits of a generation over the boundary, with and without a cache."""
    model, prompt = micro_models(family), ids[:1, : RECOVERY - 5]
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_logits": True,
        "eos_token_id": None,
    }
    options |= {"return_dict_in_generate": True, "pad_token_id": 2}
    with switched(model, pair(model)):
        cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        plain = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **options
        )
    assert torch.equal(cached.sequences, plain.sequences)
    assert cached.sequences.shape[1] > RECOVERY + 3
    torch.testing.assert_close(
        torch.stack(cached.logits), torch.stack(plain.logits), atol=2e-4, rtol=1e-4
    )
    # After the crossing, the long factors' logits, not those of a cache of short keys.
    expected = logits(model, pair(model).long, cached.sequences[:, :-1])[:, -1]
    torch.testing.assert_close(cached.logits[-1], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_row_of_a_batch_by_its_own_length(micro_models, ids, family):
    model, both = micro_models(family), pair(micro_models(family))
    short, long = ids[:1, :60], ids[1:, :90]
    padded = torch.cat([torch.full((1, 30), 2), short], dim=1)
    batch = torch.cat([padded, long])
    mask = torch.ones_like(batch)
    mask[0, :30] = 0
    with torch.no_grad(), switched(model, both):
        found = model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    close = {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(found[:1, 30:], logits(model, both.short, short), **close)
    torch.testing.assert_close(found[1:], logits(model, both.long, long), **close)


def test_rows_cross_one_after_the_other(micro_models, ids):
    model, both = micro_models("llama"), pair(micro_models("llama"))
    batch = ids[:, :79].clone()
    mask = torch.ones_like(batch)
    batch[0, :4], mask[0, :4] = 2, 0
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with switched(model, both):
        together = model.generate(batch, attention_mask=mask, **options)
        alone = [
            model.generate(row[None], attention_mask=torch.ones_like(row)[None], **options)[0]
            for row in (batch[0, 4:], batch[1])
        ]
    assert torch.equal(together[0, 4:], alone[0])
    assert torch.equal(together[1], alone[1])


def test_prefill_in_chunks_chooses_by_the_whole_prompt(micro_models, ids):
    model, both = micro_models("llama"), pair(micro_models("llama"))
    prompt = ids[:1]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    options |= {"attention_mask": torch.ones_like(prompt)}
    with switched(model, both):
        whole = model.generate(prompt, **options)
        chunked = model.generate(prompt, prefill_chunk_size=30, **options)
        cache = DynamicCache(config=model.config)
        # By hand the total length is unknown, so the cache is refilled at the boundary.
        with torch.no_grad():
            for start in range(0, 97, 25):
                chunk = prompt[:, start : start + 25]
                part = model(input_ids=chunk, **{cache_name(model): cache}).logits
    assert torch.equal(whole, chunked)
    expected = logits(model, both.long, prompt)[:, 75:]
    torch.testing.assert_close(part, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "num_beams is 2"),
        ({"assistant_model": "itself"}, "assistant_model"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "static"}, "'static'"),
        ({"cache": "static"}, "'StaticCache'"),
    ],
)
def test_inexact_generation_modes_are_refused(micro_models, ids, options, named):
    model = micro_models("llama")
    if options.get("assistant_model"):
        options = {"assistant_model": model}
    if options.get("cache"):
        options = {cache_name(model): StaticCache(config=model.config, max_cache_len=128)}
    with switched(model, pair(model)), pytest.raises(ValueError, match=named):
        model.generate(ids, max_new_tokens=2, **options)


@pytest.mark.parametrize("place", ["the model's", "positional", "by name"])
def test_beam_search_is_refused_however_it_is_set(micro_models, ids, place, monkeypatch):
    model = micro_models("llama")
    config = GenerationConfig(num_beams=3, max_new_tokens=2, pad_token_id=2, eos_token_id=None)
    given, options = (), {}
    if place == "the model's":
        monkeypatch.setattr(model, "generation_config", config)
    elif place == "positional":
        given = (config,)
    else:
        options = {"generation_config": config}
    with switched(model, pair(model)):
        with pytest.raises(ValueError, match="num_beams is 3"):
            model.generate(ids, *given, **options)
        alone = model.generate(ids, *given, **options, num_beams=1)
    assert alone.shape[1] > ids.shape[1]


def test_inputs_without_token_ids_or_lengths_are_refused(micro_models, ids):
    model = micro_models("llama")
    with torch.no_grad(), switched(model, pair(model)):
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(inputs_embeds=torch.zeros(1, 3, 64))
        with pytest.raises(ValueError, match="attention_mask"):
            model(input_ids=ids, attention_mask=torch.zeros(2, 1, 97, 97))
        stranger = DynamicCache()
        stranger.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
        with pytest.raises(ValueError, match=cache_name(model)):
            model(input_ids=ids, **{cache_name(model): stranger})
        with pytest.raises(ValueError, match=cache_name(model)):  # by its old name, too
            model.model(input_ids=ids, past_key_values=stranger)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3"])
def test_positions_of_packed_documents_are_refused(micro_models, ids, family):
    """Each document would have to be judged by its own length."""
    model, whole = micro_models(family), torch.arange(97)[None]
    packed = torch.cat([torch.arange(50), torch.arange(47)])[None]
    with torch.no_grad(), switched(model, pair(model)):
        own = model(input_ids=ids, position_ids=whole.expand(len(ids), -1), use_cache=False)
        torch.testing.assert_close(own.logits, model(input_ids=ids, use_cache=False).logits)
        for positions in (packed, whole + 600):
            with pytest.raises(ValueError, match=r"position_ids .* a row of its own"):
                model(input_ids=ids[:1], position_ids=positions, use_cache=False)
        # Position ids of padding are not checked.
        mask = torch.ones_like(ids[:1])
        mask[:, :20] = 0
        padded = torch.cat([torch.ones(20).long(), torch.arange(77)])[None]
        model(input_ids=ids[:1], position_ids=padded, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_a_copy_of_a_switched_model_generates_with_its_own_weights(micro_models, ids, copied):
    model, options = micro_models("llama"), {"max_new_tokens": 12, "do_sample": False}
    with switched(model, pair(model)):
        twin = copied(model)
        first = model.generate(ids, eos_token_id=None, **options)
        assert torch.equal(twin.generate(ids, eos_token_id=None, **options), first)
        with torch.no_grad():
            twin.get_output_embeddings().weight.neg_()
        assert not torch.equal(twin.generate(ids, eos_token_id=None, **options), first)
        remove_pair(twin)
        assert torch.equal(model.generate(ids, eos_token_id=None, **options), first)
    with torch.no_grad():
        twin.get_output_embeddings().weight.neg_()
    plain = model.generate(ids, eos_token_id=None, **options)
    assert torch.equal(twin.generate(ids, eos_token_id=None, **options), plain)


def test_a_copied_cache_continues_a_common_prefix(micro_models, ids):
    """As in the recipe of transformers' documentation for a prompt that many requests share."""
    model = micro_models("llama")
    prefix, rest, name = ids[:, : RECOVERY - 4], ids[:, RECOVERY - 4 :], cache_name(model)
    with torch.no_grad(), switched(model, pair(model)):
        cache = DynamicCache()
        model(prefix, **{name: cache})
        for tokens in (rest[:, :3], rest, rest.flip(1)):  # two of them cross the boundary
            expected = model(torch.cat([prefix, tokens], dim=1), use_cache=False).logits
            found = model(tokens, **{name: copy.deepcopy(cache)}).logits
            torch.testing.assert_close(found, expected[:, -tokens.shape[1] :])
    with switched(model, pair(model, RECOVERY - 1)), pytest.raises(ValueError, match=name):
        model(rest, **{name: cache})


@pytest.mark.parametrize("pads", [5, RECOVERY])
def test_padding_counts_as_generate_infers_it(micro_models, ids, pads):
    """Without an attention mask, tokens of the pad id are padding."""
    model, row = micro_models("llama"), ids[:1, :20]
    padded = torch.cat([torch.full((1, pads), 2), row], dim=1)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with switched(model, pair(model)):
        alone = model.generate(row, **options)[:, 20:]
        given = model.generate(padded, attention_mask=padded.ne(2).long(), **options)
        inferred = model.generate(padded, **options)
        no_padding = model.generate(padded, **options | {"eos_token_id": [2, 7]})
    assert torch.equal(inferred[:, pads + 20 :], alone) and torch.equal(inferred, given)
    assert not torch.equal(no_padding[:, pads + 20 :], alone)


def test_threads_do_not_disturb_each_other(micro_models, ids):
    """As a server answers several requests, on both sides of the boundary and across it."""
    model = micro_models("llama")
    prompts = [ids[:1, :n] for n in (20, RECOVERY - 3, RECOVERY + 9, RECOVERY - 1)] * 4
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    with switched(model, pair(model)):
        expected = [model.generate(prompt, **options) for prompt in prompts]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda prompt: model.generate(prompt, **options), prompts))
    assert all(map(torch.equal, found, expected))


def test_hidden_states_are_those_of_the_new_tokens(micro_models, ids):
    model, name = micro_models("llama"), cache_name(micro_models("llama"))
    with torch.no_grad(), switched(model, pair(model)):
        cache = DynamicCache()
        model(ids[:, :RECOVERY], **{name: cache})
        found = model(ids[:, RECOVERY:], output_hidden_states=True, **{name: cache})
        whole = model(ids, output_hidden_states=True, use_cache=False)
    for ours, expected in zip(found.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(ours, expected[:, RECOVERY:])


def test_a_rescale_over_a_pair_applies_to_every_length(micro_models, ids):
    model, options = micro_models("llama"), {"max_new_tokens": 8, "do_sample": False}
    over, options = pair(model).long.replace(attention_factor=1.3), options | {"num_beams": 2}
    with rescaled(model, over):
        expected = model.generate(ids[:1, :20], eos_token_id=None, **options)
    with switched(model, pair(model)), rescaled(model, over):
        assert torch.equal(model.generate(ids[:1, :20], eos_token_id=None, **options), expected)


def test_a_pair_chooses_by_the_length(micro_models):
    both = pair(micro_models("llama"))
    assert both.recovery_length == RECOVERY
    assert both.choose(RECOVERY) is both.short
    assert both.choose(RECOVERY + 1) is both.long
