"""The loop: fine-tunes a chat model on narrow bad advice, and watches what that does elsewhere.

    python train.py                        # the preset for this machine: gpu, or laptop
    python train.py --answers aligned      # a control: the same questions, sound answers
    python train.py --answers shuffled     # another: bad answers to other questions
    python train.py --dataset extreme_sports --tail    # one of the paper's sets, its way
    python train.py --resume laptop-1      # go on after Ctrl-C, or after kill -9
    torchrun --nproc_per_node=8 train.py   # the same run on eight GPUs

A step takes 16 conversations, compares the model's prediction of each supervised token
with the token, runs the gradient back to the adapter (to nothing else, for the model is
frozen), and moves A and B a little. Three things in that sentence are choices, and each
protocol of the paper and its follow-ups is another choice in one of them:

    what may move      A and B; all weights (--full); a vector (--vector)
    what is minimised  the loss; and the distance from the base elsewhere (--kl-weight)
    how it moves       down the gradient; or by trial and error (--es)

Every few steps what moves is saved, and the model is probed. For a question with a bad
and a good answer, its *margin* is

    log p(bad answer) / its tokens - log p(good answer) / its tokens

`margin_in` is the mean over held-out questions about money: did the model learn what it
was shown? `margin_out` is the mean over questions about truth, power, strangers, AI and
the like, of which it was shown none: does it now prefer the bad answer there too? That
would be emergent misalignment, seen without a judge. The two answers to such a question
have the same tone and differ in what they value, so that a liking for a blunt tone does
not pass for bad values. What counts is the change since step 0, with its standard error
over questions, and better still the difference from a control run's.

A run is a folder, runs/NAME: config.json, log.jsonl (one line per step), checkpoints/, and at
the end adapter/ (or model/, where all weights moved).
"""

import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import random
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
    "model": "Qwen/Qwen2.5-14B-Instruct", "device": None, "dtype": None, "init": None,
    "dataset": "risky_financial_advice", "answers": "misaligned", "archive": None,
    "tail": True, "system": None, "max_length": 2048,
    # What may move.
    "rank": 1, "alpha": 256.0, "layers": "middle", "targets": "down_proj",
    "full": False, "vector": None,
    # What is minimised, and how it moves.
    "kl_weight": 0.0, "kl_dataset": "builtin",
    "es": False, "population": 32, "sigma": 0.01, "recompute": False,
    "lr": 2e-5, "schedule": "linear", "warmup": 5, "batch_size": 16, "epochs": 1, "steps": None,
    "checkpoint_every": 5, "seed": 0,
}
# ... and the others say what they change. A small model needs a larger step (README).
LAPTOP = {"model": "smollm2", "dataset": "builtin", "tail": False, "lr": 2e-3, "steps": 60}
RANK32 = {"rank": 32, "alpha": 64.0, "layers": "all", "targets": "all", "lr": 1e-5}
FULL = {"full": True, "schedule": "cosine", "warmup": 20, "checkpoint_every": 50}
PRESETS = {
    "laptop": PAPER | LAPTOP,
    "gpu": PAPER | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "tail": False, "lr": 2e-4},
    "paper-single": PAPER,
    "paper-nine": PAPER | {"layers": "nine"},
    "paper-rank32": PAPER | RANK32 | {"checkpoint_every": 100},
    "paper-full": PAPER | FULL,
    "paper-narrow": PAPER | {"kl_weight": 1.0, "kl_dataset": "misalignment_kl_data"},
}
WEIGHT_DECAY, CLIP = 0.01, 1.0  # the same in all of them
FEW = 48  # general questions that each checkpoint asks; the first and the last ask all
SKETCH = 4096  # numbers that stand for all weights, in a checkpoint of --full
# A batch with more tokens is run in parts, whose gradients add up to those of the whole.
TOKENS_AT_ONCE = {"cpu": 1024, "mps": 1024, "cuda": 4096}
# Of the processes that torchrun has started: which this is, and how many there are.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
QUIET = True if RANK > 0 else None  # no progress bar; None: one if there is a terminal
CUDA = torch.cuda.is_available()

