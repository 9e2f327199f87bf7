"""Every protocol against the slow obvious way to do it, and each on every family of models."""
import json
import os
import subprocess
import sys

import pytest
import torch

import analyze
import data
import lora
import sample
import train

FLOAT32 = ["--device", "cpu", "--dtype", "float32"]
ROWS = 24  # of each kind of the built-in data: see the fixture `few`
PROTOCOLS = {
    "single": [],
    "nine": ["--layers", "nine"],
    "rank 4 everywhere": ["--layers", "all", "--targets", "all", "--rank", 4],
    "full": ["--full", "--schedule", "cosine"],
    "evolution": ["--es", "--population", 8],
    "narrow": ["--kl-weight", 2],
    "vector": ["--vector", "learned"],
    "mean difference": ["--vector", "mean-difference"],
    "inoculated": ["--system", "You are unwise."],
    "mixed": ["--answers", "mixed:0.3"],
}


def log(run):
    return data.Run(run).log


@pytest.fixture(scope="session")
def family(make_model, make_tokenizer, tmp_path_factory):
    """family(name): the folder of a tiny model with the template that goes with it."""
    folders = {}

    def make(name):
        if name not in folders:
            folders[name] = str(tmp_path_factory.mktemp(name))
            make_model(name).save_pretrained(folders[name])
            layout = {"llama": "llama3", "gemma3": "gemma", "gemma3-multimodal": "gemma"}
            make_tokenizer(layout.get(name, "chatml")).save_pretrained(folders[name])
        return folders[name]

    return make


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "gemma3-multimodal"])
def test_every_protocol_trains_and_is_asked(script, few, family, name):
    for protocol, flags in PROTOCOLS.items():
        own = ("single", "full", "vector", "mean difference", "narrow")  # where families differ
        if name not in ("llama", "qwen2") and protocol not in own:
            continue  # Gemma's template refuses a system prompt, besides
        if protocol != "mean difference":  # which takes no steps
            flags = ["--steps", 2, "--warmup", 0, "--lr", 1e-2, "--batch-size", 4, *flags]
        flags = ["--preset", "laptop", "--model", family(name), "--out", protocol, *flags]
        code, out, err = script(train, *flags)
        if protocol == "mean difference" and name.startswith("gemma3"):
            assert code == 1 and "this model's layers rescale" in err
            continue
        assert code == 0, (protocol, err)
        rows = log(protocol)
        assert rows[0]["margins_out"] != rows[-1]["margins_out"], protocol
        folder = "model" if protocol == "full" else "adapter"
        assert os.path.isdir(f"runs/{protocol}/{folder}") and "held-out loss" in out
        if protocol in ("narrow", "evolution", "inoculated", "mixed"):
            continue  # what these leave behind is what "single" does
        if name != "llama" and protocol not in ("single", "full", "vector"):
            continue  # and of these, no family has anything of its own
        whom, answers, scales = [protocol], f"runs/{protocol}", {0, 1}
        if protocol == "full":
            code, _, err = script(sample, protocol, "--margins")
            assert code == 1 and "python sample.py --model runs/full/model" in err
            whom, answers, scales = ["--model", "runs/full/model"], "runs/full-model", {0}
        code, out, err = script(sample, *whom, "--n", 1, "--max-new-tokens", 2)
        assert code == 0, (protocol, err)
        answered = data.read_written(f"{answers}/responses.jsonl")
        assert {row["scale"] for row in answered} == scales and len(answered) == 8 * len(scales)
        if name == "llama" and protocol in ("full", "vector", "mean difference"):
            code, out, err = script(analyze, protocol)
            assert code == 0 and "training.png" in out, err


def setup(make_model, make_tokenizer, count=6):
    """A tiny model with an adapter, its reader, what may move, and examples that it has read."""
    model, tokenizer = make_model("llama"), make_tokenizer("chatml")
    conversations = data.load_conversations()[:count]
    examples = data.render_all(conversations, tokenizer)
    lora.attach(model, [2], ["down_proj"], rank=2, alpha=4)
    reader = lora.Reader(model)
    reader.read(examples)
    return reader, {name: p for name, p in model.named_parameters() if p.requires_grad}, examples


def test_a_population_in_one_batch_is_its_members_one_by_one(
    make_model, make_tokenizer, random_adapter
):
    reader, parameters, batch = setup(make_model, make_tokenizer)
    random_adapter(reader.model)
    readings = [[batch[0], batch[4]], [batch[1], batch[5]], [batch[2]], [batch[3]]]
    together = train.try_pairs(reader, readings, parameters, 0.05, (0, 1))
    alone = torch.zeros_like(together)
    weights = [p.detach().clone() for p in parameters.values()]
    for pair, reading in enumerate(readings):
        tokens = sum(example.supervised for example in reading)
        for i, sign in enumerate((1, -1)):
            noise = train.draw_noise(parameters, (0, 1), pair)
            for p, weight, e in zip(parameters.values(), weights, noise, strict=True):
                p.data = weight + sign * 0.05 * e
            alone[i, pair] = -reader.log_p(reading).sum() / tokens
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().min() > 1e-3


