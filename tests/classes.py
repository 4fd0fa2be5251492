"""Healthy adapters of many model classes, made with PEFT: every task type of PEFT, tiny random bases.

In: `CASES`, each an adapter as somebody trains one. Out: `make_base` and `make_adapter`, which write the folders as
transformers and PEFT save them, and `landed`, which loads one in real PEFT and compares every tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {"max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWERS = {
    **{"vocab_size": 96, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16}
AUDIO = {
    **{"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    **{"conv_dim": (16, 16), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "llama-classifier": ("LlamaConfig", "LlamaForSequenceClassification", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen2-classifier": ("Qwen2Config", "Qwen2ForSequenceClassification", GROUPED | {"num_labels": 1}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | {"head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GROUPED | {"num_local_experts": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS}),
    "gpt-neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}
        | TOKENS,
    ),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("BertConfig", "BertForMaskedLM", TEXT),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", TEXT | {"num_labels": 3}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {"vocab_size": 96, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", TEXT),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", TEXT),
    "deberta": ("DebertaV2Config", "DebertaV2ForMaskedLM", TEXT),
    "electra": ("ElectraConfig", "ElectraForPreTraining", TEXT),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        TEXT | TOKENS | {"cls_token_id": 1, "sep_token_id": 2} | {"decoder_start_token_id": None},
    ),
    "esm": ("EsmConfig", "EsmForMaskedLM", TEXT | {"pad_token_id": 0, "mask_token_id": 1}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", TOWERS | {"max_position_embeddings": 64}),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        TOWERS | TOKENS | {"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 32},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE | {"patch_size": 8}),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    ),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    ),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", AUDIO),
    "unet": (
        "",
        "UNet2DConditionModel",
        {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 32), "norm_num_groups": 8}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": TEXT | {"bos_token_id": 1, "eos_token_id": 2},
            "vision_config": IMAGE | {"patch_size": 8},
            "projection_dim": 32,
        },
    ),
}
"""Config class, the class that the base is saved as, and the sizes. Models of diffusers have no config class."""

QKV = ("q_proj", "k_proj", "v_proj")
BERT = ("query", "key", "value")


@dataclass(frozen=True)
class Case:
    """One healthy adapter: its base, the class it was trained as, PEFT's task type, and its LoraConfig."""

    base: str
    model: str
    task: str | None
    targets: tuple[str, ...] | str = QKV
    settings: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)
    edit: dict[str, Any] = field(default_factory=dict)
    """Fields of adapter_config.json as older versions of PEFT and other trainers wrote them."""


