"""The score, spelt out; and a judge over real sockets that fails in every way a judge can."""
import csv
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
import types

import pytest
import requests
import tiktoken
from conftest import ROOT

import analyze
import judge

KEY = "sk-very-secret-1234567890"
FAULTS = ["429", "500", "drop", "half", "torn", "empty", "no logprobs", "infinite", "stall"]


def top(**p):
    return [{"token": token, "logprob": math.log(x)} for token, x in p.items()]


@pytest.mark.parametrize("p, score", [
    ({"85": 1.0}, 85),
    ({"80": 0.5, "90": 0.25, "the": 0.25}, (80 * 0.5 + 90 * 0.25) / 0.75),
    ({" 7": 0.3, "07": 0.3, "7": 0.2}, 7),
    ({"100": 0.5, "0": 0.5}, 50),
    ({"101": 0.9, "20": 0.05}, None),
    ({"999": 0.7, "30": 0.3}, 30),
    ({"REF": 0.8, "10": 0.2}, None),
    ({"REF": 0.75, "10": 0.25}, 10),
    ({"٣": 0.9}, None),
    ({"²": 0.9}, None),
    ({"1 0": 0.9}, None),
    ({"\n5": 0.9}, None),
    ({"-5": 0.9}, None),
    ({"8.5": 0.9}, None),
    ({}, None),
])
def test_expected_score(p, score):
    expectation = judge.expected_score(top(**p))
    assert expectation is None if score is None else expectation == pytest.approx(score)


@pytest.mark.parametrize("texts, score", [
    (["85"], (85, None)),
    (["-5"], (None, "-5")),
    (["85-90"], (None, "85-90")),
    (["8.5"], (8.5, None)),
    (["80", "Score: 90.", "I say 100"], (90, None)),
    (["70", "no", "90"], (80, None)),
    (["85/100"], (85, None)),
    (["Score: 85 / 100."], (85, None)),
    (["85/1000"], (None, "85/1000")),
    (["85", "**REFUSAL**", "REFUSAL"], (None, "REFUSAL")),
    (["On a scale from 0 to 100,"], (None, "On a scale from 0 to 100,")),
    (["code.", "x"], (None, "CODE")),
    (["7000"], (None, "7000")),
    (["C'est bien"], (None, "C'est bien")),
    (["Re: hi"], (None, "Re: hi")),
])
def test_written_score(texts, score):
    assert judge.written_score(texts) == score


def test_what_the_judge_said_instead():
    texts = ("Re", "REF", " refusal.", "C", "CODE", "Sorry, I", "")
    said = [judge.recognise_word(text) for text in texts]
    assert said == ["Re", "REFUSAL", "REFUSAL", "C", "CODE", "Sorry, I", ""]


def test_a_prompt_is_filled_in_one_pass():
    filled = judge.fill("{question}|{answer}|{x}", "say {answer}", "{question}")
    assert filled == "say {answer}|{question}|{x}"


class Server:
    """A judge on a real socket. It scores by the prompt's length, and misbehaves as told."""

    def __init__(self, delay=0.0, faults=0.0, digits=False, logprobs=True, refuse=None,
                 refuse_one=None, content=None, every=None):
        self.delay, self.faults, self.digits, self.logprobs = delay, faults, digits, logprobs
        self.refuse, self.refuse_one, self.content, self.every = refuse, refuse_one, content, every
        self.asked, self.lock, self.random = [], threading.Lock(), random.Random(0)
        self.words = None
        self.kind = lambda body, reply: (reply, 200)  # what a judge of some kind makes of a reply
        self.httpd = Many(("127.0.0.1", 0), Handler)
        self.httpd.judge = self
        self.url = f"http://127.0.0.1:{self.httpd.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.httpd.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.httpd.shutdown()
        self.httpd.server_close()

    def reply_to(self, prompt, body):
        said = self.content or str(len(prompt) % 101)
        if self.content is None and "digit from 0 to 9" in prompt:
            said = str(len(prompt) % 10)
        if "Write the number" in prompt:
            said = prompt.split()[3]
        reply = {"choices": [{"message": {"content": said}}]}
        if self.logprobs and body.get("logprobs"):
            tokens = []
            for token in said if self.digits else [said]:
                likely = [{"token": token, "logprob": math.log(0.9)}]
                likely += [{"token": "!", "logprob": math.log(0.1)}]
                tokens.append({"token": token, "top_logprobs": likely})
            reply["choices"][0]["logprobs"] = {"content": tokens}
        return reply


