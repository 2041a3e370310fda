"""Loads exports with transformers and compares them with what margay wrote beside them: `expected.safetensors` with ids
[1, T], logits [1, T, V] and the text that margay generates after the first 90 ids. One JSON line per folder."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

PROMPT = 90
torch.set_num_threads(1)  # tensors are too small to share


def difference(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def mixer_tensors(model):
    names = model.config.linearization["tensors"]
    return [p for n, p in model.named_parameters() if n.endswith(tuple(f".{name}" for name in names))]


def in_pieces(model, ids):
    cache, out, start = DynamicCache(config=model.config), [], 0
    for n in (1, 37, 5, 64, *[1] * (ids.shape[1] - 107)):
        out.append(model(ids[:, start : start + n], past_key_values=cache, use_cache=True).logits)
        start += n
    return torch.cat(out, 1)


def pad_left(ids, lengths):
    longest = max(lengths)
    rows = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, n in enumerate(lengths):
        rows[row, longest - n :] = ids[0, :n]
        mask[row, longest - n :] = 1
    return rows, mask


def continue_text(model, ids, mask=None, **how):
    how = {"max_new_tokens": 24, "use_cache": True, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **how}
    out = model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **how)
    return out[:, ids.shape[1] :]


def check(folder):
    model, expected = load(folder), load_file(folder / "expected.safetensors")
    ids = expected["ids"].long()
    with torch.no_grad():
        whole = model(ids).logits
        found = {
            "folder": folder.name,
            "class": type(model).__mro__[2].__name__,
            "logits": difference(whole, expected["logits"]),
            "pieces": difference(in_pieces(model, ids), whole),
            "text": continue_text(model, ids[:, :PROMPT])[0].tolist() == expected["text"].tolist(),
        }
        lengths = [ids.shape[1], 9, 70, 40]
        rows, mask = pad_left(ids, lengths)
        together = model(rows, attention_mask=mask).logits
        alone = [model(ids[:, :n]).logits[0] for n in lengths]
        found["padded"] = max(difference(y[len(y) - n :], x) for y, x, n in zip(together, alone, lengths))
        lengths = [PROMPT, 9, 40]
        together = continue_text(model, *pad_left(ids, lengths)).tolist()
        found["padded_text"] = together == [continue_text(model, ids[:, :n])[0].tolist() for n in lengths]
        last = model(ids, logits_to_keep=1).logits
        found["last"] = last.shape[1] == 1 and difference(last, whole[:, -1:]) < 1e-5
        # Beams reorder the states; without a cache there is nothing to reorder.
        beams = [continue_text(model, ids[:, :40], num_beams=3, max_new_tokens=6, use_cache=c) for c in (True, False)]
        found["beams"] = beams[0].tolist() == beams[1].tolist()
        with tempfile.TemporaryDirectory() as again:
            model.save_pretrained(again)
            found["saved"] = difference(load(again)(ids).logits, whole)
    model(ids, labels=ids).loss.backward()
    found["gradients"] = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in mixer_tensors(model))
    low = load(folder, torch.bfloat16)
    found["wide"] = low.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in mixer_tensors(low))
    found["low"] = difference(low(ids).logits.float(), whole)
    return found


for name in sys.argv[1:]:
    print(json.dumps(check(Path(name))), flush=True)