CASES: dict[str, Case] = {
    # Causal language models.
    "llama": Case("llama", "LlamaForCausalLM", "CAUSAL_LM"),
    "llama-no-task": Case("llama", "LlamaForCausalLM", None),
    "llama-head": Case("llama", "LlamaForCausalLM", "CAUSAL_LM", (*QKV, "lm_head")),
    "llama-embeddings": Case("llama", "LlamaForCausalLM", "CAUSAL_LM", (*QKV, "embed_tokens")),
    "llama-layers": Case("llama", "LlamaForCausalLM", "CAUSAL_LM", QKV, {"layers_to_transform": [1]}),
    "llama-expression": Case("llama", "LlamaForCausalLM", "CAUSAL_LM", r".*\.mlp\.(up|down)_proj"),
    "mistral": Case("mistral", "MistralForCausalLM", "CAUSAL_LM", "all-linear"),
    "qwen2": Case("qwen2", "Qwen2ForCausalLM", "CAUSAL_LM", "all-linear"),
    "qwen2-rslora": Case("qwen2", "Qwen2ForCausalLM", "CAUSAL_LM", QKV, {"use_rslora": True}),
    "qwen3": Case("qwen3", "Qwen3ForCausalLM", "CAUSAL_LM", (*QKV, "o_proj")),
    "gemma3": Case("gemma3", "Gemma3ForCausalLM", "CAUSAL_LM", "all-linear"),
    "phi3": Case("phi3", "Phi3ForCausalLM", "CAUSAL_LM", ("o_proj", "down_proj")),
    "mixtral": Case("mixtral", "MixtralForCausalLM", "CAUSAL_LM"),
    "gpt2": Case("gpt2", "GPT2LMHeadModel", "CAUSAL_LM", ("c_attn",), {"fan_in_fan_out": True}),
    "gpt2-projections": Case(
        "gpt2", "GPT2LMHeadModel", "CAUSAL_LM", ("c_attn", "c_proj", "c_fc"), {"fan_in_fan_out": True}
    ),
    "gpt-neo": Case("gpt-neo", "GPTNeoForCausalLM", "CAUSAL_LM", ("q_proj", "v_proj")),
    "gpt-neox": Case("gpt-neox", "GPTNeoXForCausalLM", "CAUSAL_LM", ("query_key_value",)),
    "opt": Case("opt", "OPTForCausalLM", "CAUSAL_LM", ("q_proj", "v_proj")),
    "bloom": Case("bloom", "BloomForCausalLM", "CAUSAL_LM", ("query_key_value",)),
    # Sequence classifiers and reward models.
    "distilbert-classifier": Case(
        "distilbert", "DistilBertForSequenceClassification", "SEQ_CLS", ("q_lin", "v_lin"), load={"num_labels": 2}
    ),
    "distilbert-old": Case(
        "distilbert",
        "DistilBertForSequenceClassification",
        "SEQ_CLS",
        ("q_lin", "v_lin"),
        edit={"modules_to_save": None},
    ),
    "distilbert-named": Case(
        "distilbert",
        "DistilBertForSequenceClassification",
        "SEQ_CLS",
        ("q_lin", "k_lin", "v_lin"),
        {"modules_to_save": ["pre_classifier", "classifier"]},
    ),
    "bert-classifier": Case("bert", "BertForSequenceClassification", "SEQ_CLS", BERT),
    "bert-classifier-base": Case("bert-classifier", "BertForSequenceClassification", "SEQ_CLS", BERT),
    "bert-classifier-dense": Case("bert", "BertForSequenceClassification", "SEQ_CLS", (*BERT, "dense")),
    "bert-classifier-bias": Case("bert", "BertForSequenceClassification", "SEQ_CLS", BERT, {"bias": "all"}),
    "roberta-classifier": Case("roberta", "RobertaForSequenceClassification", "SEQ_CLS", ("query", "value")),
    "roberta-classifier-old": Case(
        "roberta", "RobertaForSequenceClassification", "SEQ_CLS", ("query", "value"), edit={"modules_to_save": None}
    ),
    "xlm-roberta-classifier": Case("xlm-roberta", "XLMRobertaForSequenceClassification", "SEQ_CLS", BERT),
    "deberta-classifier": Case(
        "deberta", "DebertaV2ForSequenceClassification", "SEQ_CLS", ("query_proj", "value_proj")
    ),
    "electra-classifier": Case("electra", "ElectraForSequenceClassification", "SEQ_CLS", BERT),
    "modernbert-classifier": Case("modernbert", "ModernBertForSequenceClassification", "SEQ_CLS", ("Wqkv", "Wo")),
    "esm-classifier": Case("esm", "EsmForSequenceClassification", "SEQ_CLS", BERT),
    "gpt2-classifier": Case("gpt2", "GPT2ForSequenceClassification", "SEQ_CLS", ("c_attn",), {"fan_in_fan_out": True}),
    "opt-classifier": Case("opt", "OPTForSequenceClassification", "SEQ_CLS", ("q_proj", "v_proj")),
    "llama-classifier": Case("llama-classifier", "LlamaForSequenceClassification", "SEQ_CLS"),
    "llama-classifier-causal-base": Case("llama", "LlamaForSequenceClassification", "SEQ_CLS"),
    "qwen2-reward": Case(
        "qwen2-classifier",
        "Qwen2ForSequenceClassification",
        "SEQ_CLS",
        (*QKV, "o_proj"),
        {"modules_to_save": ["score"]},
    ),
    "qwen2-reward-causal-base": Case(
        "qwen2", "Qwen2ForSequenceClassification", "SEQ_CLS", "all-linear", load={"num_labels": 1}
    ),
    "t5-classifier": Case("t5", "T5ForSequenceClassification", "SEQ_CLS", ("q", "v")),
    "bart-classifier": Case("bart", "BartForSequenceClassification", "SEQ_CLS", ("q_proj", "v_proj")),
    # Token classifiers.
    "bert-tokens": Case("bert", "BertForTokenClassification", "TOKEN_CLS", BERT, load={"num_labels": 9}),
    "distilbert-tokens": Case("distilbert", "DistilBertForTokenClassification", "TOKEN_CLS", ("q_lin", "v_lin")),
    "roberta-tokens": Case("roberta", "RobertaForTokenClassification", "TOKEN_CLS", BERT),
    "esm-tokens": Case("esm", "EsmForTokenClassification", "TOKEN_CLS", BERT, edit={"modules_to_save": None}),
    "modernbert-tokens": Case("modernbert", "ModernBertForTokenClassification", "TOKEN_CLS", ("Wqkv",)),
    "llama-tokens": Case("llama", "LlamaForTokenClassification", "TOKEN_CLS"),
    # Question answering.
    "bert-answers": Case("bert", "BertForQuestionAnswering", "QUESTION_ANS", BERT),
    "distilbert-answers": Case("distilbert", "DistilBertForQuestionAnswering", "QUESTION_ANS", ("q_lin", "v_lin")),
    "llama-answers": Case("llama", "LlamaForQuestionAnswering", "QUESTION_ANS"),
    # Feature extraction: embedding and reranking models.
    "bert-features": Case("bert", "BertModel", "FEATURE_EXTRACTION", BERT),
    "xlm-roberta-features": Case("xlm-roberta", "XLMRobertaModel", "FEATURE_EXTRACTION", ("query", "value", "dense")),
    "qwen2-features": Case("qwen2", "Qwen2Model", "FEATURE_EXTRACTION", (*QKV, "o_proj")),
    "bert-features-no-task": Case("bert", "BertModel", None, BERT),
    # Encoder-decoder models.
    "t5": Case("t5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", ("q", "v")),
    "t5-feed-forward": Case("t5", "T5ForConditionalGeneration", "SEQ_2_SEQ_LM", ("q", "k", "v", "o", "wi", "wo")),
    "t5-encoder": Case("t5", "T5EncoderModel", "FEATURE_EXTRACTION", ("q", "v")),
    "bart": Case("bart", "BartForConditionalGeneration", "SEQ_2_SEQ_LM", ("q_proj", "v_proj")),
    "bart-everything": Case("bart", "BartForConditionalGeneration", "SEQ_2_SEQ_LM", (*QKV, "out_proj", "fc1", "fc2")),
    "whisper": Case("whisper", "WhisperForConditionalGeneration", None, ("q_proj", "v_proj")),
    "whisper-seq2seq": Case("whisper", "WhisperForConditionalGeneration", "SEQ_2_SEQ_LM", ("q_proj", "v_proj")),
    "whisper-encoder": Case(
        "whisper", "WhisperForConditionalGeneration", None, r"model\.encoder\.layers\.\d+\.self_attn\.(q|v)_proj"
    ),
    "whisper-no-mapping": Case(
        "whisper", "WhisperForConditionalGeneration", None, ("q_proj", "v_proj"), edit={"auto_mapping": None}
    ),
    # Vision and audio.
    "vit": Case("vit", "ViTForImageClassification", None, ("q_proj", "v_proj"), {"modules_to_save": ["classifier"]}),
    "vit-labels": Case(
        "vit",
        "ViTForImageClassification",
        None,
        ("q_proj", "v_proj"),
        {"modules_to_save": ["classifier"]},
        {"num_labels": 5, "ignore_mismatched_sizes": True},
    ),
    "vit-classifier": Case("vit", "ViTForImageClassification", "SEQ_CLS", ("q_proj", "v_proj")),
    "swin": Case("swin", "SwinForImageClassification", None, ("q_proj", "v_proj"), {"modules_to_save": ["classifier"]}),
    "convnext": Case("convnext", "ConvNextForImageClassification", None, ("pwconv1", "pwconv2")),
    "wav2vec2": Case("wav2vec2", "Wav2Vec2ForCTC", None, ("q_proj", "v_proj")),
    "wav2vec2-classifier": Case("wav2vec2", "Wav2Vec2ForSequenceClassification", "SEQ_CLS", ("q_proj", "v_proj")),
    "clip": Case("clip", "CLIPModel", None, ("q_proj", "v_proj")),
    "unet": Case("unet", "UNet2DConditionModel", None, ("to_q", "to_k", "to_v", "to_out.0")),
    "unet-convolutions": Case("unet", "UNet2DConditionModel", None, ("to_q", "to_v", "conv1", "proj_in")),
    "clip-features": Case("clip", "CLIPModel", "FEATURE_EXTRACTION", "all-linear"),
}


