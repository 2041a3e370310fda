"""Loads adapter folders over their base model with peft: `adapter_check.py (BASE ADAPTER EXPECTED)...`. One JSON line
per adapter: how far its logits are from those of the merged model, with and without the LoRA."""

import json
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

torch.set_num_threads(1)  # tensors are too small to share


def difference(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


for base, folder, expected in zip(*[iter(sys.argv[1:])] * 3):
    expected = load_file(expected)
    margay = get_class_from_dynamic_module("modeling_margay.MargayForCausalLM", folder)
    model = margay.from_adapter(folder, base, dtype=torch.float32).eval()
    with torch.no_grad():
        without = difference(model(expected["ids"].long()).logits, expected["logits"])
        model = PeftModel.from_pretrained(model, folder).eval()
        whole = difference(model(expected["ids"].long()).logits, expected["logits"])
    print(json.dumps({"folder": folder, "without": without, "logits": whole}), flush=True)
