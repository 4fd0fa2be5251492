"""What one would do without lora-probe: merge again with PEFT, and compare all tensors with the merged model.

    python benchmarks/by_hand.py BASE ADAPTER MERGED

In: three folders. Out: how many tensors are equal.
"""

from __future__ import annotations

import sys


def main(base: str, adapter: str, merged: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    again = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    saved = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").state_dict()
    equal = sum(torch.equal(again[name], saved[name]) for name in saved)
    print(f"{equal} of {len(saved)} tensors are equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