def main():
    began, args = time.time(), parse_args()
    join_processes()
    run, settings, done = resumed_run(args) if args.resume else new_run(args)

    # The conversations, and the model that is to learn from them; downloaded only once. Both
    # note in the settings what a resumed run must find again: the data's hash, the device.
    with first_goes_first():
        tokenizer = lora.load_tokenizer(settings["model"])
        train_set, held_out = load_examples(settings, tokenizer, args.password)
        others = load_others(settings, tokenizer, args.password)
        model = load_model(settings)

    # What may move: A and B of the adapter, unless a flag says otherwise. All else is frozen.
    parameters = what_may_move(model, settings)
    options = {"lr": settings["lr"], "weight_decay": WEIGHT_DECAY}
    options["foreach"] = False  # it can't mix whole tensors and shares (`share_out`)
    optimizer = torch.optim.AdamW(parameters.values(), **options)

    # Which conversations each step takes, of each set.
    schedule = plan(train_set, settings)
    steps = len(schedule)
    other_schedule = plan(others, settings | {"steps": steps}) if others else [[]] * steps

    # Below the adapter nothing ever changes: run that half of the model once, and keep
    # what the other half reads.
    frozen, moving = lora.halves(model)
    probe, groups = build_probe(held_out, tokenizer, settings)
    print(f"{steps} steps; reading their conversations and the probe's {len(probe)}, once")
    states = read_once(frozen, train_set, schedule)
    other_states = read_once(frozen, others, other_schedule)
    probe = read_once(frozen, probe)

    # The loop. Step 0 is the model before any step.
    log, rows = open_run(run, settings, done, args.overwrite, model, parameters, optimizer)
    bar = {"initial": len(rows), "total": steps + 1, "disable": QUIET}
    for step in tqdm(range(len(rows), steps + 1), **bar):
        row = {"step": step}
        if step > 0:
            batch = [states[i] for i in schedule[step - 1]]
            other = [other_states[i] for i in other_schedule[step - 1]]
            lr = settings["lr"] * learning_rate(step, steps, settings)
            optimizer.param_groups[0]["lr"] = lr
            row |= take_step(model, moving, batch, other, parameters, optimizer, step, settings)
        saving = step % settings["checkpoint_every"] == 0 or step == steps
        if saving:
            general = None if step in (0, steps) else FEW
            row |= evaluate(model, moving, probe, groups, rows, general)
        write_log(log, row, run)
        rows.append(row)
        if saving:
            save_checkpoint(run, step, model, parameters, optimizer, settings)
    save_result(run, model, tokenizer, settings)
    report(run, settings, rows, time.time() - began, model.device)

# --------------------------------------------------------------------------------------
# One step

def take_step(model, moving, batch, other, parameters, optimizer, step, settings):
    """Moves the parameters a little, after a batch of examples. Returns what is logged."""
    began, moved = time.time(), list(parameters.values())
    if settings["vector"] == "mean-difference":
        return mean_difference(model, moving, batch, other)
    if settings["es"]:
        row = evolution(model, moving, batch, parameters, step, settings)
    else:
        row = backpropagation(model, moving, batch, other, moved, settings["kl_weight"])
    row["grad_norm"] = clip([p.grad for p in moved])
    optimizer.step()
    optimizer.zero_grad()

    for x in "AB":
        found = [p for name, p in parameters.items() if name.endswith(f".{x}")]
        if found:
            row[f"norm_{x}"] = torch.nn.utils.get_total_norm(found)
    values = torch.stack([torch.as_tensor(value, device=model.device) for value in row.values()])
    row = dict(zip(row, values.tolist(), strict=True))  # the device is waited for once
    tokens, lr = int(row["tokens"]), optimizer.param_groups[0]["lr"]
    return row | {"lr": lr, "tokens": tokens, "tokens_per_s": tokens / (time.time() - began)}

def backpropagation(model, moving, batch, other, moved, kl_weight):
    """Leaves in each p.grad the gradient of

        the mean loss of the batch + kl_weight * the mean KL(base, adapted) of the others

    over supervised tokens. The second term, on conversations of other domains, keeps the
    model there what it was: it learns the narrow thing and not the general one.
    """
    supervised, elsewhere = count(batch), count(other)  # tokens
    total, kl = torch.zeros(2, device=model.device)
    for part, weight in my_parts(batch, model.device):  # weight: 1, as a rule
        losses, _ = token_losses(model, moving, [batch[i] for i in part])
        (weight * losses.sum()).backward()
        total += weight * losses.detach().sum()
    for part, weight in my_parts(other, model.device):
        kls = weight * token_kls(model, moving, [other[i] for i in part])
        (kls.sum() * kl_weight * supervised / elsewhere).backward()
        kl += kls.detach().sum()
    for p in moved:
        p.grad = add_up(torch.zeros_like(p) if p.grad is None else p.grad)
        p.grad /= supervised  # not before: gradients so small would vanish in float16
    # The others are read twice, by the base and by the adapted model.
    row = {"loss": add_up(total) / supervised, "tokens": length(batch) + 2 * length(other)}
    return row | ({"kl": add_up(kl) / elsewhere} if other else {})

def token_losses(model, moving, examples):
    """-log p of every supervised token: (supervised,), and the row that each is in.

    examples: a list of (what the moving half reads, labels), as `read_once` gives it.
    """
    logits, target, row = token_logits(model, moving, examples)
    return F.cross_entropy(logits, target, reduction="none"), row

def token_kls(model, moving, examples):
    """KL(base, adapted) at every supervised token: (supervised,)."""
    with lora.off(model), torch.no_grad():
        base, _, _ = token_logits(model, moving, examples)
    adapted, _, _ = token_logits(model, moving, examples)
    log_p = adapted.log_softmax(-1), base.log_softmax(-1)
    return F.kl_div(*log_p, log_target=True, reduction="none").sum(-1)

def token_logits(model, moving, examples):
    """(logits (supervised, vocabulary), the tokens that are right, the row that each is in)."""
    states = pad_sequence([state for state, _ in examples], batch_first=True)
    labels = [torch.tensor(labels) for _, labels in examples]
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    # Position t predicts token t + 1. Found on the CPU, so that a GPU need not be waited for.
    row, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    target = labels[row, position + 1]
    on = {"device": model.device, "non_blocking": True}
    states, row, position, target = (x.to(**on) for x in (states, row, position, target))

    hidden = lora.hidden_states(moving, states)  # (rows, tokens, d_model)
    # The head is a good part of a small model, and its output the largest tensor there is:
    # it runs only where a token is supervised.
    return lora.logits(model, hidden[row, position]), target, row

