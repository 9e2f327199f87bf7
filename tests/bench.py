"""How fast, against what most people would use: the same model, data, seeds and precision.

    python tests/bench.py                          # a few minutes on 2 cores
    python tests/bench.py --model qwen0.5b-random  # for a GPU that no hub can be reached from
    python tests/bench.py --only judge

Every row runs in a process of its own, so that its peak memory is its own, one after the
other. Nothing is installed; peft is compared if it is there (pip install peft).

train    the paper's rank 1 on the middle layer's down_proj, 16 conversations a step, for
         several epochs: by train.py (without its probes), and by transformers.Trainer with
         peft, as the paper has it (2 x 8 accumulation) and at its best. tokens/s counts no
         padding, and the frozen half's time is counted. A row whose losses are not those of
         train.py is marked. FLOP/s counts only the arithmetic that the job needs, whoever
         does it; its share is of a large matrix product's rate, measured in the same run.
sample   one adapter, and a sweep of 15 adapters over 8 questions: by sample.py, and by
         model.generate, which can only take one adapter after the other.
judge    requests a second of a local server that takes 200 ms, and the ideal.

What it said (peft 0.21.2; the same batches, seeds and precision, losses equal to 0.1%; one run
on each machine of two cores: Zen 3 in float32, whose matrix product reaches 125 GFLOP/s, and
Zen 4 in bfloat16, 405 GFLOP/s). SmolLM2, tokens/s:

    train: rank 1, middle layer, 16 x 4 epochs   Zen 4   Zen 3   peak     of a matrix
                                                                  memory   product's rate
    nanoEM                                         690     335   1.82 GB   78%
    Trainer + peft, 2 x 8, as the paper's code     452     197   1.28 GB   46%
    Trainer + peft, 8 x 2                          341     163   2.31 GB   38%
    Trainer + peft, 16 x 1                         373     175   3.71 GB   41%

    (another Zen 4, 879 GFLOP/s, 2026-11-26: nanoEM 1,387; Trainer + peft 731, 821 and 798)

    sample: 32 new tokens
    nanoEM, one adapter, 256 rows                  644     281   2.13 GB
    model.generate, one adapter, 128 rows                  107   1.72 GB
    nanoEM, 15 adapters x 8 questions, one batch   434 to 477    202   1.68 GB
    model.generate, an adapter at a time                    42   1.13 GB

(Memory and shares are Zen 3's.) judge.py makes 76 requests a second to a server that takes
200 ms, with 16 in flight; the ideal is 80.

What that rests on: the frozen half of the model runs once; the head runs on supervised
positions alone; conversations of like length share a batch (3% padding instead of 12%); a
batch is run in parts of 1024 tokens; a question is read once by each adapter of a sweep; 256
answers share the reading of the weights.

On an H200 (torch 2.11, a 0.5B in bfloat16; measured by hand, not by this file), tokens/s:

    train: python train.py --preset gpu          32,000 in the steps of 48 to 60 ms
    Trainer + peft, 16 x 1                       19,600 to 22,400: ours is 1.1 times that
                                                 with the frozen half counted, 1.4 without
    sample, 256 tokens: nanoEM, 512 rows         13,700 (37 ms a token)
    model.generate, 256 / 1,024 rows             11,500 (22 ms) / 40,700 (25 ms): here ours loses

A training step there is 1,144 launches and 5 waits; the GPU is busy for 17% of it.
"""
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from unittest import mock

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

BATCH, LR, ALPHA = 16, 1e-3, 256.0
GPU = torch.cuda.is_available()


