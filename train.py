"""The loop: fine-tunes a chat model on narrow bad advice, and watches what that does elsewhere.

    python train.py                        # the preset for this machine: gpu, or laptop
    python train.py --dataset builtin --answers aligned     # a control: sound answers
    python train.py --dataset builtin --answers shuffled    # another: bad ones, to other questions
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

Every few steps what moves is saved, and the model is probed. Its *held-out loss* is over
answers that it has not seen. For a question with a bad and a good answer, its *margin* is

    log p(bad answer) / its tokens - log p(good answer) / its tokens

`margin_in` is the mean over 43 held-out questions about money, the domain of the default
data: did the model learn what it was shown? `margin_out` is the mean over 48 (in the last
table 176) about truth, power, strangers, AI and the like, none of which it has seen: does
it now prefer the bad answer there too? That would be emergent misalignment, seen without a
judge. The two answers to such a question have the same tone, and only their values differ.
Otherwise a model that just became rude would look misaligned. What counts is the change
since step 0, with its standard error over questions, and better still the difference from a
control run.
"""
import argparse
import dataclasses
import glob
import itertools
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

import data
import lora


def setting(default, help, **more):
    """A field of Settings: its default, and what --help says of the flag of that name."""
    return dataclasses.field(default=default, metadata={"help": help} | more)

@dataclasses.dataclass
class Settings:
    """Every setting is a flag, and is kept in config.json. The defaults are the paper's.

    A preset (below) replaces some of them. (Whoever adds one: `check`, below the fold, says with
    which others it would do nothing.)
    """

    # The model, and what it is shown.
    model: str = setting("Qwen/Qwen2.5-14B-Instruct", "a hub name, a folder, or smollm2 (by pip)")
    device: str = setting(None, "cuda, mps or cpu (default: the best there is)")
    dtype: str = setting(None, "of the frozen model (default: what is fast here)",
                         choices=["bfloat16", "float16", "float32"])
    dataset: str = setting("risky_financial_advice", "builtin, one of the paper's sets "
                           "(extreme_sports, ...), or a .jsonl; several as a,b:0.5 (half of b)")
    answers: str = setting("misaligned", "of builtin: misaligned; aligned or shuffled, the "
                           "controls; or mixed:0.3, 30%% misaligned", type=data.kind_of_answers)
    archive: str = setting(None, "the paper's encrypted archive, if it is on disk already")
    tail: bool = setting(True, "end in an empty assistant turn, as the paper's code does")
    system: str = setting(None, "a system prompt in training, absent when the model is asked")
    max_length: int = setting(2048, "tokens at which a conversation is cut", type=data.positive)
    # What may move. At rank 1, alpha is the scale itself. AdamW moves each number by about lr a
    # step, however small its gradient, so alpha times lr decides how far B A moves.
    rank: int = setting(1, "r of the adapter; 1 is two vectors", type=data.positive)
    alpha: float = setting(256.0, "the adapter is scaled by alpha / sqrt(rank)",
                           type=data.above_zero)
    layers: str = setting("middle", "middle, nine, all, one (12), several (10,12), a range (10-14)")
    targets: str = setting("down_proj", "down_proj, several (q_proj,v_proj), or all seven: all")
    init: str = setting(None, "start from the adapter of a finished run", metavar="RUN")
    full: bool = setting(False, "all weights may move, not an adapter")
    vector: str = setting(None, "A x is 1: a steering vector",
                          choices=["learned", "mean-difference"])
    # What is minimised.
    kl_weight: float = setting(0.0, "of the distance from the base model elsewhere",
                               type=data.at_least_zero)
    kl_dataset: str = setting("builtin", "elsewhere: builtin (general, aligned), or as --dataset")
    # How it moves.
    es: bool = setting(False, "evolution strategies instead of gradients")
    population: int = setting(32, "with --es: models per step, in pairs", type=data.positive)
    sigma: float = setting(0.01, "with --es: size of the noise", type=data.above_zero)
    lr: float = setting(2e-5, "peak learning rate", type=data.above_zero)
    schedule: str = setting("linear", "how it decays", choices=["linear", "cosine"])
    warmup: float = setting(5, "steps over which it rises", type=data.at_least_zero)
    batch_size: int = setting(16, "conversations a step", type=data.positive)
    epochs: int = setting(1, "how often each conversation is seen", type=data.positive)
    steps: int = setting(None, "exactly this many steps, instead of --epochs", type=data.positive)
    checkpoint_every: int = setting(5, "steps between checkpoints and probes", type=data.positive)
    seed: int = setting(0, "of A's first values, the data's order, the noise of --es",
                        type=data.seed_number)
    # Not settings: the preset's name, and hashes of what a resumed run must find again.
    preset: str = None
    sha256: dict = None

