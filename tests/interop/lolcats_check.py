"""Reads checkpoints as the official LoLCATs code does, and saves them again as its trainer does: an ordered dictionary
of parameters beside a step and a metric. One JSON line per file."""

import json
import sys
from collections import OrderedDict

import torch

for path in sys.argv[1:]:
    state = torch.load(path, weights_only=True)["model_state_dict"]
    # Parameters, some stored transposed: what a trainer may hold.
    stored = {name: x.mT.contiguous().mT if x.dim() == 2 else x for name, x in state.items()}
    parameters = OrderedDict((name, torch.nn.Parameter(x)) for name, x in stored.items())
    torch.save({"model_state_dict": parameters, "step": 100, "eval/loss": 0.5}, path)
    print(json.dumps({"tensors": len(state)}))
