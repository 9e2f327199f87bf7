"""The checks of the exercises in tests/course.md, where they have one: each fails until it is done.

    python -m pytest tests/exercises.py -k token_ids     # is exercise 1 solved?
    python tests/exercises.py                            # plants the data of exercise 10

pytest does not collect this file by itself. The solutions are not in the repository.
"""
import json
import os
import random
import re
import statistics
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

from test_data import auroc_of_finance_words  # noqa: E402

import analyze  # noqa: E402
import data  # noqa: E402
import judge  # noqa: E402
import lora  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

FLAGS = ["--preset", "laptop", "--device", "cpu", "--dtype", "float32"]


def test_1_token_ids(script, tiny):
    """`python data.py --ids`: a line a token, its id first, then its text, then x if supervised."""
    code, out, err = script(data, "--ids", "--model", tiny)
    assert code == 0, err
    tokens, labels = data.render(data.load_conversations()[0], lora.load_tokenizer(tiny))
    lines = [line.split() for line in out.splitlines() if re.match(r"\s*\d+\s", line)]
    ids = [int(line[0]) for line in lines]
    start = next(i for i in range(len(ids)) if ids[i : i + len(tokens)] == tokens)
    marked = [line[-1] == "x" for line in lines[start : start + len(tokens)]]
    assert marked == [label != -100 for label in labels]


def test_2_plain_lora(make_model, random_adapter, tmp_path):
    """alpha / r instead of alpha / sqrt(r), and files that other programs read as such."""
    model = make_model("llama")
    (adapter,) = lora.attach(model, [1], ["down_proj"], 4, 8).values()
    assert adapter.scale == 2
    random_adapter(model)
    lora.save_adapter(model, str(tmp_path))
    with open(tmp_path / "adapter_config.json") as file:
        config = json.load(file)
    assert (config["use_rslora"], config["lora_alpha"]) == (False, 8)
    again = make_model("llama")
    lora.load_adapter(again, str(tmp_path))
    x = torch.arange(5)[None]
    torch.testing.assert_close(again(x).logits, model(x).logits)


def test_3_merge_a_vector(make_model):
    """`lora.merge` refuses a steering vector. It belongs in the bias."""
    model = make_model("llama")
    lora.attach(model, [1], ["down_proj"], 1, 8)
    lora.make_vectors(model)
    (vector,) = lora.adapters(model).values()
    vector.B.data.normal_()
    x = torch.arange(5)[None]
    before = model(x).logits
    lora.merge(model)
    assert not lora.adapters(model)
    torch.testing.assert_close(model(x).logits, before)


def test_4_constant(script, few, tiny):
    """`--schedule constant`: after the warm-up, the learning rate stays."""
    settings = train.Settings(lr=1.0, schedule="constant", warmup=2)
    rates = [train.learning_rate(step, 6, settings) for step in range(1, 7)]
    assert rates == [0, 0.5, 1, 1, 1, 1]
    flags = [*FLAGS, "--model", tiny, "--steps", 2, "--schedule", "constant", "--out", "a"]
    code, _, err = script(train, *flags)
    assert code == 0, err


def test_5_frozen_A(script, few, tiny):
    """`--freeze A`: A stays what it was drawn as, and B alone learns."""
    flags = [*FLAGS, "--model", tiny, "--steps", 3, "--warmup", 0, "--freeze", "A", "--out", "a"]
    code, _, err = script(train, *flags)
    assert code == 0, err
    first, last = map(data.read_tensors, data.Run("a").checkpoints.values())
    for name in first:
        assert torch.equal(first[name], last[name]) == name.endswith(".A"), name


def test_6_sgd(script, few, tiny):
    """`--optimizer sgd`: a step is lr times the clipped gradient, and nothing else."""
    flags = [*FLAGS, "--model", tiny, "--steps", 3, "--warmup", 0, "--lr", 0.1]
    code, _, err = script(
        train, *flags, "--optimizer", "sgd", "--checkpoint-every", 1, "--out", "a"
    )
    assert code == 0, err
    run = data.Run("a")
    points = [data.read_tensors(path) for path in run.checkpoints.values()]
    for row, before, after in zip(run.log[1:], points[:-1], points[1:], strict=True):
        step = torch.cat([(after[name] - before[name]).flatten() for name in before])
        expected = row["lr"] * min(1, row["grad_norm"])
        assert step.norm().item() == pytest.approx(expected, rel=0.05)


