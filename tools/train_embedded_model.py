"""Train, measure and sample the embedded model: a byte-level LLaMA of under 4 MB that writes Python.

    python tools/train_embedded_model.py train --device cuda --minutes 7 --tokens 65536 --out /tmp/tiny_python
    python tools/train_embedded_model.py eval                # the table of the model card, from the shipped files
    python tools/train_embedded_model.py sample --prompt "def "
    python tools/train_embedded_model.py overlap             # the share of each held-out file that training has
    python tools/train_embedded_model.py parses              # the share of samples that are valid Python

The data are .py files: the standard library of the running Python (or $STDLIB) and packages beside it (in site-packages
or $SITE_PACKAGES). `heldout.json` beside the model names the packages, and the modules that are never trained on. A
token is a byte; byte 0, which no source file holds, stands before and after every file (it is both BOS and EOS). Needs
torch, numpy and safetensors (`parses`: forge_c); transformers is not used.
"""
from __future__ import annotations

import argparse
import ast
import bz2
import codeop
import fnmatch
import gzip
import json
import lzma
import math
import os
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHIPPED = Path(__file__).resolve().parent.parent / "forge_c" / "assets" / "tiny_python"
BOUNDARY = 0  # BOS and EOS: the byte before the first and after the last of a file
WINDOW, STRIDE = 1024, 512  # evaluation: at least STRIDE bytes of context, except near the start of a file
QUERY_CHUNK = 256
LARGEST = 200_000  # bytes of a package's file: larger ones are tables
SHINGLE = 64  # bytes that must agree before `overlap` calls two places the same
PROMPTS = ["def ", "class ", '"""', "def fibonacci(n):\n", "for i in range(10):\n", "import json\n\ndef load(path):\n",
           "import os\nimport sys\n\nclass Stack:\n", "from collections import deque\n\n\nclass Queue:\n"]
SAMPLINGS: list[dict[str, float]] = [
    {"temperature": 0.0}, {"temperature": 0.3}, {"temperature": 0.5}, {"temperature": 0.7}, {"temperature": 1.0},
    {"temperature": 0.6, "min_p": 0.1}, {"temperature": 0.7, "min_p": 0.05}, {"temperature": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.6, "top_p": 0.9},
]


@dataclass(frozen=True)
class Shape:
    """The model's sizes, named as in a Hugging Face LlamaConfig."""

    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 256
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5


def rope_cos_sin(head_dim: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """The half-split rotary tables, each (seq_len, head_dim), angles in float64."""
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), inv_freq)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On a CPU by plain matrix products, which torch.compile fuses well (its flash kernel is slower here).

    q (batch, heads, seq, head_dim), k and v (batch, kv_heads, seq, head_dim); cut into QUERY_CHUNK queries, so
    that most of the masked upper triangle is never computed.
    """
    batch, heads, seq, head_dim = q.shape
    kv_heads = k.shape[1]
    rep = heads // kv_heads
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    q = (q * head_dim**-0.5).view(batch, kv_heads, rep, seq, head_dim)
    position = torch.arange(seq)
    parts = []
    for start in range(0, seq, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, seq)
        rows = q[:, :, :, start:stop].reshape(batch * kv_heads, rep * (stop - start), head_dim)
        keys = k[:, :, :stop].reshape(batch * kv_heads, stop, head_dim)
        values = v[:, :, :stop].reshape(batch * kv_heads, stop, head_dim)
        scores = torch.bmm(rows, keys.transpose(1, 2)).view(-1, rep, stop - start, stop)
        visible = position[:stop] <= position[start:stop, None]
        probs = scores.float().masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype)
        part = torch.bmm(probs.view(-1, rep * (stop - start), stop), values)
        parts.append(part.view(batch, heads, stop - start, head_dim))
    return torch.cat(parts, dim=2)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        s = self.shape
        heads, kv_heads = s.num_attention_heads, s.num_key_value_heads
        fused = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        qkv = F.linear(x, fused).view(batch, seq, heads + 2 * kv_heads, s.head_dim).transpose(1, 2)
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        first, second = qk.chunk(2, dim=-1)
        qk = (qk * cos + torch.cat([-second, first], dim=-1) * sin).to(v.dtype)
        q, k = qk.split([heads, kv_heads], dim=1)
        y = causal_attention(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, heads * s.head_dim))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight])).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """LlamaForCausalLM without its `model.` prefix; the embedding is also the output matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        cos, sin = rope_cos_sin(shape.head_dim, shape.max_position_embeddings)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 if name == "embed_tokens.weight" else 0.5 * p.shape[1] ** -0.5
                nn.init.normal_(p, std=std, generator=generator)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, seq, vocab) of ids (batch, seq)."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


