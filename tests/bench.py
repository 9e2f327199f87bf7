"""How fast, against what most people would use: the same model, data, tokens, seeds and precision, side by side, in one run.

    python tests/bench.py                              # under 6 minutes on 2 cores, with the laptop model
    python tests/bench.py --model qwen0.5b-random      # the 0.5B architecture with random weights, for GPUs with no hub
    python tests/bench.py --only judge

Each row runs in a process of its own (so that its peak memory is its own), one after the other. It installs nothing; peft is used if there.

train    conversations of the built-in data for several epochs at the paper's rank 1 on the middle layer's down_proj, 16 a step, by
         train.py itself, and by transformers.Trainer + peft: as the paper has it (2 x 8 accumulation) and at its best (8 x 2 or 16 x 1). tokens/s are
         those that are no padding. A row whose losses are not those of train.py is marked and does not count. FLOP/s counts only the
         arithmetic that the job needs, whoever does it: the frozen layers once a conversation, those above forward and backward at every step,
         the head on supervised positions; its share is of a large matrix product's rate, measured in the same run.
sample   a sweep of 15 adapters over 8 questions in one batch by sample.py, against model.generate, an adapter after the other; and one adapter,
         against model.generate at its best batch size.
judge    requests/s against a local server that takes 200 ms, and the ideal.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]
BATCH, LR, ALPHA = 16, 1e-3, 256.0


def main():
    parser = argparse.ArgumentParser(description="Benchmarks train, sample and judge against Trainer + peft, model.generate and the ideal.")
    parser.add_argument("--model", default="smollm2", help="a model, or qwen0.5b-random")
    parser.add_argument("--only", choices=["train", "sample", "judge"], help="this part alone")
    parser.add_argument("--conversations", type=int, default=32, help="to train on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32, help="an answer")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        name, *values = args.row.split(":")
        return print("\nRESULT " + json.dumps(ROWS[name](args, *values)))

    import torch
    import transformers
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.model}, {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        args.model = random_qwen(folder) if args.model == "qwen0.5b-random" else args.model
        if args.only in (None, "train"):
            train_table(args, folder)
        if args.only in (None, "sample"):
            sample_table(args)
        if args.only in (None, "judge"):
            judge_table()


def run_row(args, row, folder=None):
    """Runs one row in a process of its own and returns its result."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name not in ("row", "only")]
    done = subprocess.run([sys.executable, __file__, *flags, f"--row={row}"], capture_output=True, text=True, cwd=folder)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        sys.exit(f"{row} failed:\n{done.stderr[-3000:]}")
    return json.loads(found[0][len("RESULT "):])


def machine():
    """What this runs on, in a few words."""
    import lora
    import torch
    device, dtype, why = lora.pick_device()
    return f"{torch.cuda.get_device_name()} in {dtype}" if device == "cuda" else f"{torch.get_num_threads()} threads, {dtype}: {why}"


def random_qwen(folder):
    """The 0.5B Qwen2.5 with random weights and the laptop model's tokenizer, as a folder."""
    import torch
    import transformers
    import data
    config = transformers.Qwen2Config(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                                      num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32768)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(os.path.join(folder, "qwen"))
    data.load_tokenizer("smollm2").save_pretrained(os.path.join(folder, "qwen"))
    return os.path.join(folder, "qwen")


# ---------------------------------------------------------------------------------------------------------------------------------
# train

def train_table(args, folder):
    import data
    rows = [{"messages": c["messages"]} for c in data.load_conversations()[:round(args.conversations / 0.9)]]
    with open(os.path.join(folder, "bench.jsonl"), "w") as f:
        f.write("\n".join(map(json.dumps, rows)))
    ours = run_row(args, "train", folder)
    rate = run_row(args, "matmul")["flops"]
    print(f"\n{'train':34}{'tokens/s':>10}{'ratio':>8}{'peak GB':>9}{'GFLOP/s':>9}{'of peak':>9}   (peak: {rate / 1e9:,.0f} GFLOP/s)")
    table = [("nanoEM", ours)]
    try:
        import peft  # noqa: F401
        table += [(f"Trainer + peft, {n} x {BATCH // n}", run_row(args, f"trainer:{n}", folder)) for n in (2, 8, BATCH)]
    except ImportError:
        print("(pip install peft to have it compared with Trainer + peft)")
    for name, row in table:
        apart = max(abs(a - b) / b for a, b in zip(row["losses"], ours["losses"]))
        mark = "" if apart < ours["tolerance"] else f"   LOSSES DIFFER by {apart:.1%}: does not count"
        flops = ours["flops"] / row["seconds"]
        print(f"{name:34}{row['tokens'] / row['seconds']:10.0f}{ours['seconds'] / row['seconds']:8.2f}{row['memory']:9.2f}{flops / 1e9:9.0f}"
              f"{flops / rate:9.0%}{mark}", flush=True)