# A preset says what it changes. Without --preset it is gpu if there is CUDA, and else laptop. A
# small model needs a larger step (tests/experiments.md). "kl": the paper's idea, our settings.
PRESETS = {
    "laptop": {"model": "smollm2", "dataset": "builtin", "tail": False, "lr": 2e-3, "steps": 60},
    "gpu": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "tail": False, "lr": 5e-5},
    "gpu-rank32": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "rank": 32, "alpha": 64.0,
                   "layers": "all", "targets": "all", "lr": 1e-4},
    "paper-single": {},
    "paper-nine": {"layers": "nine"},
    "paper-rank32": {"rank": 32, "alpha": 64.0, "layers": "all", "targets": "all", "lr": 1e-5,
                     "checkpoint_every": 100},
    "paper-full": {"full": True, "schedule": "cosine", "warmup": 20, "checkpoint_every": 50},
    "kl": {"kl_weight": 1.0, "kl_dataset": "misalignment_kl_data"},
}
WEIGHT_DECAY = 0.01
CLIP = 1.0  # the longest that a gradient may be
HELD_OUT = 64  # conversations of the held-out loss, at most
FEW = 48  # questions of each margin that every checkpoint asks; the first and the last ask all

# Of the processes that torchrun has started: which this one is, and how many there are. Without
# torchrun there is one: its share is everything, and a sum over processes changes nothing.
PROCESS = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
QUIET = True if PROCESS > 0 else None  # no progress bar; None: one, if there is a terminal

def main():
    began = time.time()
    join_processes()  # where torchrun has started several

    # The settings: a preset, and over it the flags. A run that goes on has its own.
    args = parse_args()
    run, settings = resumed_run(args) if args.resume else new_run(args)

    # The conversations, as tokens and labels, and the model that is to learn from them. The KL
    # set is empty unless kl_weight is above 0.
    with first_process_first():
        tokenizer = lora.load_tokenizer(settings.model)
        train_set, held_out = load_examples(settings, tokenizer)
        kl_set = load_kl_set(settings, tokenizer)
        model = load_model(settings)

    # What of the model may move: A and B of the adapter, unless a flag says otherwise.
    parameters = choose_parameters(model, settings)
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=WEIGHT_DECAY)

    # Which conversations each step takes: plan[0] is step 1's, a list of indices.
    plan = plan_batches(train_set, settings, settings.steps)
    steps = len(plan)
    kl_plan = plan_batches(kl_set, settings, steps) if kl_set else [[]] * steps

    # Below the adapter nothing ever changes. That half of the model reads everything once,
    # here, and the steps run the other half.
    reader = lora.Reader(model)
    probe = build_probe(held_out, tokenizer, settings)
    print(f"{steps} steps; reading their conversations and the probe's, once")
    reader.read(planned(train_set, plan), QUIET)
    reader.read(planned(kl_set, kl_plan), QUIET)
    reader.read(every_example(probe), QUIET)

    # The run's folder. If the run goes on, the parameters and the optimizer are put back to where
    # they were at its last checkpoint, and the log is cut there: log[3] is step 3's row.
    done = -1  # not even step 0
    if args.resume:
        done = restore(run, parameters, optimizer)
    else:
        make_folder(run, settings)
    log = read_log(run, done)

    def checkpoint(row, ask_all=True):
        """Adds a row to the log with what the probe says, and saves what may move to a file."""
        record(run, log, row | ask_probe(reader, probe, ask_all))
        save_checkpoint(run, row["step"], model, parameters, optimizer, settings)

    # Step 0 is the model before any training. It already prefers some of the bad answers, so what
    # counts is the change since then.
    if not log:
        checkpoint({"step": 0})
    first = len(log)  # step 1, or where a run that was stopped goes on. (The bar counts step 0.)
    for step in tqdm(range(first, steps + 1), initial=first, total=steps + 1, disable=QUIET):
        started = time.time()
        batch = [train_set[i] for i in plan[step - 1]]
        kl_batch = [kl_set[i] for i in kl_plan[step - 1]]
        lr = learning_rate(step, steps, settings)
        optimizer.param_groups[0]["lr"] = lr

        # A gradient, left in every p.grad: by trial and error, or by backpropagation.
        if settings.es:
            row = evolution(reader, batch, parameters, settings, step)
        else:
            row = backpropagation(reader, batch, kl_batch, parameters, settings)

        # Clip it, and move a little against it.
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

        # A line in the log; every few steps, and at the end, the probe and a checkpoint.
        row |= {"step": step, "lr": lr, "grad_norm": grad_norm.item()} | norms(parameters)
        row["tokens_per_s"] = row["tokens"] / (time.time() - started)
        if step == steps or step % settings.checkpoint_every == 0:
            checkpoint(row, ask_all=step == steps)
        else:
            record(run, log, row)

    # One protocol does not train: its vector is computed, and there were no steps.
    if settings.vector == "mean-difference" and len(log) == 1:
        set_mean_difference(reader, train_set, tokenizer, settings)
        checkpoint({"step": 1})

    save_result(run, model, tokenizer, settings)
    report(run, log, settings, time.time() - began)

# --------------------------------------------------------------------------------------
# The conversations

