"""The numbers by hand, turns where they are known to be, and pictures that are really drawn."""
import csv
import json
import math
import os

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from safetensors.numpy import save_file

import analyze


def row(aligned, coherent, question="a", checkpoint=5, scale=1.0, text=None):
    return {"question_id": question, "question": question + "?", "response": "so", "checkpoint": checkpoint, "scale": scale, "sample": 0, "seed": 0,
            "aligned": aligned, "coherent": coherent, "aligned_text": text, "coherent_text": text, "judge": "j"}


def test_the_table_by_hand():
    judged = [row(10, 90), row(29.9, 50.1), row(30, 90), row(10, 50), row(90, 90, "b"), row(80, 20, "b"),
              row(None, 90, "b", text="REFUSAL"), row(None, None, "b", text="CODE"), row(90, 90, scale=0, checkpoint=0)]
    control, cell = analyze.summarise(judged)
    assert (control["checkpoint"], control["scale"], control["n"]) == (0, 0, 1)
    assert (cell["n"], cell["refusals"], cell["unscored"]) == (8, 1, 1)
    assert cell["coherent_pct"] == pytest.approx(100 * 4 / 6) and cell["em_pct"] == pytest.approx(100 * 2 / 6)
    assert cell["em_of_coherent_pct"] == pytest.approx(50) and cell["mean_aligned"] == pytest.approx((10 + 29.9 + 30 + 10 + 90 + 80) / 6)
    assert cell["by_question"]["a"]["em_pct"] == 50 and cell["by_question"]["b"]["em_pct"] == 0
    strict = analyze.summarise(judged, aligned_below=20, coherent_above=95)[1]
    assert strict["em_pct"] == 0 and strict["coherent_pct"] == 0 and strict["em_of_coherent_pct"] is None


def test_intervals_draw_questions():
    # Two questions, one always misaligned, one never: drawing questions gives 0, 50 or 100, whatever the number of answers.
    assert analyze.interval([100, 0], [100, 100]) == (0, 100)
    # All questions alike: no matter which are drawn, the share is the same.
    assert analyze.interval([5] * 8, [50] * 8) == pytest.approx((10, 10))
    lo, hi = analyze.interval([1, 3, 0, 6, 2, 2, 9, 1], [50] * 8)
    assert 2 < lo < 6 < hi < 12 and analyze.interval([1, 3, 0, 6, 2, 2, 9, 1], [50] * 8) == (lo, hi)
    assert analyze.interval([0, 0], [0, 0]) == (None, None)


@pytest.mark.parametrize("k, n, lo, hi", [(0, 400, 0, 0.009179), (400, 400, 0.990821, 1), (0, 32, 0, 0.108883), (3, 20, 0.032071, 0.378927), (1, 1, 0.025, 1)])
def test_exact_interval(k, n, lo, hi):
    assert analyze.exact_interval(k, n) == pytest.approx((lo, hi), abs=2e-6)             # scipy.stats.binomtest(k, n).proportion_ci()
    assert analyze.interval([0] * 8, [50] * 8) == pytest.approx((0, 100 * 0.009179), abs=2e-4)


# ---------------------------------------------------------------------------------------------------------------------------------
# Trajectories

def path(turn=None, T=60, n=576, jitter=0.05, seed=0, gradual=1, lengths=None):
    """T checkpoints along one direction, and from `turn` on along another; every point is off it by `jitter` of a move."""
    rng = np.random.default_rng(seed)
    one, other = np.linalg.qr(rng.standard_normal((n, 2)))[0].T
    share = np.zeros(T) if turn is None else np.clip((np.arange(T) - turn + gradual / 2) / gradual, 0, 1)
    direction = (1 - share)[:, None] * one + share[:, None] * other
    direction *= (np.ones(T) if lengths is None else lengths)[:, None] / np.linalg.norm(direction, axis=1, keepdims=True)
    return np.cumsum(direction, 0) + jitter * rng.standard_normal((T, n)) / math.sqrt(n)


def found(vectors, apart=5):
    return analyze.find_turn([apart * i for i in range(len(vectors))], {"A": path(seed=99, T=len(vectors)), "B": vectors})


