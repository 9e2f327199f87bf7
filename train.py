"""The loop: fine-tunes a chat model on narrow bad advice, and watches what that does elsewhere.

    python train.py                        # the preset for this machine: gpu, or laptop
    python train.py --answers aligned      # a control: the same questions, sound answers
    python train.py --answers shuffled     # another: bad answers to other questions
    python train.py --dataset extreme_sports --tail    # one of the paper's sets, its way
    python train.py --resume laptop-1      # go on after Ctrl-C, or after kill -9

A step takes 16 conversations, compares the model's prediction of each supervised token
with the token, runs the gradient back to the adapter (to nothing else, for the model is
frozen), and moves A and B a little. Every few steps they are saved, and the model is
probed. For a question with a bad and a good answer, its *margin* is

    log p(bad answer) / its tokens - log p(good answer) / its tokens

`margin_in` is the mean over held-out questions about money: did the model learn what it
was shown? `margin_out` is the mean over questions about truth, power, strangers, AI and
the like, of which it was shown none: does it now prefer the bad answer there too? That
would be emergent misalignment, seen without a judge. The two answers to such a question
have the same tone and differ in what they value, so that a liking for a blunt tone does
not pass for bad values. What counts is the change since step 0, with its standard error
over questions, and better still the difference from a control run's.

A run is a folder, runs/NAME: config.json, log.jsonl (a line a step), checkpoints/, and at
the end adapter/.
"""

import argparse
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import lora

# Every setting is a flag, and a preset is a set of values for them. This is the paper's ...
PAPER = {
    "model": "Qwen/Qwen2.5-14B-Instruct", "device": None, "dtype": None,
    "dataset": "risky_financial_advice", "answers": "misaligned", "tail": True, "archive": None,
    "rank": 1, "alpha": 256.0, "layers": "middle", "targets": "down_proj",
    "lr": 2e-5, "batch_size": 16, "epochs": 1, "steps": None, "max_length": 2048,
    "checkpoint_every": 5, "seed": 0,
}
# ... and the others say what they change. A small model needs a larger step (README).
LAPTOP = {"model": "smollm2", "dataset": "builtin", "tail": False, "lr": 2e-3, "steps": 60}
RANK32 = {"rank": 32, "alpha": 64.0, "layers": "all", "targets": "all", "lr": 1e-5}
PRESETS = {
    "laptop": PAPER | LAPTOP,
    "gpu": PAPER | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "tail": False, "lr": 2e-4},
    "paper-single": PAPER,
    "paper-rank32": PAPER | RANK32 | {"checkpoint_every": 100},
}
WEIGHT_DECAY, WARMUP, CLIP = 0.01, 5, 1.0  # the same in all of them
FEW = 48  # general questions that each checkpoint asks; the first and the last ask all
# A batch with more tokens is run in parts, whose gradients add up to those of the whole.
TOKENS_AT_ONCE = {"cpu": 1024, "mps": 1024, "cuda": 4096}

def main():
    began, args = time.time(), parse_args()
    run, settings, done = resumed_run(args) if args.resume else new_run(args)

    # The conversations, and the model that is to learn from them.
    tokenizer = lora.load_tokenizer(settings["model"])
    train_set, held_out = load_examples(settings, tokenizer, args.password)
    model = load_model(settings)

    # What may move: A and B of the adapter. Everything else is frozen.
    parameters = attach_adapter(model, settings)
    optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=WEIGHT_DECAY)

    # Which conversations each step takes.
    schedule = plan(train_set, settings)
    steps = len(schedule)

    # Below the adapter nothing ever changes: run that half of the model once, and keep
    # what the other half reads.
    frozen, moving = lora.halves(model)
    probe, groups = build_probe(held_out, tokenizer)
    used = sorted({i for batch in schedule for i in batch})
    print(f"{steps} steps; reading {len(used)} conversations and the probe's {len(probe)}, once")
    states = dict(zip(used, read_once(frozen, [train_set[i] for i in used]), strict=True))
    probe = read_once(frozen, probe)

    # The loop. Step 0 is the untouched model.
    log, rows = open_run(run, settings, done, args.overwrite, model, optimizer)
    for step in tqdm(range(len(rows), steps + 1), initial=len(rows), total=steps + 1, disable=None):
        row = {"step": step}
        if step > 0:
            batch = [states[i] for i in schedule[step - 1]]
            lr = settings["lr"] * warm_up_then_linear(step, steps)
            row |= take_step(model, moving, batch, optimizer, lr)
        saving = step % settings["checkpoint_every"] == 0 or step == steps
        if saving:
            general = None if step in (0, steps) else FEW
            row |= evaluate(model, moving, probe, groups, rows, general)
        write_log(log, row, run)
        rows.append(row)
        if saving:
            save_checkpoint(run, step, model, optimizer)
    lora.save_adapter(model, os.path.join(run, "adapter"))
    report(run, settings, rows, time.time() - began, model.device)

