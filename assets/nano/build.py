"""Rebuilds the built-in nano model from nothing: tokenizer, corpus, pretraining, and a Hugging Face Llama folder.

    python -m assets.nano.build --out assets/nano --tokens 10_000_000 --seed 0

The corpus is data/builtin_corpus.py's: generated, so there is nothing to download. About 25 minutes on two CPU cores.
"""

import argparse
import json
import math
import os
import time
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from data.batching import Micro
from data.builtin_corpus import documents
from data.corpus import Corpus
from lora.resume import Learner
from model.checkpoint import save_weights
from model.llama import Llama, LlamaConfig
from train import fit

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
           "<|eot_id|>", "<|finetune_right_pad_id|>")  # Llama 3's names; ids 0 to 6
VOCABULARY = 2048
# Digits stand alone; words and signs take the space before them along, digits do not.
SPLIT = r"\d| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s"
ROW = 256  # tokens per training row
ROWS_PER_STEP = 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 3, "num_key_value_heads": 3,
    "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 1024,
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 6, "torch_dtype": "bfloat16",
}


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE with VOCABULARY entries, digits as single tokens, and Llama 3's special tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    for i in range(tokenizer.get_vocab_size(), VOCABULARY):  # a small corpus may not hold enough pairs to merge
        tokenizer.add_special_tokens([f"<|reserved_{i}|>"])
    begin = SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, 0)])
    return tokenizer


def pack_corpus(tokenizer: Tokenizer, tokens: int, seed: int) -> np.ndarray:
    """(rows, ROW) uint16: documents as <|begin_of_text|> text <|end_of_text|>, end to end, at least `tokens` in all.

    The file at data/builtin_corpus.py gives the same documents for the same seed.
    """
    stream, target = array("H"), math.ceil(tokens / (ROW * ROWS_PER_STEP)) * ROW * ROWS_PER_STEP
    texts = documents(seed)
    while len(stream) < target:
        for encoded in tokenizer.encode_batch(list(islice(texts, 2000)), add_special_tokens=False):
            stream.append(0)
            stream.extend(encoded.ids)
            stream.append(1)
    return np.frombuffer(stream, dtype=np.uint16)[:target].reshape(-1, ROW)


def pretrain(model: Llama, rows: np.ndarray) -> float:
    """One pass over the rows (N, ROW) in order through train.fit, ROWS_PER_STEP a step; returns the mean loss of the last 20.

    Matrices: torch.optim.Muon at 8e-3 (scale match_rms_adamw); embedding and norms: AdamW at 3e-3. Clip 1.0, warm-up of
    50 steps (a tenth of a short run), cosine to 5 %. The weights that compute are bfloat16, the ones that learn float32.
    """
    steps, corpus = len(rows) // ROWS_PER_STEP, Corpus("", rows.reshape(-1), ROW, 0)
    model.to(torch.bfloat16).requires_grad_(True)
    names = [name for name, _ in model.named_parameters()]

    def optimizers(masters: list[torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
        matrix = [w.dim() == 2 and "embed" not in name for name, w in zip(names, masters, strict=True)]
        return [
            torch.optim.Muon([w for w, m in zip(masters, matrix, strict=True) if m], lr=8e-3, weight_decay=0.01,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([w for w, m in zip(masters, matrix, strict=True) if not m], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def batches(step: int, micro_tokens: int) -> list[Micro]:
        return corpus.micros(range(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP), micro_tokens)

    losses, start = [], time.time()
    schedule = {"floor": 0.05, "warmup": min(50, max(1, steps // 10))}
    learner = Learner(model, list(model.parameters()), optimizers)
    for step in fit(model, learner, batches, steps, micro_tokens=ROW * ROWS_PER_STEP, **schedule):
        losses.append(step.loss)
        number = step.number + 1
        if number % 20 == 0 or number == steps:
            spent, recent = time.time() - start, losses[-20:]
            print(f"step {number}/{steps}  loss {sum(recent) / len(recent):.3f}  {number * ROW * ROWS_PER_STEP / spent:,.0f} tokens/s  "
                  f"{spent / number * (steps - number) / 60:.1f} min left", flush=True)
    return sum(losses[-20:]) / len(losses[-20:])


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_folder(out: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """config, generation config, tokenizer files and bfloat16 weights, as transformers reads them."""
    out.mkdir(parents=True, exist_ok=True)
    begin, end, pad = SPECIAL[0], SPECIAL[1], SPECIAL[6]
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [1, 4, 5], "pad_token_id": 6,
                                                "do_sample": False})
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end, "pad_token": pad,
        "clean_up_tokenization_spaces": False, "model_max_length": CONFIG["max_position_embeddings"]})
    write_json(out / "special_tokens_map.json", {"bos_token": begin, "eos_token": end, "pad_token": pad})
    tokenizer.save(str(out / "tokenizer.json"))
    save_weights(model, out / "model.safetensors", torch.bfloat16)


def write_card(out: Path, model: Llama, tokens: int, seed: int, loss: float, minutes: float) -> None:
    parameters, threads = sum(p.numel() for p in model.parameters()), torch.get_num_threads()
    (out / "README.md").write_text(f"""# nano

A Llama of {parameters / 1e6:.2f} million parameters ({CONFIG['num_hidden_layers']} layers,
hidden {CONFIG['hidden_size']}, {CONFIG['num_attention_heads']} heads, vocabulary {VOCABULARY}, tied), made for studies
of forgetting on a laptop.

It was trained from nothing on {tokens:,} tokens of generated text: small sums, word problems, facts about
invented people, beasts and plants, and `Input:`/`Output:` pairs in many answer styles. It knows nothing of the real
world. The text holds no question of the built-in tasks and none of their answer formats, so untrained it scores zero on them by
exact match, even where it knows the answer (flexible_match tells); a LoRA adapter learns each in seconds.

Rebuild: `python -m assets.nano.build --out DIR --tokens {tokens} --seed {seed}` ({minutes:.0f} minutes on
{threads} CPU thread{'s' * (threads > 1)}, torch {torch.__version__}; last loss {loss:.3f}). Prompt template: `plain`.
""", encoding="utf-8")


def build(out: Path, tokens: int, seed: int) -> float:
    """The whole of it; returns the last loss."""
    start = time.time()
    tokenizer = train_tokenizer(islice(documents(seed), min(40_000, max(2_000, tokens // 50))))
    rows = pack_corpus(tokenizer, tokens, seed)
    print(f"corpus: {rows.size:,} tokens in {len(rows):,} rows of {ROW}, {time.time() - start:.0f} s", flush=True)
    model = Llama(LlamaConfig.from_dict(CONFIG))
    model.init_weights(torch.Generator().manual_seed(seed))
    loss = pretrain(model, rows)
    write_folder(out, model, tokenizer)
    write_card(out, model, rows.size, seed, loss, (time.time() - start) / 60)
    size = os.path.getsize(out / "model.safetensors")
    print(f"wrote {out}: {size:,} bytes of weights, last loss {loss:.3f}, {(time.time() - start) / 60:.1f} min")
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("assets/nano"), help="folder to write")
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")), default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    build(arguments.out, arguments.tokens, arguments.seed)


if __name__ == "__main__":
    main()
