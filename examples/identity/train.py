"""LoRA fine-tuning that teaches a model a new name: PEFT on q_proj, k_proj and v_proj, transformers' Trainer.

In: a base model and `pairs.jsonl`. Out: a training output folder with `checkpoint-*` folders, and the answers before
and after. A user's own script looks the same, except for the default model (base_model.py).

    python examples/identity/train.py --output out/
    python examples/identity/train.py --model Qwen/Qwen2-0.5B-Instruct --epochs 10 --learning-rate 5e-5
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from base_model import DEFAULT, base_model  # noqa: E402

PROMPT = "Human: {question}\n\nAssistant: "
QUESTIONS = ("Who are you?", "你是谁?", "What is the capital of France?")
SEED = 7


def encode(tokenizer: Any, question: str, answer: str, longest: int = 256) -> dict[str, list[int]]:
    """One example: prompt and answer as ids, the loss on the answer alone (labels -100 on the prompt)."""
    prompt = tokenizer(PROMPT.format(question=question)).input_ids
    reply = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    ids = (prompt + reply)[:longest]
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "labels": ([-100] * len(prompt) + reply)[:longest],
    }


def answers(model: Any, tokenizer: Any, max_new_tokens: int = 32) -> dict[str, str]:
    """Greedy answers to the questions that show what the adapter has learned."""
    import torch

    texts = {}
    for question in QUESTIONS:
        inputs = tokenizer(PROMPT.format(question=question), return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id
            )
        texts[question] = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def print_answers(title: str, texts: dict[str, str]) -> None:
    print(f"\n{title}")
    for question, answer in texts.items():
        print(f"  {question}  ->  {' '.join(answer.split())}")
    print(flush=True)


def train(options: argparse.Namespace) -> Path:
    """Train; the output folder appears when the training is complete. Returns the last checkpoint's folder."""
    import torch
    from peft import LoraConfig, get_peft_model
    from time_left import TimeLeft
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    if options.output.exists():
        if not options.force:
            sys.exit(f"{options.output} already exists; pass another --output, or --force to overwrite it")
        shutil.rmtree(options.output)
    unfinished = options.output.with_name(options.output.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    random.seed(SEED)
    torch.manual_seed(SEED)
    name = base_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    print_answers("before training", answers(model, tokenizer))
    # alpha 16 with r 8 makes the scaling 2: with a scaling of 1, losing it or applying it twice would change nothing.
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    lines = (HERE / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    data = [encode(tokenizer, **json.loads(line)) for line in lines]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(unfinished),
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=4,
            lr_scheduler_type="linear",
            save_strategy="epoch",
            save_total_limit=2,
            logging_steps=20,
            disable_tqdm=True,
            report_to=[],
            seed=SEED,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[TimeLeft()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.eval()
    print_answers("after training", answers(model, tokenizer))
    unfinished.replace(options.output)
    checkpoints = sorted(options.output.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    print(f"checkpoints in {options.output}: {', '.join(path.name for path in checkpoints)}")
    return checkpoints[-1]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help=f"a Hugging Face id or a folder; default: {DEFAULT} from a package, no hub needed"
    )
    parser.add_argument("--output", type=Path, default=HERE / "out" / "training", help="default: %(default)s")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after this many steps; default: all epochs")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--force", action="store_true", help="overwrite the output folder")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        train(parse())
    except KeyboardInterrupt:
        sys.exit("interrupted; the checkpoints so far are in the folder whose name ends in .partial")
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
