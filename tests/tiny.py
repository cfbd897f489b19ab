"""Tiny random models for the whole test suite: made offline in about a second, seeded, registered in the catalogue.

Does not cover: a model that can do anything. `make_tiny_llama` is a Llama with ChatML tokens and the renderer
`hermes`; `make_tiny_qwen3` a Qwen3 (q/k norm) with Qwen's tokens and the renderer `qwen3`. Weights are fp32, about
0.1 M parameters. The `weightless` makers write the same text side without torch.
Make one per session: `make_tiny_llama(models_dir / "tiny-llama")`, then `Catalogue(models_dir).get("tiny-llama")`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from app.models.catalogue import ALL_LINEAR, BaseModel
from app.models.register import finish

CONTEXT = 2048
VOCABULARY = 640
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

_CORPUS = [
    "Answer with the tools. How much is the brown hat? What does the pink scarf cost? The answer is 84.",
    "system user assistant tool role content name arguments description parameters properties required",
    '<tools>\n{"type": "function", "function": {"name": "lookup", "description": "Get the price of an item in '
    'dollars.", "parameters": {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}}}\n'
    '</tools>\nTo call a tool, write <tool_call>{"name": "<tool>", "arguments": {<args>}}</tool_call>.',
    '<tool_call>{"name": "lookup", "arguments": {"item": "brown hat"}}</tool_call><tool_response>31</tool_response>',
    "You may call one or more functions to assist with the user query. For each function call, return a json object.",
]
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
    # Five times the usual: with 0.02 every distribution is flat and no test could tell two adapters apart.
    "initializer_range": 0.1,
}


def make_tiny_llama(directory: Path, *, seed: int = 0, **config: Any) -> BaseModel:
    """Write the model into `directory` (its name is the model id). `config` overrides the shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _write_weights(directory, _tokenizer(), LlamaForCausalLM, LlamaConfig, seed, config)
    return _finish(directory, _tokenizer(), "hermes")


def make_tiny_qwen3(directory: Path, *, seed: int = 0, **config: Any) -> BaseModel:
    """As `make_tiny_llama`, with Qwen3's architecture, tags and tool format."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    _write_weights(directory, _qwen3_tokenizer(), Qwen3ForCausalLM, Qwen3Config, seed, config)
    return _finish(directory, _qwen3_tokenizer(), "qwen3")


def make_weightless_llama(directory: Path) -> BaseModel:
    """The tiny Llama's text side under an empty weight file: for tests that render and never sample. No torch."""
    _write_empty(directory, "llama")
    return _finish(directory, _tokenizer(), "hermes")


def make_weightless_qwen3(directory: Path) -> BaseModel:
    """As `make_weightless_llama`, for the tiny Qwen3."""
    _write_empty(directory, "qwen3")
    return _finish(directory, _qwen3_tokenizer(), "qwen3")


def _qwen3_tokenizer() -> Tokenizer:
    tokenizer = _tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    # As in the real vocabulary: the tags are single tokens, but not special ones.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in QWEN_TAGS])
    return tokenizer


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 2, trainer)
    return tokenizer


def _write_weights(
    directory: Path, tokenizer: Tokenizer, model_class: Any, config_class: Any, seed: int, config: dict[str, Any]
) -> None:
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id("<|im_end|>")
    shape = {
        **_SHAPE,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": tokenizer.token_to_id("<|im_start|>"),
        "eos_token_id": end,
        "pad_token_id": end,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**shape))
    model.save_pretrained(directory)


def _write_empty(directory: Path, model_type: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"model_type": model_type, "max_position_embeddings": CONTEXT}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({}, directory / "model.safetensors")


def _finish(directory: Path, tokenizer: Tokenizer, renderer: str) -> BaseModel:
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "model_max_length": CONTEXT,
        "chat_template": _CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = BaseModel(
        id=directory.name,
        path=directory.resolve(),
        renderer=renderer,
        context=CONTEXT,
        lora_targets=ALL_LINEAR,
        base_learning_rate=1e-3,
        lora_rank=4,
        licence="apache-2.0",
        hub_id=None,
        created=1_795_000_000,
    )
    finish(directory, model)
    return model
