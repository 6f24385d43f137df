"""Language models: encoders, decoders, both, and those with experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.architectures.cases import (
    IDS,
    SMALL,
    Case,
    case,
    ids_of,
    transformers_package,
    words_apart,
)


def _encoder(name: str, **config: Any) -> Case:
    """A classifier of texts, with a mask."""
    transformers = transformers_package()
    options = {**SMALL, "num_labels": 3, **config}
    model = getattr(transformers, f"{name}ForSequenceClassification")(
        getattr(transformers, f"{name}Config")(**options)
    )
    ids = ids_of()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Case(model, (), inputs, options={"output": "logits"})


@case("BERT", "transformers")
def _bert(layers: int = 3) -> Case:
    return _encoder("Bert", num_hidden_layers=layers)


@case("RoBERTa", "transformers")
def _roberta() -> Case:
    return _encoder("Roberta")


@case("DistilBERT", "transformers")
def _distilbert() -> Case:
    return _encoder("DistilBert", dim=64, hidden_dim=128, n_layers=3, n_heads=4)


def _decoder(name: str, **config: Any) -> Case:
    """A language model; what it says next is explained."""
    transformers = transformers_package()
    options = {**SMALL, **config}
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**options)
    )
    inputs = {"input_ids": ids_of(), "use_cache": False}
    return Case(model, (), inputs, target=(-1, None), options={"output": "logits"})


@case("GPT-2", "transformers")
def _gpt2(layers: int = 3) -> Case:
    return _decoder("GPT2", n_embd=64, num_hidden_layers=layers, n_head=4, n_positions=64)


@case("Llama, grouped queries", "transformers")
def _llama(layers: int = 3) -> Case:
    return _decoder("Llama", num_hidden_layers=layers, num_key_value_heads=2)


@case("Qwen2", "transformers")
def _qwen2() -> Case:
    return _decoder("Qwen2", num_key_value_heads=2)


@case("Mistral", "transformers")
def _mistral() -> Case:
    return _decoder("Mistral", num_key_value_heads=2, sliding_window=6)


@case("T5", "transformers")
def _t5(layers: int = 2) -> Case:
    transformers = transformers_package()
    config = transformers.T5Config(
        vocab_size=100,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=layers,
        num_heads=4,
        decoder_start_token_id=0,
        **IDS,
    )
    inputs = {"input_ids": ids_of(), "decoder_input_ids": ids_of(6), "use_cache": False}
    return Case(
        transformers.T5ForConditionalGeneration(config),
        (),
        inputs,
        target=(-1, None),
        options={"output": "logits"},
    )


_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
"""What is enough of a model whose family has larger ones above."""


@case("ALBERT", "transformers")
def _albert() -> Case:
    return _encoder("Albert", **_TINY, embedding_size=16)


@case("ELECTRA", "transformers")
def _electra() -> Case:
    return _encoder("Electra", **_TINY, embedding_size=16)


@case("DeBERTa V2", "transformers")
def _deberta(layers: int = 2) -> Case:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    sizes = {"pooler_hidden_size": 32, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
    return _encoder("DebertaV2", **{**_TINY, "num_hidden_layers": layers}, **relative, **sizes)


@case("XLM-R", "transformers")
def _xlm_roberta() -> Case:
    return _encoder("XLMRoberta", **_TINY)


@case("MPNet", "transformers")
def _mpnet() -> Case:
    return _encoder("MPNet", **_TINY)


@case("ModernBERT", "transformers")
def _modernbert() -> Case:
    special = {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 6}
    return _encoder("ModernBert", **_TINY, **special)


@case("FNet", "transformers")
def _fnet() -> Case:
    built = _encoder("FNet", **_TINY)
    return Case(built.model, (), {"input_ids": ids_of()}, options={"output": "logits"})


@case("OPT", "transformers")
def _opt() -> Case:
    return _decoder("OPT", **_TINY, ffn_dim=64, word_embed_proj_dim=32)


@case("GPT-NeoX", "transformers")
def _gpt_neox() -> Case:
    return _decoder("GPTNeoX", **_TINY)


@case("GPT-J", "transformers")
def _gptj() -> Case:
    return _decoder("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)


@case("Bloom, ALiBi", "transformers")
def _bloom() -> Case:
    return _decoder("Bloom", hidden_size=32, n_layer=2, n_head=4)


@case("Falcon", "transformers")
def _falcon() -> Case:
    return _decoder("Falcon", **_TINY)


@case("Phi", "transformers")
def _phi() -> Case:
    return _decoder("Phi", **_TINY)


@case("Gemma", "transformers")
def _gemma() -> Case:
    return _decoder("Gemma", **_TINY, num_key_value_heads=1, head_dim=8)


@case("Gemma 2, soft caps", "transformers")
def _gemma2() -> Case:
    return _decoder("Gemma2", **_TINY, num_key_value_heads=2, head_dim=8, sliding_window=6)


@case("Qwen3", "transformers")
def _qwen3() -> Case:
    return _decoder("Qwen3", **_TINY, num_key_value_heads=2, head_dim=8)


@case("OLMo", "transformers")
def _olmo(layers: int = 2) -> Case:
    return _decoder("Olmo", **{**_TINY, "num_hidden_layers": layers})


@case("OLMo 2", "transformers")
def _olmo2() -> Case:
    return _decoder("Olmo2", **_TINY)


_EXPERTS = {**_TINY, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def _with_experts(name: str, products: str = "grouped_mm", **config: Any) -> Case:
    """A language model with experts, two of four for every word.

    Arguments:
        products: how transformers multiplies by their weights: one product of groups of words
            (`grouped_mm`), a matrix for each word (`batched_mm`), or expert by expert (`eager`).
            torch has the first in single precision only.
    """
    built = _decoder(name, **{**_EXPERTS, **config})
    model: Any = built.model
    model.set_experts_implementation(products)
    return replace(built, to_double=words_apart if products == "grouped_mm" else None)


@case("Mixtral, experts", "transformers")
def _mixtral(layers: int = 2) -> Case:
    return _with_experts("Mixtral", num_hidden_layers=layers, num_local_experts=4)


@case("Mixtral, expert by expert", "transformers")
def _mixtral_eager() -> Case:
    return _with_experts("Mixtral", "eager", num_local_experts=4)


@case("Mixtral, a matrix for each word", "transformers")
def _mixtral_batched() -> Case:
    return _with_experts("Mixtral", "batched_mm", num_local_experts=4)


@case("Qwen2-MoE, experts", "transformers")
def _qwen2_moe() -> Case:
    sizes: dict[str, Any] = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return _with_experts("Qwen2Moe", **sizes, num_experts=4)


@case("Qwen3-MoE, experts", "transformers")
def _qwen3_moe() -> Case:
    return _with_experts("Qwen3Moe", moe_intermediate_size=32, num_experts=4, head_dim=8)


@case("OLMoE, experts", "transformers")
def _olmoe() -> Case:
    return _with_experts("Olmoe", num_experts=4)


@case("DeepSeek V3, latent attention and experts", "transformers")
def _deepseek() -> Case:
    return _with_experts(
        "DeepseekV3",
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


@case("GPT-OSS, experts and sinks", "transformers")
def _gpt_oss() -> Case:
    return _with_experts("GptOss", num_local_experts=4, head_dim=8, sliding_window=6)


@case("Switch Transformer, experts", "transformers")
def _switch() -> Case:
    transformers = transformers_package()
    config = transformers.SwitchTransformersConfig(
        vocab_size=100,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_heads=4,
        num_experts=4,
        decoder_start_token_id=0,
        **IDS,
    )
    return _translator(transformers.SwitchTransformersForConditionalGeneration(config))


@case("BART", "transformers")
def _bart() -> Case:
    transformers = transformers_package()
    config = transformers.BartConfig(
        vocab_size=100,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        decoder_start_token_id=0,
        **IDS,
    )
    return _translator(transformers.BartForConditionalGeneration(config))


def _translator(model: Any) -> Case:
    """An encoder and a decoder; what is said next is explained."""
    inputs = {"input_ids": ids_of(), "decoder_input_ids": ids_of(6), "use_cache": False}
    return Case(model, (), inputs, target=(-1, None), options={"output": "logits"})
