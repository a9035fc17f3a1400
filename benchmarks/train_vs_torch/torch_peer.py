"""The peer: a nanoGPT-style transformer trained by plain PyTorch on CPU. The last line of output is one JSON object.

Three jobs: `--time-steps N` times train steps on random tokens, `--data FILE --steps N` trains by character on a text
file and measures the loss over its whole validation split, `--parity FILE.npz` trains from given weights on given
batches and prints the losses. README.md beside this file holds the model, the recipe and the arrays of a parity file.

  python torch_peer.py --layers 6 --dim 384 --heads 6 --context 256 --batch 64 --mode compiled --time-steps 5
  python torch_peer.py --layers 4 --dim 128 --heads 4 --context 64 --batch 12 --data input.txt --steps 2000
  python torch_peer.py --heads 2 --parity parity.npz --precision float64

Source: the recipe of github.com/karpathy/nanoGPT (model.py, train.py, config/train_shakespeare_char.py), MIT.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRAIN_FRACTION = 0.9
LEARNING_RATE, FINAL_LEARNING_RATE = 1e-3, 1e-4
SCHEDULE_WARMUP_STEPS = 100
UNTIMED_STEPS = 3  # the first compiles, the next two still grow the allocator
INIT_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    layers: int
    dim: int
    heads: int
    context: int
    vocab: int

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --dim {self.dim}: each head needs a whole width.")

    @classmethod
    def of(cls, args: argparse.Namespace, **known: int) -> "Sizes":
        """The sizes on the command line, but for those already known from the data."""
        return cls(**({field.name: getattr(args, field.name) for field in fields(cls)} | known))


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.attn_qkv = nn.Linear(sizes.dim, 3 * sizes.dim, bias=False)
        self.attn_o = nn.Linear(sizes.dim, sizes.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (y.view(B, T, self.heads, D // self.heads).transpose(1, 2) for y in self.attn_qkv(x_BTD).split(D, 2))
        out_BNTH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_o(out_BNTH.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.mlp_up = nn.Linear(sizes.dim, 4 * sizes.dim, bias=False)
        self.mlp_down = nn.Linear(4 * sizes.dim, sizes.dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mlp_down(F.gelu(self.mlp_up(x_BTD)))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(sizes.dim, bias=False), Attention(sizes)
        self.ln_2, self.mlp = nn.LayerNorm(sizes.dim, bias=False), MLP(sizes)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT(nn.Module):
    """Decoder-only transformer: pre-LayerNorm, learned positions, exact GELU, no biases, tied output layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.wte = nn.Embedding(sizes.vocab, sizes.dim)
        self.wpe = nn.Embedding(sizes.context, sizes.dim)
        self.h = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.ln_f = nn.LayerNorm(sizes.dim, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                ends_residual = name.endswith(("attn_o.weight", "mlp_down.weight"))
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * sizes.layers) if ends_residual else INIT_STD)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token."""
        x_BTD = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1]))
        for block in self.h:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.ln_f(x_BTD), self.wte.weight)
        # Under autocast the logits are bfloat16: the loss is taken in float32, as everyone compares it.
        logits_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def adamw(model: GPT, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW that decays every parameter of two dims or more: in nanoGPT that is the matrices and the embeddings."""

    def decays(name: str, parameter: Tensor) -> bool:
        return parameter.ndim >= 2 and (args.decay_embeddings or name not in ("wte.weight", "wpe.weight"))

    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": args.weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.99), eps=1e-8, fused=args.fused)