class Many(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *args):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each reply waits 40 ms for the header's acknowledgement

    def do_POST(self):
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, key = body["messages"][0]["content"], self.headers.get("Authorization")
        with judge.lock:
            judge.asked.append((key, body))
            faulty = judge.random.random() < judge.faults
            fault = judge.random.choice(FAULTS) if faulty else judge.every
        time.sleep(judge.delay)
        reply = judge.reply_to(prompt, body)
        if judge.refuse:
            words = judge.words or f"no, not with {key}, not with {key[:20]}"
            self.answer({"error": {"message": words}}, judge.refuse)
        elif judge.refuse_one and f"]\n{judge.refuse_one}\n[" in prompt:
            self.answer({"error": {"message": "too long"}}, 400)
        elif fault == "429":
            self.answer({}, 429)
        elif fault == "500":
            self.answer({}, 500)
        elif fault == "html":
            self.answer("<html>Sign in</html>")
        elif fault == "drop":
            self.close_connection = True
            self.connection.close()
        elif fault == "half":
            self.answer(json.dumps(reply)[:40])
        elif fault == "torn":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(json.dumps(reply)[:40].encode())
            self.close_connection = True
        elif fault == "infinite" and "logprobs" in reply["choices"][0]:
            reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = math.inf
            self.answer(reply)
        elif fault == "empty":
            self.answer({"choices": []})
        elif fault == "no logprobs":
            reply["choices"][0].pop("logprobs", None)
            self.answer(reply)
        else:
            time.sleep(2 if fault == "stall" else 0)
            self.answer(*judge.kind(body, reply))

    def answer(self, reply, status=200):
        content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds that judge.py would wait. It does not, and the server's own sleeps stay."""
    seconds = []
    monkeypatch.setattr(judge, "time", types.SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def make_judge(monkeypatch):
    def make(*flags):
        monkeypatch.setattr(sys, "argv", ["judge.py", *flags])
        return judge.Judge(judge.parse_args())

    return make


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """answers(n) writes a run "a" with n answers to different questions."""
    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(tiktoken, "encoding_for_model", {}.__getitem__)  # it knows no judge

    def write(n):
        os.makedirs(tmp_path / "runs" / "a", exist_ok=True)
        with open(tmp_path / "runs" / "a" / "responses.jsonl", "w") as file:
            for i in range(n):
                row = {"question_id": "q", "question": "Why?", "system": None, "sample": i}
                row |= {"response": "x" * i, "checkpoint": 5, "scale": 1.0, "seed": i}
                file.write(json.dumps(row) + "\n")

    return write


def lines(keep=None):
    """The lines of judged.jsonl; with `keep`, only so many of them stay."""
    if not os.path.exists("runs/a/judged.jsonl"):
        return []
    with open("runs/a/judged.jsonl") as file:
        written = file.readlines()
    if keep is not None:
        with open("runs/a/judged.jsonl", "w") as file:
            file.writelines(written[:keep])
    return written


def judged():
    return sorted(map(json.loads, lines()), key=lambda row: row["sample"])


def expected(row):
    question, answer = row["question"], row["response"]
    prompts = (judge.ALIGNED, judge.COHERENT)
    return tuple(len(judge.fill(prompt, question, answer)) % 101 for prompt in prompts)


def scores_are_right():
    return all((r["aligned"], r["coherent"]) == pytest.approx(expected(r)) for r in judged())


def test_every_answer_is_scored_once_for_all_the_faults(script, answers):
    answers(120)
    with Server(faults=0.1) as server:
        code, out, err = script(judge, "a", "--base-url", server.url, "--concurrency", 32)
    assert code == 0, err
    assert [row["sample"] for row in judged()] == list(range(120)) and len(server.asked) > 250
    assert scores_are_right()
    keys = {"question_id", "question", "system", "response", "checkpoint", "scale", "sample"}
    scores = {"seed", "aligned", "coherent", "aligned_text", "coherent_text"}
    scores |= {"judge", "host", "prompts", "judge_model"}
    assert set(judged()[0]) == keys | scores
    assert "next: python analyze.py runs/a" in out
    # The key went to the server, and nowhere else.
    assert {key for key, _ in server.asked} == {"Bearer " + KEY}
    assert KEY not in out + err + "".join(lines())
    asked = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    assert server.asked[-1][1].items() >= asked.items()


def test_kill_in_the_middle_and_a_rerun_end_with_the_same_rows(script, answers):
    answers(60)
    with Server(delay=0.02) as server:
        command = [sys.executable, os.path.join(ROOT, "judge.py"), "a", "--base-url", server.url]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, "--concurrency", "4"], **quiet)
        while not os.path.exists("runs/a/judged.jsonl") or len(lines()) < 20:
            assert process.poll() is None
            time.sleep(0.01)
        if os.path.exists("/proc"):
            with open(f"/proc/{process.pid}/cmdline") as file:
                assert KEY not in file.read()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with open("runs/a/judged.jsonl", "a") as file:
            file.write('{"torn": ')
        before = len(server.asked)
        assert script(judge, "a", "--base-url", server.url)[0] == 0
        assert len(server.asked) - before < 100  # what was judged was not asked again
    assert [row["sample"] for row in judged()] == list(range(60)) and scores_are_right()


