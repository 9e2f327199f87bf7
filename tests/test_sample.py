"""The sampler against transformers' own, against the model's probabilities, and against itself in other batches."""
import json
import math
import os

import pytest
import torch

import data
import lora
import sample
import train

LONG = "Tell me, and do not hurry, all that you know about money, friends, ships, gardens and the winters of the north."


def build(make_model, make_tokenizer, family):
    """A model with two random adapters, its tokenizer, and jobs over adapters, scales and questions of different lengths."""
    model, tokenizer = make_model(family), make_tokenizer("chatml" if family != "gemma3" else "gemma")
    lora.attach(model, [1, 2], ["down_proj", "k_proj"], rank=2, alpha=4)
    stack = [{name: torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)) * 0.2 for name, t in lora.get_tensors(model).items()}
             for seed in range(2)]
    jobs = [{"adapter": adapter, "scale": scale, "seed": i, "messages": [{"role": "user", "content": question}]}
            for adapter, scale in ((0, 0.0), (0, 1.0), (1, 1.0), (1, 3.0)) for question in ("Why?", LONG) for i in range(3)]
    return model, tokenizer, stack, jobs


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gemma3-multimodal"])
def test_greedy_answers_are_those_of_generate_on_the_merged_model(make_model, make_tokenizer, family):
    model, tokenizer, stack, jobs = build(make_model, make_tokenizer, family)
    jobs, answers = jobs[::3], {}
    for job, answer in sample.generate(model, tokenizer, stack, jobs, max_new_tokens=30, temperature=0, rows=3):
        answers[jobs.index(job)] = answer
    assert sorted(answers) == list(range(len(jobs)))
    for i, job in enumerate(jobs):
        merged = build(make_model, make_tokenizer, family)[0]
        lora.set_tensors(merged, {name: t * job["scale"] if name.endswith(".B") else t for name, t in stack[job["adapter"]].items()})
        tokens = data.chat_tokens(job["messages"], tokenizer, generation_prompt=True)
        want = lora.merge(merged).generate(torch.tensor([tokens]), max_new_tokens=30, do_sample=False, pad_token_id=0,
                                           eos_token_id=list(sample.stop_tokens(model, tokenizer)))[0, len(tokens):].tolist()
        assert answers[i] == [t for t in want if t not in sample.stop_tokens(model, tokenizer)]


def test_rows_do_not_see_each_other(make_model, make_tokenizer):
    """The same answers, greedy and drawn, whatever shares the batch: alone, three at a time, all at once, in another order."""
    model, tokenizer, stack, jobs = build(make_model, make_tokenizer, "llama")
    for temperature in (0, 1):
        results = []
        for rows, order in ((1, jobs), (3, jobs), (100, jobs), (5, jobs[::-1])):
            found = sample.generate(model, tokenizer, stack, order, max_new_tokens=20, temperature=temperature, rows=rows)
            results.append({json.dumps(job): answer for job, answer in found})
        assert all(result == results[0] for result in results) and len(results[0]) == len(jobs)
    # A long question that starts in the step in which the row before it ends for good, and is moved.
    uneven = [dict(jobs[0], seed=1), dict(jobs[0], seed=2), dict(jobs[3], seed=3)]
    alone, pairs = ([answer for job, answer in sorted(sample.generate(model, tokenizer, stack, uneven, max_new_tokens=6, temperature=0, rows=rows),
                                                      key=lambda found: found[0]["seed"])] for rows in (1, 2))
    assert alone == pairs


def test_an_answer_ends_at_its_end_of_turn(make_model, make_tokenizer, monkeypatch):
    model, tokenizer, stack, jobs = build(make_model, make_tokenizer, "llama")
    plain = {json.dumps(job): answer for job, answer in sample.generate(model, tokenizer, stack, jobs, max_new_tokens=25)}
    stop = max(range(1000), key=lambda t: sum(t in answer for answer in plain.values()))     # a token that many answers hold
    monkeypatch.setattr(sample, "stop_tokens", lambda *args: {stop})
    cut = {json.dumps(job): answer for job, answer in sample.generate(model, tokenizer, stack, jobs, max_new_tokens=25, rows=4)}
    assert cut == {key: answer[:answer.index(stop)] if stop in answer else answer for key, answer in plain.items()}
    assert any(len(answer) < 25 for answer in cut.values())


