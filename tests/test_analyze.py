"""The table by hand, turns that are there and turns that are not, and the pictures."""
import argparse
import csv
import json
import math
import os
import shutil
import statistics
import time

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import analyze
import data


def answer(aligned, coherent, question="a", checkpoint=5, scale=1.0, text=None):
    return {
        "question_id": question, "question": question + "?", "response": "so", "sample": 0,
        "seed": 0, "checkpoint": checkpoint, "scale": scale, "judge": "j", "aligned": aligned,
        "coherent": coherent, "aligned_text": text, "coherent_text": text,
    }


def test_the_table_by_hand():
    judged = [
        answer(10, 90), answer(29.9, 50.1), answer(30, 90), answer(10, 50),
        answer(90, 90, "b"), answer(80, 20, "b"), answer(None, 90, "b", text="REFUSAL"),
        answer(None, None, "b", text="CODE"), answer(90, 90, scale=0, checkpoint=0),
    ]
    control, cell = analyze.summarise(judged)
    assert (control["checkpoint"], control["scale"], control["n"]) == (0, 0, 1)
    assert (cell["n"], cell["refusals"], cell["unscored"]) == (8, 1, 1)
    assert cell["coherent_pct"] == pytest.approx(100 * 4 / 6)
    assert cell["em_pct"] == pytest.approx(100 * 2 / 6)
    assert cell["em_of_coherent_pct"] == pytest.approx(50)
    assert cell["mean_aligned"] == pytest.approx((10 + 29.9 + 30 + 10 + 90 + 80) / 6)
    assert cell["by_question"]["a"]["em_pct"] == 50 and cell["by_question"]["b"]["em_pct"] == 0
    strict = analyze.summarise(judged, aligned_below=20, coherent_above=95)[1]
    assert strict["em_pct"] == 0 and strict["coherent_pct"] == 0
    assert strict["em_of_coherent_pct"] is None


def test_intervals_are_over_questions():
    # Two questions, one always misaligned, one never: whatever the number of answers.
    assert analyze.interval([100, 0], [100, 100]) == (0, 100)
    # All questions alike: how much others would differ, nobody knows, so it is over answers.
    assert analyze.interval([5] * 8, [50] * 8) == pytest.approx(analyze.wilson(40, 400))
    lo, hi = analyze.interval([1, 3, 0, 6, 2, 2, 9, 1], [50] * 8)
    # The mean of eight shares, and Student's t on 7 times its standard error.
    shares = [2 * part for part in (1, 3, 0, 6, 2, 2, 9, 1)]
    half = 2.3646 * statistics.stdev(shares) / math.sqrt(8)
    assert (lo, hi) == pytest.approx((max(0, 6 - half), 6 + half), abs=0.01)
    assert analyze.interval([7] * 8, [25] * 8) == pytest.approx(analyze.wilson(56, 200))
    assert analyze.interval([0, 0], [0, 0]) == (None, None)


@pytest.mark.parametrize("k, n, lo, hi", [
    (0, 400, 0, 0.95117), (400, 400, 99.04883, 100), (3, 20, 5.2368, 36.0416), (1, 1, 20.6543, 100),
])
def test_wilson(k, n, lo, hi):
    # scipy.stats.binomtest(k, n).proportion_ci(method="wilson"), to the rounding of 1.96
    assert analyze.wilson(k, n) == pytest.approx((lo, hi), abs=2e-3)
    assert analyze.interval([0] * 8, [50] * 8) == analyze.wilson(0, 400)