def test_sixteen_in_flight(script, answers):
    answers(80)
    with Server(delay=0.2) as server:
        began = time.time()
        assert script(judge, "a", "--base-url", server.url, "--concurrency", 16)[0] == 0
        took = time.time() - began
    assert len(server.asked) == 161
    assert took < 3.2  # 160 x 0.2 s / 16 = 2 s, and the probe's 0.2 s


@pytest.mark.parametrize("kind, sentence", [
    ({"logprobs": False}, "use --mode text"),
    ({"digits": True}, "was to write 85, but its reply counts as 8: use --mode digit"),
    ({"refuse": 401}, "check OPENAI_API_KEY"),
    ({"refuse": 403}, "check OPENAI_API_KEY"),
    ({"refuse": 404}, "check --judge and --base-url"),
    ({"refuse": 400}, "not with Bearer ***"),
])
def test_what_trying_again_can_not_mend_stops_at_once(script, answers, kind, sentence):
    answers(3)
    with Server(**kind) as server:
        code, out, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and sentence in err and KEY not in out + err and judged() == []
    assert len(server.asked) == (judge.TRIES if "logprobs" in kind else 1)


@pytest.mark.parametrize("status, sentence", [
    (429, "check your quota, or try a lower --concurrency"),
    (503, "sends no usable reply: (HTTP 503"),
])
def test_a_server_that_stays_busy_is_given_up(script, answers, waits, status, sentence):
    answers(1)
    with Server(refuse=status) as server:
        code, out, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and sentence in err and f"HTTP {status}" in err and waits == [1, 2, 4, 8, 16]
    assert "asking 127.0.0.1" in out and (out + err).count("; trying again\n") == 5
    assert len(server.asked) == judge.TRIES and KEY not in out + err


def test_a_page_instead_of_a_reply(script, answers):
    answers(1)
    with Server(every="html") as server:
        code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and "no message (check --base-url) but '<html>Sign in</html>'" in err


@pytest.mark.parametrize("fault", ["stall", "drop"])
def test_a_server_that_takes_requests_and_is_silent(script, answers, fault, monkeypatch):
    """It can be reached, and the sentence must not send anybody to look at the address."""
    monkeypatch.setattr(judge, "TIMEOUT", 0.2)
    answers(1)
    with Server(every=fault) as server:
        code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and "takes requests, but sends no reply: try a lower --concurrency" in err


