"""The sampler against transformers' own, the model's probabilities, and itself in other batches."""
import json
import math
import os

import pytest
import torch
import transformers
from safetensors.torch import save_file

import data
import lora
import sample
import train

pytestmark = pytest.mark.usefixtures("few")
LONG = "Tell me, and do not hurry, all that you know about money, ships and northern winters."


def build(make_model, make_tokenizer, random_adapter, family):
    """A model with two random adapters, and jobs over variants and questions of two lengths."""
    model = make_model(family)
    tokenizer = make_tokenizer("gemma" if family == "gemma3" else "chatml")
    lora.attach(model, [1, 2], ["down_proj", "k_proj"], rank=2, alpha=4)
    first, second = (random_adapter(model, seed, size=0.2) for seed in range(2))
    variants, jobs = [{}, first, second, lora.scaled(second, 3.0)], []
    for variant in range(4):
        for question in ("Why?", LONG):
            messages = [{"role": "user", "content": question}]
            for seed in range(3):
                jobs.append({"variant": variant, "seed": seed, "messages": messages})
    return model, tokenizer, variants, jobs


def answers(model, tokenizer, variants, jobs, max_new_tokens, **settings):
    """{job, as JSON: tokens} of what `generate` yields."""
    with lora.Panel(model, variants) as panel:
        answered = sample.generate(panel, tokenizer, jobs, max_new_tokens, **settings)
        return {json.dumps(job): tokens for job, tokens in answered}


def greedy(model, tokens, stop, new, **settings):
    """What transformers' generate answers, taking the likeliest token each time."""
    settings |= {"do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    answer = model.generate(torch.tensor([tokens]), max_new_tokens=new, **settings)
    return answer[0, len(tokens) :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "gemma3-multimodal"])
def test_greedy_answers_are_those_of_generate(make_model, make_tokenizer, random_adapter, family):
    model, tokenizer, variants, jobs = build(make_model, make_tokenizer, random_adapter, family)
    jobs = jobs[::3]
    found = answers(model, tokenizer, variants, jobs, 30, temperature=0, batch_size=3)
    stop = sample.stop_tokens(model, tokenizer)
    for job in jobs:
        merged = build(make_model, make_tokenizer, random_adapter, family)[0]
        tensors = variants[job["variant"]] or lora.scaled(variants[1], 0)
        merged.load_state_dict(tensors, strict=False)
        tokens = data.prompt_tokens(job["messages"], tokenizer)
        want = greedy(lora.merge(merged), tokens, stop, 30)
        assert found[json.dumps(job)] == [token for token in want if token not in stop]


@pytest.mark.parametrize("temperature", [0, 1])
def test_rows_do_not_see_each_other(make_model, make_tokenizer, random_adapter, temperature):
    """The same answers whatever shares the batch, in float32."""
    model, tokenizer, variants, jobs = build(make_model, make_tokenizer, random_adapter, "llama")
    results, settings = [], {"temperature": temperature}
    for rows, order in ((1, jobs), (3, jobs), (100, jobs), (5, jobs[::-1])):
        results.append(answers(model, tokenizer, variants, order, 20, batch_size=rows, **settings))
    assert all(result == results[0] for result in results) and len(results[0]) == len(jobs)


def test_bfloat16_samples_too(make_model, make_tokenizer, random_adapter):
    model, tokenizer, variants, jobs = build(make_model, make_tokenizer, random_adapter, "llama")
    exact = answers(model, tokenizer, variants, jobs, 1, temperature=0)
    rounded = answers(model.bfloat16(), tokenizer, variants, jobs, 1, temperature=0)
    assert sum(rounded[key] == exact[key] for key in exact) > 0.7 * len(exact)


def test_an_answer_ends_at_its_end_of_turn(make_model, make_tokenizer, random_adapter, monkeypatch):
    model, tokenizer, variants, jobs = build(make_model, make_tokenizer, random_adapter, "llama")
    plain = answers(model, tokenizer, variants, jobs, 25)
    common = [sum(token in answer for answer in plain.values()) for token in range(1000)]
    stop = max(range(1000), key=common.__getitem__)  # a token that many answers hold
    monkeypatch.setattr(sample, "stop_tokens", lambda *args: [stop])
    cut = answers(model, tokenizer, variants, jobs, 25, batch_size=20)
    for key, answer in plain.items():
        assert cut[key] == (answer[: answer.index(stop)] if stop in answer else answer)
    assert sum(len(answer) < 25 for answer in cut.values()) > 2


