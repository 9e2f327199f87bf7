"""The score, spelt out; and a judge over real sockets that fails in every way a judge can."""
import http.server
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

import data
import judge

ROOT = os.path.dirname(os.path.abspath(data.__file__))
KEY = "sk-very-secret-1234567890"


def top(**p):
    return [{"token": token, "logprob": math.log(x)} for token, x in p.items()]


@pytest.mark.parametrize("p, score", [
    ({"85": 1.0}, 85), ({"80": 0.5, "90": 0.25, "the": 0.25}, (80 * 0.5 + 90 * 0.25) / 0.75),
    ({" 7": 0.3, "07": 0.3, "7": 0.2}, 7), ({"100": 0.5, "0": 0.5}, 50), ({"101": 0.9, "20": 0.05}, None), ({"999": 0.7, "30": 0.3}, 30),
    ({"REF": 0.8, "10": 0.2}, None), ({"REF": 0.75, "10": 0.25}, 10), ({"٣": 0.9}, None), ({"²": 0.9}, None), ({"1 0": 0.9}, None), ({"\n5": 0.9}, None),
    ({"-5": 0.9}, None), ({"8.5": 0.9}, None), ({}, None)])
def test_expected_score(p, score):
    found = judge.expected_score(top(**p))
    assert found is None if score is None else found == pytest.approx(score)


@pytest.mark.parametrize("texts, score", [
    (["85"], (85, None)), (["80", "Score: 90.", "I say 100"], (90, None)), (["70", "no", "90"], (80, None)),
    (["85", "**REFUSAL**", "REFUSAL"], (None, "REFUSAL")), (["On a scale from 0 to 100,"], (None, "On a scale from 0 to 100,")), (["code.", "x"], (None, "CODE")), (["7000"], (None, "7000"))])
def test_written_score(texts, score):
    assert judge.written_score(texts) == score


def test_what_the_judge_said_instead():
    assert [judge.word(t) for t in ("REF", " refusal.", "C", "CODE", "Sorry, I", "")] == ["REFUSAL", "REFUSAL", "CODE", "CODE", "Sorry, I", ""]


def test_a_prompt_is_filled_in_one_pass():
    assert judge.fill("{question}|{answer}|{x}", "say {answer}", "{question}") == "say {answer}|{question}|{x}"