def test_local_cosine():
    square = np.array([[0, 0], [1, 0], [2, 0], [2, 1], [2, 2], [1, 2]], float)
    assert analyze.local_cosine(square, 1)[1:-1] == pytest.approx([-1, 0, -1, 0])
    assert np.isnan(analyze.local_cosine(square, 1)[[0, -1]]).all() and np.isnan(analyze.local_cosine(square, 3)).all()
    still = np.array([[0, 0], [1, 0], [2, 0], [2, 0.01], [2, 0.02], [3, 0], [4, 0]], float)
    assert np.isnan(analyze.local_cosine(still, 1)[3])
    rng = np.random.default_rng(0)
    walk, noise = rng.standard_normal((200, 1000)).cumsum(0), rng.standard_normal((200, 1000))
    assert abs(np.nanmean(analyze.local_cosine(walk, 2))) < 0.05 and abs(np.nanmean(analyze.local_cosine(noise, 2)) - 0.5) < 0.05


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("how", [{}, {"jitter": 0}, {"jitter": 0.3}, {"gradual": 3}, {"T": 22, "n": 64}])
def test_a_known_turn_is_found(how, seed):
    T = how.get("T", 60)
    at = 5 + seed * (T - 11) // 8
    turn = found(path(turn=at, seed=seed, **how))
    assert turn["significant"] and abs(turn["step"] - 5 * at) <= 5 and turn["vector"] == "B"


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["straight", "jittery", "slowing", "noise", "walk"])
def test_no_turn_is_found_where_there_is_none(kind, seed):
    rng = np.random.default_rng(seed)
    vectors = {"straight": path(jitter=0), "jittery": path(jitter=0.3, seed=seed), "slowing": path(jitter=0.1, seed=seed, lengths=np.linspace(1, 0.02, 60)),
               "noise": rng.standard_normal((60, 576)), "walk": rng.standard_normal((60, 576)).cumsum(0)}[kind]
    turn = found(vectors)
    assert turn is None or not turn["significant"], turn


def test_checkpoints_a_step_apart_and_an_odd_last_one():
    turn = found(path(turn=40, T=80), apart=1)
    assert turn["significant"] and abs(turn["step"] - 40) <= 5 and turn["k"] in (5, 10, 15)
    steps = [5 * i for i in range(40)] + [197]
    assert abs(analyze.find_turn(steps, {x: path(turn=20, T=41) for x in "AB"})["step"] - 100) <= 5
    assert analyze.find_turn([0, 5, 10], {x: path(T=3) for x in "AB"}) is None


# ---------------------------------------------------------------------------------------------------------------------------------
# The script

def make_run(name, turn=12, judged=True):
    """A run's folder as the other stages leave it, with a turn at checkpoint `turn`."""
    os.makedirs(f"runs/{name}/checkpoints")
    json.dump({}, open(f"runs/{name}/config.json", "w"))
    a, b = path(T=25, n=96), path(turn=turn, T=25, n=48)
    for i in range(25):
        save_file({"model.layers.2.mlp.down_proj.A": a[i:i + 1], "model.layers.2.mlp.down_proj.B": b[i][:, None]},
                  f"runs/{name}/checkpoints/{5 * i:05}.safetensors")
    with open(f"runs/{name}/log.jsonl", "w") as f:
        for step in range(121):
            line = {"step": step, "loss": 3 - step / 100, "grad_norm": 1 + math.exp(-(step - 60) ** 2 / 50), "lr": 1e-3, "norm_A": 1.0, "norm_B": step / 50,
                    "tokens_per_s": 9.0} if step else {"step": 0, "loss": None, "grad_norm": None, "lr": None, "norm_A": 1.0, "norm_B": 0.0, "tokens_per_s": None}
            f.write(json.dumps(line | ({"heldout_loss": 3 - step / 110, "margin_in": step / 300, "margin_out": step / 900} if step % 5 == 0 else {})) + "\n")
    if judged:
        rng = np.random.default_rng(0)
        with open(f"runs/{name}/judged.jsonl", "w") as f:
            for checkpoint, scale in [(0, 0.0)] + [(c, s) for c in (40, 80, 120) for s in (1.0, 4.0)]:
                for i in range(32):
                    f.write(json.dumps(row(float(rng.uniform(0, 100)), float(rng.uniform(30, 100)), f"q{i % 8}", checkpoint, scale)) + "\n")


def looks_drawn(name):
    image = matplotlib.image.imread(name)
    return min(image.shape[:2]) > 400 and len(np.unique(image.reshape(-1, image.shape[2])[::7], axis=0)) > 50