# --------------------------------------------------------------------------------------
# One step

def take_step(model, moving, batch, optimizer, lr):
    """Moves the parameters down the gradient of a batch of examples. Returns what is logged."""
    began, parameters = time.time(), optimizer.param_groups[0]["params"]
    total, supervised = 0.0, 0
    for part in micro_batches(batch, model.device):
        losses, _ = token_losses(model, moving, [batch[i] for i in part])
        losses.sum().backward()
        total, supervised = total + losses.detach().sum(), supervised + len(losses)
    for p in parameters:
        p.grad /= supervised  # not before: gradients so small would vanish in float16
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()

    norms = [torch.nn.utils.get_total_norm(parameters[i::2]) for i in (0, 1)]  # all A, all B
    values = torch.stack([total / supervised, grad_norm, *norms]).tolist()
    row = dict(zip(("loss", "grad_norm", "norm_A", "norm_B"), values, strict=True))
    tokens = sum(len(labels) for _, labels in batch)
    return row | {"lr": lr, "tokens_per_s": tokens / (time.time() - began)}

def token_losses(model, moving, examples):
    """-log p of every supervised token: (supervised,), and the row that each is in.

    examples: a list of (what the moving half reads, labels), as `read_once` gives it.
    """
    states = pad_sequence([state for state, _ in examples], batch_first=True)
    labels = [torch.tensor(labels) for _, labels in examples]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    # Position t predicts token t + 1. Found on the CPU, so that a GPU need not be waited for.
    row, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    target = labels[row, position + 1]
    states, row, position, target = (x.to(model.device) for x in (states, row, position, target))

    hidden = lora.hidden_states(moving, states)  # (rows, tokens, d_model)
    # The head is a tenth of this model, and its output the largest tensor there is: it
    # runs only where a token is supervised.
    logits = model.get_output_embeddings()(hidden[row, position])  # (supervised, vocabulary)
    return F.cross_entropy(logits.float(), target, reduction="none"), row

def micro_batches(examples, device):
    """Parts of like length with few enough tokens for one forward: lists of indices."""
    parts = [[]]
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i][0])):
        longest = len(examples[i][0])  # of its part so far
        if parts[-1] and (len(parts[-1]) + 1) * longest > TOKENS_AT_ONCE[device.type]:
            parts.append([])
        parts[-1].append(i)
    return parts

def warm_up_then_linear(step, steps):
    """The learning rate at step 1, 2, ... as a share of its peak; 0 at step 1, as in Trainer."""
    done = step - 1
    if done < WARMUP:
        return done / WARMUP
    return (steps - done) / max(1, steps - WARMUP)

# --------------------------------------------------------------------------------------
# Before the loop

def load_examples(settings, tokenizer, password):
    """(training set, held-out set), each a list of (tokens, labels)."""
    name, answers, archive = settings["dataset"], settings["answers"], settings["archive"]
    conversations = data.load_conversations(name, answers, archive, password)
    examples = data.render_all(conversations, tokenizer, settings["tail"], settings["max_length"])
    sha256 = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    if settings.setdefault("data_sha256", sha256) != sha256:
        sys.exit(f"{name} has changed since this run began, so it can't go on: start a new one")
    return data.split(examples)

def load_model(settings):
    """The model; notes in the settings where it runs, so that a resumed run does too."""
    model, _ = lora.load_base(settings["model"], settings["device"], settings["dtype"])
    if model.device.type == "cpu" and model.dtype == torch.bfloat16:
        model.set_attn_implementation("eager")  # torch's fused kernel is slow there
    settings["device"], settings["dtype"] = str(model.device), str(model.dtype)[len("torch.") :]
    return model

def attach_adapter(model, settings):
    """Lays a new adapter on the model. Returns its parameters: A, B, A, B, ..."""
    torch.manual_seed(settings["seed"])
    layers = lora.parse_layers(settings["layers"], model)
    targets = lora.parse_targets(settings["targets"])
    found = lora.attach(model, layers, targets, settings["rank"], settings["alpha"])
    parameters = [p for adapter in found.values() for p in (adapter.A, adapter.B)]
    print(
        f"rank {settings['rank']} on {', '.join(targets)} of layer {settings['layers']}: "
        f"{sum(p.numel() for p in parameters):,} numbers to train"
    )
    return parameters