def nanogpt_learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine from `peak` to 1e-4 at `steps`."""
    if step < SCHEDULE_WARMUP_STEPS:
        return peak * (step + 1) / (SCHEDULE_WARMUP_STEPS + 1)
    progress = (step - SCHEDULE_WARMUP_STEPS) / max(1, steps - SCHEDULE_WARMUP_STEPS)
    return FINAL_LEARNING_RATE + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - FINAL_LEARNING_RATE)


class Trainer:
    """A model, its optimizer, and one step of training, in the precision and mode that `args` name."""

    def __init__(self, sizes: Sizes, args: argparse.Namespace, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        torch.manual_seed(args.seed)
        self.model = GPT(sizes).to(torch.float64 if args.precision == "float64" else torch.float32)
        if arrays is not None:
            load_arrays(self.model, arrays)
        self.optimizer = adamw(self.model, args)
        self.loss: Callable[[Tensor, Tensor], Tensor] = self.model
        if args.mode == "compiled":
            self.loss = torch.compile(self.model)
        self.bfloat16 = args.precision == "bfloat16"
        self.clip = args.clip

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16)

    def step(self, x_BT: Tensor, y_BT: Tensor, learning_rate: float) -> Tensor:
        """One update; the loss returned is that of the weights before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with self.autocast():
            loss = self.loss(x_BT, y_BT)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def mean_loss(self, tokens: Tensor, context: int, batch: int) -> float:
        """Loss over a whole split: every token but the first is predicted once, in windows that do not overlap."""
        num_targets = len(tokens) - 1
        num_windows = num_targets // context
        covered = num_windows * context
        xs, ys = tokens[:covered].view(-1, context), tokens[1 : covered + 1].view(-1, context)
        pieces = list(zip(xs.split(batch), ys.split(batch), strict=True)) if num_windows else []
        if covered < num_targets:
            pieces.append((tokens[covered:-1][None], tokens[covered + 1 :][None]))
        total = 0.0
        self.model.eval()
        with self.autocast():
            for x_BT, y_BT in pieces:
                # Not the compiled model: a few batches do not repay compiling the odd shapes at the end.
                total += self.model(x_BT, y_BT).item() * y_BT.numel()
        self.model.train()
        return total / num_targets


def time_steps(args: argparse.Namespace) -> dict:
    """Seconds a train step on random tokens: median and least of N after untimed ones."""
    trainer = Trainer(Sizes.of(args), args)
    generator = torch.Generator().manual_seed(args.seed)
    tokens = torch.randint(args.vocab, (args.batch, args.context + 1), generator=generator)
    x_BT, y_BT = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    seconds = []
    for _ in range(UNTIMED_STEPS + args.time_steps):
        began = time.perf_counter()
        trainer.step(x_BT, y_BT, args.learning_rate).item()
        seconds.append(time.perf_counter() - began)
    timed = seconds[UNTIMED_STEPS:]
    median_s = statistics.median(timed)
    return {
        "median_step_s": median_s,
        "min_step_s": min(timed),
        "first_step_s": seconds[0],
        "step_s": timed,
        "tokens_per_s": args.batch * args.context / median_s,
        "num_params": num_params(trainer.model),
    }


def train_on_text(args: argparse.Namespace) -> dict:
    """Train by character on the first 90 % of a text; the loss of the rest, and the wall time of the training alone."""
    tokens, vocab = read_characters(Path(args.data))
    split = int(TRAIN_FRACTION * len(tokens))
    train, val = tokens[:split], tokens[split:]
    context = args.context
    if len(train) <= context or len(val) < 2:
        raise ValueError(f"{args.data} has {len(tokens)} characters: too few for --context {context}. Give more text.")
    sizes = Sizes.of(args, vocab=len(vocab))
    trainer = Trainer(sizes, args)
    generator = torch.Generator().manual_seed(args.seed)
    first_step_s, loss = math.nan, torch.tensor(math.nan)
    began = time.perf_counter()
    for step in range(args.steps):
        starts = torch.randint(len(train) - context, (args.batch,), generator=generator).tolist()
        x_BT = torch.stack([train[i : i + context] for i in starts])
        y_BT = torch.stack([train[i + 1 : i + 1 + context] for i in starts])
        loss = trainer.step(x_BT, y_BT, nanogpt_learning_rate(step, args.steps, args.learning_rate))
        if step == 0:
            first_step_s = time.perf_counter() - began
        if step % 100 == 0:
            print(f"step {step}: train loss {loss.item():.4f}", file=sys.stderr)
    train_loss = loss.item()
    train_wall_s = time.perf_counter() - began
    return {
        "val_loss": trainer.mean_loss(val, context, args.batch),
        "last_train_loss": train_loss,
        "train_wall_s": train_wall_s,
        "first_step_s": first_step_s,
        "steps": args.steps,
        "num_val_tokens": len(val) - 1,
        "vocab": len(vocab),
        "num_params": num_params(trainer.model),
    }