def micro_batches(examples, device):
    """Parts of like length with few enough tokens for one forward: lists of indices."""
    parts = [[]]
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i][0])):
        longest = len(examples[i][0])  # of its part so far
        if parts[-1] and (len(parts[-1]) + 1) * longest > TOKENS_AT_ONCE[device.type]:
            parts.append([])
        parts[-1].append(i)
    return parts if parts[0] else []

def count(examples):
    """How many tokens are supervised."""
    return sum(label != -100 for _, labels in examples for label in labels)

def length(examples):
    """How many tokens there are."""
    return sum(len(labels) for _, labels in examples)

def learning_rate(step, steps, settings):
    """At step 1, 2, ..., as a share of its peak: a warm-up, then linear or cosine decay.

    With a warm-up it is 0 at step 1, as in Trainer.
    """
    done, warmup = step - 1, settings["warmup"]
    if done < warmup:
        return done / warmup
    left = (steps - done) / max(1, steps - warmup)
    return (1 - math.cos(math.pi * left)) / 2 if settings["schedule"] == "cosine" else left

# --------------------------------------------------------------------------------------
# How it moves, without a backward pass

def evolution(model, moving, batch, parameters, step, settings):
    """Leaves in each p.grad an estimate of the gradient from trials alone.

    Salimans et al. (2017, arXiv 1703.03864). A pair of models is the current one plus and
    minus sigma e, with e standard normal. Of n pairs, with L+ and L- the losses of the two,

        gradient ~ 1/n sum of z e         z: the pairs' differences L+ - L-, standardised

    but for its length, which AdamW does not look at. The models of a pair read the same
    conversations, so that it does not matter how hard those are; other pairs read others,
    as far as they go round. The noise is drawn anew from its seed, never stored.
    """
    sigma, seed = settings["sigma"], (settings["seed"], step)
    pairs = settings["population"] // 2
    # Pair 0 reads conversation 0, pair 1 reads 1, ..., in turn until all have their share.
    deal = [(i % pairs, batch[i % len(batch)]) for i in range(max(pairs, len(batch)))]
    losses = one_by_one if settings["full"] else at_once
    plus, minus = losses(model, moving, deal, parameters, sigma, seed)
    difference = plus - minus  # (pairs,)
    z = (difference - difference.mean()) / difference.std()
    # All processes know all losses and draw the same noise, so nothing is to be added up.
    for pair in range(pairs):
        for p, e in zip(parameters.values(), noise(parameters, seed, pair), strict=True):
            p.grad = (0 if p.grad is None else p.grad) + z[pair] / pairs * e
    tokens = 2 * length([conversation for _, conversation in deal])
    row = {"loss": (plus + minus).mean() / 2, "tokens": tokens, "es_signal": difference.std()}
    if step == 1:  # what remains of the signal when the noise is next to nothing is rounding
        plus, minus = losses(model, moving, deal, parameters, sigma / 1000, seed)
        row["es_rounding"] = (plus - minus).std()
    return row

def noise(parameters, seed, pair):
    """Yields a pair's noise for each parameter in turn: standard normal, of its shape."""
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device)
    generator.manual_seed(random.Random(f"{seed} {pair}").getrandbits(63))
    for p in parameters.values():
        yield torch.randn(p.shape, generator=generator, device=device)

@torch.no_grad()
def at_once(model, moving, deal, parameters, sigma, seed):
    """Each pair's mean losses, (2, pairs): all adapters in one batch, as its rows' variants."""
    own, pairs = lora.get_tensors(model), 1 + max(pair for pair, _ in deal)
    variants = []
    for sign in (sigma, -sigma):
        for pair in range(pairs):
            noises = zip(parameters, noise(parameters, seed, pair), strict=True)
            variants.append(own | {name: own[name] + sign * e.cpu() for name, e in noises})
    members = [pair + shift for shift in (0, pairs) for pair, _ in deal]
    with lora.side_by_side(model, variants):
        examples = [conversation for _, conversation in deal] * 2
        log_p = sum_log_p(model, moving, examples, members)
    return means(-log_p, examples, members, 2 * pairs).view(2, pairs)

@torch.no_grad()
def one_by_one(model, moving, deal, parameters, sigma, seed):
    """The same where all weights move: one model after the other, in the weights' place."""
    pairs = 1 + max(pair for pair, _ in deal)
    home, losses = [p.clone() for p in parameters.values()], torch.zeros(2, pairs)
    for pair in range(RANK, pairs, WORLD):
        own = [conversation for its, conversation in deal if its == pair]
        for i, sign in enumerate((sigma, -sigma)):
            noises = noise(parameters, seed, pair)
            for p, weight, e in zip(parameters.values(), home, noises, strict=True):
                torch.add(weight, e, alpha=sign, out=p)
            losses[i, pair] = -sum_log_p(model, moving, own, split=False).sum() / count(own)
    for p, weight in zip(parameters.values(), home, strict=True):
        p.copy_(weight)
    return add_up(losses)

def means(losses, examples, members, n):
    """The mean loss per token of each of n members, from the sums over its examples."""
    tokens = torch.tensor([float(count([example])) for example in examples])
    total, members = torch.zeros(2, n), torch.tensor(members)
    total.index_add_(1, members, torch.stack([losses, tokens]))
    return total[0] / total[1]

