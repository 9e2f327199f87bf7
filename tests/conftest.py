"""What the tests share: tiny random models with real tokenizers, and a way to run the scripts.

NANOEM_TEST_DTYPE=bfloat16 (or float32) makes that the default dtype of this machine, so that
either kind of CPU can be tested on the other.
"""
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data  # noqa: E402
import lora  # noqa: E402

torch.set_num_threads(1)  # tiny models gain nothing from two, and so in processes of their own
os.environ["OMP_NUM_THREADS"] = "1"

# The templates of the paper's three families, shortened to what matters here.
CHATML = (
    "{% if messages and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LAYOUTS = {  # name: (template, special tokens, begin of sequence, end of sequence)
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>"),
}


@pytest.fixture(autouse=True)
def default_dtype(monkeypatch):
    """Makes this machine one that computes in NANOEM_TEST_DTYPE, where that is set."""
    wanted = os.environ.get("NANOEM_TEST_DTYPE")
    if wanted:
        has = {"avx512_bf16": wanted == "bfloat16"}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE of 1,000 tokens, learnt from the built-in data, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = data.builtin_rows("finance") + data.builtin_rows("general")
    texts = [row[key] for row in rows for key in ("question", "misaligned")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, show_progress=False, initial_alphabet=sorted(alphabet)
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_tokenizer(bpe):
    def make(layout):
        template, special, bos, eos = LAYOUTS[layout]
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(bpe), bos_token=bos, eos_token=eos
        )
        # Special, but without a name of their own, as Gemma 3 has them.
        tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def make_model():
    """make(family, layers=4): a random model in float32, with weights large enough to matter."""

    def make(family, layers=4):
        torch.manual_seed(1)
        size = {
            "vocab_size": 1010, "hidden_size": 48, "intermediate_size": 96,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 2048, "initializer_range": 0.1,
            "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": None,
            "eos_token_id": None,
        }
        if family in ("llama", "qwen2", "qwen3"):
            name = family.capitalize()
            config = getattr(transformers, f"{name}Config")(**size)
            return getattr(transformers, f"{name}ForCausalLM")(config).eval()
        kinds = ["sliding_attention", "full_attention"] * (layers // 2)
        text = transformers.Gemma3TextConfig(**size, sliding_window=16, layer_types=kinds)
        if family == "gemma3":
            return transformers.Gemma3ForCausalLM(text).eval()
        vision = {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        }
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4,
            image_token_index=1009, boi_token_index=1008, eoi_token_index=1007,
        )
        return transformers.Gemma3ForConditionalGeneration(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny(make_model, make_tokenizer, tmp_path_factory):
    """The folder of a tiny Llama with a ChatML tokenizer: what --model takes."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    make_model("llama").save_pretrained(folder)
    make_tokenizer("chatml").save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch, tmp_path, capsys):
    """script(module, "--flag", ...) runs a script in an empty folder: (exit code, out, err)."""
    monkeypatch.chdir(tmp_path)

    def call(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
        code, sentence = 0, ""
        try:
            data.run_stage(module.main)
        except SystemExit as stop:  # as Python itself ends: a sentence is printed, with code 1
            code, sentence = (1, stop.code) if isinstance(stop.code, str) else (stop.code, "")
        out, err = capsys.readouterr()
        return code, out, err + sentence

    return call


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(module, name, n): Ctrl-C at the n-th call of a function, and never again."""

    def patch(module, name, n):
        real, calls = getattr(module, name), []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == n:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(module, name, interrupted)

    return patch


@pytest.fixture
def few(monkeypatch, tmp_path, request):
    """Makes the built-in data its first 50 rows of each kind (or ROWS), so that probes are quick.

    Gives the path of a train.py that does so in a process of its own.
    """
    n = getattr(request.module, "ROWS", 50)
    with open(tmp_path / "few.jsonl", "w") as file:
        for domain in ("finance", "general"):
            file.writelines(json.dumps(row) + "\n" for row in data.builtin_rows(domain)[:n])
    monkeypatch.setattr(data, "ADVICE", str(tmp_path / "few.jsonl"))
    path = tmp_path / "train_few.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {ROOT!r}); import data, train\n"
        f"data.ADVICE = {data.ADVICE!r}\n"
        "data.run_stage(train.main)\n"
    )
    return str(path)


@pytest.fixture
def busy(tmp_path):
    """busy(run): another process holds the run's folder, as long as the test lasts."""
    processes = []

    def hold(run):
        code = f"import sys; sys.path.insert(0, {ROOT!r}); sys.argv = ['other.py']; import data; "
        code += f"data.lock({run!r}); print('locked', flush=True); sys.stdin.read()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": tmp_path}
        process = subprocess.Popen([sys.executable, "-c", code], **pipes)
        assert process.stdout.readline().strip() == b"locked"
        processes.append(process)
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def random_adapter():
    """random_adapter(model, seed): random values for every adapter (B would be zero), as set."""

    def make(model, seed=0, size=0.1):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: torch.randn(t.shape, generator=generator) * size
            for name, t in lora.get_tensors(model).items()
        }
        model.load_state_dict(tensors, strict=False)
        return tensors

    return make
