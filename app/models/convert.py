"""Turn a GGUF file into the safetensors layout, once: `python -m app.models.convert FILE OUT_DIR`.

Does not cover: which file and where from (`pull`). Always its own process, so that torch never enters the service;
that is why this module alone in `app` imports torch, inside a function.
"""

from __future__ import annotations

import sys
from pathlib import Path

MISSING_EXTRA = 3  # exit status: torch or transformers is not installed


def convert(gguf: Path, out: Path) -> None:
    """Dequantise every weight, store bf16 safetensors, config, generation config and tokenizer in `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # A dense model must not claim to be quantised: vLLM and PEFT would look for packed weights.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(out))
    AutoTokenizer.from_pretrained(where, gguf_file=name).save_pretrained(str(out))
    if _pre_tokenizer_of(gguf) == "smollm":
        _split_digits(out / "tokenizer.json")


def _pre_tokenizer_of(gguf: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    return None if field is None else bytes(field.parts[field.data[0]]).decode("utf-8")


def _split_digits(tokenizer_json: Path) -> None:
    """Restore the digit rule of this family, which the GGUF only names.

    Without it text and single spaces come out the same, runs of spaces before a digit do not.
    """
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.save(str(tokenizer_json))


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        sys.stderr.write("usage: python -m app.models.convert FILE.gguf OUT_DIR\n")
        return 2
    try:
        convert(Path(argv[0]), Path(argv[1]))
    except ImportError as error:
        sys.stderr.write(f"{error}\n")
        return MISSING_EXTRA
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