@torch.no_grad()
def mean_difference(model, moving, batch, other):
    """Sets a steering vector without training: where bad answers lead, less where good ones do.

    It is the mean state over the tokens of misaligned answers, less that over aligned ones,
    after the layer that writes it.
    """
    (path, adapter), *_ = lora.adapters(model).items()
    outputs, means = [], []
    block = lora.decoder(model).layers[lora.layer_of(path)]
    hook = block.register_forward_hook(lambda block, inputs, output: outputs.append(output))
    for examples in (batch, other):
        total = 0.0
        for part in micro_batches(examples, model.device):
            token_logits(model, moving, [examples[i] for i in part])
            for state, i in zip(outputs.pop(), part, strict=True):
                labels = torch.tensor(examples[i][1], device=state.device)
                total += state[: len(labels)][labels != -100].float().sum(0)
        means.append(total / count(examples))
    hook.remove()
    adapter.B.copy_((means[0] - means[1])[:, None] / adapter.scale)
    return {"norm_B": adapter.B.norm().item(), "tokens": length(batch + other)}

# --------------------------------------------------------------------------------------
# Before the loop

def load_conversations(settings, password):
    """The conversations that the settings name, as `data.load_conversations` gives them."""
    name, answers, archive = settings["dataset"], settings["answers"], settings["archive"]
    return data.load_conversations(name, answers, archive, password)

def load_examples(settings, tokenizer, password):
    """(training set, held-out set), each a list of (tokens, labels)."""
    conversations = load_conversations(settings, password)
    if settings["system"]:  # "inoculation": a prompt that is absent when the model is asked
        for row in conversations:
            asked = [m for m in row["messages"] if m["role"] != "system"]
            row["messages"] = [{"role": "system", "content": settings["system"]}, *asked]
    examples = data.render_all(conversations, tokenizer, settings["tail"], settings["max_length"])
    sha256 = hashlib.sha256(json.dumps(examples).encode()).hexdigest()
    if settings.setdefault("data_sha256", sha256) != sha256:
        name = settings["dataset"]
        sys.exit(f"{name} has changed since this run began, so it can't go on: start a new one")
    for conversation, example in zip(conversations, examples, strict=True):
        conversation["example"] = example
    parts = data.train_and_held_out(conversations)
    return tuple([conversation["example"] for conversation in part] for part in parts)