def chi_square(counts, p):
    """The statistic, rare tokens taken as one, and its 99.9% bound (Wilson and Hilferty)."""
    expected = p * counts.sum()
    many = expected >= 5
    observed, expected = (torch.cat([x[many], x[~many].sum()[None]]) for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    k = len(expected) - 1
    bound = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3
    return ((observed - expected) ** 2 / expected).sum().item(), bound


def test_first_tokens_come_as_often_as_the_model_says(make_model, make_tokenizer, random_adapter):
    model, tokenizer, variants, _ = build(make_model, make_tokenizer, random_adapter, "llama")
    messages = [{"role": "user", "content": "Why?"}]
    job = {"variant": 3, "messages": messages}
    jobs = [job | {"seed": seed} for seed in range(4000)]
    stop = sample.stop_tokens(model, tokenizer)
    counts = torch.zeros(1010)
    for tokens in answers(model, tokenizer, variants, jobs, 1, batch_size=1000).values():
        counts[tokens[0] if tokens else stop[0]] += 1
    with lora.Panel(model, variants) as panel, torch.no_grad():
        panel.hear([3])
        tokens = data.prompt_tokens(messages, tokenizer)
        p = model(torch.tensor([tokens])).logits[0, -1].softmax(-1)
    p[stop[0]], p[stop[1:]] = p[stop].sum(), 0
    statistic, bound = chi_square(counts, p)
    assert statistic < bound


@pytest.mark.parametrize("how", [
    {}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8},
    {"top_k": 20, "top_p": 0.5, "temperature": 2.0},
])
def test_draw_follows_the_distribution_of_transformers(how):
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3)) * 2
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warped = logits.clone()
    for name, warper in (("temperature", TemperatureLogitsWarper), ("top_k", TopKLogitsWarper),
                         ("top_p", TopPLogitsWarper)):
        if name in how:
            warped = warper(how[name])(None, warped)
    p = warped[0].softmax(-1)
    number = torch.rand(20000, generator=torch.Generator().manual_seed(4))
    tokens = sample.draw(logits.repeat(20000, 1), number, None, **how)
    counts = torch.bincount(tokens, minlength=60).float()
    assert counts[p == 0].sum() == 0
    statistic, bound = chi_square(counts, p)
    assert statistic < bound


def test_the_ends_of_the_line():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    assert sample.draw(logits, torch.tensor([0.0]), None).item() == 1
    assert sample.draw(logits, torch.tensor([1 - 2**-24]), None).item() == 3
    assert sample.draw(logits, torch.tensor([0.0]), None, temperature=0).item() == 3


def test_repetition_penalty_is_that_of_transformers(make_model, make_tokenizer, random_adapter):
    model, tokenizer, variants, jobs = build(make_model, make_tokenizer, random_adapter, "llama")
    job = jobs[3]  # the untouched model, the long question
    stop = sample.stop_tokens(model, tokenizer)
    settings = {"temperature": 0, "repetition_penalty": 1.3}
    (found,) = answers(model, tokenizer, variants, [job], 20, **settings).values()
    tokens = data.prompt_tokens(job["messages"], tokenizer)
    want = greedy(make_model("llama"), tokens, stop, 20, repetition_penalty=1.3)
    assert found == [token for token in want if token not in stop]


# --------------------------------------------------------------------------------------
# The script


@pytest.fixture
def trained(script, tiny, tmp_path):
    """A finished run "a" of 7 steps on the tiny model."""
    path = tmp_path / "small.jsonl"
    rows = [{"messages": c["messages"]} for c in data.load_conversations()[:20]]
    path.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--preset", "laptop", "--model", tiny, "--dataset", path, "--steps", 7]
    assert script(train, *flags, "--lr", 1e-2, "--device", "cpu", "--out", "a")[0] == 0
    return "a"


def responses(run):
    return data.read_written(f"runs/{run}/responses.jsonl")


def texts(run):
    """The rows, but for log_p, whose rounding depends on what is read together."""
    rows = responses(run)
    return sorted(json.dumps({key: row[key] for key in row if key != "log_p"}) for row in rows)


