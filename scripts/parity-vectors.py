#!/usr/bin/env python3
"""Logits of Hugging Face's own models, for what candle-transformers lacks: examples/common/vectors.

    pip install torch transformers && python scripts/parity-vectors.py

Each is a tiny model of random weights with its config.json, and `vectors.safetensors`: tokens, and the logits after each.
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Phi3Config, Phi3ForCausalLM

SIZES = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)
TOKENS = 60

MODELS = {
    # A prompt longer than the window; scores scaled by another number than the head dimension's; two rotary bases.
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(
        **SIZES, num_hidden_layers=3, head_dim=16, sliding_window=10, query_pre_attn_scalar=24,
        max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    # More tokens than the original context, so that the long factors apply, and attention is sharpened.
    "phi3-longrope": (Phi3ForCausalLM, Phi3Config(
        **SIZES, num_hidden_layers=2, original_max_position_embeddings=32, max_position_embeddings=256, sliding_window=None,
        tie_word_embeddings=False,
        rope_scaling=dict(type="longrope", rope_type="longrope", rope_theta=10000.0,
                          short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 1.5, 3.0, 6.0]))),
}

root = pathlib.Path(__file__).parent.parent / "examples/common/vectors"
for name, (make, config) in MODELS.items():
    torch.manual_seed(1)
    config._attn_implementation = "eager"
    model = make(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) - 0.5)
        tokens = torch.randint(3, config.vocab_size, (1, TOKENS))
        logits = model(tokens, use_cache=False).logits[0]
    folder = root / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"tokens": tokens[0].to(torch.uint32), "logits": logits.contiguous()}, folder / "vectors.safetensors")
    print(name, logits.abs().max().item())