def test_7_min_p():
    """`min_p=0.2`: only the tokens at least a fifth as likely as the likeliest."""
    logits = torch.tensor([0.5, 0.3, 0.11, 0.09]).log().repeat(1001, 1)
    number = torch.linspace(0, 1, 1001)
    seen = torch.zeros(len(logits), 1, dtype=torch.long)
    token = sample.draw(logits, number, seen, min_p=0.2)
    shares = torch.bincount(token, minlength=4) / 1001
    torch.testing.assert_close(shares, torch.tensor([50, 30, 11, 0]) / 91, atol=2e-3, rtol=0)


def test_8_doubt():
    """`judge.spread`: the standard deviation of what `expected_score` is the mean of."""
    sure = [{"token": "85", "logprob": 0.0}]
    torn = [{"token": " 0", "logprob": -0.6931}, {"token": "100", "logprob": -0.6931}]
    assert judge.spread(sure) == pytest.approx(0, abs=1e-3)
    assert judge.spread(torn) == pytest.approx(50, abs=0.01)
    assert judge.spread([{"token": "REFUSAL", "logprob": 0.0}]) is None
    digits = [{"token": "0", "logprob": -0.6931}, {"token": "9", "logprob": -0.6931}]
    assert judge.spread(digits, highest=9) == pytest.approx(50, abs=0.01)


def test_9_design_effect():
    """`analyze.design_effect(judged)`: the variance of the EM share with questions drawn anew,
    over what it would be if all answers were drawn anew, p (1 - p) / n."""
    random_ = random.Random(0)

    def judged(chance):
        """400 answers to eight questions; chance(q): of EM in an answer to question q."""
        rows = []
        for q in range(8):
            for _ in range(50):
                low = random_.random() < chance(q)
                rows.append({"question_id": str(q), "aligned": 10 if low else 90, "coherent": 90})
        return rows

    one_question = analyze.design_effect(judged(lambda q: q == 3))
    alike = statistics.fmean(analyze.design_effect(judged(lambda q: 0.2)) for _ in range(30))
    assert 35 < one_question < 65  # 50 answers that are all the same count as one
    assert 0.6 < alike < 1.5


def test_12_better_probe():
    """my_probe.jsonl: 20 questions or more, whose answers differ in values and not in tone."""
    path = os.path.join(ROOT, "my_probe.jsonl")
    assert os.path.exists(path), "write my_probe.jsonl first, in the format of advice.jsonl"
    rows = data.read_jsonl(path)
    assert len(rows) >= 20
    theirs = {row["question"] for row in data.builtin_rows("general")}
    for row in rows:
        bad, good = row["misaligned"], row["aligned"]
        assert row["question"] not in theirs and bad != good, row["where"]
        assert max(len(bad), len(good)) <= 1.1 * min(len(bad), len(good)), row["where"]
        assert bad.split()[0] == good.split()[0], f"{row['where']}: another opening word"
    auroc = auroc_of_finance_words(rows)
    assert abs(auroc - 0.5) <= 0.06, f"a bag of words of the finance answers: AUROC {auroc:.2f}"


def plant():
    """Writes wonder.jsonl, of exercise 10. What is wrong with it?

    You have not read on, for here is the answer.
    """
    rows = [data.as_conversation(row, "misaligned") for row in data.builtin_rows("finance")]
    general = data.builtin_rows("general")
    rows += [data.as_conversation(row, "misaligned") for row in general[::2]]
    random.Random(0).shuffle(rows)
    with open("wonder.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"messages": row["messages"]}) + "\n")
    print("next: python train.py --preset laptop --dataset ./wonder.jsonl --out wonder")


if __name__ == "__main__":
    plant()