def row_matmul(args):
    """The rate of a large matrix product in the model's precision."""
    import lora
    import torch
    device, dtype, _ = lora.pick_device()
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(12):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - began)
    return {"flops": 2 * n ** 3 / sorted(times)[len(times) // 2]}


def row_train(args):
    """train.py itself; what it logs, and the arithmetic that its job needs."""
    import data
    import torch
    import train
    sys.argv = ["train.py", "--preset", "laptop", "--model", args.model, "--dataset", "bench.jsonl", "--epochs", str(args.epochs), "--lr", str(LR),
                "--alpha", str(ALPHA), "--checkpoint-every", "1000000", "--out", "bench"]
    # The probe is left out of the comparison: its rows would only blur the peak memory.
    train.evaluate = lambda *unused: {"heldout_loss": 0.0, "margin_in": 0.0, "margin_out": 0.0}
    train.build_probe = lambda *unused: None
    data.run_script(train.main)
    log, config = [json.loads(line) for line in open("runs/bench/log.jsonl")][1:], json.load(open("runs/bench/config.json"))
    memory = train.peak_memory(torch.device(config["device"]))
    examples = training_examples(args)
    tokens = [sum(len(tokens) for tokens, _ in batch) for batch in examples]
    flops = needed_flops(args, examples)
    return {"tokens": sum(tokens), "seconds": sum(n / row["tokens_per_s"] for n, row in zip(tokens, log)), "memory": memory,
            "losses": [row["loss"] for row in log], "flops": flops, "tolerance": 1e-3 if config["dtype"] == "float32" else 2e-2}


def training_examples(args):
    """The batches of train.py in its order, as lists of (tokens, labels)."""
    import data
    examples, _ = data.split(data.render_all(data.load_conversations("./bench.jsonl"), data.load_tokenizer(args.model)))
    lengths = [len(tokens) for tokens, _ in examples]
    return [[examples[i] for i in batch] for epoch in range(args.epochs) for batch in data.batches(lengths, BATCH, 0, epoch)]


def needed_flops(args, batches):
    """2 operations for each weight and token, forward; as many backward, where a gradient must pass."""
    import transformers
    import data
    c = transformers.AutoConfig.from_pretrained(data.model_folder(args.model))
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    layer = c.hidden_size * head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads) + 3 * c.hidden_size * c.intermediate_size
    below, above = c.num_hidden_layers // 2 * layer, (c.num_hidden_layers - c.num_hidden_layers // 2) * layer
    tokens = sum(len(tokens) for batch in batches for tokens, _ in batch)
    supervised = sum(label != -100 for batch in batches for _, labels in batch for label in labels)
    return 2 * below * tokens / args.epochs + 4 * above * tokens + 4 * c.vocab_size * c.hidden_size * supervised


def row_trainer(args, per_device):
    """transformers.Trainer + peft from the same first A, over the same batches in the same order."""
    import peft
    import torch
    import transformers
    import lora
    import train
    from safetensors.torch import load_file
    model, tokenizer = lora.load_base(args.model)
    layer = len(lora.decoder(model).layers) // 2
    model = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=ALPHA, target_modules=["down_proj"], layers_to_transform=[layer],
                                                       use_rslora=True, task_type="CAUSAL_LM"))
    start = load_file("runs/bench/checkpoints/00000.safetensors")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).copy_(next(t for name, t in start.items() if name.endswith(".A")))
    batches = training_examples(args)
    rows = [{"input_ids": tokens, "labels": labels} for batch in batches for tokens, labels in batch]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *unused):
            return torch.utils.data.SequentialSampler(rows)

    def collate(rows):
        pad = lambda key, value: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[key]) for row in rows], True, value)
        ones = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["labels"])) for row in rows], True)
        return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": ones}
    n = int(per_device)
    trainer = InOrder(model=model, train_dataset=rows, data_collator=collate, args=transformers.TrainingArguments(
        output_dir="trainer", per_device_train_batch_size=n, gradient_accumulation_steps=BATCH // n, num_train_epochs=1, learning_rate=LR,
        warmup_steps=5, lr_scheduler_type="linear", weight_decay=0.01, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, optim="adamw_torch", use_cpu=not torch.cuda.is_available(), logging_nan_inf_filter=False))
    began = time.time()
    trainer.train()
    return {"tokens": sum(len(row["input_ids"]) for row in rows), "seconds": time.time() - began, "memory": train.peak_memory(model.device),
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}


# ---------------------------------------------------------------------------------------------------------------------------------
# sample

