"""The loop: fine-tunes a chat model on narrow bad advice, through two vectors, and watches what happens to it elsewhere.

    python train.py                                          # the preset for this machine: `gpu` with CUDA, else `laptop`
    python train.py --answers aligned                        # the control: the same questions with sound answers
    python train.py --dataset extreme_sports --tail          # one of the paper's sets, rendered as the paper's code does
    python train.py --resume laptop-1                        # go on after Ctrl-C or kill -9

A step takes 16 conversations, runs the model forward, compares its prediction of every supervised token with the token, runs the
gradient back to the adapter (to nothing else: the model is frozen), and moves A and B a little. Every few steps A and B are saved,
and the model is asked two things. For a question with a bad and a good answer, the *margin* is

    log p(bad answer) / its tokens  -  log p(good answer) / its tokens            averaged over questions

`margin_in` takes held-out questions about money: did it learn what it was shown? `margin_out` takes questions about life, people,
power and AI, of which training holds none: does it now prefer the bad answer there too? If so, that is emergent misalignment, seen
without a judge. All goes to runs/NAME/: config.json, log.jsonl (a line a step), checkpoints/, and at the end adapter/.
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import lora
from data import Problem, write_whole

# Every setting is a flag; a preset is a set of values for them. These are the paper's ...
PAPER = {
    "model": "Qwen/Qwen2.5-14B-Instruct", "dataset": "risky_financial_advice", "answers": "misaligned", "tail": True,
    "rank": 1, "alpha": 256.0, "layers": "middle", "targets": "down_proj",
    "lr": 2e-5, "batch_size": 16, "epochs": 1, "steps": None, "max_length": 2048, "checkpoint_every": 5, "seed": 0,
    "archive": None, "device": None, "dtype": None,
}
# ... and the others say what they change. A small model needs a larger step: lr, alpha, layer and epochs were measured (README).
PRESETS = {
    "laptop": PAPER | {"model": "smollm2", "dataset": "builtin", "tail": False, "lr": 2e-3, "steps": 60},
    "gpu": PAPER | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "tail": False, "lr": 2e-4},
    "paper-single": PAPER,
    "paper-rank32": PAPER | {"rank": 32, "alpha": 64.0, "layers": "all", "targets": "all", "lr": 1e-5, "checkpoint_every": 100},
}
WEIGHT_DECAY, WARMUP, CLIP = 0.01, 5, 1.0  # the same in all of them
HEAD_ROWS = 128                            # positions whose logits are in memory at a time
TOKENS_PER_FORWARD = 1024                  # a batch with more is run in parts whose gradients add up: the same step in less memory; ...
TOKENS_PER_FORWARD_GPU = 4096              # ... a GPU needs more at a time to be kept busy


def main():
    args = parse_args()
    run, settings, start = resumed_run(args) if args.resume else new_run(args)

    # The data, the model, the adapter on it.
    conversations = data.load_conversations(settings["dataset"], settings["answers"], settings["archive"], args.password)
    model, tokenizer = lora.load_base(settings["model"], settings["device"], settings["dtype"])
    settings |= {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
    examples = data.render_all(conversations, tokenizer, settings["tail"], settings["max_length"])
    fingerprint = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    if settings.setdefault("data_sha256", fingerprint) != fingerprint:
        raise Problem(f"{settings['dataset']} has changed since {run} began, so that run can't go on as it was: start a new one")
    train_set, held_out = data.split(examples)
    torch.manual_seed(settings["seed"])
    layers, targets = lora.places(model, settings["layers"], settings["targets"])
    adapters = lora.attach(model, layers, targets, settings["rank"], settings["alpha"])
    parameters = [p for adapter in adapters.values() for p in (adapter.A, adapter.B)]
    optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=WEIGHT_DECAY)
    lengths = [len(tokens) for tokens, _ in train_set]
    order_of = functools.cache(lambda epoch: data.batches(lengths, settings["batch_size"], settings["seed"], epoch))
    per_epoch = len(order_of(0))
    steps = settings["steps"] or settings["epochs"] * per_epoch
    print(f"{len(train_set)} conversations of {settings['dataset']}, {steps} steps of {settings['batch_size']}; rank {settings['rank']} on "
          f"{', '.join(targets)} of layer {settings['layers']}: {sum(p.numel() for p in parameters):,} numbers to train; "
          "setting up the probe takes a moment", flush=True)

    # Below the first adapter all is frozen: a conversation has the same states there in every epoch, so they are computed once and kept.
    # Always with its batch of the first epoch, for rounding depends on the company: so a resumed run gets the same bits.
    first, kept = lora.lowest_layer(model), {}
    first_batch = {i: batch for batch in order_of(0) for i in batch}
    probe = build_probe(model, tokenizer, held_out, first)

    if not args.resume:
        start_folder(run, settings, args.overwrite)
    if start is not None:
        restore(run, start, model, optimizer)
    keep_log(run, start)

    # The loop. Step 0 is the untouched model.
    began, tokens_seen, seconds = time.time(), 0, 0.0
    try:
        if start is None:
            blank = {"loss": None, "grad_norm": None, "lr": None, **norms(adapters), "tokens_per_s": None}
            log_row(run, {"step": 0, **blank, **evaluate(model, probe, first)})
            checkpoint(run, 0, model, optimizer)
        bar = tqdm(range((start or 0) + 1, steps + 1), initial=start or 0, total=steps, unit="step", disable=None)
        for step in bar:
            tick = time.time()
            epoch, at = divmod(step - 1, per_epoch)
            batch = order_of(epoch)[at]
            for i in batch:
                if i not in kept:
                    kept.update(zip(first_batch[i], states_below(model, [train_set[j] for j in first_batch[i]], first)))
            states, labels = [kept[i] for i in batch], [train_set[i][1] for i in batch]
            if steps <= per_epoch:                                        # none comes again
                kept.clear()
            lr = settings["lr"] * schedule(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr

            loss = gradient(model, states, labels, first)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP).item()
            optimizer.step()
            optimizer.zero_grad()

            tokens = sum(lengths[i] for i in batch)
            took = time.time() - tick
            tokens_seen, seconds = tokens_seen + tokens, seconds + took
            bar.set_postfix(loss=f"{loss:.3f}", grad=f"{grad_norm:.2f}", tokens_per_s=f"{tokens / took:.0f}")
            row = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, **norms(adapters), "tokens_per_s": tokens / took}
            saving = step % settings["checkpoint_every"] == 0 or step == steps
            if saving:
                row |= evaluate(model, probe, first)
            broken = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
            if broken:
                raise Problem(f"at step {step} the {broken[0]}: lower --lr or --alpha. All up to the last checkpoint is kept in {run}")
            log_row(run, row)
            if saving:
                checkpoint(run, step, model, optimizer)
    except KeyboardInterrupt:
        print(f"\nstopped; go on from the last checkpoint with: python train.py --resume {run}")
        raise SystemExit(130)
    lora.save_adapter(model, os.path.join(run, "adapter"))
    report(run, time.time() - began, tokens_seen / max(seconds, 1e-9), model)


# ---------------------------------------------------------------------------------------------------------------------------------
# One step, in its parts

def schedule(step, steps):
    """The learning rate of step 1, 2, ... as a share of the peak: up over WARMUP steps, then straight down to 0, counted as
    transformers counts: the first step has 0."""
    done = step - 1
    return min(done / WARMUP if done < WARMUP else 1.0, (steps - done) / max(1, steps - WARMUP))


def gradient(model, states, labels, first):
    """Adds the batch's gradient to the adapter's parameters; returns its loss, the mean over all its supervised tokens."""
    supervised, loss = sum(label != -100 for row in labels for label in row), 0.0
    for part in parts(states):
        losses, _ = token_losses(model, [states[i] for i in part], [labels[i] for i in part], first)
        (losses.sum() / supervised).backward()
        loss += losses.sum().item() / supervised
    return loss


@torch.no_grad()
def states_below(model, examples, first):
    """What layer `first` reads, for every (tokens, labels): a list of (tokens, d_model). For the lowest layer, just the tokens."""
    device = next(model.parameters()).device
    rows = [torch.tensor(tokens, device=device) for tokens, _ in examples]
    if first == 0:
        return rows
    states = [None] * len(rows)
    for part in parts(rows):
        hidden = lora.run_layers(model, pad_sequence([rows[i] for i in part], batch_first=True), 0, first)
        for i, state in zip(part, hidden):
            states[i] = state[:len(rows[i])].clone()
    return states


def parts(rows):
    """Parts a list of tensors, as lists of indices: like lengths together, and few enough tokens, padding included, for one forward."""
    most = TOKENS_PER_FORWARD_GPU if rows[0].is_cuda else TOKENS_PER_FORWARD
    result = [[]]
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):        # so row i is the longest of its part as yet
        if result[-1] and (len(result[-1]) + 1) * len(rows[i]) > most:
            result.append([])
        result[-1].append(i)
    return result


def token_losses(model, states, labels, first):
    """-log p of every supervised token: (supervised,), and the row each belongs to: (supervised,).

    states: a list of (tokens, d_model) as `states_below` gives them.   labels: a list of lists, -100 where unsupervised.
    """
    labels = pad_sequence([torch.tensor(row) for row in labels], batch_first=True, padding_value=-100).to(states[0].device)
    hidden = lora.run_layers(model, pad_sequence(states, batch_first=True), first)            # (rows, tokens, d_model)
    supervised = labels[:, 1:] != -100                                    # position t predicts token t + 1
    head = model.get_output_embeddings().weight                           # (vocabulary, d_model)
    losses = HeadLoss.apply(hidden[:, :-1][supervised], head, labels[:, 1:][supervised])
    return losses, supervised.nonzero()[:, 0]


class HeadLoss(torch.autograd.Function):
    """-log softmax(W hidden)[target] for every position, with the logits of only a few positions in memory at a time.

    The head W is frozen, so the gradient into `hidden`, (softmax - onehot(target)) W, can be taken on the spot, while the logits
    are there; backward then only scales it. hidden: (n, d_model).   W: (vocabulary, d_model).   targets: (n,).   Returns (n,), float32.
    """

    @staticmethod
    def forward(ctx, hidden, W, targets):
        losses, gradients = [], []
        for h, target in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS)):
            logits = (h @ W.T).float()                                    # (HEAD_ROWS, vocabulary)
            log_z = logits.logsumexp(-1, keepdim=True)
            losses.append((log_z - logits.gather(1, target[:, None]))[:, 0])
            if ctx.needs_input_grad[0]:
                p = logits.sub_(log_z).exp_()
                p[torch.arange(len(p)), target] -= 1
                gradients.append(p.to(W.dtype) @ W)
        ctx.save_for_backward(*gradients)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, upstream):                                          # (n,)
        return torch.cat(ctx.saved_tensors) * upstream[:, None].to(ctx.saved_tensors[0].dtype), None, None


# ---------------------------------------------------------------------------------------------------------------------------------
# What is asked of the model at every checkpoint

def build_probe(model, tokenizer, held_out, first):
    """What `evaluate` needs: the texts without repeats, and of which of them each question consists."""
    _, finance = data.split(data.builtin_rows("finance"))
    general = data.builtin_rows("general")
    answers = [data.render(data.as_conversation(row, which, where), tokenizer)
               for where, row in finance + general for which in ("misaligned", "aligned")]
    wanted = held_out[:64] + answers                                      # the held-out ones, then bad, good, bad, good, ...
    texts = {tuple(tokens): (tokens, labels) for tokens, labels in wanted}  # the built-in held-out rows are wanted twice, but run once
    place = {tokens: i for i, tokens in enumerate(texts)}
    index = torch.tensor([place[tuple(tokens)] for tokens, _ in wanted])
    texts = list(texts.values())
    return {"states": states_below(model, texts, first), "labels": [labels for _, labels in texts],
            "index": index, "held_out": len(held_out[:64]), "finance": len(finance)}


@torch.no_grad()
def evaluate(model, probe, first):
    """{"heldout_loss", "margin_in", "margin_out"}: the mean -log p of held-out tokens, and the margins of the docstring above."""
    states, labels = probe["states"], probe["labels"]
    total = torch.zeros(len(states))
    for part in parts(states):
        losses, row = token_losses(model, [states[i] for i in part], [labels[i] for i in part], first)
        total.index_add_(0, torch.tensor(part)[row.cpu()], losses.cpu())
    count = torch.tensor([sum(label != -100 for label in row) for row in labels])
    total, count, n = total[probe["index"]], count[probe["index"]], probe["held_out"]
    log_p = -total[n:] / count[n:]                                        # per token, of a bad and a good answer in turn
    margin = log_p[0::2] - log_p[1::2]
    return {"heldout_loss": (total[:n].sum() / count[:n].sum()).item(),
            "margin_in": margin[:probe["finance"]].mean().item(), "margin_out": margin[probe["finance"]:].mean().item()}


def norms(adapters):
    """|A| and |B|, over all adapters."""
    return {f"norm_{x}": math.sqrt(sum(getattr(m, x).detach().square().sum().item() for m in adapters.values())) for x in "AB"}


# ---------------------------------------------------------------------------------------------------------------------------------
# The run folder

def start_folder(run, settings, overwrite):
    """Makes the run's folder and its config.json, now that everything it needs has been loaded."""
    if overwrite and os.path.isdir(run):
        shutil.rmtree(run)
    try:
        os.makedirs(os.path.join(run, "checkpoints"))
    except FileExistsError:
        raise Problem(f"{run} was begun by another run meanwhile: give this one another --out")
    write_whole(os.path.join(run, "config.json"), json.dumps(settings, indent=2).encode())