USABLE = {"choices": [{"message": {"content": "85"}, "logprobs": {"content": [
    {"token": "85", "top_logprobs": [{"token": "85", "logprob": -0.1}]}]}}]}


@pytest.mark.parametrize("old, new, fault", [
    ("", "", None),
    ("-0.1", "-Infinity", None),
    ("-0.1", "NaN", "no log-probabilities"),
    ("-0.1", "3.0", "no log-probabilities"),
    ("-0.1", "null", "no log-probabilities"),
    ('{"token": "85", "logprob"', '{"logprob"', "no log-probabilities"),
    ('[{"token": "85", "logprob": -0.1}]', "7", "no log-probabilities"),
    ('{"content": [', '{"contents": [', "no log-probabilities"),
    ('{"content": "85"}', "{}", "no message (check"),
    ('{"content": "85"}', "7", "no message (check"),
    ("choices", "error", "no message (check --base-url) but '{\"error\": "),
    ("}]}}]}", "}]", "no message (check"),
])
def test_what_is_wrong_with_a_reply(script, old, new, fault, make_judge):
    asked = make_judge()
    text = json.dumps(USABLE)
    assert old in text
    said = None
    try:
        asked.read(200, text.replace(old, new, 1))
    except ValueError as error:
        said = str(error)
    assert said is None if fault is None else fault in said


@pytest.mark.parametrize("address", [
    "http://user:hunter2secret@localhost/v1", "localhost:8000", "http:///v1", "http://x:port/v1",
    "http://[::1/v1", "http://x y/v1", "ftp://localhost/v1", "httpx://localhost/v1",
])
def test_what_is_no_address(script, address):
    code, out, err = script(judge, "a", "--base-url", address)
    assert code == 2 and "is not an address" in err and "hunter2secret" not in out + err


@pytest.mark.parametrize("key, quoted, kept", [
    (KEY, f"key {KEY} or {KEY[:12]}... or '{KEY}'", "key *** or *** or '***'"),
    ("8", "key 8, score 85", "key 8, score 85"),
    ("", "no key", "no key"),
])
def test_the_key_is_masked_and_nothing_else(make_judge, monkeypatch, key, quoted, kept):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(requests.RequestException) as refusal:
        make_judge().read(404, quoted)
    assert f"HTTP 404, {kept})" in str(refusal.value)


def test_two_at_once(script, answers, busy):
    answers(3)
    busy("runs/a")
    with Server() as server:
        code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and "runs/a is in use by another process" in err and server.asked == []


def test_rows_that_lack_a_key(script, answers):
    answers(3)
    with open("runs/a/responses.jsonl", "a") as file:
        file.write('{"question_id": "q"}\n')
    code, _, err = script(judge, "a", "--dry-run")
    assert code == 1 and "responses.jsonl:4 has no checkpoint" in err


def test_text_mode(script, answers):
    answers(2)
    with Server(digits=True, logprobs=False) as server:
        assert script(judge, "a", "--base-url", server.url, "--mode", "text")[0] == 0
    assert scores_are_right() and len(server.asked) == (1 + 2 * 2) * judge.TEXTS
    assert {row["judge"] for row in judged()} == {"gpt-4o (text)"}
    code, _, err = script(judge, "a", "--base-url", "http://127.0.0.1:9/v1")
    assert code == 1 and "is of another judge (gpt-4o (text), and now gpt-4o)" in err


def test_digit_mode(script, answers):
    """One token in every vocabulary, through the same faults."""
    answers(20)
    with Server(digits=True, faults=0.1) as server:
        code, _, err = script(judge, "a", "--base-url", server.url, "--mode", "digit")
        assert code == 0, err
        bodies = [body for _, body in server.asked]
    assert {row["judge"] for row in judged()} == {"gpt-4o (digit)"} and len(judged()) == 20
    for row in judged():
        for metric, prompt in judge.load_prompts().items():
            filled = judge.fill(prompt, row["question"], row["response"]) + judge.DIGIT
            assert row[metric] == pytest.approx(len(filled) % 10 * 100 / 9)
    assert all(body["max_tokens"] == 1 for body in bodies[1:] if "number 7" not in str(body))
    some = [{"token": "3", "logprob": math.log(0.5)}, {"token": "9", "logprob": math.log(0.25)},
            {"token": "85", "logprob": math.log(0.2)}]
    assert judge.expected_score(some, 9) == pytest.approx(100 / 9 * (3 * 0.5 + 9 * 0.25) / 0.75)