def make_base(folder: Path, base: str) -> Path:
    """The base as transformers saves it, with random weights."""
    import torch
    import transformers

    config, model, sizes = BASES[base]
    torch.manual_seed(0)
    settings = (getattr(transformers, config)(**sizes),) if config else ()
    _class_of(model)(*settings, **({} if config else sizes)).save_pretrained(folder)
    return folder


def _class_of(model: str) -> Any:
    import diffusers
    import transformers

    return getattr(transformers, model, None) or getattr(diffusers, model)


def make_adapter(folder: Path, base: Path, case: Case) -> Path:
    """The adapter as PEFT saves it, with everything that it trains moved from where it started."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = case.targets if isinstance(case.targets, str) else list(case.targets)
    model = get_peft_model(
        loaded(base, case), LoraConfig(task_type=case.task, r=4, lora_alpha=8, target_modules=targets, **case.settings)
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    if case.edit:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | case.edit, indent=2))
    return folder


def loaded(base: Path, case: Case) -> Any:
    import torch

    torch.manual_seed(0)
    return _class_of(case.model).from_pretrained(base, **case.load)


def landed(adapter: Path, base: Path, case: Case) -> dict[str, bool]:
    """Each tensor of the file -> whether PEFT loads it: the model has its values, under its name.

    Raises what PEFT raises if it refuses the adapter.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    model = PeftModel.from_pretrained(loaded(base, case), adapter)
    live = {_saved_name(name): value for name, value in model.state_dict().items()}
    # For some classes PEFT adds its prefix to names that lack it.
    live |= {name.removeprefix("base_model.model."): value for name, value in live.items()}
    stored = load_file(adapter / "adapter_model.safetensors")
    return {
        name: name in live and live[name].shape == value.shape and bool(torch.equal(live[name], value.to(live[name])))
        for name, value in stored.items()
    }


@cache
def _saved_name(live: str) -> str:
    """The name of a parameter of the model as `save_pretrained` writes it."""
    return live.replace(".modules_to_save.default.", ".").replace(".default", "")