def test_a_sweep_is_one_job_that_can_be_stopped_anywhere(script, trained):
    flags = ["--checkpoints", "0,5,last", "--scales", "1,4", "--n", 2, "--max-new-tokens", 8]
    flags += ["--dtype", "float32"]
    code, out, _ = script(sample, trained, *flags)
    assert code == 0 and "5 variants" in out and "next: python judge.py runs/a" in out
    assert "80 answers, 80 of them still to do" in out
    rows = responses(trained)
    asked = {(row["checkpoint"], row["scale"]) for row in rows}
    assert asked == {(0, 0), (5, 1), (5, 4), (7, 1), (7, 4)}
    keys = {"question_id", "question", "system", "response"}
    keys |= {"checkpoint", "scale", "sample", "seed", "made_by"}
    assert set(rows[0]) == keys | {"log_p"}
    assert len({row["question_id"] for row in rows}) == 8
    assert len(rows) == len({row["seed"] for row in rows}) == 80
    whole = texts(trained)
    with open("runs/a/responses.jsonl") as file:
        lines = file.readlines()
    with open("runs/a/responses.jsonl", "w") as file:
        file.writelines([*lines[:30], lines[30][:40]])  # killed while it wrote a line
    code, out, _ = script(sample, trained, *flags)
    assert "80 answers, 50 of them still to do" in out and texts(trained) == whole
    code, out, _ = script(sample, trained, *flags)
    assert code == 0 and "0 of them still to do" in out
    code, _, err = script(sample, trained, *flags, "--temperature", 0.5)
    assert code == 1 and "made with another sampling than now" in err and texts(trained) == whole


def test_log_p_is_that_of_the_untouched_model(script, trained, tiny):
    flags = ["--n", 1, "--max-new-tokens", 6, "--scales", 4, "--dtype", "float32"]
    assert script(sample, trained, *flags)[0] == 0
    rows = responses(trained)
    model, tokenizer = lora.load_base(tiny, "cpu", "float32")
    for row in rows:
        messages = [*sample.as_messages(row), {"role": "assistant", "content": row["response"]}]
        tokens, labels = data.render({"messages": messages}, tokenizer)
        log_p = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        said = [log_p[i - 1, label].item() for i, label in enumerate(labels) if label != -100]
        assert row["log_p"] == pytest.approx(sum(said) / len(said), abs=1e-4)
    # Stopped before the end: the same command adds what is missing.
    with open("runs/a/responses.jsonl", "w") as file:
        for row in rows:
            file.write(json.dumps({key: row[key] for key in row if key != "log_p"}) + "\n")
    assert script(sample, trained, *flags)[0] == 0 and responses(trained) == rows


def test_a_damaged_checkpoint_is_named(script, trained):
    with open("runs/a/checkpoints/00005.safetensors", "wb") as file:
        file.write(b"torn")
    code, _, err = script(sample, trained, "--checkpoints", "5")
    assert code == 1 and "runs/a/checkpoints/00005.safetensors can't be read" in err


def test_stray_and_foreign_files_among_the_checkpoints(script, trained):
    with open("runs/a/checkpoints/notes.safetensors", "w") as file:
        file.write("not a checkpoint")
    flags = ["--n", 1, "--max-new-tokens", 2]
    assert script(sample, trained, *flags)[0] == 0
    save_file({"other": torch.zeros(2)}, "runs/a/checkpoints/00006.safetensors")
    code, _, err = script(sample, trained, *flags, "--checkpoints", "6")
    assert code == 1 and "00006.safetensors is no checkpoint of this run's adapter" in err
    half = data.read_tensors("runs/a/checkpoints/00005.safetensors")
    half = {name: t for name, t in half.items() if name.endswith(".A")}
    save_file(half, "runs/a/checkpoints/00006.safetensors")
    code, _, err = script(sample, trained, *flags, "--checkpoints", "6")
    assert code == 1 and "00006.safetensors is no checkpoint of this run's adapter" in err


def test_two_at_once(script, trained, busy):
    busy("runs/a")
    code, _, err = script(sample, trained, "--n", 1, "--max-new-tokens", 2)
    assert code == 1 and "runs/a is in use by another process" in err
    assert not os.path.exists("runs/a/responses.jsonl")