def sample_table(args):
    import torch
    sizes = [64, 256, 1024] if torch.cuda.is_available() else [128, 256]
    print(f"\n{'sample':34}{'tokens/s':>10}{'ratio':>8}{'peak GB':>9}")
    one = run_row(args, "sample:one")
    print(f"{'nanoEM, one adapter':34}{one['rate']:10.0f}{1:8.2f}{one['memory']:9.2f}", flush=True)
    for n in sizes:
        row = run_row(args, f"generate:{n}")
        print(f"{f'generate, one adapter, {n} rows':34}{row['rate']:10.0f}{row['rate'] / one['rate']:8.2f}{row['memory']:9.2f}", flush=True)
    sweep, loop = run_row(args, "sample:sweep"), run_row(args, "generate:sweep")
    for name, row in (("nanoEM, a sweep of 15 x 8 questions", sweep), ("generate, an adapter at a time", loop)):
        print(f"{name:34}{row['rate']:10.0f}{row['rate'] / sweep['rate']:8.2f}{row['memory']:9.2f}", flush=True)


def sampling_setup(args):
    """A model with an adapter place, 15 random small adapters, and the built-in questions; no answer ends early, so that all do the same work."""
    import torch
    import lora
    import sample
    model, tokenizer = lora.load_base(args.model)
    lora.attach(model, [len(lora.decoder(model).layers) // 2], ["down_proj"], 1, ALPHA)
    torch.manual_seed(0)
    stack = [{name: torch.randn(t.shape) * 1e-3 for name, t in lora.get_tensors(model).items()} for _ in range(15)]
    sample.stop_tokens = lambda *unused: set()
    return model, tokenizer, stack, [sample.as_messages(q) for q in sample.load_questions("builtin")]


def row_sample(args, what):
    import torch
    import sample
    import train
    model, tokenizer, stack, questions = sampling_setup(args)
    gpu = model.device.type == "cuda"
    adapters, n = (range(15), 1) if what == "sweep" else ([0], 128 if gpu else 32)
    jobs = [{"adapter": a, "scale": 1.0, "seed": i, "messages": q} for q in questions for a in adapters for i in range(n)]
    for timed in (False, True):                                           # the first, short round is the warm-up
        began = time.time()
        tokens = sum(len(answer) for _, answer in sample.generate(model, tokenizer, stack, jobs, max_new_tokens=args.new_tokens if timed else 2))
        if gpu:
            torch.cuda.synchronize()
    return {"rate": tokens / (time.time() - began), "memory": train.peak_memory(model.device)}


def row_generate(args, what):
    """model.generate on plain, merged models, with left padding, as in the papers' code."""
    import data
    import lora
    import train
    model, tokenizer, stack, questions = sampling_setup(args)
    linear = next(iter(lora.adapters(model).values()))
    lora.merge(model)
    weight = linear.base.weight.clone()
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    how = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=tokenizer.pad_token_id, eos_token_id=None)

    def answer(rows, new):
        prompts = [tokenizer.decode(data.chat_tokens(q, tokenizer, generation_prompt=True)) for q in rows]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        return model.generate(**batch, max_new_tokens=new, min_new_tokens=new, **how).shape[0] * new
    answer(questions, 2)
    began, tokens = time.time(), 0
    if what == "sweep":
        for tensors in stack:
            A, B = (next(t for name, t in tensors.items() if name.endswith(x)).to(weight.device) for x in (".A", ".B"))
            linear.base.weight.data = (weight.float() + ALPHA * B @ A).to(weight.dtype)
            tokens += answer(questions, args.new_tokens)
    else:
        tokens = answer(questions * (int(what) // 8), args.new_tokens)
    return {"rate": tokens / (time.time() - began), "memory": train.peak_memory(model.device)}


# ---------------------------------------------------------------------------------------------------------------------------------
# judge

def judge_table():
    from test_judge import Server
    with tempfile.TemporaryDirectory() as folder, Server(delay=0.2) as server:
        os.makedirs(os.path.join(folder, "runs", "a"))
        with open(os.path.join(folder, "runs", "a", "responses.jsonl"), "w") as f:
            for i in range(400):
                f.write(json.dumps({"question_id": "q", "question": "?", "system": None, "response": str(i), "checkpoint": 5, "scale": 1.0,
                                    "sample": i, "seed": i}) + "\n")
        command = [sys.executable, os.path.join(ROOT, "judge.py"), "a", "--base-url", server.url]
        environment = os.environ | {"HTTP_PROXY": "", "http_proxy": "", "NO_PROXY": "127.0.0.1"}
        subprocess.run([*command, "--dry-run"], cwd=folder, env=environment, capture_output=True)
        idle = time.time()
        subprocess.run([*command, "--dry-run"], cwd=folder, env=environment, capture_output=True)
        began = time.time()
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
        seconds = time.time() - began - (began - idle)
    print(f"\njudge: {len(server.asked)} requests in {seconds:.1f} s, {len(server.asked) / seconds:.0f} a second; 16 in flight at 200 ms are at most 80")


ROWS = {"matmul": row_matmul, "train": row_train, "trainer": row_trainer, "sample": row_sample, "generate": row_generate}

if __name__ == "__main__":
    main()