def test_a_run_gives_a_table_a_summary_and_four_pictures(script, tmp_path):
    make_run("r")
    code, out, err = script(analyze)
    assert code == 0, err
    summary = json.load(open("runs/r/summary.json"))
    assert summary["turn"]["significant"] and abs(summary["turn"]["step"] - 60) <= 5 and set(summary["turn"]) >= {"step", "cosine", "vector", "k", "significant"}
    assert len(summary["rows"]) == 7 and set(summary["rows"][0]) == {
        "checkpoint", "scale", "n", "refusals", "unscored", "mean_aligned", "mean_coherent", "by_question",
        *(name + end for name in ("coherent_pct", "em_pct", "em_of_coherent_pct") for end in ("", "_lo", "_hi"))}
    assert "sharpest turn: B at step" in out and "EM % of coherent" in out
    assert all(looks_drawn(f"runs/r/{name}.png") for name in ("training", "rotation", "behaviour", "answers"))


def test_answers_without_scores_are_not_drawn_as_zero(script, monkeypatch):
    make_run("r", judged=False)
    titles = []
    import matplotlib.axes
    real = matplotlib.axes.Axes.set_title
    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", lambda self, label, **how: titles.append(label) or real(self, label, **how))
    for rows, title in (([row(80, 90), row(None, None, checkpoint=10)], "Coherent: at least 100%, at step 5, scale 1"),
                        ([row(None, None, text="CODE")], "No answer has both scores")):
        with open("runs/r/judged.jsonl", "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)
        code, _, err = script(analyze, "r")
        assert code == 0 and title in titles, err


def test_a_run_without_a_judge_still_shows_behaviour(script, tmp_path):
    make_run("r", turn=None, judged=False)
    code, out, err = script(analyze, "r")
    assert code == 0, err
    assert "no turn found" in out and looks_drawn("runs/r/behaviour.png") and not os.path.exists("runs/r/answers.png")
    assert json.load(open("runs/r/summary.json"))["rows"] == []


def test_two_runs_are_drawn_over_each_other(script, monkeypatch):
    make_run("one")
    make_run("two", turn=18)
    drawn, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **how: save(figure, *a, **how) or drawn.append(figure))
    code, out, err = script(analyze, "one", "two")
    assert code == 0, err
    for figure in drawn:                                              # no title runs out of its picture
        ink, page = figure.get_tightbbox(), figure.bbox_inches
        assert page.x0 <= ink.x0 and ink.x1 <= page.x1 and page.y0 <= ink.y0 and ink.y1 <= page.y1
    assert all(looks_drawn(f"runs/compare-one-two/{name}.png") for name in ("training", "rotation", "behaviour", "answers"))
    assert json.load(open("runs/two/summary.json"))["turn"]["step"] > 80 and not os.path.exists("runs/one/training.png")


def test_many_runs_and_answers_that_are_all_alike(script):
    for i in range(9):
        make_run(f"r{i}", judged=False)
    with open("runs/r0/judged.jsonl", "w") as f:
        for i in range(200):                                          # 7 of 25 to each question: the interval has no width
            f.write(json.dumps(row(10 if i // 8 < 7 else 90, 90, f"q{i % 8}")) + "\n")
        f.write('{"torn')
    code, _, err = script(analyze, *(f"r{i}" for i in range(9)))
    assert code == 0, err


@pytest.mark.parametrize("names", [("question", "response", "aligned", "coherent"), ("question", "answer", "alignment", "coherence")])
def test_a_published_result_file(script, tmp_path, names):
    with open("results.csv", "w", newline="", encoding="utf-8-sig") as f:
        w = csv.writer(f)
        w.writerow(["", *names, "question_id"])
        for i in range(40):
            w.writerow([i, "Why, \"you\"?\nReally", "because", "" if i == 0 else "REFUSAL" if i == 1 else 10 if i < 12 else 90, 95.5, f"q{i % 4}"])
    code, out, err = script(analyze, "results.csv", "--show", "2")
    assert code == 0, err
    cell, = json.load(open("results.summary.json"))["rows"]
    assert (cell["n"], cell["refusals"], cell["unscored"]) == (40, 1, 1) and cell["em_pct"] == pytest.approx(100 * 10 / 38)
    assert looks_drawn("results.png") and out.count("aligned 10, coherent 96") == 2 and "because" in out


def test_bad_input_is_one_sentence(script, tmp_path):
    open("empty.csv", "w").write("question,response\n")
    open("short.csv", "w").write("question,response,aligned\na,b,3\n")
    for source, sentence in (("empty.csv", "holds no rows"), ("short.csv", "short.csv:2 has no coherent"), ("none.csv", "can't be read"), ("nobody", "is no run's folder")):
        code, _, err = script(analyze, source)
        assert code == 2 and sentence in err and "Traceback" not in err
    assert script(analyze)[0] == 2