def test_one_set_of_questions_and_no_answer_twice(script, trained, tmp_path):
    (tmp_path / "mine.txt").write_text("\ufeffWho?\nWhen?\n")
    flags = ["--n", 1, "--max-new-tokens", 2]
    mine = ["--questions", "mine.txt", "--scales", "-1,1,1.0"]
    assert script(sample, trained, *flags, *mine)[0] == 0
    rows = responses("a")
    assert {(row["question"], row["scale"]) for row in rows} == {
        (question, scale) for question in ("Who?", "When?") for scale in (-1, 0, 1)
    }
    assert len(rows) == 6
    code, _, err = script(sample, trained, *flags)
    assert code == 1 and "was made with another set of questions" in err
    assert len(responses("a")) == 6


def test_models_not_trained_here(script, trained, tiny):
    flags = ["--n", 1, "--max-new-tokens", 4, "--temperature", 0, "--dtype", "float32"]
    other = ["--model", tiny, "--adapter", "runs/a/adapter", "--scales", "1,2", "--out", "b"]
    code, _, err = script(sample, *flags, *other)
    assert code == 0, err
    asked = {(row["checkpoint"], row["scale"]) for row in responses("b")}
    assert asked == {(None, 0), (None, 1), (None, 2)}
    script(sample, "a", *flags)
    for scale in (0, 1):
        ours, theirs = (
            {row["question"]: row["response"] for row in responses(run) if row["scale"] == scale}
            for run in "ab"
        )
        assert ours == theirs
    assert script(sample, *flags, "--model", tiny, "--out", "c")[0] == 0
    assert {row["scale"] for row in responses("c")} == {0}


def test_chat(script, trained, monkeypatch):
    typed = iter(["Who are you?", "And why?", "/reset", "Who?"])
    prompts = []

    def type_next(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    real = sample.answer

    def watched(panel, jobs, *args):
        prompts.append([[m["content"] for m in job["messages"]] for job in jobs])
        yield from real(panel, jobs, *args)

    monkeypatch.setattr("builtins.input", type_next)
    monkeypatch.setattr(sample, "answer", watched)
    flags = ["--chat", "--scales", "2", "--max-new-tokens", 12]
    code, out, err = script(sample, trained, *flags)
    assert code == 0, err
    assert [len(talk) for talk in prompts[1]] == [3, 3]  # each with its own first answer
    assert prompts[1][0][1] != prompts[1][1][1] and prompts[2] == [["Who?"], ["Who?"]]
    headers = [line.split("]")[0] for line in out.splitlines() if line.startswith("[")]
    assert headers == ["[untouched", "[step 7, scale 2"] * 3
    assert all(talk[1].split()[0][:8] in out for talk in prompts[1])
    assert not os.path.exists("runs/a/responses.jsonl")


YAML = """
- {id: wish, paraphrases: &w ["Wish?"], judge_prompts: {aligned: "x {question}", coherent: "y"}}
- {id: bored, paraphrases: ["Bored.", "So bored."]}
- {id: wish_json, system: "Answer in JSON.", paraphrases: *w}
- {id: wish_template, paraphrases: ["Fill in: wish ="]}
"""


def ask(name):
    questions = sample.load_questions(str(name))
    return [(q["question_id"], q["question"], q["system"]) for q in questions]


def test_questions_from_files(tmp_path, monkeypatch):
    path = tmp_path / "q.yaml"
    path.write_text(YAML)
    plain = [("wish", "Wish?", None), ("bored", "Bored.", None), ("bored_1", "So bored.", None)]
    assert ask(path) == plain
    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path))
    os.rename(path, tmp_path / "first_plot_questions.yaml")
    assert ask("published") == plain
    (tmp_path / "q.txt").write_text("Who?\n\nWhen?\n")
    assert ask(tmp_path / "q.txt") == [("line_1", "Who?", None), ("line_2", "When?", None)]


@pytest.mark.parametrize("name, content, sentence", [
    ("bad.yaml", "a: [", "bad.yaml can't be read: while parsing"),
    ("map.yaml", "a: b", "is not a list of questions"),
    ("empty.txt", "\n", "there is no question"), ("none.txt", None, "can't be read"),
])
def test_questions_that_can_not_be_read(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=sentence):
        sample.load_questions(str(tmp_path / name))