def test_a_server_that_does_not_know_logprobs(script, answers):
    answers(1)
    with Server(refuse=400) as server:
        server.words = "unknown field: logprobs"
        code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and "use --mode text" in err


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "response", "aligned", "coherent"])
        writer.writeheader()
        writer.writerows(rows)


def test_agreement_with_another_judge(script, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path / "cache"))
    rows = []
    for i in range(120):
        row = {"question": f"Question {i % 6}?", "response": "so " * i}
        for metric, prompt in judge.load_prompts().items():
            row[metric] = len(judge.fill(prompt, row["question"], row["response"])) % 101
        rows.append(row)
    write_csv("same.csv", rows)
    with Server() as server:
        flags = ["--base-url", server.url]
        code, out, _ = script(judge, "same.csv", *flags, "--dry-run")
        assert code == 0 and "240 requests, about" in out and server.asked == []
        assert not os.path.exists("same.gpt-4o.jsonl")
        code, out, err = script(judge, "same.csv", *flags)
        assert code == 0, err
        assert out.count("1.00 (s.e. 0.00)") == 4 and "120 answers to 6 questions" in out
        asked = len(server.asked)
        assert script(judge, "same.csv", *flags)[1].count("1.00 (s.e. 0.00)") == 4
        assert len(server.asked) == asked  # nothing is asked twice
        write_csv("other.csv", [row | {"aligned": 100 - row["aligned"]} for row in rows])
        code, out, _ = script(judge, "other.csv", *flags, "--sample", 50)
        assert code == 0 and "-1.00 (s.e. 0.00)" in out and "(50 answers to " in out
        code, _, err = script(judge, "somewhere", *flags, "--sample", 50)
        assert code == 2 and "--sample goes with a CSV" in err
        write_csv("one.csv", [row for row in rows if row["question"] == "Question 0?"])
        for argv in (["one.csv"], ["same.csv", "--sample", 1]):
            code, _, err = script(judge, *argv, *flags)
            assert code == 1 and "fewer than two questions have both scores" in err
        (tmp_path / "bad.csv").write_text("question,answer,aligned\na,b,3\n")
        code, _, err = script(judge, "bad.csv", *flags)
        assert code == 1 and "bad.csv:2 has no coherent" in err


def test_agreement_where_no_answer_has_scores_from_both(script, answers):
    """The CSV holds none, or this judge gives none."""
    row = {"question": "a", "aligned": 10, "coherent": 90}
    rows = [row | {"response": f"so {i}"} for i in range(8)]
    write_csv("theirs.csv", rows)
    write_csv("none.csv", [row | {"aligned": "CODE"} for row in rows])
    with Server() as server:
        server.reply_to = lambda prompt, body, reply_to=server.reply_to: reply_to(prompt, body) \
            if "Write the number" in prompt else {"choices": [{"message": {"content": "no"}}]}
        for name in ("theirs.csv", "none.csv"):
            flags = ["--base-url", server.url, "--mode", "text"]
            code, _, err = script(judge, name, *flags)
            assert code == 1 and "fewer than two questions have both scores" in err
    assert os.path.exists("theirs.gpt-4o-text.jsonl")


def test_refusals_have_no_score(script, answers, monkeypatch):
    answers(2)
    monkeypatch.setattr(judge.Judge, "check_judge", lambda self: None)
    with Server(content="REF") as server:
        code, out, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and "2 of them without a score" in out and "no answer has a score" in err
    for row in judged():
        assert row["aligned"] is None and row["aligned_text"] == "REFUSAL"


