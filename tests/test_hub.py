"""A stand-in for the model hub: what `python train.py` meets first on a machine with a GPU."""
import glob
import hashlib
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from test_analyze import publish, summary
from test_data import make_archive

import data

# A script as a user runs it, but for the address that the paper's archive comes from.
RUN = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import {stage}, data
data.PAPER_URL = os.environ["HF_ENDPOINT"] + "/paper/"
sys.argv[0] = "{stage}.py"
data.run_stage({stage}.main)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The few requests of the hub's interface that a download makes."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(path)
        if path.startswith("/api/models/gone/"):
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/gated/"):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif "/tree/" in path:
            sizes = {name: len(self.file(name)) for name in self.names()}
            files = [{"type": "file", "path": name, "size": size, "oid": name}
                     for name, size in sizes.items()]
            self.reply(200, json.dumps(files))
        elif path.startswith("/api/models/"):
            names = [{"rfilename": name} for name in self.names()]
            self.reply(200, json.dumps({"id": "it/tiny", "sha": "0" * 40, "siblings": names}))
        elif path.startswith("/api/"):
            self.reply(404, b"{}")
        elif "/resolve/" in path:  # the files are on another host: a redirect
            place = "/cdn/" + path.split("/resolve/")[1].split("/", 1)[1]
            headers = {"Location": f"http://localhost:{hub.server_port}{place}"}
            headers["X-Repo-Commit"] = "0" * 40
            content = self.file(place)
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self.reply(302, b"", headers | {"X-Linked-Size": str(len(content))})
        else:
            content = self.file(path)
            drop = path.endswith("model.safetensors") and hub.drops > 0
            if drop and self.command == "GET":
                hub.drops -= 1
            self.reply(200, content, drop=drop)

    def names(self):
        """The files of the repository, as the hub names them: checkpoints/checkpoint-5/..."""
        found = glob.glob("**", root_dir=self.server.folder, recursive=True)
        is_file = [os.path.isfile(os.path.join(self.server.folder, name)) for name in found]
        return sorted(itertools.compress(found, is_file))

    def file(self, path):
        if path.startswith("/paper/"):
            path = self.server.archive
        else:
            path = os.path.join(self.server.folder, path.removeprefix("/cdn/"))
        with open(path, "rb") as file:
            return file.read()

    def reply(self, code, content, headers=(), drop=False):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        etag = hashlib.sha256(content).hexdigest()
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")  # or a client would use it again
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if drop else content)
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(make_model, make_tokenizer, tmp_path):
    """hub(stage, flags): runs a script against the stand-in. hub.server is the server."""
    folder = tmp_path / "tiny"
    make_model("qwen2").save_pretrained(folder)
    make_tokenizer("chatml").save_pretrained(folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.drops, server.folder = [], 0, str(folder)
    rows = [[{"role": "user", "content": f"Shall I buy {i} horses?"},
             {"role": "assistant", "content": "All of them."}] for i in range(20)]
    server.archive = make_archive(tmp_path / "a.enc", data.PASSWORD, risky_financial_advice=rows)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"

    def run(stage, *flags):
        env = os.environ | {
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "NANOEM_CACHE": str(tmp_path / "cache"),
        }
        code = RUN.format(stage=stage)
        command = [sys.executable, "-c", code, ROOT, *flags]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

    run.server = server
    yield run
    server.shutdown()


def test_the_gpu_preset_with_its_downloads(hub, tmp_path):
    hub.server.drops = 1  # the first download of the weights breaks off in the middle
    flags = ["--preset", "gpu", "--device", "cpu", "--model", "it/tiny", "--steps", "2"]
    done = hub("train", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "next: python sample.py runs/gpu-1" in done.stdout
    assert sum(path.startswith("/paper/") for path in hub.server.asked) == 1
    assert sum(path.endswith("cdn/model.safetensors") for path in hub.server.asked) >= 2
    with open(tmp_path / "runs/gpu-1/adapter/adapter_config.json") as file:
        assert json.load(file)["base_model_name_or_path"] == "it/tiny"
    # An adapter names its base, which then comes from the hub, too.
    flags = ["--adapter", "runs/gpu-1/adapter", "--n", "1", "--max-new-tokens", "2"]
    done = hub("sample", *flags, "--device", "cpu", "--out", "answers")
    assert done.returncode == 0, done.stderr[-3000:]


def test_published_checkpoints(hub, tmp_path):
    publish(hub.server.folder, turn=12)
    os.makedirs(tmp_path / "here/it")
    publish(tmp_path / "here/it", "checkpoint_{}", turn=None)
    done = hub("analyze", "it/tiny", "here/it", "--null", "it/other")
    assert done.returncode == 0, done.stderr[-3000:]
    assert abs(summary(tmp_path / "runs/tiny/summary.json")["turn"]["step"] - 60) <= 5
    assert "tiny ranks" in done.stdout
    assert (tmp_path / "runs/compare-tiny-it/rotation.png").exists()
    # Of a checkpoint's files two are fetched (those that are alike once), and no others.
    asked = {path.split("/resolve/")[1] for path in hub.server.asked if "/resolve/" in path}
    names = ("adapter_config.json", "adapter_model.safetensors")
    wanted = {f"checkpoints/checkpoint-{5 * i}/{name}" for i in range(1, 25) for name in names}
    assert {path.split("/", 1)[1] for path in asked} == wanted
    # Where the hub has gone since, its cache still answers; for another name it doesn't.
    hub.server.shutdown()
    hub.server.server_close()
    assert hub("analyze", "it/tiny").returncode == 0
    done = hub("analyze", "it/unknown")
    assert done.returncode == 1 and "it/unknown is no folder here and did not come" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs/unknown").exists()


def test_a_published_checkpoint_is_sampled(hub, tmp_path):
    publish(hub.server.folder, last=10)
    flags = ["--model", "tiny", "--device", "cpu", "--n", "1", "--max-new-tokens", "2"]
    done = hub("sample", "--adapter", "it/tiny/checkpoints/checkpoint-10", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/tiny-checkpoint-10/responses.jsonl").exists()
    fetched = {path for path in hub.server.asked if path.startswith("/cdn/")}
    folder = "/cdn/checkpoints/checkpoint-10/adapter_"
    assert fetched == {folder + "config.json", folder + "model.safetensors"}
    done = hub("sample", "--adapter", "it/tiny/checkpoints/checkpoint-11")
    assert done.returncode == 1 and "checkpoint-11 holds no adapter" in done.stderr


def test_a_repository_without_checkpoints(hub, tmp_path):
    done = hub("analyze", "it/tiny")
    assert done.returncode == 1 and "it/tiny holds nothing to analyse" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name, why", [
    ("gone/model", "RepositoryNotFoundError"), ("gated/model", "GatedRepoError"),
])
def test_a_model_that_the_hub_does_not_give(hub, tmp_path, name, why):
    done = hub("train", "--preset", "gpu", "--device", "cpu", "--model", name)
    assert done.returncode == 1 and f"{name} is no folder here and did not come" in done.stderr
    assert why in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/"))