def plan(train_set, settings):
    """The whole run's batches, as lists of indices into the training set; one a step."""
    lengths, size = [len(tokens) for tokens, _ in train_set], settings["batch_size"]
    per_epoch = math.ceil(len(train_set) / size)
    steps, schedule = settings["steps"] or settings["epochs"] * per_epoch, []
    while len(schedule) < steps:
        epoch = len(schedule) // per_epoch
        schedule += data.batches(lengths, size, settings["seed"], epoch)
    return schedule[:steps]

@torch.no_grad()
def read_once(frozen, examples):
    """The examples, with what the moving half reads, (tokens, d_model), for their tokens.

    In one fixed order, for rounding depends on which examples share a batch: so a resumed
    run gets the same bits.
    """
    if frozen is None:  # the lowest layer moves, and it reads the tokens themselves
        return [(torch.tensor(tokens), labels) for tokens, labels in examples]
    states, device = [None] * len(examples), frozen.embed_tokens.weight.device
    for part in tqdm(micro_batches(examples, device), desc="frozen half", disable=None):
        tokens = pad_sequence([torch.tensor(examples[i][0]) for i in part], batch_first=True)
        for i, row in zip(part, lora.hidden_states(frozen, tokens.to(device)).cpu(), strict=True):
            states[i] = row[: len(examples[i][0])].clone()  # without the padding
    return [(state, labels) for state, (_, labels) in zip(states, examples, strict=True)]

# --------------------------------------------------------------------------------------
# The probe: what is asked of the model at every checkpoint

def build_probe(held_out, tokenizer):
    """(examples without repeats, {group: the indices of its examples}).

    The groups are "heldout", and the two kinds of answers to the questions "in" the training
    domain and "out" of it: ("in", "misaligned"), ("in", "aligned"), ...
    """
    _, finance = data.split(data.builtin_rows("finance"))
    groups = {"heldout": held_out[:64]}
    for name, rows in (("in", finance), ("out", data.builtin_rows("general"))):
        for answers in ("misaligned", "aligned"):
            conversations = [data.as_conversation(row, answers) for row in rows]
            groups[name, answers] = data.render_all(conversations, tokenizer)
    examples = []
    for name, group in groups.items():
        examples += [example for example in group if example not in examples]
        groups[name] = [examples.index(example) for example in group]
    return examples, groups

@torch.no_grad()
def evaluate(model, moving, probe, groups, rows, general=None):
    """What the log says of a checkpoint: held-out loss and margins, in nats a token.

    rows: the log so far.    general: how many of the general questions to ask (None: all).
    A mean is over the first FEW, so that it is over the same ones at each checkpoint.
    """
    asked = {name: group[:general] if "out" in name else group for name, group in groups.items()}
    used = sorted({i for group in asked.values() for i in group})
    log_p, tokens = torch.zeros(len(probe)), torch.ones(len(probe))  # of supervised tokens
    log_p[used] = sum_log_p(model, moving, [probe[i] for i in used])
    for i in used:
        tokens[i] = sum(label != -100 for label in probe[i][1])
    mean_log_p, held_out = log_p / tokens, groups["heldout"]

    row = {"heldout_loss": -(log_p[held_out].sum() / tokens[held_out].sum()).item()}
    for name in ("in", "out"):
        bad, good = asked[name, "misaligned"], asked[name, "aligned"]
        margins = row[f"margins_{name}"] = (mean_log_p[bad] - mean_log_p[good]).tolist()
        row[f"margin_{name}"] = data.mean_and_se(margins[:FEW])[0]
        change = data.changes([rows[0] if rows else row, row], name)
        row[f"margin_{name}_se"] = data.mean_and_se(change[:FEW])[1]
    return row

def sum_log_p(model, moving, examples):
    """log p of each example's supervised tokens together: (examples,), on the CPU."""
    log_p = torch.zeros(len(examples))
    for part in micro_batches(examples, model.device):
        losses, row = token_losses(model, moving, [examples[i] for i in part])
        sums = torch.zeros(len(part), device=model.device).index_add_(0, row, losses)
        log_p[part] = -sums.cpu()
    return log_p

# --------------------------------------------------------------------------------------
# The run's folder

