"""Reads GGUF files as others do: `gguf_check.py (MODEL GGUF TEXTS)...`. MODEL is the folder that the file was made of, TEXTS
a JSON list of [text, ids]. One JSON line per file: what gguf reads, how far the logits of transformers and llama.cpp are
from those of transformers on MODEL, and whether llama.cpp tokenises the texts as listed; null where it cannot be had."""

import json
import sys
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

torch.set_num_threads(1)  # tensors are too small to share


def difference(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


def in_llama_cpp(file, ids):
    model = llama_cpp.Llama(str(file), n_ctx=len(ids), n_batch=512, logits_all=True, type_k=0, type_v=0, n_threads=1,
                            verbose=False)
    model.eval(ids)
    return torch.from_numpy(model.scores[: len(ids)].copy())


def check(folder, file, texts):
    reader = gguf.GGUFReader(file)
    value = lambda key: reader.fields[key].contents() if key in reader.fields else None
    architecture = value("general.architecture")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocab = model.config.vocab_size
    # Some frequencies depend on the length.
    counts = sorted({min(n, value(f"{architecture}.context_length")) for n in (60, 300)})
    texts_of_ids = [[2 + (i * i * 31 + i * 7 + 11) % (vocab - 2) for i in range(n)] for n in counts]
    worst = lambda other: max(difference(other(ids), logits(model, ids)) for ids in texts_of_ids)
    found = {
        "file": file.name,
        "architecture": architecture,
        "name": value("general.name"),
        "context": value(f"{architecture}.context_length"),
        "tensors": {t.name: [t.tensor_type.name, *map(int, reversed(t.shape))] for t in reader.tensors},
        "keys": {k: value(k) for k in reader.fields if "tokens" not in k and "merges" not in k and "scores" not in k},
        "transformers": None,
        "llama_cpp": None,
        "ids": None,
    }
    if architecture in GGUF_SUPPORTED_ARCHITECTURES:
        try:
            other = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            found["transformers"] = worst(lambda ids: logits(other, ids))
        except Exception as error:
            found["transformers"] = repr(error)
    if llama_cpp:
        found["llama_cpp"] = worst(lambda ids: in_llama_cpp(file, ids))
        words = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
        texts = json.loads(texts.read_text())
        found["ids"] = [words.tokenize(t.encode(), add_bos=True, special=False) == ids for t, ids in texts]
    return found


for arguments in zip(*[iter(sys.argv[1:])] * 3):
    print(json.dumps(check(*map(Path, arguments))), flush=True)