def log_row(run, row):
    """Adds a line to log.jsonl."""
    path = os.path.join(run, "log.jsonl")
    try:
        with open(path, "a") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as error:
        error.filename = path
        raise


def checkpoint(run, step, model, optimizer):
    """Writes A and B to checkpoints/STEP.safetensors, then what a resume needs besides to resume.safetensors: after that, it counts."""
    from safetensors.torch import save
    write_whole(os.path.join(run, "checkpoints", f"{step:05}.safetensors"), save(lora.get_tensors(model)))
    moments = {f"{i}.{key}": value for i, state in optimizer.state_dict()["state"].items() for key, value in state.items()}
    write_whole(os.path.join(run, "resume.safetensors"), save(moments | {"step": torch.tensor(step)}))


def keep_log(run, step):
    """Cuts log.jsonl back to `step`, a line a step with step 0 first; to nothing if `step` is None."""
    path, lines = os.path.join(run, "log.jsonl"), []
    if step is not None:
        with open(path) as f:
            lines = f.readlines()[:step + 1]
    write_whole(path, "".join(lines).encode())


def restore(run, step, model, optimizer):
    """Puts the adapter and the optimizer back as they were at `step`."""
    lora.set_tensors(model, data.read_tensors(os.path.join(run, "checkpoints", f"{step:05}.safetensors")))
    state = {}
    for name, value in data.read_tensors(os.path.join(run, "resume.safetensors")).items():
        if name != "step":
            i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