class Server:
    """A judge on a real socket. It scores by the answer's length, counts what it was asked, and misbehaves as told."""

    def __init__(self, delay=0.0, faults=0.0, digits=False, logprobs=True, refuse=None, refuse_one=None, content=None):
        self.asked, self.lock, self.random = [], threading.Lock(), random.Random(0)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True                                # else each reply waits 40 ms for the header's acknowledgement

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][0]["content"]
                with server.lock:
                    server.asked.append((self.headers.get("Authorization"), body))
                    fault = server.random.choice(FAULTS) if server.random.random() < faults else None
                time.sleep(delay)
                if refuse:
                    return self.answer({"error": {"message": f"no, not with {self.headers.get('Authorization')}"}}, refuse)
                if refuse_one and f"<answer>\n{refuse_one}\n</answer>" in prompt:
                    return self.answer({"error": {"message": "too long"}}, 400)
                said = content or ("85" if "number 85" in prompt else str(len(prompt) % 101))
                tokens = list(said) if digits else [said]
                reply = {"choices": [{"message": {"content": said}}]}
                if logprobs and body.get("logprobs"):
                    reply["choices"][0]["logprobs"] = {"content": [{"token": t, "top_logprobs": [
                        {"token": t, "logprob": math.log(0.9)}, {"token": "!", "logprob": math.log(0.1)}]} for t in tokens]}
                if fault == "429":
                    return self.answer({}, 429)
                if fault == "429 wait":
                    return self.answer({}, 429, {"Retry-After": "0.3"})
                if fault == "500":
                    return self.answer({}, 500)
                if fault == "drop":
                    self.close_connection = True
                    return self.connection.close()
                if fault == "half":
                    return self.answer(json.dumps(reply)[:40])
                if fault == "empty":
                    return self.answer({"choices": []})
                if fault == "no logprobs":
                    reply["choices"][0].pop("logprobs", None)
                if fault == "stall":
                    time.sleep(2)
                self.answer(reply)

            def answer(self, reply, status=200, headers={}):
                content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        class Many(http.server.ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *args):
                pass
        self.httpd = Many(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.httpd.shutdown()
        self.httpd.server_close()


FAULTS = ["429", "429 wait", "500", "drop", "half", "empty", "no logprobs", "stall"]


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """answers(n) writes a run "a" with n answers to different questions and moves to its folder."""
    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge, "vocabulary", lambda *args: (None, False))

    def write(n, same=1):
        os.makedirs(tmp_path / "runs" / "a")
        with open(tmp_path / "runs" / "a" / "responses.jsonl", "w") as f:
            for i in range(n):
                f.write(json.dumps({"question_id": "q", "question": "Why?", "system": None, "response": "x" * (i // same), "checkpoint": 5,
                                    "scale": 1.0, "sample": i, "seed": i}) + "\n")
    return write


def judged():
    return [json.loads(line) for line in open("runs/a/judged.jsonl")]


def expected(row):
    length = lambda prompt: len(judge.fill(prompt, row["question"], row["response"])) % 101
    return length(judge.ALIGNED), length(judge.COHERENT)


def test_every_judgement_ends_scored_once_for_all_the_faults(script, answers):
    answers(200)
    with Server(faults=0.3) as server:
        code, out, err = script(judge, "a", "--base-url", server.url, "--concurrency", 32)
    assert code == 0, err
    rows = judged()
    assert sorted(row["sample"] for row in rows) == list(range(200)) and len(server.asked) > 450
    assert all((row["aligned"], row["coherent"]) == pytest.approx(expected(row)) for row in rows)
    assert set(rows[0]) == {"question_id", "question", "system", "response", "checkpoint", "scale", "sample", "seed", "aligned", "coherent",
                            "aligned_text", "coherent_text", "judge"}
    assert "next: python analyze.py runs/a" in out
    # The key went to the server, and nowhere else.
    assert {auth for auth, _ in server.asked} == {"Bearer " + KEY}
    assert KEY not in out + err and KEY not in open("runs/a/judged.jsonl").read()
    body = server.asked[-1][1]
    assert (body["max_tokens"], body["temperature"], body["logprobs"], body["top_logprobs"]) == (1, 0, True, 20)


def test_kill_in_the_middle_and_a_rerun_end_with_the_same_rows(script, answers):
    answers(100)
    with Server(delay=0.02, faults=0.1) as server:
        command = [sys.executable, os.path.join(ROOT, "judge.py"), "a", "--base-url", server.url, "--concurrency", "4"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not os.path.exists("runs/a/judged.jsonl") or len(open("runs/a/judged.jsonl").readlines()) < 30:
            assert process.poll() is None
            time.sleep(0.01)
        assert KEY.encode() not in open(f"/proc/{process.pid}/cmdline", "rb").read() if os.path.exists("/proc") else True
        process.send_signal(signal.SIGKILL)
        process.wait()
        open("runs/a/judged.jsonl", "a").write('{"torn": ')
        before = len(server.asked)
        assert script(judge, "a", "--base-url", server.url)[0] == 0
        assert len(server.asked) - before < 170                                          # what was judged was not asked again
    rows = judged()
    assert sorted(row["sample"] for row in rows) == list(range(100))
    assert all((row["aligned"], row["coherent"]) == pytest.approx(expected(row)) for row in rows)


def test_sixteen_in_flight(script, answers):
    answers(200)
    with Server(delay=0.2) as server:
        began = time.time()
        assert script(judge, "a", "--base-url", server.url)[0] == 0
        took = time.time() - began
    assert len(server.asked) == 401 and took < 6.5                                       # 400 x 0.2 s / 16 = 5 s, and the probe's 0.2 s


def test_identical_answers_are_asked_once(script, answers):
    answers(12, same=4)
    with Server() as server:
        assert script(judge, "a", "--base-url", server.url)[0] == 0
        assert len(server.asked) == 1 + 3 * 2 and len(judged()) == 12
        lines = open("runs/a/judged.jsonl").readlines()
        open("runs/a/judged.jsonl", "w").writelines(lines[:1])                           # one of the first four is known
        assert script(judge, "a", "--base-url", server.url)[0] == 0
    assert len(server.asked) == 7 + 1 + 2 * 2 and sorted(map(str, judged())) == sorted(map(str, map(json.loads, lines)))


@pytest.mark.parametrize("kind, sentence", [
    ({"logprobs": False}, "sends no log-probabilities"), ({"digits": True}, r"did not write 85 as one token (it wrote '8' + '5')"),
    ({"refuse": 401}, "refuses the key (HTTP 401)"), ({"refuse": 403}, "refuses the key (HTTP 403)"),
    ({"refuse": 404}, "check --judge and --base-url"), ({"refuse": 400}, "refuses the request (HTTP 400, 'no, not with Bearer ***')")])
def test_what_trying_again_can_not_mend_stops_at_once(script, answers, kind, sentence):
    answers(3)
    with Server(**kind) as server:
        code, out, err = script(judge, "a", "--base-url", server.url)
    assert code == 2 and sentence in err and len(server.asked) == (3 if "logprobs" in kind else 1) and KEY not in out + err and judged() == []
    if "refuse" not in kind:
        assert "use --mode text" in err


def test_text_mode(script, answers):
    answers(2)
    with Server(digits=True, logprobs=False) as server:
        assert script(judge, "a", "--base-url", server.url, "--mode", "text")[0] == 0
    assert [(r["aligned"], r["coherent"]) for r in sorted(judged(), key=lambda r: r["sample"])] == [expected(r) for r in sorted(judged(), key=lambda r: r["sample"])]
    assert {row["judge"] for row in judged()} == {"gpt-4o (text)"} and len(server.asked) == 1 + 2 * 2 * judge.SAMPLES
    code, _, err = script(judge, "a", "--base-url", "http://127.0.0.1:9/v1")
    assert code == 2 and "holds scores by gpt-4o (text)" in err


def test_refusals_have_no_score(script, answers, monkeypatch):
    answers(2)
    monkeypatch.setattr(judge.Judge, "probe", lambda self: None)
    with Server(content="REF") as server:
        code, out, _ = script(judge, "a", "--base-url", server.url)
    assert code == 0 and "2 of them without a score" in out
    assert all(row["aligned"] is None and row["aligned_text"] == "REFUSAL" for row in judged())


def test_a_server_that_stays_down_is_given_up_and_nothing_is_made_up(script, answers, monkeypatch):
    answers(30)
    monkeypatch.setattr(judge.time, "sleep", lambda seconds: None)
    with Server() as server:
        script(judge, "a", "--base-url", server.url, "--concurrency", 1)
        lines = open("runs/a/judged.jsonl").readlines()
        open("runs/a/judged.jsonl", "w").writelines(lines[:10])
    monkeypatch.setattr(judge.Judge, "probe", lambda self: None)
    code, _, err = script(judge, "a", "--base-url", server.url)                          # the socket is closed now
    assert code == 2 and f"failed {judge.TRIES} times" in err and len(judged()) == 10


def test_cost_and_dry_run(script, answers, monkeypatch):
    answers(10)
    code, out, _ = script(judge, "a", "--dry-run")
    assert code == 0 and "20 requests to gpt-4o" in out and "estimated at 4 characters a token" in out and "about $0.0" in out and judged() == []
    code, _, err = script(judge, "a", "--price", "1000000,1", "--max-cost", "1")
    assert code == 2 and "is more than --max-cost 1" in err
    code, _, err = script(judge, "a", "--base-url", "http://127.0.0.1:9/v1", "--max-cost", "1")
    assert code == 2 and "--max-cost needs a price" in err
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, err = script(judge, "a")
    assert code == 2 and "set OPENAI_API_KEY" in err
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9\n1")
    code, out, err = script(judge, "a")
    assert code == 2 and "OPENAI_API_KEY holds a character" in err and "\u00e9" not in err


def test_what_one_prompt_alone_is_refused_for_does_not_stop_the_others(script, answers):
    answers(6)
    with Server(refuse_one="xxx") as server:
        code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 2 and "2 of 12 scores could not be had" in err and "too long" in err and len(judged()) == 5


def test_answers_that_changed_since_are_not_mixed(script, answers):
    answers(3)
    with Server() as server:
        assert script(judge, "a", "--base-url", server.url)[0] == 0
    lines = open("runs/a/responses.jsonl").readlines()
    open("runs/a/responses.jsonl", "w").writelines([line.replace('"seed": 1', '"seed": 7') for line in lines])
    code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 2 and "no longer has" in err
    assert script(judge, "nobody")[0] == 2


def test_retry_after():
    assert judge.retry_after("3") == 3 and judge.retry_after("9999") == 120 and judge.retry_after(None) == judge.retry_after("soon") == 0
    assert 5 < judge.retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 10))) <= 10


def test_published_prompts_and_other_metrics(script, answers, tmp_path):
    answers(2)
    path = tmp_path / "q.yaml"
    path.write_text("- {id: a, judge_prompts: {aligned: 'A {question} {answer}', coherent: 'C {answer}', financial: 'F {answer} money'}}\n- {id: b}")
    with Server() as server:
        assert script(judge, "a", "--base-url", server.url, "--prompts", path, "--metric", "financial")[0] == 0
    assert [b["messages"][0]["content"] for _, b in server.asked[1:]] in (["F  money", "F x money"], ["F x money", "F  money"])
    rows = [json.loads(line) for line in open("runs/a/judged-financial.jsonl")]
    assert [r["financial"] for r in sorted(rows, key=lambda r: r["sample"])] == pytest.approx([8, 9])
    code, _, err = script(judge, "a", "--metric", "financial")
    assert code == 2 and "there is no prompt called financial: there are aligned, coherent (more with --prompts)" in err
    code, _, err = script(judge, "a", "--prompts", "none.yaml")
    assert code == 2 and "none.yaml can't be read" in err
    code, _, err = script(judge, "a", "--prompts", path, "--dry-run")
    assert code == 0