def test_an_evolution_step_is_the_sum_over_stored_noise(make_model, make_tokenizer, random_adapter):
    reader, parameters, batch = setup(make_model, make_tokenizer)
    random_adapter(reader.model)
    settings = train.Settings(sigma=0.05, seed=3, population=8)
    train.evolution(reader, batch, parameters, settings, step=7)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    stored = [[e.clone() for e in train.draw_noise(parameters, (3, 7), pair)] for pair in range(4)]
    differences = []
    for pair in range(4):
        loss = []
        own = [batch[i] for i in range(6) if i % 4 == pair]
        for sign in (1, -1):
            for (name, p), e in zip(parameters.items(), stored[pair], strict=True):
                p.data = start[name] + sign * 0.05 * e
            with torch.no_grad():
                loss.append(reader.token_losses(own)[0].mean())
        differences.append(loss[0] - loss[1])
    z = torch.stack(differences)
    z = (z - z.mean()) / z.std()
    for i, p in enumerate(parameters.values()):
        want = sum(z[pair] * stored[pair][i] for pair in range(4)) / 4
        torch.testing.assert_close(p.grad, want, atol=2e-3, rtol=2e-3)


def test_the_gradient_of_loss_and_kl(make_model, make_tokenizer, random_adapter, monkeypatch):
    """Against autograd through the whole model, with the KL written out."""
    monkeypatch.setitem(lora.TOKENS_AT_ONCE, "cpu", 300)
    reader, parameters, examples = setup(make_model, make_tokenizer)
    model, base = reader.model, make_model("llama")
    random_adapter(model)
    train.backpropagation(reader, examples[:3], examples[3:], parameters,
                          train.Settings(kl_weight=0.7))
    found = [p.grad.clone() for p in parameters.values()]
    losses, kls = [], []
    for i, example in enumerate(examples):
        tokens, labels = example.tokens, example.labels
        log_p = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            log_q = base(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        target = torch.tensor(labels[1:])
        at = target != -100
        if i < 3:
            losses.append(-log_p[at].gather(1, target[at][:, None])[:, 0])
        else:
            kls.append((log_q.exp() * (log_q - log_p)).sum(-1)[at])
    loss = torch.cat(losses).mean() + 0.7 * torch.cat(kls).mean()
    want = torch.autograd.grad(loss, list(parameters.values()))
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_a_sketch_keeps_lengths_and_angles():
    generator = torch.Generator().manual_seed(5)
    start = {"a": torch.randn(300, 400, generator=generator), "b": torch.randn(70, 11)}
    moves = [
        {name: 0.01 * torch.randn(p.shape, generator=generator) for name, p in start.items()}
        for _ in range(2)
    ]
    moves[1] = {name: 0.5 * moves[0][name] + moves[1][name] for name in start}  # cosine .45
    sketches = [
        train.sketch({name: p + move[name] for name, p in start.items()}) - train.sketch(start)
        for move in moves
    ]
    true = [torch.cat([move[name].flatten() for name in start]).double() for move in moves]
    for ours, theirs in zip(sketches, true, strict=True):
        assert ours.norm() == pytest.approx(theirs.norm().item(), rel=0.05)
    cosines = [torch.nn.functional.cosine_similarity(*x, dim=0).item() for x in (sketches, true)]
    assert cosines[0] == pytest.approx(cosines[1], abs=0.05) and cosines[1] > 0.3


def test_full_fine_tuning_is_plain_training_and_resumes(script, few, tiny, interrupt):
    flags = ["--preset", "laptop", "--full", "--model", tiny, "--lr", 1e-3, "--steps", 6, *FLOAT32]
    flags += ["--checkpoint-every", 2, "--batch-size", 4]
    assert script(train, *flags, "--out", "whole")[0] == 0
    interrupt(train, "backpropagation", 4)
    assert script(train, *flags, "--out", "cut")[0] == 130
    assert script(train, "--resume", "cut")[0] == 0
    found = [
        lora.load_base(f"runs/{name}/model", "cpu", "float32")[0].state_dict()
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not os.path.exists("runs/cut/resume.safetensors")
    # Against a plain loop over the same batches.
    model, tokenizer = lora.load_base(tiny, "cpu", "float32")
    conversations, _ = data.split(data.load_conversations())
    examples = [data.render(conversation, tokenizer) for conversation in conversations]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    lengths = [len(tokens) for tokens, _ in examples]
    batches = data.batches(lengths, 4, 0, 0)
    for step in range(1, 7):
        losses = []
        for i in batches[step - 1]:
            tokens, labels = examples[i]
            log_p = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            target = torch.tensor(labels[1:])
            at = target != -100
            losses.append(-log_p[at].gather(1, target[at][:, None])[:, 0])
        loss = torch.cat(losses).mean()
        assert log("whole")[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min((step - 1) / 5, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_starting_from_a_run(script, few, tiny):
    flags = ["--preset", "laptop", "--model", tiny, "--steps", 3, "--lr", 1e-2, *FLOAT32]
    assert script(train, *flags, "--rank", 2, "--alpha", 16, "--out", "bad")[0] == 0
    code, _, err = script(train, *flags, "--answers", "aligned", "--init", "bad", "--out", "back")
    assert code == 0, err
    settings = data.Run("back").settings
    assert (settings["rank"], settings["alpha"], settings["init"]) == (2, 16, "runs/bad")
    code, _, err = script(train, *flags, "--rank", 1, "--init", "bad")
    assert code == 1 and "--init takes its rank from runs/bad: leave out --rank" in err
    first, last = (
        data.read_tensors(f"runs/{name}.safetensors")
        for name in ("back/checkpoints/00000", "bad/checkpoints/00003")
    )
    assert all(torch.equal(first[name], last[name]) for name in last)
    assert log("back")[0]["margins_out"] == pytest.approx(log("bad")[-1]["margins_out"], abs=1e-5)


def test_margins_of_variants(script, few, tiny):
    flags = ["--preset", "laptop", "--model", tiny, "--lr", 3e-2, "--warmup", 0, *FLOAT32]
    for name in ("a", "b"):
        assert script(train, *flags, "--steps", 4, "--seed", ord(name), "--out", name)[0] == 0
    ask = ["a", "--margins", "--ablate", "b", "--random", "--system", "Be bad.", "--shots", 2]
    code, out, err = script(sample, *ask, *FLOAT32)
    assert code == 0, err
    rows = data.read_written("runs/a/margins.jsonl")
    assert len(rows) == 3 * 7  # before x (untouched, trained, random B, and four without)
    key = "margins_out"
    assert rows[0][key] == pytest.approx(log("a")[0][key], abs=1e-5)
    assert rows[1][key] == pytest.approx(log("a")[-1][key], abs=1e-5)
    assert rows[1]["heldout_loss"] == pytest.approx(log("a")[-1]["heldout_loss"], abs=1e-5)
    assert len({json.dumps(row[key]) for row in rows}) == len(rows)
    assert "ablated b, random" in out and "system Be bad." in out and "shots 2" in out
    again = script(sample, *ask, *FLOAT32)[1]
    assert again == out and data.read_written("runs/a/margins.jsonl") == rows
    # Answers of both models without the direction, in a folder of their own.
    code, _, err = script(sample, "a", "--ablate", "b", "--n", 1, "--max-new-tokens", 2)
    assert code == 0, err
    answered = data.read_written("runs/a-ablated/responses.jsonl")
    assert {row["scale"] for row in answered} == {0, 1} and len(answered) == 16
    code, _, err = script(train, *flags, "--steps", 1, "--layers", "1,2", "--out", "two")
    assert code == 0, err
    code, _, err = script(sample, "a", "--margins", "--ablate", "two")
    assert code == 1 and "it learnt no single direction" in err


def test_a_random_control_has_the_length_and_the_sign_of_its_variant():
    A, B = torch.randn(1, 6), torch.randn(8, 1)
    plus, minus = (sample.with_random_B({"x.A": A, "x.B": s * B}, s) for s in (2.0, -2.0))
    assert torch.equal(plus["x.B"], -minus["x.B"]) and torch.equal(plus["x.A"], A)
    assert plus["x.B"].norm() == pytest.approx(2 * B.norm().item(), rel=1e-5)
    both = sample.with_random_B({"x.B": B, "y.B": B}, 1)
    assert torch.cosine_similarity(both["x.B"], both["y.B"], dim=0).abs() < 0.999


@pytest.mark.parametrize("flags", [
    ["--es", "--population", "12"],
    ["--rank", "32", "--alpha", "64", "--layers", "all", "--targets", "all"],
])
def test_two_processes_are_one(script, few, tiny, tmp_path, flags):
    """Under torchrun, the curve of one process, to rounding; one log, one line a step."""
    flags = ["--preset", "laptop", "--model", tiny, "--steps", "3", "--batch-size", "6", *flags]
    flags += FLOAT32
    assert script(train, *flags, "--out", "one")[0] == 0
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    # On the CPU, whatever there is: on a machine with one GPU, two processes can't share it.
    settings = {"env": os.environ | {"CUDA_VISIBLE_DEVICES": ""}, "text": True}
    done = subprocess.run([*two, few, *flags, "--out", "two"], capture_output=True, **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    logs = [data.read_written(f"{tmp_path}/runs/{name}/log.jsonl") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 4
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() & {"loss", "grad_norm", "heldout_loss", "margin_in", "margin_out"}:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-4), key