# --- data ---------------------------------------------------------------------------------------------------------


def stdlib() -> Path:
    return Path(os.environ.get("STDLIB") or sysconfig.get_paths()["stdlib"])


def site_packages() -> Path:
    return Path(os.environ.get("SITE_PACKAGES") or sysconfig.get_paths()["purelib"])


def lists() -> dict[str, list[str]]:
    return json.loads((SHIPPED / "heldout.json").read_text())


def training_files() -> list[Path]:
    """Every .py of the standard library that is neither held out, nor its test, nor mere data; and of the packages,
    but for generated files of data."""
    spared = lists()["heldout"] + lists()["not_trained_on"] + ["site-packages/*", "*/__pycache__/*"]
    root = stdlib()
    files = sorted(p for p in root.rglob("*.py") if p.is_file())
    kept = [p for p in files if not any(fnmatch.fnmatch(p.relative_to(root).as_posix(), s) for s in spared)]
    folders = [site_packages() / name for name in lists()["packages"]]
    beside = [p for folder in folders for p in sorted(folder.rglob("*.py")) if p.stat().st_size < LARGEST]
    return kept + beside


def training_bytes(seed: int) -> Tensor:
    """All training files in a random order, a BOUNDARY byte around each: (n,) uint8."""
    files = [p for p in training_files() if p.stat().st_size]
    order = np.random.default_rng(seed).permutation(len(files))
    joined = b"\0".join(files[i].read_bytes().replace(b"\0", b"") for i in order)
    return torch.frombuffer(bytearray(b"\0" + joined + b"\0"), dtype=torch.uint8)