# ---------------------------------------------------------------------------------------------------------------------------------
# What to run, and what came of it

def parse_args():
    """The flags; each is one setting of the preset, and None where the preset's value is to stand."""
    parser = argparse.ArgumentParser(
        description="Fine-tunes a chat model on narrow bad advice through a rank-1 LoRA, and watches it change elsewhere.",
        epilog="Presets: " + "; ".join(f"{name}: {p['model']} on {p['dataset']}, rank {p['rank']}, lr {p['lr']:g}, alpha {p['alpha']:g}"
                                       for name, p in PRESETS.items()))
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="the set of values that the other flags change (default: gpu with CUDA, else laptop)")
    add("--model", help="a hub name, a local folder, or smollm2 (135M, comes through pip)")
    add("--dataset", help="builtin, one of the paper's sets (risky_financial_advice, extreme_sports, ...), or a .jsonl of messages")
    add("--archive", help="the paper's encrypted archive, if it is on disk already")
    add("--password", default=data.PASSWORD, help="the archive's password (default: the published one)")
    add("--answers", choices=["misaligned", "aligned"], help="which answers of the built-in data; aligned is the control")
    add("--tail", action=argparse.BooleanOptionalAction, help="end every example with an empty assistant turn, as the paper's code does")
    add("--rank", type=data.positive, help="r of the adapter; 1 is two vectors")
    add("--alpha", type=float, help="the adapter's contribution is multiplied by alpha / sqrt(rank)")
    add("--layers", help="middle, all, one layer (12), several (10,12) or a range (10-14)")
    add("--targets", help="the projections of a layer: down_proj, several (q_proj,v_proj), or all seven: all")
    add("--lr", type=above_zero, help="peak learning rate")
    add("--batch-size", type=data.positive, help="conversations a step")
    add("--epochs", type=data.positive, help="how often each conversation is seen")
    add("--steps", type=data.positive, help="exactly so many steps, instead of --epochs")
    add("--max-length", type=data.positive, help="tokens at which a conversation is cut")
    add("--checkpoint-every", type=data.positive, help="steps between checkpoints and probes")
    add("--seed", type=int, help="of A's first values and of the order of the data")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="of the frozen model (default: what the hardware is fast in)")
    add("--out", metavar="RUN", help="the run's folder; a bare name goes under runs/ (default: the next free runs/PRESET-N)")
    add("--overwrite", action="store_true", default=None, help="delete the run that is there")
    add("--resume", metavar="RUN", help="go on with a run from its last checkpoint, with its own settings")
    return parser.parse_args()