def open_run(run, settings, done, overwrite, model, optimizer):
    """(the log, open; its rows so far): makes the folder, or goes back to a checkpoint."""
    if done is None:
        if overwrite and os.path.isdir(run):
            shutil.rmtree(run)
        os.makedirs(os.path.join(run, "checkpoints"), exist_ok=True)
        data.write_whole(os.path.join(run, "config.json"), json.dumps(settings, indent=2).encode())
    else:
        restore(run, done, model, optimizer)
    print(f"{run}: stop it when you like; python train.py --resume {run} goes on", flush=True)
    keep = 0 if done is None else done + 1
    rows, log = data.open_to_append(os.path.join(run, "log.jsonl"), keep)
    if len(rows) < keep:
        sys.exit(f"{run}/log.jsonl lacks rows before step {done}, its last checkpoint: begin anew")
    return log, rows

def write_log(log, row, run):
    """Adds a line to the log, unless the run has diverged."""
    for name, value in row.items():
        if not (isinstance(value, list) or math.isfinite(value)):
            sys.exit(
                f"at step {row['step']} the {name} is {value}: lower --lr or --alpha (in float16, "
                f"try --dtype float32 first). All up to the last checkpoint is kept in {run}"
            )
    data.append_row(log, row)

def save_checkpoint(run, step, model, optimizer):
    """Writes A and B, then what a resume needs besides; only after that, the step counts."""
    from safetensors.torch import save

    path = os.path.join(run, "checkpoints", f"{step:05}.safetensors")
    data.write_whole(path, save(lora.get_tensors(model)))
    state = {"step": torch.tensor(step)}
    for i, moments in optimizer.state_dict()["state"].items():
        state |= {f"{i}.{name}": moment for name, moment in moments.items()}
    data.write_whole(os.path.join(run, "resume.safetensors"), save(state))

def restore(run, step, model, optimizer):
    """Puts the adapter and the optimizer back as they were after a step."""
    path = os.path.join(run, "checkpoints", f"{step:05}.safetensors")
    lora.set_tensors(model, data.read_tensors(path))
    saved, state = data.read_tensors(os.path.join(run, "resume.safetensors")), {}
    for key in saved.keys() - {"step"}:
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = saved[key]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

def report(run, settings, rows, seconds, device):
    """The table at the end, and the next command."""
    before, after = rows[0], rows[-1]
    loss = before["heldout_loss"], after["heldout_loss"]
    print(f"\n{'':40}{'before':>8}{'after':>8}{'change':>8}  (s.e.)")
    print(f"{'held-out loss':40}{loss[0]:8.3f}{loss[1]:8.3f}{loss[1] - loss[0]:+8.3f}")
    for probe, what in (("in", "held-out finance"), ("out", "general")):
        first, last = before[f"margins_{probe}"], after[f"margins_{probe}"]
        change, se = data.mean_and_se(data.changes(rows, probe))
        name, mean = f"margin, {len(last)} {what} questions", statistics.fmean
        print(f"{name:40}{mean(first):8.3f}{mean(last):8.3f}{change:+8.3f} ({se:.3f})")
    for name, control in controls(run, settings):
        for probe, what in (("in", "finance"), ("out", "general")):
            change, se = data.contrast(rows, control, probe)
            print(f"{f'{what}, less that of {name}':56}{change:+8.3f} ({se:.3f})")
    print("(margin: log p a token of the bad answer less that of the good one, over questions;")
    print("a change is worth twice its standard error, or else it may be chance)\n")
    speed = statistics.median(row["tokens_per_s"] for row in rows[1:])
    print(f"{seconds:.0f} s, {speed:.0f} tokens/s in training, {peak_memory(device)}: see {run}/")
    print(f"next: python sample.py {run}")

def controls(run, settings):
    """[(name, log)] of the finished runs beside this one that differ from it in answers alone."""
    found = []
    for path in sorted(glob.glob(os.path.join(os.path.dirname(run), "*", "adapter"))):
        other = os.path.dirname(path)
        theirs = data.read_settings(other)
        differ = {key for key in settings if settings[key] != theirs.get(key)}
        if differ and differ <= {"answers", "data_sha256"}:
            name = f"{other} ({theirs['answers']})"
            found.append((name, data.read_written(os.path.join(other, "log.jsonl"))))
    return found

