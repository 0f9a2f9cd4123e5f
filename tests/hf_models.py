"""Models of Hugging Face's transformers, tiny ones made from configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

VOCABULARY = 23


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    ))  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(
        vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=16, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    ))  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCABULARY, d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, dropout_rate=0, decoder_start_token_id=0,
    ))  # fmt: skip


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
        output_router_logits=True,
    ))  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {made.__name__: made for made in (gpt2, llama, bert, t5, mixtral)}