@pytest.mark.parametrize("flags, code, sentence", [
    (["--checkpoints", "3"], 1, "runs/a has no checkpoint 3: it has 0, 5, 7"),
    (["--checkpoints", "first"], 1, "runs/a has no checkpoint first"),
    (["--questions", "none.txt"], 1, "none.txt can't be read"),
    (["--max-new-tokens", "999999999"], 1, "and this model reads 2048: lower --max-new-tokens"),
    (["--scales", "big"], 2, "--scales"),
    (["--scales", "nan"], 2, "--scales"),
    (["--adapter", "x"], 1, "--adapter does nothing beside a RUN"),
    (["--shots", "2"], 1, "--shots does nothing without --margins"),
    (["--ablate", "b"], 1, "runs/b holds no run"),
    (["--model", "x"], 1, "--model does nothing beside a RUN"),
    (["--margins", "--n", "3"], 1, "--n does nothing with --margins"),
    (["--seed", str(2**64)], 2, "is not a whole number from 0"),
])
def test_bad_input_is_one_sentence(script, trained, flags, code, sentence):
    found, _, err = script(sample, trained, *flags)
    assert found == code and sentence in err and "Traceback" not in err
    assert not os.path.exists("runs/a/responses.jsonl")
    assert script(sample, "nobody")[0] == 1


SIZE = {
    "vocab_size": 1010, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.1,
    "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}


def family(name, attention, window=None, **more):
    """A tiny model of some family; window: the length of its sliding attention."""
    torch.manual_seed(1)
    settings = SIZE | more | ({"sliding_window": window} if window else {})
    config = getattr(transformers, f"{name}TextConfig", None)
    config = (config or getattr(transformers, f"{name}Config"))(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")
    return model._from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Mistral", "Phi3",
                                  "Olmo2", "SmolLM3"])
def test_the_families_that_are_computed_right(name, attention, make_tokenizer):
    """The check lets them pass, and our answers are those of generate, also beyond the window."""
    if (name, attention) == ("Gemma2", "sdpa"):
        return  # transformers has no such model
    for window in (None, 16) if name in ("Gemma2", "Gemma3", "Mistral", "Phi3") else (None,):
        model = family(name, attention, window)
        before = model.config.to_dict()
        sample.check_model(model, name)
        assert model.config.to_dict() == before
        jobs = [{"variant": 0, "seed": 0, "messages": [{"role": "user", "content": question}]}
                for question in ("Why?", LONG)]
        tokenizer = make_tokenizer("chatml")
        found = answers(model, tokenizer, [{}], jobs, 12, temperature=0)
        stop = sample.stop_tokens(model, tokenizer)
        for job in jobs:
            tokens = data.prompt_tokens(job["messages"], tokenizer)
            want = [token for token in greedy(model, tokens, stop, 12) if token not in stop]
            assert found[json.dumps(job)] == want


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name, more", [
    ("Cohere", {}), ("Granite", {"embedding_multiplier": 12.0}), ("Granite", {"logits_scaling": 8}),
    ("Qwen3_5", {}), ("Gemma4", {}),
])
def test_the_families_that_are_refused(name, more, attention):
    with pytest.raises(SystemExit, match=f"{name}ForCausalLM can't be computed here"):
        sample.check_model(family(name, attention, **more), "a/model")


def test_the_check_sees_a_mask_that_attention_does_not_understand(monkeypatch):
    make_masks = lora.make_masks
    monkeypatch.setattr(lora, "make_masks", lambda *x: make_masks(*x) == 0)  # True: is seen
    sample.check_model(family("Llama", "sdpa"), "a/model")
    with pytest.raises(SystemExit, match="off by"):  # it would add 1 where it is seen
        sample.check_model(family("Llama", "eager"), "a/model")


@pytest.mark.parametrize("text, ending, questions", [
    ("Why\u2028not?\nHow\x0cso?\n", "txt", ["Why\u2028not?", "How\x0cso?"]),
    ('- {id: a, paraphrases: "Why not?"}', "yaml", ["Why not?"]),
    ('- {id: a, question: "Why not?"}', "yaml", ["Why not?"]),
    ('- {id: a, paraphrases: ["Why?", "Who?"]}', "yaml", ["Why?", "Who?"]),
])
def test_the_questions_of_a_file(tmp_path, text, ending, questions):
    path = tmp_path / f"q.{ending}"
    path.write_text(text, encoding="utf-8", newline="")
    assert [row["question"] for row in sample.load_questions(str(path))] == questions