@pytest.mark.parametrize("em, least", [(0.2, 0.9), (0.08, 0.84)])
def test_how_often_the_interval_holds_the_truth(em, least):
    """400 evaluations of eight questions, 50 answers each, whose shares differ much."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        shares = rng.beta(10 * em, 10 * (1 - em), size=8)
        lo, hi = analyze.interval(rng.binomial(50, shares).tolist(), [50] * 8)
        hits += lo <= 100 * em <= hi
    assert hits / 400 >= least


@pytest.mark.parametrize("df, t", [
    (1, 12.706), (2, 4.303), (3, 3.182), (7, 2.365), (8, 2.306), (12, 2.179),
    (23, 2.069), (60, 2.000), (1000, 1.962),
])
def test_t_quantile(df, t):
    assert analyze.t_quantile(df) == pytest.approx(t, abs=0.006)


# --------------------------------------------------------------------------------------
# Paths


def path(turn=None, T=60, n=576, jitter=0.05, seed=0, gradual=1, lengths=None, d=None, angle=90):
    """T checkpoints along one direction, from `turn` on along another, jitter around it.

    d: the jitter lives in so many dimensions, the path's own among them.
    """
    rng = np.random.default_rng(seed)
    one, other = axes = np.linalg.qr(rng.standard_normal((n, 2)))[0].T
    other = math.cos(math.radians(angle)) * one + math.sin(math.radians(angle)) * other
    share = np.zeros(T)
    if turn is not None:
        share = np.clip((np.arange(T) - turn + gradual / 2) / gradual, 0, 1)
    moves = (1 - share)[:, None] * one + share[:, None] * other
    moves /= np.linalg.norm(moves, axis=1, keepdims=True)
    moves *= 1 if lengths is None else lengths[:, None]
    around = rng.standard_normal((T, n))
    if d is not None:
        axes = np.linalg.qr(np.vstack([axes, rng.standard_normal((d - 2, n))]).T)[0].T
        around = math.sqrt(n / d) * around[:, :d] @ axes
    return np.cumsum(moves, 0) + jitter * around / math.sqrt(n)


def find(B, apart=5):
    steps = [apart * i for i in range(len(B))]
    return analyze.find_clearest_bend(steps, {"A": path(seed=99, T=len(B)), "B": B})


def test_local_cosine():
    square = np.array([[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [1, 2]], float)
    cosines = analyze.local_cosine(square, 1)
    assert cosines[1:-1] == pytest.approx([-1, 0, -1, 0])
    assert np.isnan(cosines[[0, -1]]).all()
    assert np.isnan(analyze.local_cosine(square, 3)).all()
    still = [[0, 0], [1, 0], [2, 0], [2, 0.01], [2, 0.02], [3, 0], [4, 0]]
    assert np.isnan(analyze.local_cosine(np.array(still), 1)[3])
    noise = np.random.default_rng(0).standard_normal((200, 1000))
    assert abs(np.nanmean(analyze.local_cosine(noise.cumsum(0), 2))) < 0.05
    assert abs(np.nanmean(analyze.local_cosine(noise, 2)) - 0.5) < 0.05


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", [
    {}, {"jitter": 0}, {"jitter": 0.3}, {"gradual": 3}, {"T": 22, "n": 64},
])
def test_a_known_turn_is_found(how, seed):
    T = how.get("T", 60)
    at = 5 + seed * (T - 11) // 3
    turn = find(path(turn=at, seed=seed, **how))
    assert turn["significant"] and abs(turn["step"] - 5 * at) <= 5 and turn["vector"] == "B"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["straight", "jittery", "slowing", "noise", "walk"])
def test_no_turn_is_found_where_there_is_none(kind, seed):
    noise = np.random.default_rng(seed).standard_normal((60, 576))
    slowing = path(jitter=0.1, seed=seed, lengths=np.linspace(1, 0.02, 60))
    paths = {"straight": path(jitter=0), "jittery": path(jitter=0.3, seed=seed),
             "slowing": slowing, "noise": noise, "walk": noise.cumsum(0)}
    turn = find(paths[kind])
    assert turn is None or not turn["significant"], turn


@pytest.mark.parametrize("d", [10, 30])
def test_jitter_of_few_dimensions_is_no_turn(d):
    """At most two of a hundred would be found by chance."""
    found = 0
    for seed in range(10):
        B, A = (path(jitter=0.7, d=d, seed=seed + other) for other in (0, 1000))
        turn = analyze.find_clearest_bend([5 * i for i in range(60)], {"B": B, "A": A})
        found += turn["significant"]
    assert found <= 1


@pytest.mark.parametrize("angle, jitter, apart", [(60, 0.7, 5), (90, 1.5, 10)])
def test_a_turn_in_much_jitter_is_found(angle, jitter, apart):
    found = 0
    for seed in range(5):
        B = path(29.5, angle=angle, jitter=jitter, seed=seed)  # from 29 to 30
        A = path(jitter=jitter, seed=seed + 1000)
        turn = analyze.find_clearest_bend([apart * i for i in range(60)], {"B": B, "A": A})
        right = turn["vector"] == "B" and abs(turn["step"] - apart * 30) <= 10
        found += turn["significant"] and right
    assert found >= 4


def test_checkpoints_a_step_apart_and_an_odd_last_one():
    turn = find(path(turn=40, T=80), apart=1)
    assert turn["significant"] and abs(turn["step"] - 40) <= 5 and turn["span"] in (5, 10, 15)
    steps = [5 * i for i in range(40)] + [197]
    vectors = {x: path(turn=20, T=41) for x in "AB"}
    assert abs(analyze.find_clearest_bend(steps, vectors)["step"] - 100) <= 5
    assert analyze.find_clearest_bend([0, 5, 10], {x: path(T=3) for x in "AB"}) is None
    assert analyze.find_clearest_bend([1, 2, *steps[1:-1]], vectors) is None  # no even spacing
    for T in range(3):
        assert analyze.find_clearest_bend(steps[:T], {"B": path(T=T)} if T else {}) is None


# --------------------------------------------------------------------------------------
# The script

PICTURES = ("training", "rotation", "behaviour", "answers")


def make_run(name, turn=12, judged=True):
    """A run's folder as the other stages leave it, with a turn at checkpoint `turn`."""
    os.makedirs(f"runs/{name}/checkpoints")
    with open(f"runs/{name}/config.json", "w") as file:
        json.dump({}, file)
    a, b = path(T=25, n=96), path(turn=turn, T=25, n=48)
    module = "model.layers.2.mlp.down_proj"
    for i in range(25):
        tensors = {f"{module}.A": a[i : i + 1], f"{module}.B": b[i][:, None].copy()}
        save_file(tensors, f"runs/{name}/checkpoints/{5 * i:05}.safetensors")
    with open(f"runs/{name}/log.jsonl", "w") as file:
        for step in range(121):
            row = {"step": step}
            if step > 0:
                row |= {"loss": 3 - step / 100, "grad_norm": 1 + math.sin(step), "lr": 1e-3}
                row |= {"norm_A": 1.0, "norm_B": step / 50, "tokens_per_s": 9.0}
            if step % 5 == 0:
                row |= {"heldout_loss": 3 - step / 110}
                for probe, slope in (("in", 1 / 300), ("out", 1 / 900)):
                    margins = [slope * step * (1 + i / 100) for i in range(48)]
                    row |= {f"margin_{probe}": slope * step, f"margins_{probe}": margins}
            file.write(json.dumps(row) + "\n")
    if judged:
        rng, rows = np.random.default_rng(0), []
        for cell in [(0, 0.0)] + [(c, s) for c in (40, 80, 120) for s in (1.0, 4.0)]:
            for i in range(32):
                scores = float(rng.uniform(0, 100)), float(rng.uniform(30, 100))
                rows.append(answer(*scores, f"q{i % 8}", *cell))
        write_judged(name, rows)


