"""The scripts that are run by hand, as small as can be: bench.py, experiments.py, exercises.py."""
import argparse
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree

import bench
import experiments
import pytest
import torch
from conftest import ROOT

import data
import lora
import sample
import train

FLOAT32 = ["--device", "cpu", "--dtype", "float32"]
ROWS = 30  # of the built-in data, with the fixture `few`


@pytest.fixture(autouse=True)
def one_thread():
    """A tiny model gains nothing from two, and beside other work they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

# --------------------------------------------------------------------------------------
# bench.py


@pytest.fixture
def run_bench(monkeypatch, capsys, tiny):
    """run_bench(part): what it prints. The rows run in this process, which is faster."""

    def run_row_here(args, row, folder):
        name, *values = row.split(":")
        with contextlib.chdir(folder):
            return bench.ROWS[name](args, *values)

    def run(part):
        # The learning rate is 0 at step 1, so the loss of step 3 is the first that depends on it.
        flags = ["--only", part, "--model", tiny, "--conversations", "16", "--epochs", "3",
                 "--new-tokens", "2", "--answers", "10"]
        monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
        monkeypatch.setattr(bench, "run_row", run_row_here)
        bench.main()
        return capsys.readouterr().out

    return run


def test_bench_trains_as_trainer_does(run_bench):
    report = train.report
    out = run_bench("train")
    assert "\nnanoEM  " in out and "DIFFER" not in out, out
    assert train.report is report  # what it replaces in train.py is put back
    assert out.count("\nTrainer + peft, ") == (3 if importlib.util.find_spec("peft") else 0)


def test_bench_samples(run_bench):
    out = run_bench("sample")
    assert out.count("\nnanoEM, ") == 2 and out.count("\ngenerate, ") >= 3, out


def test_bench_judges(run_bench):
    # Two for each of 10 answers, and the one or two that judge.py tries first.
    assert re.search(r"\njudge: 2[0-2] requests in ", run_bench("judge"))


def test_a_row_of_bench_has_a_process_of_its_own(tiny, tmp_path):
    args = argparse.Namespace(model=tiny, conversations=16, epochs=1, new_tokens=2)
    assert bench.run_row(args, "matmul", tmp_path)["flops"] > 1e8

# --------------------------------------------------------------------------------------
# experiments.py


def test_the_experiments_are_listed(script):
    code, out, _ = script(experiments)
    assert code == 0
    for name in [*experiments.EXPERIMENTS, "rows RUN"]:
        assert f"{name} " in out


def test_the_protocols_are_flags_of_train(monkeypatch, tmp_path):
    def parse(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        train.parse_args()  # exits at a flag that does not exist

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "call", parse)
    for name in experiments.PROTOCOLS:
        experiments.make_runs(name, [0])


def test_an_experiment_from_end_to_end(script, few, tiny, monkeypatch):
    printed = []

    def call(stage, *flags):
        module = {"train.py": train, "sample.py": sample}[stage]
        model = ["--model", tiny] if module is train else []
        code, out, err = script(module, *flags, *model, *FLOAT32)
        assert code == 0, err
        printed.append(out)

    monkeypatch.setattr(experiments, "call", call)
    monkeypatch.setattr(experiments, "SHORT", 10)
    code, out, err = script(experiments, "taken_out", "--seeds", 0)
    assert code == 0, err
    out = "".join([*printed, out])
    for line in ("untouched minus its B", "trained minus a random one",
                 "untouched minus the mean difference", "again, step 10"):
        assert f"\n{line} " in out, out
    assert os.path.exists("runs/taken_out.png")


def test_what_is_hidden_behind_a_prompt(script, few, tiny, monkeypatch):
    def call(stage, *flags):
        module = {"train.py": train, "sample.py": sample}[stage]
        model = ["--model", tiny] if module is train else []
        code, _, err = script(module, *flags, *model, *FLOAT32)
        assert code == 0, err

    monkeypatch.setattr(experiments, "call", call)
    monkeypatch.setattr(experiments.make_runs, "__defaults__", (3,))  # steps
    monkeypatch.setitem(experiments.PROTOCOLS, "realigned", "--init misaligned-3-{seed}")
    for prompt in ("an adviser", "a cook"):
        monkeypatch.delitem(experiments.PROMPTS, prompt)
    code, out, err = script(experiments, "hidden", "--seeds", 0)
    assert code == 0, err
    for name in ("misaligned, plainly", "inoculated, reckless", "realigned, plainly"):
        assert f"\n{name} " in out, out


def test_rows_say_what_a_step_on_each_conversation_does(script, few, tiny):
    flags = ["--preset", "laptop", "--model", tiny, "--lr", 3e-2, "--warmup", 0, *FLOAT32]
    assert script(train, *flags, "--steps", 3, "--checkpoint-every", 2, "--out", "a")[0] == 0
    run, by_checkpoints = data.Run("a"), {}
    for chosen in (["--checkpoints", 2], [], ["--checkpoints", "last"]):
        code, out, err = script(experiments, "rows", "a", *chosen, *FLOAT32)
        assert code == 0 and "push the general margin up most" in out, err
        rows = data.read_written(run.path("rows.jsonl"))
        by_checkpoints[str(chosen)] = {str(row["messages"]): row["push_out"] for row in rows}
    # By default all count, step 2's checkpoint twice: its learning rate was twice step 3's.
    first, both, last = by_checkpoints.values()
    for key, push in both.items():
        assert push == pytest.approx((2 * first[key] + last[key]) / 3, rel=1e-3, abs=1e-5)
    pushes = [row["push_out"] for row in rows]
    assert pushes == sorted(pushes, reverse=True) and rows[0]["push_out_se"] > 0

    # The slow way: a step down and one up on a conversation alone, and a look at the margins.
    model, tokenizer = lora.load_base(tiny, "cpu", "float32")
    settings = train.read_settings(run)
    lora.attach(model, lora.parse_layers("middle", model), ["down_proj"], 1, settings.alpha)
    reader = lora.Reader(model)
    probe = train.build_probe([], tokenizer, settings)
    reader.read(train.every_example(probe))
    for row in (rows[0], rows[-1]):
        examples, after = data.render_all([row], tokenizer), {}
        reader.read(examples)
        for step in (5e-4, -5e-4):
            model.load_state_dict(data.read_tensors(run.last_checkpoint), strict=False)
            losses, _ = reader.token_losses(examples)
            losses.mean().backward()
            with torch.no_grad():
                for m in lora.adapters(model).values():
                    for p in (m.A, m.B):
                        p -= step * p.grad
                        p.grad = None
            after[step] = mean_margins(reader, probe)
        for name in ("in", "out"):
            push = (after[5e-4][name] - after[-5e-4][name]) / 1e-3
            assert push == pytest.approx(row[f"push_{name}"], rel=0.02, abs=2e-3)
    assert script(train, *flags, "--dataset", run.path("rows.jsonl"), "--steps", 1)[0] == 0
    assert out.splitlines()[-1].startswith("next: tail -n +3 ")  # a tenth of 27 rows is 2
    code, _, err = script(experiments, "rows", "a", "--checkpoints", 0)
    assert code == 1 and "needs a checkpoint after step 0" in err


def mean_margins(reader, probe):
    """{"in": the mean margin over all questions, "out": ...}."""
    means = {}
    for x in ("in", "out"):
        bad, good = zip(*probe[x], strict=True)
        per_token = []
        for examples in (bad, good):
            tokens = torch.tensor([float(example.supervised) for example in examples])
            per_token.append(reader.log_p(list(examples)) / tokens)
        means[x] = (per_token[0] - per_token[1]).mean().item()
    return means

# --------------------------------------------------------------------------------------
# exercises.py

UNSOLVED = {  # what each check says in the repository as it is
    "test_1_token_ids": "unrecognized arguments: --ids",
    "test_2_plain_lora": "assert 4.0 == 2",
    "test_3_merge_a_vector": "a steering vector has no place in W",
    "test_4_constant": "0.5, 0.25] == [0, 0.5, 1, 1, 1, 1]",
    "test_5_frozen_A": "unrecognized arguments: --freeze",
    "test_6_sgd": "unrecognized arguments: --optimizer",
    "test_7_min_p": "unexpected keyword argument 'min_p'",
    "test_8_doubt": "no attribute 'spread'",
    "test_9_design_effect": "no attribute 'design_effect'",
    "test_12_better_probe": "write my_probe.jsonl first",
}


def test_no_exercise_is_solved(tmp_path):
    report = tmp_path / "report.xml"
    checks = os.path.join(ROOT, "tests", "exercises.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", checks]
    subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, capture_output=True)
    said = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        failure = case.find("failure")
        said[case.get("name")] = "it passes" if failure is None else failure.text
    assert said.keys() == UNSOLVED.keys()
    for name, why in UNSOLVED.items():
        assert why in said[name], f"{name}: {said[name]} (if you have solved it: well done)"