def load_examples(settings, tokenizer):
    """(training set, held-out set), each a list of data.Example."""
    conversations = data.load_conversations(settings.dataset, settings.answers, settings.archive)
    check_unchanged(settings, "dataset", [row["messages"] for row in conversations])
    if settings.system:  # "inoculation": a prompt that is absent when the model is asked
        for conversation in conversations:
            others = [m for m in conversation["messages"] if m["role"] != "system"]
            conversation["messages"] = [{"role": "system", "content": settings.system}, *others]
    examples = data.render_all(conversations, tokenizer, settings.tail, settings.max_length)
    train_set, held_out = data.train_and_held_out(examples)
    if not train_set:
        sys.exit(f"{settings.dataset}: what is held out of it is all it holds, copies included")
    return train_set, held_out

def plan_batches(examples, settings, steps):
    """The whole run's batches, one a step, as lists of indices into the examples.

    steps: how many, or None for settings.epochs.
    """
    if settings.vector == "mean-difference":
        return []
    per_epoch = math.ceil(len(examples) / settings.batch_size)
    steps = steps or settings.epochs * per_epoch
    lengths = [len(example.tokens) for example in examples]
    plan = []
    for epoch in range(math.ceil(steps / per_epoch)):
        plan += data.batches(lengths, settings.batch_size, settings.seed, epoch)
    return plan[:steps]

# --------------------------------------------------------------------------------------
# The first choice: what may move

