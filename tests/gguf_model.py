"""Write a micro model as a GGUF file."""

import json

import gguf

from longrope.models.bundled import BUNDLED


def write_gguf(model, path, scaling=None):
    """The micro-Llama as llama.cpp's converter writes it, in float32."""
    config = model.config
    tokenizer = json.loads((BUNDLED / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        for kind, n in heads.items():
            if kind in name:  # llama.cpp keeps the two halves of a head interleaved
                weight = weight.reshape(n, 2, -1, weight.shape[1]).swapaxes(1, 2)
                weight = weight.reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