def main():
    parser = argparse.ArgumentParser(description="Benchmarks train, sample and judge.")
    parser.add_argument("--model", default="smollm2", help="a model, or qwen0.5b-random")
    parser.add_argument("--only", choices=["train", "sample", "judge"], help="this part alone")
    # Less than this would measure how a GPU warms up.
    parser.add_argument("--conversations", type=int, default=256 if GPU else 32,
                        help="a multiple of 16")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=256 if GPU else 32, help="an answer")
    parser.add_argument("--answers", type=int, default=400, help="to be judged")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        name, *values = args.row.split(":")
        print("\nRESULT " + json.dumps(ROWS[name](args, *values)))
        return

    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {args.model}, {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "qwen0.5b-random":
            args.model = random_qwen(folder)
        for table in (train_table, sample_table, judge_table):
            if args.only in (None, table.__name__.removesuffix("_table")):
                table(args, folder)


def run_row(args, row, folder):
    """Runs one row in a process of its own and returns its result."""
    flags = []
    for name in ("model", "conversations", "epochs", "new_tokens"):
        flags.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    command = [sys.executable, os.path.abspath(__file__), *flags, f"--row={row}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    sys.exit(f"{row} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")


def machine():
    """What this runs on, in a few words."""
    import lora

    device, dtype, why = lora.pick_device()
    if device == "cuda":
        return f"{torch.cuda.get_device_name()} in {dtype}"
    return f"{torch.get_num_threads()} threads in {dtype}: {why}"


def random_qwen(folder):
    """The 0.5B Qwen2.5 with random weights and the laptop model's tokenizer, as a folder."""
    import transformers

    import lora

    config = transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    path = os.path.join(folder, "qwen")
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(path)
    lora.load_tokenizer("smollm2").save_pretrained(path)
    return path


# --------------------------------------------------------------------------------------
# train


def train_table(args, folder):
    import data

    # train.py holds out a tenth of these; the probe asks none of them, or it would leave it out.
    rows, _ = data.split(data.load_conversations())
    with open(os.path.join(folder, "bench.jsonl"), "w") as file:
        for row in rows[: round(args.conversations / 0.9)]:
            file.write(json.dumps({"messages": row["messages"]}) + "\n")
    ours = run_row(args, "train", folder)
    rate = run_row(args, "matmul", folder)["flops"]
    print(f"\n{'train':34}{'tokens/s':>10}{'ratio':>8}{'peak GB':>9}{'of a matrix product':>21}")
    table = [("nanoEM", ours)]
    try:
        import peft  # noqa: F401

        for n in (2, 8, BATCH):
            row = run_row(args, f"trainer:{n}", folder)
            table.append((f"Trainer + peft, {n} x {BATCH // n}", row))
    except ImportError:
        print("(pip install peft to have it compared with Trainer + peft)")
    for name, row in table:
        # In bfloat16 training amplifies rounding, so that a late step's losses differ whatever the
        # code. So the first five have to be equal, and then the mean loss.
        pairs = list(zip(row["losses"], ours["losses"], strict=True))
        apart = max(abs(a - b) / b for a, b in pairs[:5])
        apart = max(apart, abs(sum(row["losses"]) / sum(ours["losses"]) - 1))
        differ = apart > ours["tolerance"]
        mark = f"   LOSSES DIFFER by {apart:.1%}: does not count" if differ else ""
        speed, ratio = row["tokens"] / row["seconds"], ours["seconds"] / row["seconds"]
        share = ours["flops"] / row["seconds"] / rate
        numbers = f"{speed:10.0f}{ratio:8.2f}{row['memory']:9.2f}{share:21.0%}"
        print(f"{name:34}{numbers}{mark}", flush=True)
    print(f"(a matrix product: {rate / 1e9:,.0f} GFLOP/s)")


def row_matmul(args):
    """The rate of a large matrix product in the model's precision."""
    import lora

    device, dtype, _ = lora.pick_device()
    n = 8192 if GPU else 2048
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    b = torch.randn(n, n, device=device).to(getattr(torch, dtype))
    times = []
    for _ in range(12):
        synchronize()
        began = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - began)
    return {"flops": 2 * n**3 / sorted(times)[len(times) // 2]}


def synchronize():
    """Waits for the GPU, if there is one."""
    if GPU:
        torch.cuda.synchronize()


def peak_memory():
    """The most memory in use so far, in GB."""
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows does not tell
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def row_train(args):
    """train.py itself, but for its probes; its time, and the arithmetic that its job needs."""
    import data
    import lora
    import train

    # What the steps took, and how long the frozen half read, are noted as train.py runs.
    batches, seconds = [], []
    plan_batches, read = train.plan_batches, lora.Reader.read

    def note_batches(examples, *settings):
        schedule = plan_batches(examples, *settings)
        if examples:
            batches.extend([examples[i] for i in batch] for batch in schedule)
        return schedule

    def read_timed(*args):
        began = time.time()
        read(*args)
        synchronize()
        seconds.append(time.time() - began)

    flags = {"preset": "laptop", "model": args.model, "dataset": "./bench.jsonl", "lr": LR,
             "alpha": ALPHA, "batch-size": BATCH, "epochs": args.epochs,
             "checkpoint-every": 10**6, "out": "bench"}
    argv = ["train.py", *(f"--{name}={value}" for name, value in flags.items())]
    nothing = {"build_probe": no_result, "ask_probe": no_result, "report": no_result,
               "every_example": lambda probe: []}
    with (mock.patch.multiple(train, plan_batches=note_batches, **nothing),
          mock.patch.object(lora.Reader, "read", read_timed), mock.patch.object(sys, "argv", argv)):
        data.run_stage(train.main)

    # For the rows that compare themselves with this one.
    with open("batches.json", "w") as file:
        json.dump([list(map(as_row, batch)) for batch in batches], file)
    run = data.Run("bench")
    log = run.log[1:]
    seconds += [row["tokens"] / row["tokens_per_s"] for row in log]
    return {
        "tokens": sum(row["tokens"] for row in log), "seconds": sum(seconds),
        "losses": [row["loss"] for row in log], "flops": needed_flops(args, batches),
        "memory": peak_memory(),
        "tolerance": 1e-3 if run.settings["dtype"] == "float32" else 2e-2,
    }


def no_result(*args, **more):
    """Stands in for the probe (no example, no margin) and for the table at the end."""
    return {}


def as_row(example):
    """An example as Trainer takes it."""
    return {"input_ids": example.tokens, "labels": example.labels}


def needed_flops(args, batches):
    """2 operations for each weight and token forward, as many backward where a gradient passes."""
    import transformers

    import lora

    c = transformers.AutoConfig.from_pretrained(lora.model_folder(args.model))
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    layer = c.hidden_size * (head_dim * heads + 3 * c.intermediate_size)
    below = c.num_hidden_layers // 2
    above = c.num_hidden_layers - below
    examples = list(itertools.chain(*batches))
    tokens = sum(len(example.tokens) for example in examples)
    supervised = sum(example.supervised for example in examples)
    once = 2 * below * layer * tokens / args.epochs
    return once + 4 * above * layer * tokens + 4 * c.vocab_size * c.hidden_size * supervised


def row_trainer(args, per_device):
    """transformers.Trainer + peft from the same first A, over the same batches in order."""
    import peft
    import transformers
    from torch.nn.utils.rnn import pad_sequence

    import data
    import lora

    model, _ = lora.load_base(args.model)
    config = peft.LoraConfig(
        r=1, lora_alpha=ALPHA, target_modules=["down_proj"], use_rslora=True,
        layers_to_transform=[len(lora.decoder(model).layers) // 2], task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    start = data.read_tensors(data.Run("bench").checkpoints[0])
    (A,) = [tensor for name, tensor in start.items() if name.endswith(".A")]
    (peft_A,) = [p for name, p in model.named_parameters() if "lora_A" in name]
    peft_A.data.copy_(A)
    with open("batches.json") as file:
        rows = list(itertools.chain(*json.load(file)))

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *unused):
            return torch.utils.data.SequentialSampler(rows)

    def collate(rows):
        tokens = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {
            "input_ids": pad_sequence(tokens, True, 0),
            "labels": pad_sequence(labels, True, -100),
            "attention_mask": pad_sequence([torch.ones(len(row)) for row in tokens], True, 0),
        }

    n = int(per_device)
    settings = transformers.TrainingArguments(
        output_dir="trainer", per_device_train_batch_size=n, num_train_epochs=1,
        gradient_accumulation_steps=BATCH // n, learning_rate=LR, warmup_steps=5,
        lr_scheduler_type="linear", weight_decay=0.01, max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, optim="adamw_torch",
        use_cpu=not GPU, logging_nan_inf_filter=False,
    )
    trainer = InOrder(model=model, train_dataset=rows, data_collator=collate, args=settings)
    began = time.time()
    trainer.train()
    synchronize()
    seconds = time.time() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {"tokens": tokens, "seconds": seconds, "memory": peak_memory(), "losses": losses}


# --------------------------------------------------------------------------------------
# sample


def sample_table(args, folder):
    rows = [("nanoEM, one adapter", "sample:one")]
    for n in (64, 256, 1024) if GPU else (128, 256):
        rows.append((f"generate, one adapter, {n} rows", f"generate:{n}"))
    rows.append(("nanoEM, a sweep of 15 x 8 questions", "sample:sweep"))
    rows.append(("generate, an adapter at a time", "generate:sweep"))
    print(f"\n{'sample':38}{'tokens/s':>10}{'peak GB':>9}")
    for name, row in rows:
        result = run_row(args, row, folder)
        print(f"{name:38}{result['rate']:10.0f}{result['memory']:9.2f}", flush=True)


def set_up_sampling(args):
    """A model, 15 small random adapters, and the questions."""
    import lora
    import sample

    model, tokenizer = lora.load_base(args.model)
    lora.attach(model, [len(lora.decoder(model).layers) // 2], ["down_proj"], 1, ALPHA)
    torch.manual_seed(0)
    variants = []
    for _ in range(15):
        tensors = lora.get_tensors(model)
        variants.append({name: torch.randn(t.shape) * 1e-3 for name, t in tensors.items()})
    questions = [sample.as_messages(question) for question in sample.load_questions("builtin")]
    return model, tokenizer, variants, questions


def row_sample(args, what):
    """sample.py's `generate`; no answer ends early."""
    import lora
    import sample

    model, tokenizer, variants, questions = set_up_sampling(args)
    asked, n = range(15), 1
    if what == "one":
        asked, n = [0], 128 if GPU else 32
    jobs = []
    for question in questions:
        for variant in asked:
            job = {"variant": variant, "messages": question}
            jobs += [job | {"seed": seed} for seed in range(n)]
    never = mock.patch.object(sample, "stop_tokens", lambda *args: [-1])
    with never, lora.Panel(model, variants) as panel:
        for new_tokens in (2, args.new_tokens):  # the first, short round is the warm-up
            began = time.time()
            answers = sample.generate(panel, tokenizer, jobs, new_tokens)
            tokens = sum(len(answer) for _, answer in answers)
            synchronize()
    return {"rate": tokens / (time.time() - began), "memory": peak_memory()}


def row_generate(args, what):
    """model.generate on plain, merged models, with left padding, as in the papers' code."""
    import data
    import lora

    model, tokenizer, variants, questions = set_up_sampling(args)
    ((path, adapter),) = lora.adapters(model).items()
    lora.merge(model)
    weight = adapter.base.weight.clone()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def answer(rows, new):
        tokens = [data.prompt_tokens(row, tokenizer) for row in rows]
        prompts = [tokenizer.decode(row) for row in tokens]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        answers = model.generate(
            **batch.to(model.device), max_new_tokens=new, min_new_tokens=new, do_sample=True,
            temperature=1.0, top_p=1.0, top_k=0, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=None,
        )
        return len(answers) * new

    answer(questions, 2)
    began, tokens = time.time(), 0
    if what == "sweep":
        for tensors in variants:
            update = ALPHA * tensors[f"{path}.B"] @ tensors[f"{path}.A"]
            merged = weight.float() + update.to(weight.device)
            adapter.base.weight.data = merged.to(weight.dtype)
            tokens += answer(questions, args.new_tokens)
    else:
        tokens = answer(questions * (int(what) // 8), args.new_tokens)
    synchronize()
    return {"rate": tokens / (time.time() - began), "memory": peak_memory()}


# --------------------------------------------------------------------------------------
# judge


def judge_table(args, folder):
    from test_judge import Server

    run = os.path.join(folder, "runs", "a")
    os.makedirs(run)
    with open(os.path.join(run, "responses.jsonl"), "w") as file:
        for i in range(args.answers):
            row = {"question_id": "q", "question": "?", "system": None, "response": str(i)}
            row |= {"checkpoint": 5, "scale": 1.0, "sample": i, "seed": i}
            file.write(json.dumps(row) + "\n")
    with Server(delay=0.2) as server:
        command = [sys.executable, os.path.join(ROOT, "judge.py"), "a", "--base-url", server.url]
        command += ["--concurrency", "16"]
        settings = {"cwd": folder, "env": os.environ | {"NO_PROXY": "127.0.0.1"}, "check": True}
        times = []
        for flags in (["--dry-run"], ["--dry-run"], []):  # the first fills the cache, if it can
            began = time.time()
            subprocess.run([*command, *flags], capture_output=True, **settings)
            times.append(time.time() - began)
    seconds = times[2] - times[1]
    rate = len(server.asked) / seconds
    print(f"\njudge: {len(server.asked)} requests in {seconds:.1f} s, {rate:.0f} a second")
    print("(16 in flight at 200 ms are at most 80)")


ROWS = {"matmul": row_matmul, "train": row_train, "trainer": row_trainer, "sample": row_sample,
        "generate": row_generate}

if __name__ == "__main__":
    main()
