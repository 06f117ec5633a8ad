"""Streamed models of several architectures against the same ones that transformers loads whole."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_streamed_model import ROUNDING, Whole, sequences, streamed

from verl_fp16.preflight.passes import measure, micro_batches

SHAPE = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS = {
    # One tensor for query, key and value; linear layers that are none of torch's; learned positions; tied.
    "GPT2LMHead": {"vocab_size": 259, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128},
    # Outputs that have no part in the loss.
    "BloomForCausalLM": {"vocab_size": 259, "hidden_size": 64, "n_layer": 2, "n_head": 2},
    # An embedding that scales what it gives; tied.
    "GemmaForCausalLM": {**SHAPE, "head_dim": 32},
    # Logits that are scaled behind the head.
    "GraniteForCausalLM": {**SHAPE, "logits_scaling": 4.0},
    # Other names of the experts in the checkpoint.
    "MixtralForCausalLM": {**SHAPE, "head_dim": 32, "num_local_experts": 4},
    # Latent attention, a dense layer first, a bias of the router that is a buffer.
    "DeepseekV3ForCausalLM": {
        **SHAPE,
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "n_shared_experts": 1,
    },
    # Experts with biases.
    "GptOssForCausalLM": {**SHAPE, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture(name, tmp_path):
    kind = name.removesuffix("ForCausalLM").removesuffix("LMHead")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[name])
    cls = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else name)
    cls(config).save_pretrained(tmp_path)
    model, watch = streamed(tmp_path)
    batches = micro_batches(sequences(20, 20, 13), seed=0)
    measured = measure(model, watch, batches, start=10)
    whole = Whole(tmp_path, batches, 2.0**10)
    gradients = measured.gradients[10]
    compared = {name for name in whole.outputs if name} & measured.outputs.keys()
    assert len(compared) >= 10
    for module in compared:
        assert measured.outputs[module].largest == pytest.approx(whole.outputs[module], rel=ROUNDING), module
    for module in compared & whole.gradients.keys() - {"transformer.wpe"}:  # one gradient for all sequences of a batch
        assert gradients.outputs[module].largest == pytest.approx(whole.gradients[module], rel=4 * ROUNDING), module
    tied = {id(parameter) for _, parameter in whole.model.get_input_embeddings().named_parameters()}
    for parameter_name, parameter in whole.model.named_parameters():
        if id(parameter) in tied or parameter.grad is None:  # each use of a tied weight is looked at by itself
            continue
        largest = float(parameter.grad.abs().max())
        found = gradients.weights[parameter_name].largest
        # A bias of the keys has a gradient of rounding errors alone.
        assert found == pytest.approx(largest, rel=4 * ROUNDING, abs=1e-3), parameter_name
    assert measured.loss_scale.verified