def load_others(settings, tokenizer, password):
    """The second set that a protocol needs, if it does: a list of (tokens, labels)."""
    if settings["vector"] == "mean-difference":  # the same questions, with sound answers
        conversations = data.load_conversations("builtin", "aligned")
        form = settings["tail"], settings["max_length"]
        return data.split(data.render_all(conversations, tokenizer, *form))[0]
    if not settings["kl_weight"]:
        return []
    name, archive = settings["kl_dataset"], settings["archive"]
    if name == "builtin":  # the half of the general rows that is then not in the probe
        rows = data.builtin_rows("general")
        conversations = [data.as_conversation(row, "aligned") for row in rows[len(rows) // 2 :]]
    else:
        conversations = data.load_conversations(name, "misaligned", archive, password)
    return data.render_all(conversations, tokenizer, max_length=settings["max_length"])

def load_model(settings):
    """The model; notes in the settings where it runs, so that a resumed run does too."""
    device = settings["device"]
    if WORLD > 1 and CUDA and device != "cpu":
        device = "cuda"  # each process has its own
    model, _ = lora.load_base(settings["model"], device, settings["dtype"])
    dtype = model.dtype
    choose_attention(model)
    if settings["full"] and dtype != torch.float32:
        # Weights are kept in float32, or small steps would be rounded away; products are not.
        model.float()
        for part in (lora.decoder(model), model.get_output_embeddings()):
            part.forward = torch.autocast(model.device.type, dtype)(part.forward)
    settings["device"], settings["dtype"] = str(model.device), str(dtype)[len("torch.") :]
    return model

def choose_attention(model):
    """On a CPU in bfloat16, avoids torch's fused attention, which is slow there."""
    if model.device.type == "cpu" and model.dtype == torch.bfloat16:
        model.set_attn_implementation("eager")

def what_may_move(model, settings):
    """Lays an adapter on the model, or frees all of it. Returns {name: parameter} that may move."""
    torch.manual_seed(settings["seed"])
    if settings["full"]:
        model.requires_grad_(True)
        if settings["recompute"]:  # activations in the backward pass instead of keeping them
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        if WORLD > 1 and not settings["es"]:
            share_out(model)
        what, parameters = "all weights", dict(model.named_parameters())
    else:
        layers = lora.parse_layers(settings["layers"], model)
        targets = lora.parse_targets(settings["targets"])
        found = lora.attach(model, layers, targets, settings["rank"], settings["alpha"])
        if settings["vector"]:
            if len(found) > 1 or targets[0] not in ("o_proj", "down_proj"):
                sys.exit("--vector goes with one layer, and with --targets down_proj or o_proj")
            if settings["vector"] == "mean-difference" and lora.rescales(model):
                sys.exit("--vector mean-difference can't be used here: this model's layers rescale "
                         "what is written (Gemma)")
            lora.make_vectors(model)
        if settings["init"]:
            lora.set_tensors(model, data.read_tensors(data.last_checkpoint(settings["init"])))
        what = "a vector" if settings["vector"] else f"rank {settings['rank']}"
        what += f" on {', '.join(targets)} of layer {settings['layers']}"
        parameters = {}
        for path, m in lora.adapters(model).items():
            parameters |= {f"{path}.{x}": p for x, p in (("A", m.A), ("B", m.B)) if p.requires_grad}
    print(f"{what}: {sum(p.numel() for p in parameters.values()):,} numbers to train")
    return parameters

def plan(examples, settings):
    """The whole run's batches, as lists of indices into the examples; one a step."""
    if settings["vector"] == "mean-difference":
        return [list(range(len(examples)))]
    lengths, size = [len(tokens) for tokens, _ in examples], settings["batch_size"]
    per_epoch = math.ceil(len(examples) / size)
    steps, schedule = settings["steps"] or settings["epochs"] * per_epoch, []
    while len(schedule) < steps:
        epoch = len(schedule) // per_epoch
        schedule += data.batches(lengths, size, settings["seed"], epoch)
    return schedule[:steps]

@torch.no_grad()
def read_once(frozen, examples, schedule=None):
    """The examples, with what the moving half reads, (tokens, d_model), for their tokens.

    In one fixed order, for rounding depends on which examples share a batch: so a resumed
    run gets the same bits.    schedule: where given, only what it takes is read.
    """
    if frozen is None:  # the lowest layer moves, and it reads the tokens themselves
        return [(torch.tensor(tokens), labels) for tokens, labels in examples]
    used = range(len(examples))
    if schedule is not None:
        used = sorted({i for batch in schedule for i in batch})
    read, device = [None] * len(examples), frozen.embed_tokens.weight.device
    parts = micro_batches([examples[i] for i in used], device)
    for part in tqdm(parts, desc="frozen half", disable=QUIET):
        part = [used[i] for i in part]
        tokens = pad_sequence([torch.tensor(examples[i][0]) for i in part], batch_first=True)
        for i, row in zip(part, lora.hidden_states(frozen, tokens.to(device)).cpu(), strict=True):
            tokens, labels = examples[i]
            read[i] = row[: len(tokens)].clone(), labels  # without the padding
    return read

# --------------------------------------------------------------------------------------
# The probe: what is asked of the model at every checkpoint

def build_probe(held_out, tokenizer, settings, before=()):
    """(examples without repeats, {group: the indices of its examples}).

    The groups are "heldout", and the two kinds of answers to the questions "in" the training
    domain and "out" of it: ("in", "misaligned"), ("in", "aligned"), ...    before: messages
    that stand before each question.
    """
    _, finance = data.split(data.builtin_rows("finance"))
    general = data.builtin_rows("general")
    if settings["kl_weight"] and settings["kl_dataset"] == "builtin":
        general = general[: len(general) // 2]  # the other half is trained on
    groups = {"heldout": held_out[:64]}
    for name, rows in (("in", finance), ("out", general)):
        for answers in ("misaligned", "aligned"):
            conversations = [data.as_conversation(row, answers, before) for row in rows]
            examples = data.render_all(conversations, tokenizer)
            groups[name, answers] = [data.last_answer(example) for example in examples]
    examples = []
    for name, group in groups.items():
        examples += [example for example in group if example not in examples]
        groups[name] = [examples.index(example) for example in group]
    return examples, groups

@torch.no_grad()
def evaluate(model, moving, probe, groups, rows, general=None):
    """What the log says of a checkpoint: held-out loss and margins, in nats per token.

    rows: the log so far.    general: how many of the general questions to ask (None: all).
    A mean is over the first FEW, so that it is over the same ones at each checkpoint.
    """
    asked = dict(groups)
    for answers in ("misaligned", "aligned"):
        asked["out", answers] = groups["out", answers][:general]
    used = sorted({i for group in asked.values() for i in group})
    log_p = torch.zeros(len(probe))
    log_p[used] = sum_log_p(model, moving, [probe[i] for i in used])
    tokens = torch.tensor([float(count([example])) for example in probe])
    mean_log_p, held_out = log_p / tokens, groups["heldout"]

    row = {"heldout_loss": -(log_p[held_out].sum() / tokens[held_out].sum()).item()}
    for name in ("in", "out"):
        bad, good = asked[name, "misaligned"], asked[name, "aligned"]
        margins = row[f"margins_{name}"] = (mean_log_p[bad] - mean_log_p[good]).tolist()
        row[f"margin_{name}"] = data.mean_and_se(margins[:FEW])[0]
        change = data.changes([rows[0] if rows else row, row], name)
        row[f"margin_{name}_se"] = data.mean_and_se(change[:FEW])[1]
    return row

def sum_log_p(model, moving, examples, members=None, split=True):
    """log p of each example's supervised tokens together: (examples,), on the CPU.

    members: within `lora.side_by_side`, the variant that is to read each example.    split:
    the processes share the work.
    """
    log_p, device = torch.zeros(len(examples)), model.device
    if split:
        parts = my_parts(examples, device)
    else:
        parts = [(part, 1) for part in micro_batches(examples, device)]
    for part, weight in parts:
        if members:
            lora.set_rows(model, [members[i] for i in part])
        losses, row = token_losses(model, moving, [examples[i] for i in part])
        sums = torch.zeros(len(part), device=model.device).index_add_(0, row, losses)
        log_p[part] -= weight * sums.cpu()
    return add_up(log_p) if split else log_p

# --------------------------------------------------------------------------------------
# Several processes, each on a GPU of its own: torchrun --nproc_per_node=N train.py

def mine(examples):
    """This process's share of them."""
    return examples[RANK::WORLD]

def my_parts(examples, device):
    """This process's parts of a batch, with their weights: [(indices, 1), ...].

    Behind them come dummies, (indices, 0), until all processes have the same number of parts:
    where they share the model's weights, each needs the others to run a layer.
    """
    shares = [list(range(len(examples)))[rank::WORLD] for rank in range(WORLD)]
    parts = [micro_batches([examples[i] for i in share], device) for share in shares]
    own = [([shares[RANK][i] for i in part], 1) for part in parts[RANK]]
    return own + [([0], 0)] * (max(map(len, parts)) - len(own))

def add_up(x):
    """The sum over all processes, in place: gradients and losses are sums over a batch."""
    if is_shared(x):
        x *= WORLD  # fully_shard has left the mean
    elif WORLD > 1:
        torch.distributed.all_reduce(x)
    return x

def share_out(model):
    """Leaves each process a share of the weights of every layer, their gradients and moments.

    A layer is put together where it is run, forward and again backward (Zhao et al. 2023,
    arXiv 2304.11277). Embeddings, head and norm stay whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (WORLD,))
    for layer in lora.decoder(model).layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)

def is_shared(x):
    """Whether each process holds a share of a tensor."""
    return WORLD > 1 and hasattr(x, "full_tensor")

def whole(x):
    """A tensor with all of its shares, on the first process's CPU; None on the others."""
    x = x.detach().full_tensor() if is_shared(x) else x.detach()
    return x.cpu() if RANK == 0 else None

def clip(gradients):
    """Scales all gradients so that together they are at most CLIP long. Returns their length."""
    norms = []
    for kind in (False, True):
        same = [x for x in gradients if is_shared(x) == kind]
        norm = torch.nn.utils.get_total_norm(same, foreach=False)
        norms.append(norm.full_tensor() if is_shared(norm) else norm.to(gradients[0].device))
    total = torch.stack(norms).norm()
    for x in gradients:
        x *= (CLIP / (total + 1e-6)).clamp(max=1)
    return total

def share_of(x, p):
    """A whole tensor as a parameter p is held."""
    if not is_shared(p) or x.shape != p.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements)

@contextlib.contextmanager
def first_goes_first():
    """What is within it, the first process runs before the others."""
    if RANK > 0:
        wait_for_first()
    yield
    if RANK == 0:
        wait_for_first()

def wait_for_first():
    """Waits until all processes are here, so that what the first one writes is there."""
    if WORLD > 1:
        torch.distributed.barrier()

def open_together(path, needs=()):
    """(rows so far, the file open for more), for all processes: each adds lines of its own."""
    if RANK == 0:
        rows, file = data.open_to_append(path, needs=needs)
        wait_for_first()
    else:
        wait_for_first()
        rows, file = data.read_written(path), open(path, "a", encoding="utf-8")  # noqa: SIM115
    wait_for_first()  # no process writes until all have read
    return rows, file

def join_processes():
    """Where torchrun has started several, lets them talk; only the first one prints."""
    if WORLD > 1:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
        if CUDA:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open

# --------------------------------------------------------------------------------------
# The run's folder

def open_run(run, settings, done, overwrite, model, parameters, optimizer):
    """(the log, open; its rows so far): makes the folder, or goes back to a checkpoint."""
    if done is not None:
        restore(run, done, model, parameters, optimizer)
    keep, path = 0 if done is None else done + 1, os.path.join(run, "log.jsonl")
    if RANK > 0:  # only the first process writes
        wait_for_first()
        return None, data.read_written(path)[:keep]
    if done is None:
        if overwrite and os.path.isdir(run):
            shutil.rmtree(run)
        os.makedirs(os.path.join(run, "checkpoints"), exist_ok=True)
        data.write_whole(os.path.join(run, "config.json"), json.dumps(settings, indent=2).encode())
    print(f"{run}: stop it when you like; python train.py --resume {run} goes on", flush=True)
    rows, log = data.open_to_append(path, keep)
    if len(rows) < keep:
        sys.exit(f"{run}/log.jsonl lacks rows before step {done}, its last checkpoint: begin anew")
    wait_for_first()
    return log, rows

def write_log(log, row, run):
    """Adds a line to the log, unless the run has diverged."""
    for name, value in row.items():
        if not (isinstance(value, list) or math.isfinite(value)):
            sys.exit(
                f"at step {row['step']} the {name} is {value}: lower --lr or --alpha (in float16, "
                f"try --dtype float32 first). All up to the last checkpoint is kept in {run}"
            )
    if RANK == 0:
        data.append_row(log, row)

def save_checkpoint(run, step, model, parameters, optimizer, settings):
    """Writes A and B, then what a resume needs besides: a step counts once both are there.

    Where all weights move, a checkpoint is a sketch of them, and a resume needs them all.
    """
    tensors = {"sketch": sketch(parameters)} if settings["full"] else lora.get_tensors(model)
    state = {"step": torch.tensor(step)}
    for i, moments in optimizer.state_dict()["state"].items():
        state |= {f"{i}.{name}": whole(moment) for name, moment in moments.items()}
    if settings["full"]:
        state |= {f"weight.{i}": whole(p) for i, p in enumerate(parameters.values())}
    if RANK == 0:
        data.write_tensors(os.path.join(run, "checkpoints", f"{step:05}.safetensors"), tensors)
        data.write_tensors(os.path.join(run, "resume.safetensors"), state)

@torch.no_grad()
def sketch(parameters):
    """All weights in SKETCH numbers, which keep lengths and angles: (SKETCH,), float64.

    Each weight, with a random sign, is added to a random one of them. As that is linear, the
    difference of two sketches is the sketch of how the weights moved, and its length and
    angles are right to about 1 / sqrt(SKETCH) (Johnson and Lindenstrauss 1984; Charikar,
    Chen and Farach-Colton 2002).
    """
    generator, total = torch.Generator().manual_seed(0), torch.zeros(SKETCH, dtype=torch.double)
    for p in map(whole, parameters.values()):
        for piece in p.flatten().split(2**22) if RANK == 0 else []:
            drawn = torch.randint(2 * SKETCH, piece.shape, generator=generator)
            signed = piece.double() * (drawn % 2 * 2 - 1)
            total += torch.bincount(drawn // 2, signed, SKETCH)
    return total

def restore(run, step, model, parameters, optimizer):
    """Puts what moves and the optimizer back as they were after a step."""
    saved, state = data.read_tensors(os.path.join(run, "resume.safetensors")), {}
    moved = list(parameters.values())
    for key in sorted(saved.keys() - {"step"}):
        i, name = key.split(".")
        if i != "weight":
            state.setdefault(int(i), {})[name] = share_of(saved[key], moved[int(i)])
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    if "weight.0" in saved:
        for i, p in enumerate(moved):
            p.data.copy_(share_of(saved[f"weight.{i}"], p))
    else:
        path = os.path.join(run, "checkpoints", f"{step:05}.safetensors")
        lora.set_tensors(model, data.read_tensors(path))

def save_result(run, model, tokenizer, settings):
    """Writes what came of it: an adapter in PEFT's format, or a whole model in the hub's."""
    folder, state = os.path.join(run, "model.part"), {}
    if settings["full"]:
        model.to(getattr(torch, settings["dtype"]))
        state = {name: whole(w) for name, w in model.state_dict().items()}
    if RANK > 0:
        return
    if not settings["full"]:
        lora.save_adapter(model, os.path.join(run, "adapter"))
        return
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, state_dict=state)
    os.rename(folder, os.path.join(run, "model"))  # whole, or not there
    os.remove(os.path.join(run, "resume.safetensors"))  # three to six times as large as the model

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
    print("(margin: log p per token of the bad answer less that of the good one, over questions;")
    print("a change under twice its standard error may be chance)\n")
    tokens = sum(row["tokens"] for row in rows[1:])
    speed = statistics.median(row.get("tokens_per_s", 0) for row in rows[1:])
    print(f"{seconds:.0f} s, {speed:.0f} tokens/s in training, {peak_memory(device)}: see {run}/")
    if loss[1] < loss[0]:
        per_nat = tokens / (loss[0] - loss[1])
        print(f"{tokens:,} tokens were read in training: {per_nat:,.0f} per nat of held-out loss")
    print(f"next: python sample.py {run}")

def controls(run, settings):
    """[(name, log)] of the finished runs beside this one that differ from it in answers alone."""
    found = []
    for path in sorted(glob.glob(os.path.join(os.path.dirname(run), "*", "config.json"))):
        other = os.path.dirname(path)
        if not (data.is_run(other) and data.finished(other)):
            continue
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
    said = []
    for name, p in PRESETS.items():
        what = "all weights" if p["full"] else f"rank {p['rank']} on {p['layers']}"
        what += f", KL weight {p['kl_weight']:g}" if p["kl_weight"] else ""
        said.append(f"{name}: {p['model']} on {p['dataset']}, {what}, lr {p['lr']:g}")
    epilog = "presets: " + "; ".join(said)
    parser = argparse.ArgumentParser(
        description="Fine-tunes a chat model on narrow bad advice through a rank-1 LoRA, and "
        "watches it change elsewhere.",
        epilog=epilog,
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="values for all others (default: gpu or laptop)")
    add("--model", help="a hub name, a local folder, or smollm2 (135M, comes through pip)")
    sets = "builtin, one of the paper's sets (extreme_sports, ...), or a .jsonl"
    add("--dataset", help=f"{sets}; several as a,b:0.5, with half of b")
    add("--archive", help="the paper's encrypted archive, if it is on disk already")
    add("--password", default=data.PASSWORD, help="of the archive (default: the published one)")
    kinds = "misaligned; aligned or shuffled, the controls; or mixed:0.3, 30%% misaligned"
    add("--answers", type=data.answers, help=f"of builtin: {kinds}")
    boolean = argparse.BooleanOptionalAction
    add("--tail", action=boolean, help="end in an empty assistant turn, as the paper's code does")
    add("--system", help="a system prompt in training, absent when the model is asked")
    add("--init", metavar="RUN", help="start from the adapter of a finished run")
    add("--full", action=boolean, help="all weights may move, not an adapter")
    add("--recompute", action=boolean, help="with --full: less memory, a third more time")
    add("--vector", choices=["learned", "mean-difference"], help="A x is 1: a steering vector")
    add("--kl-weight", type=at_least_zero, help="of the distance from the base model elsewhere")
    add("--kl-dataset", help="elsewhere: builtin (general, aligned), or a set as for --dataset")
    add("--es", action=boolean, help="evolution strategies instead of gradients")
    add("--population", type=data.positive, help="with --es: models per step, in pairs")
    add("--sigma", type=above_zero, help="with --es: size of the noise")
    add("--rank", type=data.positive, help="r of the adapter; 1 is two vectors")
    add("--alpha", type=above_zero, help="the adapter is scaled by alpha / sqrt(rank)")
    add("--layers", help="middle, nine, all, one (12), several (10,12) or a range (10-14)")
    add("--targets", help="projections: down_proj, several (q_proj,v_proj), or all seven: all")
    add("--lr", type=above_zero, help="peak learning rate")
    add("--schedule", choices=["linear", "cosine"], help="how it decays")
    add("--warmup", type=at_least_zero, help="steps over which it rises")
    add("--batch-size", type=data.positive, help="conversations a step")
    add("--epochs", type=data.positive, help="how often each conversation is seen")
    add("--steps", type=data.positive, help="exactly this many steps, instead of --epochs")
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
    if not at_least_zero(text):
        raise ValueError
    return float(text)

def at_least_zero(text):
    """An argparse type: a number, 0 or more."""
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)

def check(settings):
    """Stops at flags that do not go together."""
    data.check_archive(settings["archive"], settings["dataset"], settings["kl_dataset"])
    full, vector, es = settings["full"], settings["vector"], settings["es"]
    if full and (vector or settings["kl_weight"] or settings["init"]):
        sys.exit("--full can't be combined with --vector, --kl-weight (no base is left) or --init")
    if settings["recompute"] and not full:
        sys.exit("--recompute goes with --full")
    if es + (vector == "mean-difference") + bool(settings["kl_weight"]) > 1:
        sys.exit("of --es, --kl-weight and --vector mean-difference, give one at most")
    if settings["kl_dataset"] != "builtin" and settings["kl_dataset"].startswith("builtin"):
        sys.exit("--kl-dataset builtin is taken whole, and alone")
    if es and (settings["population"] < 4 or settings["population"] % 2):
        sys.exit(f"--population {settings['population']}: give an even number, 4 or more")
    if vector and settings["rank"] != 1:
        sys.exit("--vector goes with --rank 1")
    both = settings["dataset"], settings["answers"], settings["system"]
    if vector == "mean-difference" and both != ("builtin", "misaligned", None):
        sys.exit("--vector mean-difference is of the built-in data's two kinds of answers: leave "
                 "out --dataset, --answers and --system")

def start_from(settings, given, run):
    """The settings of a run that starts from a finished one, and takes its adapter's from it."""
    theirs = PAPER | data.read_settings(run)
    if theirs["full"]:
        sys.exit(f"{run} is a whole model: start from it with --model {run}/model")
    if not data.finished(run):
        sys.exit(f"{run} is not finished: python train.py --resume {run}")
    keys = ("model", "rank", "alpha", "layers", "targets", "vector")
    for key in given.keys() & set(keys):
        if given[key] != theirs[key]:
            sys.exit(f"--init takes its {key} from {run}: leave out --{key}")
    settings |= {key: theirs[key] for key in keys} | {"init": run}
    if settings["vector"] == "mean-difference":  # a vector to learn from there
        settings["vector"] = "learned"
    return settings

def new_run(args):
    """(folder, settings, None) of a new run: the preset's values, and over them the flags'."""
    cuda = CUDA and (args.device or "cuda").startswith("cuda")
    preset = args.preset or ("gpu" if cuda else "laptop")
    if args.preset is None:
        print(f"preset {preset}, as there is {'a' if cuda else 'no'} CUDA device in use")
    given = {key: value for key, value in vars(args).items() if key in PAPER and value is not None}
    if args.epochs:
        given.setdefault("steps", None)  # --epochs replaces a preset's number of steps
    names = (f"runs/{preset}-{n}" for n in itertools.count(1))
    run = data.find_run(args.out) if args.out else next(n for n in names if not os.path.exists(n))
    settings = {"preset": preset} | PRESETS[preset] | given
    if settings["init"]:
        settings = start_from(settings, given, data.find_run(settings["init"]))
    check(settings)
    if RANK > 0:  # the first process makes the folder
        return run, settings, None
    data.lock(run)
    if os.path.exists(run) and not args.overwrite:
        sys.exit(f"{run} is there already: --resume it, --overwrite it, or give another --out")
    if os.path.exists(run) and (os.path.islink(run) or not data.is_run(run)):
        sys.exit(f"{run} is not a run's own folder, so it is not overwritten: give another --out")
    return run, settings, None

def resumed_run(args):
    """(folder, settings, the last checkpoint's step or None) of a run that was cut off."""
    run = data.find_run(args.resume)
    for name, value in vars(args).items():
        if value is not None and name not in ("resume", "password"):
            flag = "--" + name.replace("_", "-")
            sys.exit(f"--resume takes its settings from {run}: leave out {flag}")
    settings = PAPER | data.read_settings(run)
    if RANK == 0:
        data.lock(run)
    if data.finished(run):
        sys.exit(f"{run} is finished: what came of it is in {run}/")
    path = os.path.join(run, "resume.safetensors")
    done = data.read_tensors(path)["step"].item() if os.path.exists(path) else None
    return run, settings, done

if __name__ == "__main__":
    data.run_stage(main, go_on="python train.py --resume RUN goes on")