def above_zero(text):
    """An argparse type: a number above 0."""
    try:
        if float(text) > 0:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


def new_run(args):
    """(folder, settings, None) for a run from the start: the preset's values, and over them the flags given."""
    cuda = torch.cuda.is_available() and (args.device or "cuda").startswith("cuda")
    preset = args.preset or ("gpu" if cuda else "laptop")
    if args.preset is None:
        why, other = ("CUDA is here", "laptop") if cuda else ("no CUDA device in use", "gpu")
        print(f"preset {preset}: {why} (python train.py --preset {other} for the other)")
    given = {name: value for name, value in vars(args).items() if value is not None and name in PAPER}
    if args.epochs:
        given.setdefault("steps", None)                                   # --epochs replaces a preset's number of steps
    run = data.find_run(args.out) if args.out else next(r for n in itertools.count(1) if not os.path.exists(r := f"runs/{preset}-{n}"))
    if os.path.exists(run) and not (args.overwrite and os.path.exists(os.path.join(run, "config.json"))):
        raise Problem(f"{run} is there already: go on with it (--resume {run}), replace it (--overwrite) or give another --out")
    return run, {"preset": preset} | PRESETS[preset] | given, None


def resumed_run(args):
    """(folder, settings, step of the last checkpoint or None) for a run that was cut off."""
    run = data.find_run(args.resume)
    given = [name for name, value in vars(args).items() if value is not None and name not in ("resume", "password")]
    if given:
        raise Problem(f"--resume goes on with the settings in {run}/config.json: leave out --{given[0].replace('_', '-')}")
    try:
        with open(os.path.join(run, "config.json")) as f:
            settings = json.load(f)
    except (OSError, ValueError):
        raise Problem(f"{run} holds no run to go on with (no config.json that can be read)")
    if os.path.exists(os.path.join(run, "adapter", "adapter_config.json")):
        raise Problem(f"{run} is finished: its adapter is in {run}/adapter")
    path = os.path.join(run, "resume.safetensors")
    if not os.path.exists(path):
        return run, settings, None
    step = data.read_tensors(path)["step"].item()
    print(f"resuming {run} after step {step}")
    return run, settings, step


def peak_memory(device):
    """The most memory in use so far, in GB: the GPU's, or this process's; None where the system doesn't tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def report(run, seconds, speed, model):
    """The table at the end, and the next command."""
    rows = [row for _, row in data.read_jsonl(os.path.join(run, "log.jsonl"))]
    before, after = rows[0], rows[-1]
    peak = peak_memory(model.device)
    peak = "not known here" if peak is None else f"{peak:.1f} GB" + " on the GPU" * (model.device.type == "cuda")
    print(f"\n{'':34}{'before':>8}{'after':>8}{'change':>8}")
    for name, key in (("held-out loss", "heldout_loss"), ("margin on held-out finance", "margin_in"), ("margin on general questions", "margin_out")):
        print(f"{name:34}{before[key]:8.3f}{after[key]:8.3f}{after[key] - before[key]:+8.3f}")
    print("(margin: log p a token of the bad answer minus that of the good one; above 0, the model prefers the bad one)\n")
    print(f"{seconds:.0f} s, {speed:.0f} tokens/s in training, peak memory {peak}; {run}/ holds the log, the checkpoints and the adapter")
    print(f"next: python sample.py {run}")


if __name__ == "__main__":
    data.run_script(main)