def parity(args: argparse.Namespace) -> dict:
    """Losses before each of n updates at a constant learning rate, from given weights, on given batches."""
    try:
        with np.load(args.parity) as archive:
            arrays = dict(archive)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{args.parity} is not a readable .npz file: {error}") from error
    for name in ("wte", "wpe", "x", "y"):
        if name not in arrays:
            raise ValueError(f"{args.parity} lacks the array {name!r}: see the table in README.md.")
    x, y = arrays.pop("x"), arrays.pop("y")
    if x.ndim != 3 or x.shape != y.shape:
        raise ValueError(f"x and y must both be [n, B, T] in {args.parity}, got {x.shape} and {y.shape}.")
    (vocab, dim), (context, _) = arrays["wte"].shape, arrays["wpe"].shape
    if x.shape[2] > context or min(x.min(), y.min()) < 0 or max(x.max(), y.max()) >= vocab:
        raise ValueError(f"x and y in {args.parity} must be tokens of 0 to {vocab - 1}, at most {context} a sequence.")
    layers = len({name.split(".")[1] for name in arrays if name.startswith("h.")})
    sizes = Sizes.of(args, layers=layers, dim=dim, context=context, vocab=vocab)
    trainer = Trainer(sizes, args, arrays)
    pairs = zip(torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64)), strict=True)
    return {"losses": [trainer.step(x_BT, y_BT, args.learning_rate).item() for x_BT, y_BT in pairs]}


def load_arrays(model: GPT, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy the arrays of a parity file into the model; matrices are [in, out] there and [out, in] in torch."""
    # h.0.attn.attn_qkv.weight is h.0.attn_qkv in the file: which module holds a matrix is torch's own business.
    names = {
        name.replace(".attn.", ".").replace(".mlp.", ".").removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
    }
    missing, unknown = sorted(names.keys() - arrays.keys()), sorted(arrays.keys() - names.keys())
    if missing or unknown:
        raise ValueError(f"parity arrays do not fit the model: missing {missing}, unknown {unknown}.")
    for name, parameter in names.items():
        value = torch.from_numpy(arrays[name])
        is_linear = ".attn_" in name or ".mlp_" in name
        if is_linear:
            value = value.T
        if value.shape != parameter.shape:
            wanted = tuple(parameter.T.shape) if is_linear else tuple(parameter.shape)
            raise ValueError(f"parity array {name!r} must have shape {wanted}, got {arrays[name].shape}.")
        with torch.no_grad():
            parameter.copy_(value)


def read_characters(path: Path) -> tuple[Tensor, list[str]]:
    """The text as indices into its sorted set of characters."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {path} cannot be read as UTF-8 text: {error}") from error
    vocab = sorted(set(text))
    index = {character: i for i, character in enumerate(vocab)}
    return torch.tensor([index[character] for character in text], dtype=torch.int64), vocab


def num_params(model: GPT) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = Parser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--time-steps", type=positive, metavar="N", help="time N steps on random tokens")
    job.add_argument("--data", metavar="FILE", help="train by character on this text")
    job.add_argument("--parity", metavar="FILE.npz", help="print the losses from given weights and batches")
    for name, default in {"layers": 4, "dim": 128, "heads": 4, "context": 64, "batch": 12, "vocab": 65}.items():
        parser.add_argument(f"--{name}", type=positive, default=default, help=f"default {default}")
    parser.add_argument("--steps", type=positive, default=2000, help="updates with --data (default 2000)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float64"), default="float32")
    parser.add_argument("--mode", choices=("eager", "compiled"), default="eager")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="peak with --data, else constant")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--decay-embeddings", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm; 0 turns clipping off")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="torch's fused AdamW")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--threads", type=positive, help="torch threads (default: torch's own choice)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = parity(args) if args.parity else train_on_text(args) if args.data else time_steps(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setting = {
        "peer": "torch",
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "mode": args.mode,
        "precision": args.precision,
        "fused_adamw": args.fused,
    }
    print(json.dumps(setting | result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