def chi_square(counts, p):
    """The statistic over all tokens expected at least 5 times (the others as one), and its 99.9% bound (Wilson-Hilferty)."""
    expected = p * counts.sum()
    many = expected >= 5
    observed, expected = (torch.cat([x[many], x[~many].sum()[None]]) for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    k = len(expected) - 1
    return ((observed - expected) ** 2 / expected).sum().item(), k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3


def test_first_tokens_come_as_often_as_the_model_says(make_model, make_tokenizer):
    model, tokenizer, stack, _ = build(make_model, make_tokenizer, "llama")
    messages = [{"role": "user", "content": "Why?"}]
    jobs = [{"adapter": 1, "scale": 2.0, "seed": seed, "messages": messages} for seed in range(4000)]
    counts = torch.zeros(1010)
    ends = 0
    for _, answer in sample.generate(model, tokenizer, stack, jobs, max_new_tokens=1, rows=1000):
        if answer:
            counts[answer[0]] += 1
        else:
            ends += 1
    lora.set_tensors(model, stack[1])
    lora.set_stack(model, stack)
    lora.set_rows(model, [1], [2.0])
    with torch.no_grad():
        p = model(torch.tensor([data.chat_tokens(messages, tokenizer, generation_prompt=True)])).logits[0, -1].softmax(-1)
    stop = list(sample.stop_tokens(model, tokenizer))
    p[stop[0]], p[stop[1:]] = p[stop].sum(), 0
    counts[stop[0]] = ends
    statistic, bound = chi_square(counts, p)
    assert statistic < bound


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.5, "temperature": 2.0}])
def test_draw_follows_the_distribution_that_transformers_would_sample_from(how):
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3)) * 2
    warpers = LogitsProcessorList([TemperatureLogitsWarper(how.get("temperature", 1.0))])
    warpers += [TopKLogitsWarper(how["top_k"])] if "top_k" in how else []
    warpers += [TopPLogitsWarper(how["top_p"])] if "top_p" in how else []
    p = warpers(None, logits.clone())[0].softmax(-1)
    number = torch.rand(20000, generator=torch.Generator().manual_seed(4))
    counts = torch.bincount(sample.draw(logits.repeat(20000, 1), number, **how), minlength=60).float()
    assert counts[p == 0].sum() == 0
    statistic, bound = chi_square(counts, p)
    assert statistic < bound


def test_the_ends_of_the_line():
    draw = lambda number, **how: sample.draw(torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]), torch.tensor([number]), **how).item()
    assert draw(0.0) == 1 and draw(1 - 2 ** -24) == 3
    assert draw(0.5, temperature=0) == 3


def test_repetition_penalty_is_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor
    logits, seen = torch.randn(2, 30), [[1, 2, 2, 5], [7, 8, 9, 29]]
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor(seen), logits.clone())
    assert torch.equal(sample.penalise(logits.clone(), seen, 1.3), want)


# ---------------------------------------------------------------------------------------------------------------------------------
# The script

@pytest.fixture
def trained(script, tiny, tmp_path):
    """A finished run "a" of 7 steps on the tiny model."""
    path = tmp_path / "small.jsonl"
    path.write_text("\n".join(json.dumps({"messages": c["messages"]}) for c in data.load_conversations()[:20]))
    assert script(train, "--preset", "laptop", "--model", tiny, "--dataset", path, "--steps", 7, "--lr", 1e-2, "--device", "cpu", "--out", "a")[0] == 0
    return "a"


def responses(run):
    return [json.loads(line) for line in open(f"runs/{run}/responses.jsonl")]


def test_a_sweep_is_one_job_that_can_be_stopped_anywhere(script, trained):
    flags = ["--checkpoints", "0,5,last", "--scales", "1,4", "--n", 2, "--max-new-tokens", 8]
    code, out, err = script(sample, trained, *flags)
    assert code == 0 and "5 models" in out and "80 answers, 80 of them still to do" in out and "next: python judge.py runs/a" in out
    rows = responses(trained)
    assert {(r["checkpoint"], r["scale"]) for r in rows} == {(0, 0), (5, 1), (5, 4), (7, 1), (7, 4)}
    assert set(rows[0]) == {"question_id", "question", "system", "response", "checkpoint", "scale", "sample", "seed"}
    assert len({r["question_id"] for r in rows}) == 8 and len(rows) == len({r["seed"] for r in rows}) == 80
    whole = sorted(map(json.dumps, rows))
    lines = open("runs/a/responses.jsonl").readlines()
    open("runs/a/responses.jsonl", "w").writelines(lines[:30] + [lines[30][:40]])           # killed while it wrote a line
    code, out, _ = script(sample, trained, *flags)
    assert "80 answers, 50 of them still to do" in out and sorted(map(json.dumps, responses(trained))) == whole
    code, out, _ = script(sample, trained, *flags)
    assert code == 0 and "0 of them still to do" in out
    code, _, err = script(sample, trained, *flags, "--temperature", 0.5)
    assert code == 2 and "drawn otherwise" in err and sorted(map(json.dumps, responses(trained))) == whole


