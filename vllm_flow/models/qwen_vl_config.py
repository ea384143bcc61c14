"""Qwen-VL's ``config.json`` as it is published, read without the code that lies beside it.

Its decoder is that of Qwen2 under other names, so ``text_config`` is a Qwen2 configuration, and vLLM's
Qwen2 runs it. Knows transformers' configurations, nothing of vLLM.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, Qwen2Config

QUERIES = 256
"""Tokens of a picture where ``visual`` does not say: published checkpoints leave it out."""


class QwenVLConfig(PreTrainedConfig):
    """The published fields, and a Qwen2 configuration of the decoder.

    Args:
        visual: the tower: ``image_size``, ``patch_size``, ``width``, ``layers``, ``heads``, ``mlp_ratio``,
            ``output_dim``, ``image_start_id``. None is a Qwen that knows no pictures.
        intermediate_size: twice the width of the MLP's hidden layer: gate and up are counted together.
        seq_length: what the decoder was trained on, in tokens. Past it the published code scales queries
            (LogN) and the rotary base (dynamic NTK).
        text_config: the decoder's, where this configuration was written by transformers.
    """

    model_type = "qwen"
    sub_configs = {"text_config": Qwen2Config}

    def __init__(
        self,
        visual: dict[str, Any] | None = None,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        kv_channels: int = 128,
        layer_norm_epsilon: float = 1e-6,
        rotary_emb_base: float = 10000,
        rotary_pct: float = 1.0,
        seq_length: int = 2048,
        max_position_embeddings: int = 8192,
        use_dynamic_ntk: bool = True,
        use_logn_attn: bool = True,
        no_bias: bool = True,
        tie_word_embeddings: bool = False,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        **others: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = Qwen2Config(**text_config)
        self.visual = visual
        self.seq_length = seq_length
        self.use_dynamic_ntk = use_dynamic_ntk
        self.use_logn_attn = use_logn_attn
        self.kv_channels = kv_channels
        self.rotary_pct = rotary_pct
        self.no_bias = no_bias
        self.text_config = text_config or Qwen2Config(
            architectures=["Qwen2ForCausalLM"],
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size // 2,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_attention_heads,
            rms_norm_eps=layer_norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": float(rotary_emb_base)},
            max_position_embeddings=seq_length if self.is_scaled else max_position_embeddings,
            tie_word_embeddings=tie_word_embeddings,
        )
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)

    @property
    def is_scaled(self) -> bool:
        """Whether prompts longer than ``seq_length`` are computed otherwise than shorter ones."""
        return self.use_dynamic_ntk or self.use_logn_attn

    @property
    def image_tokens(self) -> int:
        """Tokens of a picture."""
        return int((self.visual or {}).get("n_queries", QUERIES))

    @property
    def image_start_id(self) -> int:
        """Token before a picture; the one after it and the picture's own follow in the vocabulary."""
        assert self.visual is not None
        return int(self.visual["image_start_id"])

    @property
    def image_token_id(self) -> int:
        """Token that stands where a picture's embeddings come."""
        return self.image_start_id + 2


def obstacle(config: QwenVLConfig, max_model_len: int) -> str | None:
    """Why this model cannot be served at this length, None if it can."""
    if not config.visual:
        return (
            "this QWenLMHeadModel has no 'visual' in its config.json, so it knows no pictures: "
            "vLLM-Flow serves Qwen-VL and Qwen-VL-Chat, and vLLM served Qwen until version 0.23"
        )
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    if config.rotary_pct != 1 or not config.no_bias or config.kv_channels != head:
        return (
            "vLLM-Flow serves Qwen-VL with rotary_pct 1, no_bias true and kv_channels equal to "
            f"hidden_size / num_attention_heads, but config.json has rotary_pct {config.rotary_pct}, "
            f"no_bias {str(config.no_bias).lower()} and kv_channels {config.kv_channels} beside {head}"
        )
    if config.is_scaled and max_model_len > config.seq_length:
        return (
            f"past the {config.seq_length} tokens it was trained on, Qwen-VL scales its queries (LogN) "
            "and its rotary base (dynamic NTK), which vLLM-Flow does not do: set --max-model-len to "
            f"{config.seq_length} or less, it is {max_model_len}"
        )
    return None


def check(config: QwenVLConfig, max_model_len: int) -> None:
    """Refuse what cannot be served.

    Raises:
        ValueError: the reason, and what to do.
    """
    found = obstacle(config, max_model_len)
    if found is not None:
        raise ValueError(f"{found[0].upper()}{found[1:]}.")
