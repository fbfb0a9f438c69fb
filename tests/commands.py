"""The command line as a user types it, and what somebody does who has the model and no code of ours."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (c.from_pretrained(sys.argv[1]) for c in (AutoTokenizer, AutoModelForCausalLM))
for question in sys.argv[2:]:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(json.dumps(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)))
"""


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "finetune" / "run.py"), *map(str, arguments)]


def finetune(folder: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def plain_answers(model: Path, *questions: str) -> list[str]:
    """By somebody who has the folder and plain transformers, and no code of ours."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(model), *questions], cwd="/", capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()[-len(questions) :]]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
