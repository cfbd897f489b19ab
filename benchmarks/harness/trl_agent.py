"""The same agent job in TRL's own `GRPOTrainer` with tools, as its documentation shows it; run as a process.

    python -m benchmarks.harness.trl_agent SPEC.json RESULT.json

Does not cover: anything of ours except the renderer that the prompt is compared with. The tools are coroutines: TRL
1.16.0 has three kinds, plain functions (called one after the other), coroutines (those of one assistant message
together) and methods of an environment (as either). In all of them the rollouts of a batch take turns: the loop over
the batch waits for one rollout's tools before it looks at the next. Coroutines are the fastest of the three.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import httpx
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template

from app.models.catalogue import read_card
from app.rendering.hermes import HOW_TO_CALL
from app.rendering.registry import load_renderer
from benchmarks.harness.agent_task import TOOLS, score
from benchmarks.harness.trl_spec import Result, Spec

# The text of our Hermes renderer as a template: the same tokens on both sides. Its calls are the JSON blocks of TRL's
# own response template for Qwen.
TEMPLATE = (
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>tool\n' }}{%- else %}{{ '\n' }}"
    "{%- endif %}{{ '<tool_response>' + m.content + '</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{%- if loop.first and m.role == 'system' and tools %}{{ '\n<tools>\n' }}"
    "{%- for tool in tools %}{{ (tool | tojson) + '\n' }}{%- endfor %}{{ '</tools>\n' + how_to_call }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{%- set f = call.function or call %}"
    "{%- if m.content or not loop.first %}{{ '\n' }}{%- endif %}"
    "{{ '<tool_call>{\"name\": ' + (f.name | tojson) + ', \"arguments\": ' }}"
    "{{- f.arguments if f.arguments is string else f.arguments | tojson }}{{ '}</tool_call>' }}{%- endfor %}"
    "{{ '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)


class Clock(TrainerCallback):  # type: ignore[misc]  # untyped base
    """When the loop began and when each step ended."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())


def run(spec: Spec) -> Result:
    torch.set_num_threads(spec.threads)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    tokenizer.chat_template = f"{{%- set how_to_call = {json.dumps(HOW_TO_CALL)} %}}" + TEMPLATE
    tokenizer.response_template = qwen3_template
    http = httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=1000))

    async def lookup(item: str) -> str:
        """Get the price of an item.

        Args:
            item: The item.
        """
        return await _ask("lookup", item)

    async def stock(item: str) -> str:
        """Get how many of an item are left.

        Args:
            item: The item.
        """
        return await _ask("stock", item)

    async def _ask(name: str, item: str) -> str:
        answer = await http.post(f"{spec.tool_url}/tools/{name}", json={"arguments": json.dumps({"item": item})})
        output: str = answer.raise_for_status().json()["output"]
        return output

    for tool in (lookup, stock):
        del tool.__annotations__["return"]  # TRL would write it into the schema: other tokens than on our side
    rewards: list[float] = []

    def reward(completions: list[list[dict[str, Any]]], wanted: list[list[str]], **_: Any) -> list[float]:
        found = [_score(messages, items) for messages, items in zip(completions, wanted, strict=True)]
        rewards.extend(found)
        return found

    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=spec.model,
            reward_funcs=reward,
            args=_arguments(spec, scratch),
            train_dataset=Dataset.from_list([{"prompt": r["messages"], "wanted": r["wanted"]} for r in spec.rows]),
            processing_class=tokenizer,
            tools=[lookup, stock],
            peft_config=LoraConfig(
                r=spec.lora_rank, lora_alpha=2 * spec.lora_rank, target_modules=spec.lora_targets, lora_dropout=0.0,
                task_type="CAUSAL_LM",
            ),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    lengths = [
        entry["completions/mean_length"] for entry in trainer.state.log_history if "completions/mean_length" in entry
    ]
    per_step = spec.batch * spec.group
    spans = [b - a for a, b in itertools.pairwise(clock.marks)]
    return Result(
        seconds=clock.marks[-1] - clock.marks[0],
        rollouts=len(rewards),
        tokens=round(sum(lengths) * per_step),
        reward=sum(rewards) / len(rewards),
        step_seconds=spans,
        same_prompt_tokens=_same_prompt(spec, tokenizer, [lookup, stock]),
    )


def _arguments(spec: Spec, scratch: str) -> GRPOConfig:
    per_step = spec.batch * spec.group
    on_gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=scratch,
        per_device_train_batch_size=spec.micro,
        gradient_accumulation_steps=per_step // spec.micro,
        num_generations=spec.group,
        max_completion_length=spec.max_tokens,
        max_tool_calling_iterations=spec.turns - 1,  # assistant messages after the first
        max_steps=spec.steps,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        loss_type="dapo",
        temperature=1.0,
        top_k=0,
        bf16=spec.dtype == "bfloat16",
        model_init_kwargs={"dtype": spec.dtype},
        gradient_checkpointing=False,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=spec.seed,
    )


def _score(messages: list[dict[str, Any]], wanted: list[str]) -> float:
    made = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    last = messages[-1] if messages else {}
    text = str(last.get("content") or "") if last.get("role") == "assistant" else ""
    return score([(call.get("name", ""), call.get("arguments")) for call in made], text, wanted)


def _same_prompt(spec: Spec, tokenizer: Any, tools: list[Any]) -> bool:
    """Whether our renderer and the template above write the first row's prompt with the same tokens."""
    messages = spec.rows[0]["messages"]
    theirs = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return list(theirs) == load_renderer(read_card(Path(spec.model))).prompt(messages, TOOLS)


def main() -> None:
    spec_file, result_file = map(Path, sys.argv[1:])
    result = run(Spec(**json.loads(spec_file.read_text())))
    result_file.write_text(json.dumps(result.__dict__))


if __name__ == "__main__":
    main()
