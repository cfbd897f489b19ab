"""Teach a small model to route support tickets, with nothing but the `openai` client and two files.

Does not cover: tools; `examples/shop` trains an agent that calls some.
"""

import json
import time
from pathlib import Path

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY say where
tickets = Path(__file__).parent / "tickets"
train, valid = (client.files.create(file=tickets / f"{name}.jsonl", purpose="fine-tune") for name in ("train", "valid"))
grader = {
    "type": "string_check",
    "name": "label",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "{{item.label}}",
}
job = client.fine_tuning.jobs.create(
    model="smollm2-135m-instruct",
    training_file=train.id,
    validation_file=valid.id,
    method={"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": {"n_epochs": 1}}},  # type: ignore
    extra_body={"hone": {"max_tokens_per_turn": 8}},
)
while job.status not in ("succeeded", "failed", "cancelled"):
    time.sleep(2)
    job = client.fine_tuning.jobs.retrieve(job.id)
events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
print("\n".join(event.message for event in reversed(events)))  # they come newest first
assert job.fine_tuned_model, job.error

ticket = json.loads((tickets / "valid.jsonl").read_text().splitlines()[0])
answer = client.chat.completions.create(model=job.fine_tuned_model, messages=ticket["messages"], temperature=0)
print(ticket["messages"][-1]["content"], "→", answer.choices[0].message.content, f"(expected: {ticket['label']})")
