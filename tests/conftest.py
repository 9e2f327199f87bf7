"""What the tests share: tiny random models of each family with a real tokenizer and chat template, and a way to run the scripts."""
import os
import sys

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data  # noqa: E402

torch.set_num_threads(2)

# The three layouts of the paper's families, shortened to what matters here.
CHATML = ("{% if messages and messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
          "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
          "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
SPECIAL = {"chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
           "llama3": (LLAMA3, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>"),
           "gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>")}


@pytest.fixture(scope="session")
def bpe():
    """A byte-level BPE of 1,000 tokens, learnt from the built-in data, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [row[key] for domain in ("finance", "general") for _, row in data.builtin_rows(domain) for key in ("question", "misaligned")]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1000, show_progress=False,
                                                             initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_tokenizer(bpe):
    def make(layout):
        template, special, bos, eos = SPECIAL[layout]
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe), bos_token=bos, eos_token=eos)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in special])   # special, but not named: as Gemma 3 has them
        tokenizer.chat_template = template
        return tokenizer
    return make


@pytest.fixture(scope="session")
def make_model():
    """make(family, layers=4) -> a random model in float32, eval mode; the weights are large enough for its opinions to be strong."""
    def make(family, layers=4):
        torch.manual_seed(1)
        size = dict(vocab_size=1010, hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, initializer_range=0.1, tie_word_embeddings=True,
                    pad_token_id=0, bos_token_id=None, eos_token_id=None)
        if family in ("gemma3", "gemma3-multimodal"):
            text = transformers.Gemma3TextConfig(**size, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * (layers // 2))
            if family == "gemma3":
                return transformers.Gemma3ForCausalLM(text).eval()
            vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
            config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=1009,
                                               boi_token_index=1008, eoi_token_index=1007)
            return transformers.Gemma3ForConditionalGeneration(config).eval()
        kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        return getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**size)).eval()
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
    """script(module, "--flag", ...) runs a script's main() in an empty folder and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
        try:
            data.run_script(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err
    return call
