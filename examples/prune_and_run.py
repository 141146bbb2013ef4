"""Train a small Llama on characters, prune 80 % of its weights in blocks, fine-tune, and run it int8-sparse.

usage: prune_and_run.py [--text tinyshakespeare.txt] [--out FOLDER] [--quick]

Three models start from one that is trained, and go on with the same batches: dense, pruned by magnitude and
pruned by taylor. The better of the pruned ones then runs in four ways, which are compared in loss, time and
bytes. Writes prune_and_run.json, with every sample, and prune_and_run.png.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from prune_and_run_report import plot, report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import halfbyte as hb
from halfbyte.bench import footprint, fusion
from halfbyte.bench.engine import Timed, median_of_ratios, run_rounds
from halfbyte.bench.machine import available_cores, describe
from halfbyte.bench.perplexity import TEXT_VARIABLE, Text, read_text
from halfbyte.cli.arguments import positive
from halfbyte.errors import HalfbyteError
from halfbyte.extras import quiet, require

PATTERN = "block16x4"
METHODS = ("magnitude", "taylor")
DENSE = "dense"
FLOAT, INT8, SPARSE_FLOAT, SPARSE_INT8 = "float32", "w8a8", "f32+block16x1", f"w8a8+{PATTERN}"


@dataclass(frozen=True)
class Settings:
    """The model, how long it is trained, and how long it is measured."""

    amount: float = 0.8
    steps: int = 600  # of training, before anything is pruned
    tune: int = 300  # of fine-tuning, for each of the three
    seed: int = 0
    threads: int = 1
    width: int = 384
    mlp: int = 1536
    layers: int = 2
    heads: int = 6
    context: int = 128  # characters in a window
    batch: int = 8  # windows in a training step
    rate: float = 2e-3
    tune_rate: float = 1e-3
    prune_steps: int = 10  # over the first half of the fine-tuning
    taylor_batches: int = 4
    windows: int = 256  # of the validation text, for the losses that are reported
    peeks: int = 12  # validation losses while fine-tuning, on an eighth of the windows
    forwards: tuple[int, ...] = (1, 16)  # windows in a timed forward pass
    rounds: int = 9
    round_seconds: float = 0.2


QUICK = Settings(
    steps=30, tune=20, width=64, mlp=128, heads=2, context=32, prune_steps=4, windows=32, peeks=2, rounds=2,
    round_seconds=0.002,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    settings = dataclasses.replace(
        QUICK if args.quick else Settings(), threads=args.threads, seed=args.seed,
        **{name: value for name in ("amount", "steps", "tune") if (value := getattr(args, name)) is not None},
    )  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    result = run(settings, read_text(args.text))
    print(report(result))
    file = args.out / "prune_and_run.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result, file.with_suffix(".png"))
    print(f"\nWritten: {file}{' and .png' if args.plot else ''}")
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for; packages that are missing are an error before minutes of training."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="what the model learns to write, such as tinyshakespeare.txt (default: the file that "
        f"{TEXT_VARIABLE} names, else Python's documentation)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER", help="for JSON and plot")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: shows that it runs")
    parser.add_argument("--amount", type=share, help=f"share of zeros (default {Settings.amount})")
    parser.add_argument("--steps", type=positive, help=f"of training (default {Settings.steps})")
    parser.add_argument("--tune", type=positive, help=f"steps of fine-tuning (default {Settings.tune})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=available_cores())
    parser.add_argument("--no-plot", dest="plot", action="store_false", help="needs no matplotlib")
    args = parser.parse_args(argv)
    require("transformers", extra="demo", purpose="this example")
    if args.plot:
        require("matplotlib", extra="bench", purpose="the plot (or give --no-plot)")
    return args


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def run(settings: Settings, text: Text) -> dict:
    """Train, prune, convert, measure; the result holds plain JSON values, with every sample."""
    began = time.perf_counter()
    corpus = Corpus(text, settings)
    base = new_model(settings, len(corpus.letters))
    trainer = Trainer(base, corpus, settings, settings.steps, settings.rate, "training")
    trainer.run(settings.steps)
    models, trained = {}, {}
    for name in (DENSE, *METHODS):
        model = models[name] = copy.deepcopy(base)
        curve = [trainer.curve[-1] | {"step": 0}, *fine_tune(model, corpus, settings, name)]
        trained[name] = evaluate(model, corpus.windows) | {"zeros": zeros_of(model), "curve": curve}
    seconds = time.perf_counter() - began
    losses = {name: one["losses"] for name, one in trained.items()}
    best = min(METHODS, key=lambda name: trained[name]["loss"])
    forms, alike = converted(models[DENSE], models[best], corpus.windows)
    return {
        "format": "halfbyte-bench", "version": 1, "kind": "example-pruning",
        "machine": describe(settings.threads), "settings": dataclasses.asdict(settings),
        "text": {
            "source": text.source, "sha256": text.sha256, "characters": len(text.content),
            "letters": len(corpus.letters),
        },
        "parameters": sum(p.numel() for p in base.parameters()),
        "training_seconds": seconds, "base_curve": trainer.curve, "trained": trained, "best": best,
        "to_dense": {name: compared(losses[name], losses[DENSE]) for name in METHODS},
        "taylor_to_magnitude": compared(losses["taylor"], losses["magnitude"]),
        "alike": alike, "rows": measured(forms, best, corpus, settings),
        "sample": write(forms[SPARSE_INT8], corpus, settings), "seconds": time.perf_counter() - began,
    }  # fmt: skip


# The text and the model


class Corpus:
    """Characters as numbers: nine tenths to train on, and windows of the last tenth."""

    def __init__(self, text: Text, settings: Settings):
        self.letters = sorted(set(text.content))
        number = {letter: i for i, letter in enumerate(self.letters)}
        ids = torch.tensor([number[letter] for letter in text.content])
        cut, size = len(ids) * 9 // 10, settings.context + 1
        self.train, rest = ids[:cut], ids[cut:]
        if len(rest) < size:
            raise HalfbyteError(f"{text.source} is too short to learn from: {len(ids)} characters")
        starts = torch.linspace(0, len(rest) - size, settings.windows).long()
        self.windows = rest[starts[:, None] + torch.arange(size)]  # [windows, context + 1]

    def batch(self, generator: torch.Generator, count: int) -> Tensor:
        """int64 [count, context + 1], from anywhere in the training text."""
        size = self.windows.shape[1]
        starts = torch.randint(len(self.train) - size, (count,), generator=generator)
        return self.train[starts[:, None] + torch.arange(size)]


def new_model(settings: Settings, letters: int) -> nn.Module:
    """A Llama of random weights."""
    with quiet():
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=letters, hidden_size=settings.width, intermediate_size=settings.mlp,
                num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
                num_key_value_heads=settings.heads, max_position_embeddings=4 * settings.context,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean loss of the characters after the first of each window, in nats."""
    return cross_entropy(logits_of(model, windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def evaluate(model: nn.Module, windows: Tensor) -> dict:
    """Loss of each window and of all, and the share of characters that were the likeliest."""
    losses, right = [], 0
    model.eval()
    with torch.inference_mode():
        for part in windows.split(32):
            logits, target = logits_of(model, part[:, :-1]), part[:, 1:]
            losses += cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1).tolist()
            right += int((logits.argmax(-1) == target).sum())
    return {
        "loss": statistics.fmean(losses), "accuracy": right / windows[:, 1:].numel(), "losses": losses,
    }  # fmt: skip


def compared(ours: list[float], theirs: list[float]) -> dict:
    """Mean difference of the losses of the same windows (below 0: ours is better), and its standard error."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return {
        "difference": statistics.fmean(differences),
        "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
    }


# Training and pruning


class Trainer:
    """AdamW with a learning rate that falls as a cosine to nothing after `steps` steps.

    `curve`: at `peeks` places on the way, the loss on an eighth of the validation windows.
    """

    def __init__(
        self, model: nn.Module, corpus: Corpus, settings: Settings, steps: int, rate: float, label: str
    ):
        self.model, self.corpus, self.settings, self.steps, self.done = model, corpus, settings, steps, 0
        self.generator = torch.Generator().manual_seed(settings.seed + steps)  # the same batches for all
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.1)
        warm = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min(1, (i + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
        )
        self.bar = tqdm(total=steps, desc=label, unit="step", disable=None)
        self.curve: list[dict] = []

    def run(self, until: int) -> None:
        """Train up to that step."""
        while self.done < until:
            self.model.train()
            loss = loss_of(self.model, self.corpus.batch(self.generator, self.settings.batch))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.done += 1
            self.bar.update()
            if self.done * self.settings.peeks // self.steps > len(self.curve):
                self.curve.append(self.peek())
        if self.done == self.steps:
            self.bar.close()

    def peek(self) -> dict:
        loss = evaluate(self.model, self.corpus.windows[::8])["loss"]
        self.bar.set_postfix_str(f"validation loss {loss:.3f}")
        return {"step": self.done, "loss": loss, "zeros": zeros_of(self.model)["share"]}


def fine_tune(model: nn.Module, corpus: Corpus, settings: Settings, name: str) -> list[dict]:
    """Go on training, as many steps for all; with a method for a name, pruned over the first half of them."""
    trainer = Trainer(model, corpus, settings, settings.tune, settings.tune_rate, name)
    if name in METHODS:
        generator = torch.Generator().manual_seed(settings.seed)
        data = [corpus.batch(generator, settings.batch) for _ in range(settings.taylor_batches)]
        schedule = hb.PruneSchedule(
            model, settings.amount, settings.prune_steps, "cubic", method=name, pattern=PATTERN, data=data,
            loss_fn=loss_of, progress=False,
        )  # fmt: skip
        for step in schedule:
            trainer.run(settings.tune // 2 * step.number // settings.prune_steps)
    trainer.run(settings.tune)
    return trainer.curve


def zeros_of(model: nn.Module) -> dict:
    """The zeros of the layers that have masks, each and together; of all linear layers without any masks."""
    found = hb.sparsity(model).layers
    layers = [layer for layer in found if layer.masked] or found
    zeros, total = (sum(getattr(layer, what) for layer in layers) for what in ("zeros", "total"))
    rows = [{"name": layer.name, "shape": layer.shape, "zeros": layer.zeros} for layer in layers]
    return {"zeros": zeros, "total": total, "share": zeros / total, "layers": rows}


# Running it


def converted(dense: nn.Module, pruned: nn.Module, windows: Tensor) -> tuple[dict[str, nn.Module], dict]:
    """The dense model and the pruned one in each format, ready to run, and how alike their outputs are."""
    quantized = hb.quantize_(copy.deepcopy(pruned), INT8, progress=False)  # zeros are codes like the others
    sparse = hb.sparsify_(copy.deepcopy(quantized), "always", pattern=PATTERN, progress=False)
    sparse_float = hb.sparsify_(copy.deepcopy(pruned), "always", scheme=SPARSE_FLOAT, progress=False)
    forms = {
        FLOAT: dense,
        INT8: hb.quantize_(copy.deepcopy(dense), INT8, progress=False),
        SPARSE_FLOAT: sparse_float,
        SPARSE_INT8: sparse,
    }
    ids = windows[:16, :-1]
    exact, product = call(pruned, ids), call(sparse_float, ids)
    fused = [hb.fuse_(copy.deepcopy(model)) for model in (quantized, sparse)]
    pairs = {"unfused": (quantized, sparse), "fused": fused}
    alike = {name: torch.equal(call(a, ids), call(b, ids)) for name, (a, b) in pairs.items()}
    alike["float_difference"] = float((product - exact).norm() / exact.norm())
    return forms, alike


def measured(forms: dict[str, nn.Module], best: str, corpus: Corpus, settings: Settings) -> list[dict]:
    """Loss, bytes and milliseconds of each format, as it is and fused."""
    fused = {name: hb.fuse_(copy.deepcopy(model)) for name, model in forms.items()}
    times = []
    for count in settings.forwards:
        ids = corpus.windows[:count, :-1]
        timed = [
            Timed(f"{name}{kind}", [lambda model=model, ids=ids: call(model, ids)], settings.round_seconds, 1)
            for kind, models in (("", forms), (" fused", fused))
            for name, model in models.items()
        ]
        times.append(run_rounds(timed, settings.rounds, f"{count}x{settings.context}"))
    rows = []
    for name, model in forms.items():
        row = {"name": name, "weights": DENSE if name in (FLOAT, INT8) else best}
        row |= evaluate(fused[name], corpus.windows) | {"fusion": fusion.describe(fused[name])}
        row |= {"saved_bytes": footprint.byte_count(model), "memory_bytes": footprint.resident_bytes(model)}
        row["times"] = [
            {
                "windows": count, "fused": bool(kind), "ms": 1e3 * statistics.median(sample[name + kind]),
                "faster": median_of_ratios(sample[FLOAT], sample[name + kind]),
                "faster_than_int8": median_of_ratios(sample[INT8 + kind], sample[name + kind]),
                "samples_ms": [1e3 * s for s in sample[name + kind]],
            }
            for count, sample in zip(settings.forwards, times, strict=True)
            for kind in ("", " fused")
        ]  # fmt: skip
        rows.append(row)
    return rows


def call(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return logits_of(model, ids)


def write(model: nn.Module, corpus: Corpus, settings: Settings) -> str:
    """The start of the first validation window, a bar, and what the model writes after it."""
    start = corpus.windows[:1, : settings.context // 4]
    count = settings.context - start.shape[1]  # positions that it has learned
    fused = hb.fuse_(copy.deepcopy(model))
    ids = hb.generate(fused, start, count, do_sample=True, temperature=0.7, seed=settings.seed)[0].tolist()
    said = "".join(corpus.letters[i] for i in ids)
    return f"{said[: start.shape[1]]}|{said[start.shape[1] :]}"


if __name__ == "__main__":
    sys.exit(main())