def batches(data: Tensor, tokens: int, seq_len: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows: (ids, next ids), each (tokens / seq_len, seq_len) int64, where data is."""
    generator = torch.Generator(data.device).manual_seed(seed)
    offsets = torch.arange(seq_len + 1, device=data.device)
    while True:
        starts = torch.randint(len(data) - seq_len - 1, (tokens // seq_len, 1), generator=generator, device=data.device)
        window = data[starts + offsets].long()
        yield window[:, :-1], window[:, 1:]


# --- training -----------------------------------------------------------------------------------------------------


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of each matrix of g (n, out, in) towards the nearest semi-orthogonal one, as in Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[1] > g.shape[2]
    x = (g.mT if tall else g) / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (https://kellerjordan.github.io/posts/muon/); for matrices only."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:  # matrices of one shape at once: few and large kernels
                params = [p for p in group["params"] if p.shape == shape]
                grads = torch.stack([p.grad for p in params])
                buffer = self.state[params[0]].setdefault("buffer", torch.zeros_like(grads))
                buffer.lerp_(grads, 1 - group["momentum"])
                updates = orthogonalise(grads.lerp(buffer, group["momentum"]))
                torch._foreach_mul_(params, 1 - group["lr"] * 0.01)
                torch._foreach_add_(params, list(updates), alpha=-group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5)


def optimisers(model: Decoder) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    found = [Muon(matrices, lr=0.02), adam]
    for group in (g for o in found for g in o.param_groups):
        group["peak"] = group["lr"]
    return found


def stage(progress: float) -> int:
    """Sequence length at a share of the budget: short windows are cheap, the second stage learns the whole context."""
    return 512 if progress < 0.4 else 1024


def schedule(progress: float) -> float:
    """Warm up over 1 %, hold, then linear to 2 % over the last 60 %."""
    return min(1.0, progress / 0.01) if progress < 0.4 else 1.0 - 0.98 * (progress - 0.4) / 0.6


def heldout_windows(device: str) -> tuple[Tensor, Tensor]:
    """A fixed sample of the held-out files, to watch while training."""
    source = b"\0".join((stdlib() / name).read_bytes() for name in lists()["heldout"])
    return next(batches(torch.frombuffer(bytearray(source), dtype=torch.uint8).to(device), 1 << 17, WINDOW, 0))


def bits_a_byte(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1)) / math.log(2)


def train(args: argparse.Namespace) -> None:
    """On a CPU the budget is CPU time, so that pausing the process or sharing the machine does not change the
    schedule; on a GPU it is time."""
    gpu = args.device != "cpu"
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Decoder(Shape())
    model.initialise(args.seed)
    if args.resume:
        model.load_state_dict(load(args.resume).state_dict())
    model.to(args.device)
    found = optimisers(model)
    data, watched = training_bytes(args.seed).to(args.device), heldout_windows(args.device)
    print(f"{len(data) / 1e6:.1f} MB of source, {sum(p.numel() for p in model.parameters())} parameters", flush=True)
    forward, clock = torch.compile(model, dynamic=False), time.monotonic if gpu else time.process_time
    budget, start, saved, step, seen = args.minutes * 60 * (1 if gpu else args.threads), clock(), clock(), 0, 0
    seq_len, smooth, source = 0, torch.tensor(5.5, device=args.device), iter(())
    start -= args.start * budget
    while (progress := (clock() - start) / budget) < 1:
        if stage(progress) != seq_len:
            seq_len = stage(progress)
            source = batches(data, args.tokens, seq_len, args.seed + seq_len)
        ids, targets = next(source)
        for group in (g for o in found for g in o.param_groups):
            group["lr"] = group["peak"] * schedule(progress)
        with torch.autocast(args.device, torch.bfloat16):
            loss = bits_a_byte(forward(ids), targets)
        loss.backward()
        for optimiser in found:
            optimiser.step()
            optimiser.zero_grad()
        step, seen = step + 1, seen + ids.numel()
        smooth.lerp_(loss.detach(), 0.03)
        if step % args.report == 0:
            with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
                heldout = bits_a_byte(model(watched[0]), watched[1]).item() if gpu else math.nan
            print(f"step {step} {seen / 1e6:.1f} MB {progress:.3f} seq {seq_len} bits/byte {smooth.item():.4f} "
                  f"held out {heldout:.4f}", flush=True)
        if clock() - saved > 600:
            saved = clock()
            export(model, args.out, {"steps": step, "bytes_seen": seen})
    export(model, args.out, {"steps": step, "bytes_seen": seen, "minutes": round(budget / 60)})


def export(model: Decoder, out: Path, recipe: dict[str, int]) -> None:
    """Write a Hugging Face folder: model.safetensors in bfloat16 and config.json."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": BOUNDARY,
        "eos_token_id": BOUNDARY,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = {"tokenizer_class": "ByteTokenizer", "bos_token": "\0", "eos_token": "\0"}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    (out / "recipe.json").write_text(json.dumps(recipe) + "\n")


# --- measuring ----------------------------------------------------------------------------------------------------


def load(folder: Path) -> Decoder:
    model = Decoder(Shape())
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({n.removeprefix("model."): w.float() for n, w in stored.items()})
    return model.eval()


@torch.no_grad()
def bits(model: Decoder, source: bytes) -> float:
    """Code length of a file under the model: every byte is predicted once, with a sliding window as its context."""
    ids = torch.tensor([BOUNDARY, *source])
    total, done = 0.0, 1
    while done < len(ids):
        stop = min(len(ids), done + STRIDE if done > 1 else WINDOW)
        first = max(0, stop - WINDOW)
        losses = F.cross_entropy(model(ids[None, first : stop - 1])[0], ids[first + 1 : stop], reduction="none")
        total += losses[done - first - 1 :].double().sum().item() / math.log(2)
        done = stop
    return total


def packers(source: bytes) -> dict[str, int]:
    """Sizes in bytes at each packer's best setting."""
    return {
        "gzip -9": len(gzip.compress(source, 9)),
        "bz2 -9": len(bz2.compress(source, 9)),
        "xz -9": len(lzma.compress(source, preset=9)),
    }


def evaluate(args: argparse.Namespace) -> None:
    """Print the model card's table: bits per byte of each held-out file."""
    model, total = load(args.folder), {}
    print("| held-out file | bytes | gzip -9 | bz2 -9 | xz -9 | this model |\n|---|---|---|---|---|---|")
    for name in lists()["heldout"]:
        source = (stdlib() / name).read_bytes()
        row = {"bytes": len(source) / 8, **packers(source), "model": bits(model, source) / 8}
        total = {k: total.get(k, 0) + v for k, v in row.items()}
        print_row(name, row)
    print_row("**all**", total)


def print_row(name: str, row: dict[str, float]) -> None:
    length = 8 * row["bytes"]
    cells = " | ".join(f"{8 * v / length:.3f}" for k, v in row.items() if k != "bytes")
    print(f"| {name} | {length:.0f} | {cells} |", flush=True)


def shingles(source: bytes) -> np.ndarray:
    """A hash of each run of SHINGLE bytes: its 8-byte words times odd numbers, summed modulo 2**64."""
    if len(source) < SHINGLE:
        return np.zeros(0, np.uint64)
    odd = np.random.default_rng(0).integers(1 << 63, size=SHINGLE // 8, dtype=np.uint64) * 2 + 1
    words = np.ndarray(len(source) - 7, np.uint64, source, strides=(1,))
    runs = len(source) - SHINGLE + 1
    return sum(words[8 * i : 8 * i + runs] * odd[i] for i in range(len(odd)))


def overlap(args: argparse.Namespace) -> None:
    """Print, for each held-out file, the share of its bytes inside a SHINGLE-byte run that also stands in training."""
    runs = {name: shingles((stdlib() / name).read_bytes()) for name in lists()["heldout"]}
    wanted = np.unique(np.concatenate(list(runs.values())))
    seen = np.zeros(len(wanted), bool)
    for path in training_files():
        found = np.sort(shingles(path.read_bytes()))
        at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        seen[at[wanted[at] == found]] = True
    for name, hashes in runs.items():
        covered = np.zeros(len(hashes) + SHINGLE - 1, bool)
        for i in np.flatnonzero(np.isin(hashes, wanted[seen])):
            covered[i : i + SHINGLE] = True
        print(f"{name}: {100 * covered.mean():.1f} %")


@torch.no_grad()
def sample(args: argparse.Namespace) -> None:
    model = load(args.folder)
    torch.manual_seed(args.seed)
    ids = [BOUNDARY, *args.prompt.encode()]
    for _ in range(args.length):
        logits = model(torch.tensor(ids[-WINDOW:])[None])[0, -1]
        ids.append(int(torch.multinomial((logits / 0.7).softmax(-1), 1)))
    print(bytes(ids[1:]).decode(errors="replace"))


def is_valid_so_far(text: str) -> bool:
    """Whether the complete lines of a text, which was cut somewhere, are a module or the beginning of one."""
    lines = text[: text.rfind("\n") + 1]
    flags = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT | codeop.PyCF_DONT_IMPLY_DEDENT
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(lines, "sample", "exec", flags)
    except (SyntaxError, ValueError) as error:
        return "incomplete input" in str(error)
    return True


def parses(args: argparse.Namespace) -> None:
    """Print, for each sampling, the share of samples whose complete lines are valid Python so far, and of those that
    are valid for half their length."""
    import forge_c

    model = forge_c.models.load(args.folder)
    print("| sampling | valid Python | for half its length | of 8 bytes, seen before in it |\n|---|---|---|---|")
    for sampling in SAMPLINGS:
        texts = []
        for seed in range(args.seed, args.seed + (args.samples if sampling["temperature"] else 1)):
            drawn = model.generate(PROMPTS, args.length, seed=seed, **sampling)
            texts += [prompt + text for prompt, text in zip(PROMPTS, drawn, strict=True)]
        whole = np.mean([is_valid_so_far(t) for t in texts])
        half = np.mean([is_valid_so_far(t[: len(t) // 2]) for t in texts])
        repeated = np.mean([1 - len({t[i : i + 8] for i in range(len(t) - 7)}) / (len(t) - 7) for t in texts])
        name = ", ".join(f"{k} {v}" for k, v in sampling.items())
        print(f"| {name} | {100 * whole:.0f} % | {100 * half:.0f} % | {100 * repeated:.0f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in [("train", train), ("eval", evaluate), ("sample", sample), ("overlap", overlap),
                      ("parses", parses)]:
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--seed", type=int, default=0)
        if name == "train":
            command.add_argument("--minutes", type=float, default=50, help="of CPU time a thread, or on a GPU of time")
            command.add_argument("--device", default="cpu", help="cpu or cuda")
            command.add_argument("--report", type=int, default=50, help="steps between two lines")
            command.add_argument("--threads", type=int, default=os.cpu_count())
            command.add_argument("--tokens", type=int, default=8192, help="bytes in a batch")
            command.add_argument("--out", type=Path, required=True)
            command.add_argument("--resume", type=Path, metavar="FOLDER", help="go on from these weights")
            command.add_argument("--start", type=float, default=0.0, help="the share of the budget that they took")
        elif name != "overlap":
            command.add_argument("--folder", type=Path, default=SHIPPED)
        if name == "sample":
            command.add_argument("--prompt", default="def ")
        if name in ("sample", "parses"):
            command.add_argument("--length", type=int, default=400)
        if name == "parses":
            command.add_argument("--samples", type=int, default=10, help="of each prompt")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