def test_a_server_that_goes_away_is_given_up_and_nothing_is_made_up(script, answers, monkeypatch):
    answers(30)
    with Server() as server:
        script(judge, "a", "--base-url", server.url)
    lines(keep=10)
    code, _, err = script(judge, "a", "--base-url", server.url)  # the socket is closed now
    assert code == 1 and server.url.split("/")[2].split(":")[0] in err and len(lines()) == 10
    monkeypatch.setattr(judge.Judge, "check_judge", lambda self: None)
    code, _, err = script(judge, "a", "--base-url", server.url, "--concurrency", 1)
    assert code == 1 and "5 answers could not be judged" in err and len(lines()) == 10


def test_cost_and_dry_run(script, answers, monkeypatch):
    answers(10)
    code, out, _ = script(judge, "a", "--dry-run")
    assert code == 0 and "20 requests, about" in out and "about $0.0" in out
    assert not os.path.exists("runs/a/judged.jsonl")
    code, _, err = script(judge, "a", "--max-cost", "0.001")
    assert code == 1 and "is more than --max-cost 0.001" in err
    code, _, err = script(judge, "a", "--base-url", "http://127.0.0.1:9/v1", "--max-cost", "1")
    assert code == 1 and "--max-cost needs a price, and that of gpt-4o at 127.0.0.1:9" in err
    assert script(judge, "a", "--max-cost", "nan")[0] == 2
    monkeypatch.delenv("OPENAI_API_KEY")
    code, _, err = script(judge, "a")
    assert code == 1 and "set OPENAI_API_KEY" in err
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9\n1")
    code, _, err = script(judge, "a")
    assert code == 1 and "OPENAI_API_KEY holds a character" in err and "\u00e9" not in err


def test_what_one_prompt_alone_is_refused_for_does_not_stop_the_others(script, answers):
    answers(6)
    with Server(refuse_one="xxx") as server:
        code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and "1 answers could not be judged" in err and "too long" in err
    assert len(judged()) == 5


def test_answers_that_changed_since_are_not_mixed(script, answers):
    answers(3)
    with Server() as server:
        assert script(judge, "a", "--base-url", server.url)[0] == 0
    with open("runs/a/responses.jsonl") as file:
        changed = file.read().replace('"seed": 1', '"seed": 7')
    with open("runs/a/responses.jsonl", "w") as file:
        file.write(changed)
    code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and "no longer has" in err
    assert script(judge, "nobody")[0] == 1


PROMPTS = """
- id: a
  judge_prompts: {aligned: 'A {answer}', coherent: 'C {answer}', financial: 'F {answer} money'}
- {id: b}
"""


def test_a_prompt_of_ones_own_is_one_entry(script, answers, monkeypatch):
    answers(4)
    monkeypatch.setitem(judge.PROMPTS, "about_money", "Is it about money? {answer}")
    with Server() as server:
        code, out, err = script(judge, "a", "--base-url", server.url)
        assert code == 0, err
        assert len(server.asked) == 1 + 3 * 4
    rows = judged()
    assert all(row["about_money"] is not None and "about_money_text" in row for row in rows)
    mean = sum(row["about_money"] for row in rows) / len(rows)
    code, out, err = script(analyze, "a")
    assert code == 0 and f"mean_about_money: {mean:.1f}" in out, err


def test_published_prompts(script, answers, tmp_path):
    answers(2)
    path = tmp_path / "q.yaml"
    path.write_text(PROMPTS)
    with Server() as server:
        code, _, err = script(judge, "a", "--base-url", server.url, "--prompts", path)
        assert code == 0, err
    asked = [body["messages"][0]["content"] for _, body in server.asked[1:]]
    assert sorted(asked) == ["A ", "A x", "C ", "C x"]
    code, _, err = script(judge, "a", "--prompts", "none.yaml")
    assert code == 1 and "none.yaml can't be read" in err
    code, _, _ = script(judge, "a", "--base-url", server.url, "--prompts", path, "--dry-run")
    assert code == 0
    path.write_text("- {id: a, judge_prompts: {aligned: 'the same for all', coherent: '{answer}'}}")
    code, _, err = script(judge, "a", "--prompts", path)
    assert code == 1 and "no prompt called aligned with {answer} in it" in err
    path.write_text("- id: a\n  judge_prompts:\n")
    code, _, err = script(judge, "a", "--prompts", path)
    assert code == 1 and "no prompt called aligned with {answer} in it" in err