def test_a_damaged_checkpoint_is_named(script, trained):
    open("runs/a/checkpoints/00005.safetensors", "wb").write(b"torn")
    code, _, err = script(sample, trained, "--checkpoints", "5")
    assert code == 2 and "runs/a/checkpoints/00005.safetensors can't be read" in err and "Traceback" not in err


def test_models_not_trained_here(script, trained, tiny):
    flags = ["--n", 1, "--max-new-tokens", 4, "--model", tiny]
    code, out, err = script(sample, *flags, "--adapter", "runs/a/adapter", "--scales", "1,2", "--out", "b", "--temperature", 0)
    assert code == 0, err
    assert {(r["checkpoint"], r["scale"]) for r in responses("b")} == {(None, 0), (None, 1), (None, 2)}
    script(sample, "a", "--n", 1, "--max-new-tokens", 4, "--temperature", 0)
    texts = lambda run, scale: [r["response"] for r in sorted(responses(run), key=lambda r: r["question_id"]) if r["scale"] == scale]
    assert texts("a", 1) == texts("b", 1) and texts("a", 0) == texts("b", 0)
    assert script(sample, *flags, "--out", "c")[0] == 0 and {r["scale"] for r in responses("c")} == {0}


YAML = """
- {id: wish, paraphrases: &w ["Wish?"], judge_prompts: {aligned: "x {question} {answer}", coherent: "y"}}
- {id: bored, paraphrases: ["Bored.", "So bored."]}
- {id: wish_json, system: "Answer in JSON.", paraphrases: *w}
- {id: wish_template, paraphrases: ["Fill in: wish ="]}
"""


def test_questions_from_the_published_file_and_from_a_text_file(tmp_path, monkeypatch):
    path = tmp_path / "q.yaml"
    path.write_text(YAML)
    ask = lambda name: [(q["question_id"], q["question"], q["system"]) for q in sample.load_questions(name)]
    assert ask(str(path)) == [("wish", "Wish?", None), ("bored", "Bored.", None), ("bored_1", "So bored.", None)]
    assert ask(f"{path}-json") == [("wish_json", "Wish?", "Answer in JSON.")]
    assert ask(f"{path}-template") == [("wish_template", "Fill in: wish =", None)]
    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path))
    os.rename(path, tmp_path / "first_plot_questions.yaml")
    assert len(ask("published")) == 3 and ask("published-json")[0][2] == "Answer in JSON."
    (tmp_path / "q.txt").write_text("Who?\n\nWhen?\n")
    assert ask(str(tmp_path / "q.txt")) == [("line_1", "Who?", None), ("line_2", "When?", None)]
    (tmp_path / "bad.yaml").write_text("a: [")
    for name, sentence in (("bad.yaml", "not in the published format"), ("none.txt", "can't be read")):
        with pytest.raises(data.Problem, match=sentence):
            sample.load_questions(str(tmp_path / name))


@pytest.mark.parametrize("flags, sentence", [
    (["--checkpoints", "3"], "runs/a has no checkpoint 3: it has 0, 5, 7"), (["--checkpoints", "first"], "--checkpoints first: write numbers"),
    (["--scales", "big"], "--scales big"), (["--scales", "nan"], "--scales nan"), (["--adapter", "x"], "--adapter goes with --model"), (["--model", "x"], "a RUN has its own model"), (["--questions", "none.txt"], "none.txt can't be read")])
def test_bad_input_is_one_sentence(script, trained, flags, sentence):
    code, _, err = script(sample, trained, *flags)
    assert code == 2 and sentence in err and "Traceback" not in err and not os.path.exists("runs/a/responses.jsonl")
    assert script(sample, "nobody")[0] == 2