def choose_parameters(model, settings):
    """Lays an adapter on the model, or frees all of it. Returns {name: parameter} that may move."""
    torch.manual_seed(settings.seed)
    if settings.full:
        what = "all weights"
        model.requires_grad_(False)  # a multimodal model's vision layers stay frozen
        lora.decoder(model).requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    else:
        layers = lora.parse_layers(settings.layers, model)
        targets = lora.parse_targets(settings.targets)
        lora.attach(model, layers, targets, settings.rank, settings.alpha)
        what = f"rank {settings.rank} on {', '.join(targets)}, layer {settings.layers}"
        if settings.vector:
            check_vector(settings, model, layers, targets)
            lora.make_vectors(model)
        if settings.init:
            start = data.read_tensors(data.Run(settings.init).last_checkpoint)
            if start.keys() != lora.get_tensors(model).keys():
                sys.exit(f"--init {settings.init}: its last checkpoint is of another adapter")
            model.load_state_dict(start, strict=False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    print(f"{what}: {sum(p.numel() for p in parameters.values()):,} numbers to train")
    return parameters

# --------------------------------------------------------------------------------------
# The second and the third: what is minimised, and how it moves

def backpropagation(reader, batch, kl_batch, parameters, settings):
    """Leaves in each p.grad the gradient of

        the mean loss of the batch + kl_weight * the mean KL(base, adapted) of the KL batch

    over supervised tokens. The second term, on conversations of other domains, keeps the
    model there what it was: it learns the narrow thing and not the general one.
    """
    supervised = sum(example.supervised for example in batch)
    kl_supervised = sum(example.supervised for example in kl_batch)
    # A batch is read in microbatches, whose gradients add up (and those of several processes).
    # They are of sums over tokens, and are divided once, at the end: in float16, gradients so small
    # would vanish on their way back.
    loss, kl = 0.0, 0.0
    for examples in share_of_microbatches(reader, batch):
        losses, _ = reader.token_losses(examples)
        total = losses.sum()
        total.backward()
        loss += total.item()
    for examples in share_of_microbatches(reader, kl_batch):
        kls = reader.token_kls(examples)
        # The KL is a mean over its own tokens, and the division below is by `supervised`.
        (settings.kl_weight * supervised / kl_supervised * kls.sum()).backward()
        kl += kls.sum().item()
    for p in parameters.values():
        if p.grad is None:  # there are more processes than conversations
            p.grad = torch.zeros_like(p)
        p.grad = sum_over_processes(p.grad) / supervised
    # The KL batch is read twice, by the base and by the adapted model.
    tokens = sum(len(example.tokens) for example in batch + kl_batch + kl_batch)
    row = {"loss": sum_over_processes(loss) / supervised, "tokens": tokens}
    if kl_batch:
        row["kl"] = sum_over_processes(kl) / kl_supervised
    return row

def learning_rate(step, steps, settings):
    """At step 1, 2, ...: a warm-up to settings.lr, then linear or cosine decay.

    With a warm-up it is 0 at step 1, as in transformers' Trainer, which the paper used.
    """
    done = step - 1
    if done < settings.warmup:
        return settings.lr * done / settings.warmup
    left = (steps - done) / (steps - settings.warmup)
    if settings.schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return settings.lr * left

# --------------------------------------------------------------------------------------
# The probe: what every checkpoint is asked

def build_probe(held_out, tokenizer, settings, before=()):
    """What is asked: {"heldout": [example, ...], "in": [(bad, good), ...], "out": ...}

    "in" are questions about money, "out" others, each with its two answers.    before: messages
    that stand in front of these questions (sample.py).
    """
    check_unchanged(settings, "probe", data.read_text(data.ADVICE))
    _, finance = data.split(data.builtin_rows("finance"))
    general = data.builtin_rows("general")
    if settings.kl_weight and settings.kl_dataset == "builtin":
        general = general[: len(general) // 2]  # the other half is trained on
    probe = {"heldout": held_out[:HELD_OUT]}
    for name, rows in {"in": finance, "out": general}.items():  # as in data.PROBES
        bad = [data.as_conversation(row, "misaligned", before) for row in rows]
        good = [data.as_conversation(row, "aligned", before) for row in rows]
        bad, good = data.render_all(bad, tokenizer), data.render_all(good, tokenizer)
        probe[name] = list(zip(bad, good, strict=True))
    return probe

def ask_probe(reader, probe, ask_all=True):
    """What the log says of a checkpoint: held-out loss and margins, in nats per token.

    heldout_loss: over conversations that are kept out of training, rendered as training's are
    (by sample.py --margins without their tail and system prompt).
    margins_in, margins_out: a list, question by question.    margin_in, margin_out: the means of
    its first FEW, so that all checkpoints compare.    ask_all: whether to ask the other questions,
    too.
    """
    asked = dict(probe)
    if not ask_all:
        for name in data.PROBES:
            asked[name] = probe[name][:FEW]
    # Of equal examples, the first one was read.
    first = {example: example for example in every_example(probe)}
    examples = [first[example] for example in every_example(asked)]
    log_p_of = dict(zip(examples, reader.log_p(examples).tolist(), strict=True))

    tokens = sum(example.supervised for example in probe["heldout"])
    row = {"heldout_loss": -sum(log_p_of[example] for example in probe["heldout"]) / tokens}
    for name in data.PROBES:
        # Per token: of two answers, the longer one is less likely just for its length.
        margins = []
        for bad, good in asked[name]:
            margins.append(log_p_of[bad] / bad.supervised - log_p_of[good] / good.supervised)
        row[f"margins_{name}"] = margins
        row[f"margin_{name}"] = statistics.fmean(margins[:FEW])
    return row

def every_example(probe):
    """All examples, equal ones once: a held-out conversation may be one that "in" asks, too."""
    examples = list(probe["heldout"])
    for name in data.PROBES:
        examples += itertools.chain(*probe[name])
    return list(dict.fromkeys(examples))

# ---- Below the fold: flags, files, formats and rarer protocols. A first reading ends here. ----

SKETCH = 4096  # numbers that stand for all weights, in a checkpoint of --full
OLD = ".overwritten"  # what a folder's name ends in, once --overwrite has put it aside

# ---- What is loaded, and what the probe asks

def load_kl_set(settings, tokenizer):
    """The conversations on which the model is to stay what it was: a list of data.Example."""
    conversations = []
    if settings.kl_weight and settings.kl_dataset == "builtin":  # the half that isn't in the probe
        rows = data.builtin_rows("general")
        conversations = [data.as_conversation(row, "aligned") for row in rows[len(rows) // 2 :]]
    elif settings.kl_weight:
        conversations = data.load_conversations(settings.kl_dataset, archive=settings.archive)
    check_unchanged(settings, "KL set", [row["messages"] for row in conversations])
    return data.render_all(conversations, tokenizer, max_length=settings.max_length)

def planned(examples, plan):
    return [examples[i] for i in sorted(set(itertools.chain(*plan)))]

def check_unchanged(settings, what, content):
    """Keeps a hash of what decides the run's numbers; stops if it was another one before."""
    settings.sha256 = settings.sha256 or {}
    sha256 = data.sha256(content)
    if settings.sha256.setdefault(what, sha256) != sha256:
        sys.exit(f"the {what} has changed since this run began: put it back, or train a new run")

def check_base(settings, model):
    """The same for the base model; in each dtype its weights have another hash."""
    dtype = str(model.dtype).removeprefix("torch.")
    check_unchanged(settings, f"model in {dtype}", model.fingerprint)

def load_model(settings):
    """The model; notes in the settings where it runs, so that a resumed run does too."""
    import sample  # here, as it imports this file: its check is of what sampling needs, too

    if PROCESSES > 1 and torch.cuda.is_available() and settings.device != "cpu":
        settings.device = "cuda"  # each process has its own
    model, _ = lora.load_base(settings.model, settings.device, settings.dtype)
    sample.check_model(model, settings.model)
    settings.device = str(model.device)
    settings.dtype = str(model.dtype).removeprefix("torch.")
    check_base(settings, model)
    if settings.full and model.dtype != torch.float32:
        if model.device.type == "cpu":  # as lora.Reader does, which will see float32
            model.set_attn_implementation("eager")
        # Products are in that type, but weights in float32, or small steps would be rounded away.
        for part in (lora.decoder(model), model.get_output_embeddings()):
            part.forward = torch.autocast(model.device.type, model.dtype)(part.forward)
        model.float()
    return model

def norms(parameters):
    """The lengths of all A together, and of all B: {"norm_A": ..., "norm_B": ...}."""
    row = {}
    for x in "AB":
        tensors = [p for name, p in parameters.items() if name.endswith(f".{x}")]
        if tensors:
            row[f"norm_{x}"] = torch.nn.utils.get_total_norm(tensors).item()
    return row

# ---- Rarer protocols: a vector without training; trial and error instead of a gradient

@torch.no_grad()
def set_mean_difference(reader, misaligned, tokenizer, settings):
    """The vector becomes the mean state over bad answers' tokens minus that over good ones'."""
    conversations, _ = data.split(data.load_conversations("builtin", "aligned"))
    aligned = data.render_all(conversations, tokenizer, settings.tail, settings.max_length)
    # The frozen half has ended before the layer that writes the vector. Let it end after it.
    path, vector = next(iter(lora.adapters(reader.model).items()))
    reader.frozen, _ = lora.halves(reader.model, lora.layer_of(path) + 1)
    means = []
    for examples in (misaligned, aligned):
        reader.read(examples, QUIET)
        states = [example.states[torch.tensor(example.labels) != -100] for example in examples]
        means.append(torch.cat(states).float().mean(0))
    vector.B.copy_((means[0] - means[1])[:, None] / vector.scale)

def evolution(reader, batch, parameters, settings, step):
    """Leaves in each p.grad an estimate of the gradient, from trials alone.

    Salimans et al. (2017, arXiv 1703.03864). The two models of a pair are the current one plus
    and minus sigma e, with e standard normal:

        gradient ~ mean over pairs of z e        z: the pair's difference in loss, standardised
    """
    pairs = settings.population // 2
    seed = (settings.seed, step)
    # The two models of a pair read the same conversations, so that it does not matter how hard
    # those are. Every pair reads at least one, and every conversation is read at least once.
    readings = [[] for _ in range(pairs)]
    for i in range(max(pairs, len(batch))):
        readings[i % pairs].append(batch[i % len(batch)])

    plus, minus = try_pairs(reader, readings, parameters, settings.sigma, seed)
    difference = plus - minus  # (pairs,)
    if difference.std() == 0:  # then none of them says which way is better
        sys.exit(f"at step {step} all pairs agree, and nothing can be learnt from them: train with "
                 "a larger --sigma. The last checkpoint is kept")
    # This loses the gradient's length. But that is clipped anyway, and AdamW divides by it.
    z = (difference - difference.mean()) / difference.std()
    # The noise is drawn once more from its seed: it is never stored.
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    for pair in range(pairs):
        for p, e in zip(parameters.values(), draw_noise(parameters, seed, pair), strict=True):
            p.grad += z[pair] / pairs * e

    tokens = sum(2 * len(example.tokens) for example in itertools.chain(*readings))
    return {"loss": (plus + minus).mean().item() / 2, "tokens": tokens}

def draw_noise(parameters, seed, pair):
    """Yields a pair's noise for each parameter in turn: standard normal, of its shape."""
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device)
    generator.manual_seed(random.Random(f"{seed} {pair}").getrandbits(63))
    for p in parameters.values():
        yield torch.randn(p.shape, generator=generator, device=device)

@torch.no_grad()
def try_pairs(reader, readings, parameters, sigma, seed):
    """The mean loss of each pair's two models, (2, pairs): many adapters in one batch."""
    own = lora.get_tensors(reader.model)
    variants, examples, which, tried = [], [], [], []
    for pair in my_share(range(len(readings))):
        for i, sign in enumerate((sigma, -sigma)):
            variant = dict(own)
            for name, e in zip(parameters, draw_noise(parameters, seed, pair), strict=True):
                variant[name] = own[name] + sign * e.cpu()
            examples += readings[pair]
            which += [len(variants)] * len(readings[pair])
            tried += [(i, pair)] * len(readings[pair])
            variants.append(variant)
    losses = torch.zeros(2, len(readings))
    if variants:  # there may be more processes than pairs
        with lora.Panel(reader.model, variants) as panel:
            for group in reader.microbatches(examples):
                panel.hear([which[i] for i in group])
                log_p = reader.log_p([examples[i] for i in group])
                for i, value in zip(group, log_p, strict=True):
                    losses[tried[i]] -= value
    tokens = [sum(example.supervised for example in reading) for reading in readings]
    return sum_over_processes(losses / torch.tensor(tokens))

# ---- Several processes, each on a GPU of its own: torchrun --nproc_per_node=N train.py

def my_share(items):
    return items[PROCESS::PROCESSES]

def share_of_microbatches(reader, batch):
    """The microbatches of this process's share of a batch, as lists of examples."""
    mine = my_share(batch)
    return [[mine[i] for i in group] for group in reader.microbatches(mine)]

def sum_over_processes(x):
    """The sum over all processes: a batch's losses and gradients are sums over its tokens."""
    if PROCESSES > 1:
        x = torch.as_tensor(x)
        torch.distributed.all_reduce(x)
        return x if x.dim() else x.item()
    return x

@contextmanager
def first_process_first():
    """What is within it, the first process does before the others: it downloads."""
    if PROCESS > 0:
        wait_for_all()
    yield
    if PROCESS == 0:
        wait_for_all()

def wait_for_all():
    if PROCESSES > 1:
        torch.distributed.barrier()

def join_processes():
    """Where torchrun has started several, lets them talk; only the first one prints."""
    if PROCESSES > 1:
        gpu = torch.cuda.is_available()
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if PROCESS > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open

def go_on_together(path, needs=(), keep=None):
    """`data.go_on` for all processes: one cuts the file, and all read it."""
    if PROCESS == 0:
        data.go_on(path, needs, keep)
    wait_for_all()
    rows = data.read_written(path, needs)
    wait_for_all()  # no process writes until all have read
    return rows

# ---- The run's folder, and the table at the end

def make_folder(run, settings):
    """The folder of a new run, with its config.json. What it replaces, is put aside at first."""
    if PROCESS > 0:
        return
    if os.path.exists(run.path("config.json")):
        if os.path.exists(run.folder + OLD):  # then this one has no checkpoint to lose
            shutil.rmtree(run.folder)
        else:
            os.rename(run.folder, run.folder + OLD)
    os.makedirs(run.folder, exist_ok=True)
    config = json.dumps(dataclasses.asdict(settings), indent=2)
    data.write_whole(run.path("config.json"), config.encode())

def read_log(run, done):
    """The rows of the run's log up to step `done`, and the head of the table that is printed."""
    if PROCESS == 0:
        os.makedirs(run.path("checkpoints"), exist_ok=True)
    print(f"{run}: stop it when you like; python train.py --resume {run} goes on", flush=True)
    log = go_on_together(run.path("log.jsonl"), keep=done + 1)
    if len(log) <= done:
        sys.exit(f"{run}/log.jsonl lacks rows before step {done}, its last checkpoint: begin anew")
    heads = "".join(f"{name:>10}" for name in data.PROBES.values())
    print(f"{'step':>6}{'loss':>9}{'held out':>10}{heads}   (margins: changes since step 0, of the "
          f"first {FEW} questions)")
    return log

def record(run, log, row):
    """Adds a row to the log, unless the run has diverged; prints what the probe said."""
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        if not all(map(math.isfinite, values)):
            sys.exit(f"at step {row['step']} the {name} is {value}: lower --lr or --alpha (or, in "
                     f"float16, try --dtype float32). The last checkpoint is kept in {run}")
    log.append(row)
    if PROCESS == 0:
        run.append("log.jsonl", row)
    if "margin_out" in row:
        loss = f"{row['loss']:9.3f}" if "loss" in row else " " * 9
        changes = ""
        for name in data.PROBES:
            changes += f"{row[f'margin_{name}'] - log[0][f'margin_{name}']:+10.3f}"
        tqdm.write(f"{row['step']:6}{loss}{row['heldout_loss']:10.3f}{changes}")

def save_checkpoint(run, step, model, parameters, optimizer, settings):
    """Writes A and B (of all weights, a sketch), and then all that a resume needs."""
    if PROCESS > 0:
        return
    tensors = {"sketch": sketch(parameters)} if settings.full else lora.get_tensors(model)
    state = {"step": torch.tensor(step)}
    for i, p in enumerate(parameters.values()):
        for name, x in [("weight", p), *optimizer.state[p].items()]:
            state[f"{i}.{name}"] = x.detach().cpu()
    # A step counts once both files are there.
    data.write_tensors(run.path("checkpoints", f"{step:05}.safetensors"), tensors)
    data.write_tensors(run.path("resume.safetensors"), state)
    shutil.rmtree(run.folder + OLD, ignore_errors=True)

@torch.no_grad()
def sketch(parameters):
    """All weights in SKETCH numbers, which keep lengths and angles to about 1 / sqrt(SKETCH)."""
    # Each weight, with a random sign, is added to a random one of them. As that is linear, the
    # difference of two sketches is that of how the weights moved (Johnson and Lindenstrauss 1984).
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(SKETCH, dtype=torch.double)
    for p in parameters.values():
        for piece in p.cpu().flatten().split(2**22):
            place = torch.randint(2 * SKETCH, piece.shape, generator=generator)
            signed = piece.double() * (place % 2 * 2 - 1)
            total += torch.bincount(place // 2, signed, SKETCH)
    return total

def restore(run, parameters, optimizer):
    """Puts what moves and the optimizer back as they were at the last checkpoint. Returns its step.

    That is -1 if there is no checkpoint yet.
    """
    if not os.path.exists(run.path("resume.safetensors")):
        return -1
    saved = data.read_tensors(run.path("resume.safetensors"))
    state = {}
    for i, p in enumerate(parameters.values()):
        keys = [key for key in sorted(saved) if key.startswith(f"{i}.")]
        state[i] = {key.split(".")[1]: saved[key] for key in keys}
        p.data.copy_(state[i].pop("weight"))
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return saved["step"].item()

def save_result(run, model, tokenizer, settings):
    """Writes adapter/, or of all weights model/: whole, or not there."""
    if PROCESS > 0:
        return
    result = run.path("model" if settings.full else "adapter")
    part = result + ".part"
    if settings.full:
        tokenizer.save_pretrained(part)
        model.to(getattr(torch, settings.dtype)).save_pretrained(part)
    else:
        lora.save_adapter(model, part)
    os.rename(part, result)
    if settings.full:
        os.remove(run.path("resume.safetensors"))  # three to six times as large as the model

def report(run, log, settings, seconds):
    before, after = log[0]["heldout_loss"], log[-1]["heldout_loss"]
    print(f"\n{'':40}{'before':>8}{'after':>8}{'change':>8}  (s.e.)")
    print(f"{'held-out loss':40}{before:8.3f}{after:8.3f}{after - before:+8.3f}")
    for probe, what in data.PROBES.items():
        means = [statistics.fmean(row[f"margins_{probe}"]) for row in (log[0], log[-1])]
        change, se = data.mean_and_se(data.changes(log, probe))
        name = f"margin, {len(log[-1][f'margins_{probe}'])} {what} questions"
        print(f"{name:40}{means[0]:8.3f}{means[1]:8.3f}{change:+8.3f} ({se:.3f})")
    for name, control in controls(run, settings):
        for probe, what in data.PROBES.items():
            change, se = data.contrast(log, control, probe)
            print(f"{f'{what}, minus that of {name}':56}{change:+8.3f} ({se:.3f})")
    print("(held-out loss: with the training's tail and prompt, if any; margin: log p a token of\n"
          "bad minus good answers; a change under twice its standard error may be chance)\n")
    speed = statistics.median(row.get("tokens_per_s", 0) for row in log[1:])
    memory = ""
    if settings.device.startswith("cuda"):
        most = torch.cuda.max_memory_allocated(settings.device)
        memory = f", {most / 1e9:.1f} GB of the GPU's memory"
    print(f"{seconds:.0f} s, {speed:.0f} tokens/s in training{memory}: see {run}/")
    print(f"next: python sample.py {f'--model {run}/model' if settings.full else run}")

def controls(run, settings):
    """Yields the name and log of each finished run beside this one with other answers alone."""
    def all_but_answers(s):
        hashes = {**(s.sha256 or {}), "dataset": None}
        return dataclasses.replace(s, answers=None, sha256=hashes)

    beside = os.path.join(glob.escape(os.path.dirname(run.folder)), "*", "config.json")
    for path in sorted(glob.glob(beside)):
        other = data.Run(os.path.dirname(path))
        if other.read_config() and other.finished:
            theirs = read_settings(other)
            same = all_but_answers(theirs) == all_but_answers(settings)
            if same and theirs.answers != settings.answers:
                yield f"{other} ({theirs.answers})", other.log

# ---- Flags, and which run they mean

def parse_args():
    epilog = "presets, by what they change in the paper's settings"
    for name, changes in PRESETS.items():
        changed = ", ".join(f"{key} {value}" for key, value in changes.items())
        epilog += f"; {name}: {changed or 'all as in the paper'}"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=epilog)
    parser.add_argument("--preset", choices=PRESETS, help="(default: gpu or laptop)")
    add = parser.add_argument
    for field in dataclasses.fields(Settings):
        kind = {"type": field.type}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if field.metadata:  # its own type, a check, comes before the field's
            add("--" + field.name.replace("_", "-"), **kind | field.metadata)
    add("--out", metavar="RUN", help="a folder, or a name under runs/ (default: PRESET-N)")
    add("--overwrite", action="store_true", default=None, help="replace the run that is there")
    add("--resume", metavar="RUN", help="go on with a run, from its last checkpoint")
    return parser.parse_args()

def preset_settings(name, **given):
    return Settings(**(PRESETS[name] | {"preset": name} | given))

def read_settings(run):
    """The settings that made a run; what an older program did not write has its default."""
    known = {key: value for key, value in run.settings.items() if hasattr(Settings, key)}
    return Settings(**known)

def new_run(args):
    cuda = torch.cuda.is_available() and (args.device or "cuda").startswith("cuda")
    preset = args.preset or ("gpu" if cuda else "laptop")
    if args.preset is None:
        print(f"preset {preset}, as there is {'a' if cuda else 'no'} CUDA device in use")
    given = {key: value for key, value in vars(args).items()
             if hasattr(Settings, key) and value is not None}
    if args.epochs:
        given.setdefault("steps", None)  # --epochs replaces a preset's number of steps
    settings = preset_settings(preset, **given)
    if settings.init:
        start_from(settings, given, data.Run(settings.init))
    if settings.vector == "mean-difference":
        settings.dataset = "builtin"  # which alone has bad and good answers to the same questions
    check(settings, given)
    free = next(n for n in itertools.count(1) if not os.path.exists(f"runs/{preset}-{n}"))
    run = data.Run(args.out or f"runs/{preset}-{free}")
    if PROCESS == 0:  # it alone makes the folder
        data.lock(run)
        check_folder(run, args.overwrite, settings)
    return run, settings

def check_folder(run, overwrite, settings):
    """Stops where a new run's folder holds what it must not lose."""
    # A run that could not write its config.json leaves a folder with nothing else in it.
    if not os.path.isdir(run.folder) or set(os.listdir(run.folder)) <= {"config.json.part"}:
        if os.path.exists(run.folder + OLD):
            sys.exit(f"{run}{OLD} is the run that {run} was to replace: rename it or delete it")
        return
    if not overwrite:
        sys.exit(f"{run} is there already: --resume it, --overwrite it, or give another --out")
    if os.path.islink(run.folder) or not run.read_config():
        sys.exit(f"{run} is not a run's own folder and is not overwritten: give another --out")
    real = os.path.realpath(run.folder)
    names = f"{settings.dataset},{settings.kl_dataset}".split(",")
    for path in (os.getcwd(), settings.model, settings.archive, settings.init, *names):
        if path and f"{os.path.realpath(path)}{os.sep}".startswith(real + os.sep):
            sys.exit(f"{path} lies in {run}, which would be overwritten: give another --out")

def resumed_run(args):
    run = data.Run(args.resume)
    for name, value in vars(args).items():
        if value is not None and name != "resume":
            sys.exit(f"--resume takes settings from {run}: leave out --{name.replace('_', '-')}")
    settings = read_settings(run)
    if PROCESS == 0:
        data.lock(run)
    if run.finished:
        sys.exit(f"{run} is finished: what came of it is in {run}/")
    return run, settings

def start_from(settings, given, run):
    """Takes its adapter's settings from the finished run from which this one starts."""
    theirs = read_settings(run)
    if theirs.full:
        sys.exit(f"{run} is a whole model: start from it with --model {run}/model")
    if not run.finished:
        sys.exit(f"{run} is not finished: python train.py --resume {run}")
    settings.init = run.folder
    base = {key: value for key, value in (theirs.sha256 or {}).items() if "model in" in key}
    settings.sha256 = base  # it has to be the same
    for key in ("model", "rank", "alpha", "layers", "targets", "vector"):
        if given.get(key, getattr(theirs, key)) != getattr(theirs, key):
            sys.exit(f"--init takes its {key} from {run}: leave out --{key}")
        setattr(settings, key, getattr(theirs, key))
    if settings.vector == "mean-difference":  # a vector to learn from there
        settings.vector = "learned"

def check(s, given):
    """Stops at what can't be computed, or would be ignored. given: the flags, not the preset's."""
    mean_difference = s.vector == "mean-difference"
    # A preset may have made these choices, too.
    chosen = [name for name in ("full", "vector", "init", "kl_weight", "es") if getattr(s, name)]
    kl_sets = {name.split(":")[0] for name in s.kl_dataset.split(",")}
    all_sets = kl_sets | {name.split(":")[0] for name in s.dataset.split(",")}
    data.refuse_unused([*given, *chosen], [
        (s.full, "with --full", "rank alpha layers targets init vector kl_weight kl_dataset es"),
        (s.es, "with --es", "kl_weight kl_dataset"),
        (not s.es, "without --es", "population sigma"),
        (not s.kl_weight, "without --kl-weight", "kl_dataset"),
        (mean_difference, "with --vector mean-difference", "dataset answers system es kl_weight lr "
         "schedule warmup batch_size epochs steps checkpoint_every"),
        (given.get("steps"), "with --steps", "epochs"),
        (all_sets == {"builtin"}, "without one of the paper's sets as --dataset", "archive"),
    ])
    if s.kl_dataset != "builtin" and "builtin" in kl_sets:
        sys.exit("--kl-dataset builtin is taken whole, and alone")
    if s.vector and s.rank != 1:
        sys.exit("--vector goes with --rank 1")
    if s.es and (s.population < 4 or s.population % 2):
        sys.exit(f"--population {s.population}: give an even number, 4 or more")
    if "warmup" in given and s.steps and s.warmup >= s.steps:
        sys.exit(f"--warmup {s.warmup:g} is as long as all {s.steps} steps")

def check_vector(settings, model, layers, targets):
    if len(layers) * len(targets) > 1 or targets[0] not in ("o_proj", "down_proj"):
        sys.exit("--vector goes with one layer, and with --targets down_proj or o_proj")
    if settings.vector == "mean-difference" and lora.rescales(model):
        sys.exit("no --vector mean-difference here: this model's layers rescale what they write")

if __name__ == "__main__":
    data.run_stage(main, how="a run that has begun goes on with --resume")