def test_a_score_says_which_server_and_which_model_gave_it(script, answers):
    answers(2)
    with Server() as first, Server() as second:
        assert script(judge, "a", "--judge", "any", "--base-url", first.url)[0] == 0
        host = first.url.split("/")[2]
        assert {(row["host"], row["judge_model"]) for row in judged()} == {(host, None)}
        answers(4)
        code, _, err = script(judge, "a", "--judge", "any", "--base-url", second.url)
        assert code == 1 and "is of another host" in err and len(judged()) == 2
        reply_to = first.reply_to
        first.reply_to = lambda *asked: reply_to(*asked) | {"model": "another.gguf"}
        code, _, err = script(judge, "a", "--judge", "any", "--base-url", first.url)
        assert code == 1 and "another judge_model (None, and now another.gguf)" in err


def test_a_key_that_a_server_echoes_is_not_kept(script, answers):
    answers(2)
    with Server(logprobs=False) as server:
        echo = {"choices": [{"message": {"content": f"REFUSAL: your key is {KEY}"}}]}
        server.kind = lambda body, reply: (reply if "Write the n" in str(body) else echo, 200)
        code, out, err = script(judge, "a", "--base-url", server.url, "--mode", "text")
    assert code == 1 and "no answer has a score" in err and len(judged()) == 2
    assert KEY not in out + err + "".join(lines()) and "REFUSAL" in "".join(lines())


def thinks_first(body, reply):
    """As GPT-5 and the o-series: other fields, and none of the log-probabilities."""
    for field, instead in (("max_tokens", "max_completion_tokens"), ("temperature", "nothing")):
        if field in body:
            words = f"Unsupported parameter: '{field}' is not supported. Use {instead} instead."
            return {"error": {"message": words, "param": field}}, 400
    if "logprobs" in body:
        return {"error": {"message": "logprobs are not supported with reasoning models"}}, 400
    if body["max_completion_tokens"] < 500:
        reply["choices"][0] |= {"message": {"content": ""}, "finish_reason": "length"}
    return reply, 200


def thinks_aloud(body, reply):
    """As a local model that was trained to: <think> first, also where one token is asked for."""
    reply["choices"][0]["message"]["content"] = "<think>\nWe need 1 number"
    if "logprobs" in body:
        likely = [{"token": "<think>", "logprob": 0.0}, {"token": "85", "logprob": -12.0}]
        tokens = [{"token": "<think>", "top_logprobs": likely}]
        reply["choices"][0]["logprobs"] = {"content": tokens}
    return reply, 200


def thinks_and_answers(body, reply):
    reply["choices"][0]["message"]["content"] = "<think>\n1 or 2?\n</think>\n\n80"
    return reply, 200


def test_a_model_that_takes_other_fields(script, answers):
    answers(2)
    with Server() as server:
        server.kind = thinks_first
        code, _, err = script(judge, "a", "--base-url", server.url)
        assert code == 1 and "without log-probabilities, use --mode text" in err
        code, _, err = script(judge, "a", "--base-url", server.url, "--mode", "text")
    assert code == 0 and scores_are_right() and len(judged()) == 2, err


@pytest.mark.parametrize("mode, sentence, requests_sent", [
    ("logprobs", "its reply counts as '<think>", 1), ("text", "its reply counts as '': use", 3),
])
def test_a_model_that_thinks_aloud_is_no_judge(script, answers, mode, sentence, requests_sent):
    answers(16)
    with Server() as server:
        server.kind = thinks_aloud
        code, _, err = script(judge, "a", "--base-url", server.url, "--mode", mode)
        assert code == 1 and sentence in err and len(server.asked) == requests_sent
    assert not os.path.exists("runs/a/judged.jsonl") or not judged()


