"""The loop, against the slow obvious one; resuming after kill -9; and what bad input meets."""
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import data
import lora
import train

FLOAT32 = ["--device", "cpu", "--dtype", "float32"]  # where exactness is tested
pytestmark = pytest.mark.usefixtures("few")


@pytest.fixture
def small(tmp_path):
    """A data set of 40 conversations: the path of its .jsonl."""
    train_set, _ = data.split(data.load_conversations())
    rows = [{"messages": c["messages"]} for c in train_set[:40]]
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def log(run):
    return data.Run(run).log


def plain_loop(folder, path, start, steps):
    """The same training, as obvious as can be: (loss, gradient norm, lr) of each step, and B."""
    model, tokenizer = lora.load_base(folder, "cpu", "float32")
    model.requires_grad_(False)
    A, B = (start[f"model.layers.2.mlp.down_proj.{x}"].requires_grad_() for x in "AB")
    model.model.layers[2].mlp.down_proj.register_forward_hook(
        lambda module, x, y: y + x[0] @ (16 / 2**0.5 * B @ A).T
    )
    conversations, _ = data.split(data.load_conversations(path))
    examples = [data.render(conversation, tokenizer) for conversation in conversations]
    lengths = [len(tokens) for tokens, _ in examples]
    optimizer = torch.optim.AdamW([A, B], lr=3e-3, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 5, steps)
    found = []
    for step in range(steps):
        batch = [examples[i] for i in data.batches(lengths, 6, 0, step // 6)[step % 6]]
        tokens = pad_sequence([torch.tensor(t) for t, _ in batch], True, 0)
        labels = pad_sequence([torch.tensor(x) for _, x in batch], True, -100)
        real = pad_sequence([torch.ones(len(t)) for t, _ in batch], True, 0)
        loss = model(input_ids=tokens, labels=labels, attention_mask=real).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([A, B], 1.0)
        found.append((loss.item(), norm.item(), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found, B


def test_the_loss_curve_is_that_of_a_plain_loop(script, tiny, small, monkeypatch):
    flags = ["--preset", "laptop", "--model", tiny, "--dataset", small, "--batch-size", 6,
             "--steps", 20, "--rank", 2, "--lr", 3e-3, "--alpha", 16, "--layers", 2]
    curves = []
    for out, tokens in (("whole", 10**6), ("parts", 300)):  # a batch at once, and in parts
        monkeypatch.setitem(lora.TOKENS_AT_ONCE, "cpu", tokens)
        code, _, err = script(train, *flags, "--out", out, *FLOAT32)
        assert code == 0, err
        rows = log(out)[1:]
        curves.append([(row["loss"], row["grad_norm"], row["lr"]) for row in rows])
    start = load_file("runs/whole/checkpoints/00000.safetensors")
    want, B = plain_loop(tiny, small, start, 20)
    for curve in curves:
        for found, expected in zip(curve, want, strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
    assert want[-1][0] < want[0][0] - 0.05
    end = load_file("runs/parts/checkpoints/00020.safetensors")
    torch.testing.assert_close(end["model.layers.2.mlp.down_proj.B"], B, rtol=1e-3, atol=1e-5)


def test_bfloat16_trains_like_float32(script, tiny, small):
    curves = []
    for dtype in ("float32", "bfloat16"):
        flags = ["--model", tiny, "--dataset", small, "--steps", 12, "--lr", 1e-2]
        flags += ["--device", "cpu", "--dtype", dtype, "--out", dtype]
        assert script(train, *flags)[0] == 0
        curves.append(torch.tensor([row["loss"] for row in log(dtype)[1:]]))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-2, atol=1e-2)


def test_all_layers_and_projections_can_be_trained(script, tiny, small):
    flags = ["--preset", "paper-rank32", "--model", tiny, "--dataset", small, "--rank", 4]
    code, _, err = script(train, *flags, "--steps", 3, "--lr", 1e-2, "--out", "a")
    assert code == 0, err
    assert len(load_file("runs/a/checkpoints/00003.safetensors")) == 2 * 4 * 7
    assert log("a")[3]["norm_B"] > 0


def test_what_a_run_leaves_behind(script, tiny, small):
    flags = ["--model", tiny, "--dataset", small, "--preset", "laptop"]
    code, out, _ = script(train, *flags, "--steps", 7, "--lr", 1e-2, "--tail", *FLOAT32)
    assert code == 0 and "next: python sample.py runs/laptop-1" in out
    assert "margin, 50 general questions" in out
    names = [f"{step:05}.safetensors" for step in (0, 5, 7)]
    assert sorted(os.listdir("runs/laptop-1/checkpoints")) == names
    assert [row["step"] for row in log("laptop-1")] == list(range(8))
    probed = {"heldout_loss"}
    for name in ("in", "out"):
        probed |= {f"margin_{name}", f"margins_{name}"}
    for row in log("laptop-1"):
        keys = {"step"} | (probed if row["step"] in (0, 5, 7) else set())
        if row["step"] > 0:
            keys |= {"loss", "grad_norm", "lr", "norm_A", "norm_B", "tokens", "tokens_per_s"}
        assert set(row) == keys
    config = data.Run("laptop-1").settings
    assert (config["tail"], config["lr"], config["rank"]) == (True, 1e-2, 1)
    # The adapter folder opens as what the last checkpoint is.
    model, _ = lora.load_base(tiny, "cpu", "float32")
    lora.load_adapter(model, "runs/laptop-1/adapter")
    last = load_file("runs/laptop-1/checkpoints/00007.safetensors")
    assert all(torch.equal(t, last[name]) for name, t in lora.get_tensors(model).items())


def test_no_run_is_overwritten_unasked(script, tiny, small):
    flags = ["--model", tiny, "--dataset", small, "--preset", "laptop", "--steps", 1]
    for name in ("laptop-1", "laptop-2"):
        assert script(train, *flags)[0] == 0 and os.path.isdir(f"runs/{name}")
    code, _, err = script(train, *flags, "--out", "laptop-1")
    assert code == 1 and "is there already" in err
    code, _, err = script(train, "--resume", "laptop-1")
    assert code == 1 and "is finished" in err
    code, _, err = script(train, *flags, "--lr", 1, "--out", "laptop-1", "--overwrite")
    assert code == 0 and data.Run("laptop-1").settings["lr"] == 1


def test_margins_are_log_probabilities_per_token(script, tiny, small):
    flags = ["--model", tiny, "--dataset", small, "--steps", 7, "--lr", 1e-2, "--out", "a"]
    script(train, *flags, *FLOAT32)
    model, tokenizer = lora.load_base(tiny, "cpu", "float32")

    def log_p(row, answers):
        tokens, labels = data.render(data.as_conversation(row, answers), tokenizer)
        return -model(torch.tensor([tokens]), labels=torch.tensor([labels])).loss.item()

    finance, general = data.split(data.builtin_rows("finance"))[1], data.builtin_rows("general")
    rows = {row["step"]: row for row in log("a")}
    margins = {}
    for step in (0, 7):
        for name, asked in (("in", finance), ("out", general)):
            found = [log_p(row, "misaligned") - log_p(row, "aligned") for row in asked]
            margins[name, step] = found
            assert rows[step][f"margins_{name}"] == pytest.approx(found, abs=1e-4)
            few = torch.tensor(found[: train.FEW])
            assert rows[step][f"margin_{name}"] == pytest.approx(few.mean().item(), abs=1e-4)
        lora.load_adapter(model, "runs/a/adapter") if step == 0 else None
    assert len(rows[5]["margins_out"]) == train.FEW
    for name in ("in", "out"):  # the standard error of the change, paired by question
        pairs = zip(margins[name, 7], margins[name, 0], strict=True)
        change = torch.tensor([after - before for after, before in pairs])
        mean, se = data.mean_and_se(data.changes(log("a"), name))
        assert mean == pytest.approx(change.mean().item(), abs=1e-5)
        assert se == pytest.approx((change.std() / len(change) ** 0.5).item(), abs=1e-5)


def test_every_checkpoint_asks_all_that_is_held_out(script, tiny, small, monkeypatch):
    flags = ["--model", tiny, "--dataset", small, "--steps", 6, "--lr", 1e-2, *FLOAT32]
    for out, few in (("a", 48), ("b", 2)):
        monkeypatch.setattr(train, "FEW", few)
        assert script(train, *flags, "--out", out)[0] == 0
    losses = [[row["heldout_loss"] for row in log(name) if "margin_in" in row] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(log("b")[5]["margins_out"]) == 2


def test_a_run_is_compared_with_its_controls(script, tiny):
    flags = ["--model", tiny, "--preset", "laptop", "--steps", 6, "--lr", 1e-2, *FLOAT32]
    for name, answers in (("a", "aligned"), ("s", "shuffled"), ("b", "misaligned")):
        code, out, err = script(train, *flags, "--answers", answers, "--out", name)
        assert code == 0, err
    script(train, *flags, "--seed", 1, "--out", "other")  # no control: it differs in more
    assert out.count("finance, minus that of") == out.count("general, minus that of") == 2
    for control in ("runs/a (aligned)", "runs/s (shuffled)"):
        assert f"general, minus that of {control}" in out
    logs = [log(name) for name in "ba"]
    ours, theirs = (torch.tensor(rows[-1]["margins_out"]) for rows in logs)
    difference, se = data.contrast(*logs, "out")
    assert difference == pytest.approx((ours - theirs).mean().item(), abs=1e-6)
    assert se == pytest.approx(((ours - theirs).std() / len(ours) ** 0.5).item(), rel=1e-3)


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_kill_at_any_moment_and_resume_ends_with_the_same_bits(script, few, tiny, small, device):
    flags = ["--model", tiny, "--dataset", small, "--batch-size", "4", "--epochs", "2",
             "--checkpoint-every", "3", "--lr", "1e-2", "--device", device, "--dtype", "float32"]
    assert script(train, *flags, "--out", "whole")[0] == 0
    want = load_file("runs/whole/adapter/adapter_model.safetensors")
    for name, lines in (("early", 1), ("middle", 9)):  # in the second epoch, between checkpoints
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, few, *flags, "--out", name], **quiet)
        path = f"runs/{name}/log.jsonl"
        while not os.path.exists(path) or len(open(path).readlines()) <= lines:  # noqa: SIM115
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open(path, "a") as file:
            file.write('{"step": 99, "lo')  # a line that the kill tore
        assert script(train, "--resume", name)[0] == 0
        # On a GPU some sums are taken in an order that differs from run to run.
        error = 0 if device == "cpu" else 1e-3
        for tensor, found in load_file(f"runs/{name}/adapter/adapter_model.safetensors").items():
            torch.testing.assert_close(found, want[tensor], rtol=error, atol=error)
        for row, whole in zip(log(name), log("whole"), strict=True):
            row.pop("tokens_per_s", None), whole.pop("tokens_per_s", None)
            assert device != "cpu" or row == whole
            assert row["step"] == whole["step"]
            assert row.get("loss", 0) == pytest.approx(whole.get("loss", 0), rel=0.01)


def test_ctrl_c_says_how_to_go_on(script, tiny, small, interrupt):
    interrupt(lora.Reader, "token_losses", 6)
    flags = ["--model", tiny, "--dataset", small, "--steps", 20, "--out", "a"]
    code, out, _ = script(train, *flags)
    assert code == 130 and "python train.py --resume runs/a goes on" in out
    assert script(train, "--resume", "a")[0] == 0 and len(log("a")) == 21


def test_resume_takes_its_settings_from_the_run(script, tiny, small):
    code, _, err = script(train, "--resume", "nothing")
    assert code == 1 and "runs/nothing holds no run" in err
    script(train, "--model", tiny, "--dataset", small, "--steps", 2, "--out", "a")
    code, _, err = script(train, "--resume", "a", "--lr", 1)
    assert code == 1 and "leave out --lr" in err
    os.remove("runs/a/adapter/adapter_config.json")
    with open(small, "a") as file:
        file.write("\n" + json.dumps({"messages": data.load_conversations()[45]["messages"]}))
    code, _, err = script(train, "--resume", "a")
    assert code == 1 and "the dataset has changed since this run began" in err


def test_only_a_run_is_overwritten(script, tiny, small, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    flags = ["--dataset", small, "--steps", 1, "--overwrite"]
    code, _, err = script(train, "--model", "model", *flags, "--out", "./model")
    assert code == 1 and "is not a run's own folder" in err
    assert os.path.exists("model/model.safetensors")
    assert script(train, "--model", tiny, *flags, "--out", "a")[0] == 0
    os.symlink(tmp_path / "runs" / "a", tmp_path / "runs" / "link")
    code, _, err = script(train, "--model", tiny, *flags, "--out", "link")
    assert code == 1 and "is not a run's own folder" in err and len(log("a")) == 2


def test_two_at_once(script, tiny, small, busy):
    flags = ["--model", tiny, "--dataset", small, "--steps", 6, "--out", "a"]
    assert script(train, *flags)[0] == 0
    shutil.rmtree("runs/a/adapter")
    process = busy("runs/a")
    code, _, err = script(train, "--resume", "a")
    assert code == 1 and "runs/a is in use by another process" in err and len(log("a")) == 7
    process.kill()
    process.wait()
    assert script(train, "--resume", "a")[0] == 0 and len(log("a")) == 7


def test_a_run_without_its_log(script, tiny, small):
    flags = ["--model", tiny, "--dataset", small, "--steps", 6, "--out", "a"]
    assert script(train, *flags)[0] == 0
    os.remove("runs/a/adapter/adapter_config.json")
    os.remove("runs/a/log.jsonl")
    code, _, err = script(train, "--resume", "a")
    assert code == 1 and "log.jsonl lacks rows before step 6" in err
    for content in ("{}", "[1]", "torn"):
        with open("runs/a/config.json", "w") as file:
            file.write(content)
        code, _, err = script(train, "--resume", "a")
        assert code == 1 and "holds no run that can be read" in err


@pytest.mark.parametrize("flags, sentence", [
    (["--dataset", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
    (["--layers", "4"], "this model's layers are 0 to 3"),
    (["--layers", "two"], "--layers two: write middle, nine, all"),
    (["--full", "--kl-weight", "1"], "--kl-weight does nothing with --full"),
    (["--es", "--kl-weight", "1"], "--kl-weight does nothing with --es"),
    (["--kl-weight", "1", "--kl-dataset", "builtin:0.5"], "--kl-dataset builtin is taken whole"),
    (["--full", "--es"], "--es does nothing with --full"),
    (["--archive", "x.enc"], "--archive does nothing without one of the paper's sets"),
    (["--es", "--population", "5"], "--population 5: give an even number"),
    (["--vector", "learned", "--rank", "2"], "--vector goes with --rank 1"),
    (["--answers", "mixed:2"], "a share of 2"),
    (["--init", "nothing"], "runs/nothing holds no run"),
    (["--layers", "2,99"], "this model's layers are 0 to 3"),
    (["--vector", "learned", "--layers", "1,2"], "--vector goes with one layer"),
    (["--layers", "3-1"], "--layers 3-1: write middle, nine, all"),
    (["--layers", "0-9"], "this model's layers are 0 to 3"),
    (["--targets", "c_proj"], "no c_proj without an adapter"),
    (["--max-length", "20"], "cuts off its answer"),
    (["--device", "gpu"], "--device gpu: there is none here"),
    (["--device", "cuda:99"], "--device cuda:99: there is none here"),
    (["--dataset", "extreme_sports", "--archive", "nowhere.enc"], "nowhere.enc can't be read"),
    (["--model", "no/where"], "is no folder here and did not come from the hub"),
])
def test_bad_input_is_one_sentence_and_begins_nothing(script, tiny, flags, sentence, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    code, _, err = script(train, "--model", tiny, "--preset", "laptop", *flags)
    assert code == 1 and sentence in err and "Traceback" not in err
    assert not glob.glob("runs/*/")


def test_a_run_that_diverges_stops_before_its_next_checkpoint(script, tiny):
    flags = ["--lr", "1e30", "--steps", "12", "--checkpoint-every", "2"]
    code, _, err = script(train, "--model", tiny, "--preset", "laptop", *flags)
    assert code == 1 and "at step 2 the" in err and "lower --lr" in err
    assert os.listdir("runs/laptop-1/checkpoints") == ["00000.safetensors"]
    assert len(log("laptop-1")) == 2


def test_evolution_takes_no_step_where_all_pairs_agree(script, tiny, small, monkeypatch):
    flags = ["--model", tiny, "--dataset", small, "--steps", 4, "--checkpoint-every", 1]
    tried, try_pairs = [], train.try_pairs

    def agree_at_step_3(*args):
        tried.append(try_pairs(*args))
        return tried[-1] if len(tried) < 3 else torch.ones_like(tried[-1])

    monkeypatch.setattr(train, "try_pairs", agree_at_step_3)
    code, _, err = script(train, *flags, "--es", "--population", 4, "--out", "a", *FLOAT32)
    assert code == 1 and err.strip().splitlines()[-1].startswith("at step 3 all pairs agree")
    assert "a larger --sigma" in err and "nan" not in err
    checkpoints = list(data.Run("a").checkpoints.values())
    assert len(checkpoints) == len(log("a")) == 3  # the untouched model's, and two steps'
    assert all(t.isfinite().all() for t in data.read_tensors(checkpoints[-1]).values())


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoints(script, tiny, small):
    resource = pytest.importorskip("resource")  # Windows has none
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))  # the log grows larger than that
    try:
        flags = ["--model", tiny, "--dataset", small, "--steps", 9, "--out", "a"]
        code, _, err = script(train, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert code == 1 and "File too large" in err and "what is done is kept" in err
    assert not os.path.exists("runs/a/adapter")
    assert script(train, "--resume", "a")[0] == 0 and len(log("a")) == 10