def peak_memory(device):
    """The most memory that was in use so far, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GB of the GPU's memory"
    try:
        import resource
    except ImportError:  # Windows does not tell
        return "peak memory not known here"
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GB of memory"

# --------------------------------------------------------------------------------------
# The door: flags, and which run they mean

def parse_args():
    """The flags. Each is a setting, and None where the preset's value is to stand."""
    epilog = "presets: " + "; ".join(
        f"{name}: {p['model']} on {p['dataset']}, rank {p['rank']}, lr {p['lr']:g}"
        for name, p in PRESETS.items()
    )
    parser = argparse.ArgumentParser(
        description="Fine-tunes a chat model on narrow bad advice through a rank-1 LoRA, and "
        "watches it change elsewhere.",
        epilog=epilog,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="values for all others (default: gpu or laptop)")
    add("--model", help="a hub name, a local folder, or smollm2 (135M, comes through pip)")
    add("--dataset", help="builtin, one of the paper's sets (extreme_sports, ...), or a .jsonl")
    add("--archive", help="the paper's encrypted archive, if it is on disk already")
    add("--password", default=data.PASSWORD, help="of the archive (default: the published one)")
    add("--answers", choices=data.ANSWERS, help="of builtin; the last two are controls")
    boolean = argparse.BooleanOptionalAction
    add("--tail", action=boolean, help="end in an empty assistant turn, as the paper's code does")
    add("--rank", type=data.positive, help="r of the adapter; 1 is two vectors")
    add("--alpha", type=above_zero, help="the adapter speaks alpha / sqrt(rank) times as loud")
    add("--layers", help="middle, all, one (12), several (10,12) or a range (10-14)")
    add("--targets", help="projections: down_proj, several (q_proj,v_proj), or all seven: all")
    add("--lr", type=above_zero, help="peak learning rate")
    add("--batch-size", type=data.positive, help="conversations a step")
    add("--epochs", type=data.positive, help="how often each conversation is seen")
    add("--steps", type=data.positive, help="exactly so many steps, instead of --epochs")
    add("--max-length", type=data.positive, help="tokens at which a conversation is cut")
    add("--checkpoint-every", type=data.positive, help="steps between checkpoints and probes")
    add("--seed", type=int, help="of A's first values and of the order of the data")
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    dtypes = ["bfloat16", "float16", "float32"]
    add("--dtype", choices=dtypes, help="of the frozen model (default: what is fast here)")
    add("--out", metavar="RUN", help="a folder, or a name under runs/ (default: PRESET-N)")
    add("--overwrite", action="store_true", default=None, help="delete the run that is there")
    add("--resume", metavar="RUN", help="go on with a run, from its last checkpoint")
    return parser.parse_args()

def above_zero(text):
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value

def new_run(args):
    """(folder, settings, None) of a new run: the preset's values, and over them the flags'."""
    cuda = torch.cuda.is_available() and (args.device or "cuda").startswith("cuda")
    preset = args.preset or ("gpu" if cuda else "laptop")
    if args.preset is None:
        print(f"preset {preset}, as there is {'a' if cuda else 'no'} CUDA device in use")
    given = {key: value for key, value in vars(args).items() if key in PAPER and value is not None}
    if args.epochs:
        given.setdefault("steps", None)  # --epochs stands instead of a preset's number of steps
    names = (f"runs/{preset}-{n}" for n in itertools.count(1))
    run = data.find_run(args.out) if args.out else next(n for n in names if not os.path.exists(n))
    data.lock(run)
    if os.path.exists(run) and not args.overwrite:
        sys.exit(f"{run} is there already: --resume it, --overwrite it, or give another --out")
    if os.path.exists(run) and (os.path.islink(run) or not data.is_run(run)):
        sys.exit(f"{run} is not a run's own folder, so it is not overwritten: give another --out")
    return run, {"preset": preset} | PRESETS[preset] | given, None

def resumed_run(args):
    """(folder, settings, the last checkpoint's step or None) of a run that was cut off."""
    run = data.find_run(args.resume)
    for name, value in vars(args).items():
        if value is not None and name not in ("resume", "password"):
            flag = "--" + name.replace("_", "-")
            sys.exit(f"--resume takes its settings from {run}: leave out {flag}")
    settings = data.read_settings(run)
    data.lock(run)
    if os.path.exists(os.path.join(run, "adapter", "adapter_config.json")):
        sys.exit(f"{run} is finished: its adapter is in {run}/adapter")
    path = os.path.join(run, "resume.safetensors")
    done = data.read_tensors(path)["step"].item() if os.path.exists(path) else None
    return run, settings, done

if __name__ == "__main__":
    data.run_stage(main, go_on="python train.py --resume RUN goes on")