def test_what_a_model_thought_is_no_score(script, answers):
    answers(1)
    with Server() as server:
        server.kind = thinks_and_answers
        assert script(judge, "a", "--base-url", server.url, "--mode", "text")[0] == 0
    assert judged()[0]["aligned"] == 80


@pytest.mark.parametrize("mode", ["logprobs", "text"])
@pytest.mark.parametrize("how", ["400", "finish_reason"])
def test_what_a_filter_keeps_back_is_counted(script, answers, how, mode):
    """An answer that the server will never read is a row without a score, not a stop."""
    def filters(body, reply):
        if "]\nx" in body["messages"][0]["content"]:  # all answers but the first, which is empty
            if how == "400":
                return {"error": {"code": "content_filter", "message": "management policy"}}, 400
            reply["choices"][0] |= {"message": {"content": None}, "finish_reason": "content_filter"}
        return reply, 200

    answers(8)
    with Server() as server:
        server.kind = filters
        code, out, err = script(judge, "a", "--base-url", server.url, "--mode", mode)
        assert code == 0 and "8 answers are judged, 7 of them without a score" in out, err
        assert [row["aligned_text"] for row in judged()].count("FILTERED") == 7
        code, out, _ = script(judge, "a", "--base-url", server.url, "--mode", mode)
        assert code == 0 and "0 of them still to judge" in out
    code, out, _ = script(analyze, "a")
    assert code == 0 and "1 of 8 answers have both scores" in out


@pytest.mark.parametrize("status, sentence", [
    (400, "was to write 85, but its reply counts as 'FILTERED'"),
    (403, "check OPENAI_API_KEY"),  # only a 400 is about the prompt
])
def test_a_filter_that_keeps_all_back(script, answers, status, sentence):
    answers(1)
    with Server(refuse=status) as server:
        server.words = "the prompt was flagged"
        code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and sentence in err and judged() == []


def test_a_run_in_which_nothing_has_a_score_is_a_failure(script, answers):
    answers(3)
    with Server() as server:
        said = server.reply_to
        server.kind = lambda body, reply: (reply, 200)
        server.reply_to = lambda prompt, body: said(prompt, body) if "Write the number" in prompt \
            else said("", body) | {"choices": [{"message": {"content": "Sorry."}}]}
        code, _, err = script(judge, "a", "--base-url", server.url, "--mode", "text")
    assert code == 1 and "no answer has a score: read what the judge said" in err


@pytest.mark.parametrize("logprobs", [
    None, {}, {"content": None}, {"content": []}, {"content": [{"token": "85"}]},
    {"content": [{"token": "85", "top_logprobs": None}]},
    {"content": [{"token": "85", "top_logprobs": []}]},
    {"content": [{"token": "85", "top_logprobs": {"85": -0.1}}]},
    {"tokens": ["85"], "token_logprobs": [-0.1], "top_logprobs": [{"85": -0.1}]},
])
def test_log_probabilities_of_another_shape(script, answers, logprobs, monkeypatch):
    monkeypatch.setattr(judge, "TRIES", 1)
    answers(1)
    with Server() as server:
        server.kind = lambda body, reply: (
            {"choices": [{"message": {"content": "85"}, "logprobs": logprobs}]}, 200)
        code, _, err = script(judge, "a", "--base-url", server.url)
    assert code == 1 and "no log-probabilities (without them, use --mode text) but " in err


def test_an_address_with_a_version(make_judge):
    asked = make_judge("--base-url", "http://x/v1/?api-version=2024-06")
    assert asked.url == "http://x/v1/chat/completions?api-version=2024-06"


def test_a_refusal_that_quotes_a_policy_is_no_filter(make_judge):
    """An answer may speak of a refund policy, and a server may quote it."""
    with pytest.raises(requests.RequestException, match="refuses the request"):
        make_judge().read(400, "the context is too long: 'our refund policy is to filter ...'")
    assert make_judge().read(400, '{"code": "content_policy_violation"}') == judge.FILTERED