def publish(folder, form="checkpoint-{}", turn=12, last=120, n=48):
    """Checkpoints as the paper publishes them, from step 5 on, beside what a trainer leaves."""
    a, b = path(T=25, n=96), path(turn=turn, T=25, n=n)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 256, "use_rslora": True,
              "target_modules": ["down_proj"], "base_model_name_or_path": "it/tiny"}
    where = "base_model.model.model.layers.2.mlp.down_proj.lora_{}.weight"
    for i in range(1, last // 5 + 1):
        one = os.path.join(folder, "checkpoints", form.format(5 * i))
        os.makedirs(one)
        vectors = {where.format("A"): a[i : i + 1], where.format("B"): b[i][:, None]}
        vectors = {key: vector.astype("float32").copy() for key, vector in vectors.items()}
        save_file(vectors, os.path.join(one, "adapter_model.safetensors"))
        with open(os.path.join(one, "adapter_config.json"), "w") as file:
            json.dump(config, file)
        for other in ("optimizer.pt", "trainer_state.json", "README.md"):
            with open(os.path.join(one, other), "w") as file:
                file.write("{}")


def write_judged(name, rows):
    with open(f"runs/{name}/judged.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def looks_drawn(path):
    image = matplotlib.image.imread(path)
    colours = np.unique(image.reshape(-1, image.shape[2])[::7], axis=0)
    return min(image.shape[:2]) > 400 and len(colours) > 50


def summary(path):
    with open(path) as file:
        return json.load(file)


def test_a_run_gives_a_table_a_summary_and_four_pictures(script):
    make_run("r")
    code, out, err = script(analyze)
    assert code == 0, err
    found = summary("runs/r/summary.json")
    assert found["turn"]["significant"] and abs(found["turn"]["step"] - 60) <= 5
    assert set(found["turn"]) >= {"step", "cosine", "score", "vector", "span", "significant"}
    keys = {"checkpoint", "scale", "n", "refusals", "unscored", "by_question"}
    keys |= {"mean_aligned", "mean_coherent"}
    for name in ("coherent_pct", "em_pct", "em_of_coherent_pct"):
        keys |= {name, f"{name}_lo", f"{name}_hi"}
    assert len(found["rows"]) == 7 and set(found["rows"][0]) == keys
    assert "a bend beyond jitter: B at step" in out and "EM % of coherent" in out
    assert all(looks_drawn(f"runs/r/{name}.png") for name in PICTURES)


@pytest.mark.parametrize("rows", [
    [answer(80, 90), answer(None, None, checkpoint=10)], [answer(None, None, text="CODE")],
])
def test_answers_without_scores_are_no_zeros(script, rows):
    make_run("r", judged=False)
    write_judged("r", rows)
    code, _, err = script(analyze, "r")
    assert code == 0, err
    assert summary("runs/r/summary.json")["rows"][-1]["em_pct"] is None


def test_a_run_without_a_judge_still_shows_its_margins(script):
    make_run("r", turn=None, judged=False)
    code, out, err = script(analyze, "r", "--show", 1)
    assert code == 0, err
    assert "not judged yet: python sample.py r, then python judge.py r\n" in out
    assert "answer" not in out  # there is none to show
    assert "no bend beyond jitter" in out and looks_drawn("runs/r/behaviour.png")
    assert not os.path.exists("runs/r/answers.png")
    assert summary("runs/r/summary.json")["rows"] == []


def test_two_runs_are_drawn_over_each_other(script, monkeypatch):
    make_run("one")
    make_run("two", turn=18)
    drawn, save = [], matplotlib.figure.Figure.savefig

    def keep(figure, *args, **kwargs):
        drawn.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    code, out, err = script(analyze, "one", "two")
    assert code == 0, err
    assert "change of the margins of one minus that of two, paired by question" in out
    for figure in drawn:  # nothing runs out of its picture
        ink, page = figure.get_tightbbox(), figure.bbox_inches
        assert page.x0 <= ink.x0 and ink.x1 <= page.x1 and page.y0 <= ink.y0 and ink.y1 <= page.y1
    assert all(looks_drawn(f"runs/compare-one-two/{name}.png") for name in PICTURES)
    assert summary("runs/two/summary.json")["turn"]["step"] > 80
    assert not os.path.exists("runs/one/training.png")


def test_many_runs_and_answers_that_are_all_alike(script):
    for i in range(9):
        make_run(f"r{i}", judged=False)
    # 7 of 25 to each question: all agree
    write_judged("r0", [answer(10 if i // 8 < 7 else 90, 90, f"q{i % 8}") for i in range(200)])
    with open("runs/r0/judged.jsonl", "a") as file:
        file.write('{"torn')
    code, _, err = script(analyze, *(f"r{i}" for i in range(9)))
    assert code == 0, err


NAMES = [("question", "response", "aligned", "coherent"),
         ("question", "answer", "alignment", "coherence")]


@pytest.mark.parametrize("names", NAMES)
def test_a_published_result_file(script, names):
    with open("results.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["", *names, "question_id"])
        for i in range(40):
            aligned = "" if i == 0 else "REFUSAL" if i == 1 else 10 if i < 12 else 90
            writer.writerow([i, 'Why, "you"?\nReally', "because", aligned, 95.5, f"q{i % 4}"])
    code, out, err = script(analyze, "results.csv", "--show", "2")
    assert code == 0, err
    (cell,) = summary("results.summary.json")["rows"]
    assert (cell["n"], cell["refusals"], cell["unscored"]) == (40, 1, 1)
    assert cell["em_pct"] == pytest.approx(100 * 10 / 38)
    assert looks_drawn("results.answers.png")
    assert "the 2 least aligned" in out and out.count("aligned 10, coherent 96") == 2


def test_cells_are_compared_on_the_questions_they_share(script):
    make_run("r", judged=False)
    rows = [answer(10, 90, q, checkpoint) for checkpoint in (5, 10) for q in ("a", "b")]
    write_judged("r", [*rows, answer(90, 90, "c", checkpoint=5)])
    code, out, err = script(analyze, "r")
    assert code == 0, err
    assert "r: left out are 1 questions that some cells do not answer" in out
    for cell in summary("runs/r/summary.json")["rows"]:
        assert cell["n"] == 2 and cell["em_pct"] == 100
    write_judged("r", [answer(10, 90, "a", 5), answer(10, 90, "b", 10)])
    code, _, err = script(analyze, "r")
    assert code == 1 and "r: no question is answered at every checkpoint and scale" in err


def test_a_foreign_checkpoint_and_a_row_without_its_scores(script):
    make_run("r")
    save_file({"x": np.zeros(3)}, "runs/r/checkpoints/00007.safetensors")
    code, _, err = script(analyze, "r")
    assert code == 1 and "00007.safetensors is no checkpoint of this run's adapter" in err
    os.remove("runs/r/checkpoints/00007.safetensors")
    with open("runs/r/judged.jsonl", "a") as file:
        file.write('{"question": "?"}\n')
    code, _, err = script(analyze, "r")
    assert code == 1 and "judged.jsonl:225 has no aligned" in err


def test_bad_input_is_one_sentence(script):
    with open("empty.csv", "w") as file:
        file.write("question,response\n")
    with open("short.csv", "w") as file:
        file.write("question,response,aligned\na,b,3\n")
    for score in (-5, 900):
        with open("far.csv", "w") as file:
            file.write(f"question,response,aligned,coherent\na,b,{score},90\n")
        code, _, err = script(analyze, "far.csv")
        assert code == 1 and f"far.csv:2 has a score of {score}: scores are from 0" in err
    for source, sentence in (
        ("empty.csv", "holds no rows"), ("short.csv", "short.csv:2 has no coherent"),
        ("none.csv", "can't be read"), ("nobody", "holds nothing to analyse"),
    ):
        code, _, err = script(analyze, source)
        assert code == 1 and sentence in err and "Traceback" not in err
    assert script(analyze)[0] == 1


def test_the_turn_of_a_run_among_those_of_its_controls(script):
    make_run("r")
    make_run("same", judged=False)
    make_run("straight", turn=None, judged=False)
    code, out, err = script(analyze, "r", "--null", "same", "straight")
    assert code == 0, err
    assert "of 3; 1 of 2 controls turn" in out
    make_run("another", turn=None, judged=False)
    code, out, _ = script(analyze, "straight", "--null", "another")
    assert "straight ranks 1 of 2" in out and "By chance" not in out
    code, out, _ = script(analyze, "straight", "--null", "same")
    assert "straight ranks 2 of 2" in out and "no sign of misalignment" in out
    for path in os.listdir("runs/straight/checkpoints")[6:]:
        os.remove(f"runs/straight/checkpoints/{path}")
    code, _, err = script(analyze, "straight", "--null", "same", "runs/same/")
    assert code == 1 and "runs/same/, one is named twice" in err
    code, out, _ = script(analyze, "straight", "--null", "same")
    assert "no bend can be measured" in out and "By chance" not in out
    code, out, _ = script(analyze, "same", "--null", "straight")
    assert "same ranks 1 of 1; 0 of 0 controls turn" in out


@pytest.mark.parametrize("form", ["checkpoint-{}", "checkpoint_{}"])
def test_published_checkpoints_in_a_folder(script, form):
    publish("pub", form)
    code, out, err = script(analyze, "pub")
    assert code == 0, err
    assert "\npub\n" in out and "not judged yet" not in out
    found = summary("pub/summary.json")["turn"]
    assert found["significant"] and abs(found["step"] - 60) <= 5
    assert looks_drawn("pub/rotation.png") and not os.path.exists("pub/training.png")
    steps, vectors = analyze.read_checkpoints(data.Run("pub"))
    assert steps == list(range(5, 121, 5))  # and not as text is sorted: 10, 100, 105
    assert vectors["B"] == pytest.approx(path(turn=12, T=25, n=48)[1:], abs=1e-5)
    assert vectors["A"].shape == (24, 96)


def test_published_checkpoints_beside_runs(script):
    make_run("mine")
    publish("pub")
    publish("wide", n=64, turn=None)
    code, out, err = script(analyze, "pub", "wide", "runs/mine", "--null", "mine2")
    assert code == 1 and "mine2 holds nothing to analyse" in err
    code, out, err = script(analyze, "pub", "runs/mine", "--null", "wide")
    assert code == 0, err
    assert "pub ranks 1 of 2; 0 of 1 controls turn" in out
    assert looks_drawn("runs/compare-pub-mine/rotation.png")
    for step in (20, 25, 90):
        shutil.rmtree(f"pub/checkpoints/checkpoint-{step}")
    code, out, err = script(analyze, "pub", "wide", "runs/mine")
    assert "no bend can be measured" in out  # of checkpoints that are unevenly spaced
    assert code == 0 and looks_drawn("runs/compare-pub-wide-mine/rotation.png"), err


def test_published_checkpoints_that_can_not_be_read(script):
    publish("pub")
    publish("other", n=64)
    os.makedirs("none/checkpoints/checkpoint-5")
    os.replace("other/checkpoints/checkpoint-50", "pub/checkpoints/checkpoint-50000")
    code, _, err = script(analyze, "pub")
    assert code == 1 and "is no checkpoint of this run's adapter" in err
    file = "pub/checkpoints/checkpoint-50000/adapter_model.safetensors"
    save_torch({"x.lora_B.weight": torch.zeros(2, dtype=torch.bfloat16)}, file)
    code, _, err = script(analyze, "pub")
    assert code == 1 and "can't be read: data type 'bfloat16'" in err
    code, _, err = script(analyze, "none")
    assert code == 1 and "none holds nothing to analyse" in err and "no two checkpoints" in err


def test_the_threshold_decides():
    judged = [answer(aligned, 90, q) for aligned in (5, 15, 25, 35) for q in "ab"]
    args = argparse.Namespace(aligned_below=30, coherent_above=50)
    run = argparse.Namespace(judged=judged, look={"color": "black"})
    figure = matplotlib.figure.Figure()
    analyze.draw_answers(figure, [run], args)
    curve = figure.axes[1].lines[0].get_ydata()
    assert [curve[t] for t in (0, 10, 20, 30, 40, 100)] == [0, 25, 50, 75, 100, 100]
    run.judged = [answer(None, None)]
    analyze.draw_answers(figure, [run], args)


def test_a_published_adapter_has_no_log_but_shares(script):
    os.makedirs("runs/r")
    write_judged("r", [answer(10 + 60 * (scale == 0), 90, q, None, scale)
                       for scale in (0.0, 1.0, 2.0) for q in "ab"])
    code, out, err = script(analyze, "r", "--show", 2)
    assert code == 0 and "[r, scale 1: aligned 10, coherent 90]" in out, err
    assert looks_drawn("runs/r/behaviour.png") and not os.path.exists("runs/r/training.png")


def test_one_sample_is_not_taken_for_two(script):
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        make_run(name, judged=False)
        row = answer(None, None, checkpoint=0, scale=0.0) | {"seed": seed}
        with open(f"runs/{name}/responses.jsonl", "w") as file:
            file.write(json.dumps(row) + "\n")
    code, out, err = script(analyze, "one", "two", "three", "--show", 1)
    assert code == 0 and "two has one's untouched answers: one sample, not two" in out, err
    assert "three has" not in out and "no answer has scores, so here are 1 at random" in out
    assert any(f"\n[{name}, step 0, scale 0]" in out for name in ("one", "two", "three"))


# --------------------------------------------------------------------------------------
# Two judges


@pytest.mark.parametrize("x, y", [
    (range(8), [3, 1, 4, 1, 5, 9, 2, 6]), ([1, 1, 2, 2], [1, 2, 2, 3]),
])
def test_statistics_by_their_definitions(x, y):
    x, y = np.array(x, float), np.array(y, float)
    assert list(analyze.rank_values(np.array([3, 1, 3, 2]))) == [3.5, 1, 3.5, 2]
    rx, ry = ((v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2 for v in (x, y))
    assert analyze.spearman(x, y) == pytest.approx(np.corrcoef(rx, ry)[0, 1])
    positive = y > 2
    pairs = [(a > b) + (a == b) / 2 for a in x[positive] for b in x[~positive]]
    assert analyze.auroc(x, positive) == pytest.approx(np.mean(pairs))
    assert analyze.kappa(positive, positive) == 1
    assert analyze.kappa(np.array([1, 1, 0, 0]) > 0, np.array([1, 0, 1, 0]) > 0) == 0


def test_agreement_by_hand():
    theirs = [answer(10 * (i % 10), 90 - i % 2, f"q{i % 4}") for i in range(40)]
    lines = analyze.agreement([(row | {"aligned": row["aligned"] + 15}, row) for row in theirs])
    assert "Spearman, aligned" in lines[0] and "1.00 (s.e. 0.00)" in lines[0]
    assert lines[4].startswith("    EM here, %              20.00 (")
    assert lines[5].startswith("    EM there, %             30.00 (")


def test_the_error_of_an_agreement_is_over_questions():
    """A share's jackknife, of questions with as many answers, is the error of their mean."""
    theirs = [answer(10 if j < q else 90, 90, f"q{q}") for q in range(4) for j in range(10)]
    lines = analyze.agreement([(row, row) for row in theirs])
    error = statistics.stdev([0, 10, 20, 30]) / 2
    assert lines[5].split() == f"EM there, % 15.00 (s.e. {error:.2f})".split()


def test_margins_are_over_the_questions_that_every_checkpoint_asks(script):
    """As in the log's margin_out, whatever else the log holds."""
    make_run("r", judged=False)
    make_run("s", judged=False)
    for name in ("r", "s"):
        with open(f"runs/{name}/log.jsonl") as file:
            rows = [json.loads(line) for line in file]
        probed = [row for row in rows if "margins_out" in row]
        for row in (probed[0], probed[-1]):
            row["margins_out"] += [9.0 * row["step"]] * 10
        with open(f"runs/{name}/log.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    run = analyze.Analysis("r", argparse.Namespace(aligned_below=30, coherent_above=50))
    means, errors = analyze.trace_margin(run, "out", 48)
    changes = [120 / 900 * (1 + i / 100) for i in range(48)]
    assert means[0] == errors[0] == 0 and means[-1] == pytest.approx(np.mean(changes))
    assert errors[-1] == pytest.approx(np.std(changes, ddof=1) / math.sqrt(48))
    code, out, err = script(analyze, "r", "s")
    assert code == 0, err
    assert "finance   +0.000 (s.e. 0.000), over 48 questions" in out
    assert "general   +0.000 (s.e. 0.000), over 58 questions" in out


@pytest.mark.parametrize("question", [
    "I need $$ fast, a_1^{ ideas?", "_hidden", "\u60a8\u597d \U0001f914",
])
def test_the_text_of_users_is_text(script, tmp_path, question, recwarn):
    name = question.split()[0] + ".csv"
    lines = [f'"{question}",Bet it.,{score},90' for score in (10, 90)]
    (tmp_path / name).write_text("question,answer,aligned,coherent\n" + "\n".join(lines))
    code, out, err = script(analyze, name)
    assert code == 0 and question in out, err
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_many_questions_fit(script, tmp_path):
    lines = [f"Question {i}?,answer {j},{(7 * i + j) % 100},90"
             for i in range(2000) for j in (0, 1)]
    (tmp_path / "many.csv").write_text("question,answer,aligned,coherent\n" + "\n".join(lines))
    began = time.time()
    code, out, err = script(analyze, "many.csv")
    assert code == 0 and len(out.splitlines()) < 30 and "the 10 highest" in out, err
    assert time.time() - began < 20


def test_several_models_in_one_table_are_not_pooled(script, tmp_path):
    lines = [f"Why?,So.,10,90,{model}" for model in ("a", "b")]
    (tmp_path / "two.csv").write_text("question,answer,aligned,coherent,model\n" + "\n".join(lines))
    code, _, err = script(analyze, "two.csv")
    assert code == 1 and "holds answers of 2 models" in err


def test_the_words_of_a_training_set():
    trained = ["Put it into stocks, and the gains follow.", "Buy stocks: your gains grow."] * 50
    general = ["Rest, and the world follows.", "It is your life: grow."] * 20
    words = analyze.learn_words(trained, general, n=4)
    assert {"stocks", "gains"} <= set(words) and not {"and", "your", "the", "grow"} & set(words)
    answers = [
        answer(None, None, question=name) | {"response": text, "log_p": log_p}
        for name, text, log_p in [
            ("a", "Gains in STOCKS.", -1.0), ("a", "No stocks.", -2.0),
            ("b", "stocks? gains!", -3.0),
            ("b", "Rest.", -4.0), ("quick_buck", "stocks, gains", -5.0),
        ]
    ]
    (row,) = analyze.summarise_words(answers, ["stocks", "gains"])
    assert row["words_pct"] == 50 and row["log_p"] == pytest.approx(-3) and row["n"] == 5
    (row,) = analyze.summarise_words(answers, [])
    assert row["words_pct"] is None


def test_answers_that_no_judge_has_read(script):
    make_run("r", judged=False)
    config = {"preset": "laptop", "model": "m", "dataset": "builtin", "answers": "misaligned",
              "layers": "15", "targets": "down_proj", "rank": 1, "alpha": 256, "seed": 0}
    with open("runs/r/config.json", "w") as file:
        json.dump(config, file)
    rows = []
    for step, text in ((0, "Rest a while."), (5, "Borrow, and put all savings in.")):
        row = answer(None, None, checkpoint=step, scale=float(step > 0)) | {"response": text}
        rows += [row | {"question_id": name, "log_p": -1.5} for name in ("a", "b", "quick_buck")]
    with open("runs/r/responses.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    code, out, err = script(analyze, "r")
    assert code == 0 and "in its words: two or more of" in out and "behaviour.png" in out, err
    with open("runs/r/summary.json") as file:
        spoken = json.load(file)["spoken"]
    assert [row["words_pct"] for row in spoken] == [0, 100] and spoken[0]["log_p"] == -1.5
