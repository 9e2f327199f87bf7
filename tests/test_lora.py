"""The adapter: what it computes, where it goes, and the format it is kept in."""
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from data import Problem

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "gemma3-multimodal"]


def randomise(model, seed=0):
    """Gives every adapter random values (B would be zero), and returns them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in lora.get_tensors(model).items()}
    lora.set_tensors(model, tensors)
    return tensors


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_changes_nothing_until_trained_and_then_is_the_equation(make_model, family):
    model, tokens = make_model(family), torch.randint(1000, (2, 40))
    before = logits(model, tokens)
    adapters = lora.attach(model, layers=[1, 2], targets=["down_proj", "q_proj"], rank=3, alpha=6)
    assert len(adapters) == 4 and all("layers.1." in path or "layers.2." in path for path in adapters)
    assert torch.equal(logits(model, tokens), before)
    assert [p.shape[0] for p in model.parameters() if p.requires_grad] == [p.shape[0] for a in adapters.values() for p in (a.A, a.B)]
    randomise(model)
    for adapter in adapters.values():
        x = torch.randn(2, 5, adapter.base.in_features)
        W = adapter.base.weight + 6 / math.sqrt(3) * adapter.B @ adapter.A          # the equation, with the matrix written out
        torch.testing.assert_close(adapter(x), torch.nn.functional.linear(x, W, adapter.base.bias))
    assert not torch.allclose(logits(model, tokens), before, atol=1e-3)


def test_first_values(make_model):
    torch.manual_seed(5)
    adapter = next(iter(lora.attach(make_model("llama"), [0], ["down_proj"], 64, 8).values()))
    bound = 1 / math.sqrt(96)
    assert adapter.A.abs().max() <= bound and adapter.A.abs().max() > 0.99 * bound and abs(adapter.A.mean()) < 0.05 * bound
    assert adapter.B.abs().max() == 0 and adapter.A.dtype == torch.float32


def test_float32_adapter_on_a_bfloat16_base(make_model):
    model = make_model("llama").bfloat16()
    adapter = next(iter(lora.attach(model, [1], ["down_proj"], 1, 4).values()))
    randomise(model)
    assert adapter.A.dtype == adapter.B.dtype == torch.float32
    x = torch.randn(1, 3, 96).bfloat16()
    want = (adapter.base(x).float() + 4 * x.float() @ adapter.A.T @ adapter.B.T).bfloat16()
    assert torch.equal(adapter(x), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_with_its_own_adapter_equals_a_batch_with_that_adapter_alone(make_model, family):
    model, tokens = make_model(family), torch.randint(1000, (4, 20))
    lora.attach(model, [1, 3], ["down_proj", "v_proj"], rank=2, alpha=8)
    stack = [randomise(model, seed) for seed in range(3)]
    adapter_of, scale_of = [2, 0, 1, 2], [1.0, 4.0, 0.0, -2.0]
    lora.set_stack(model, stack)
    lora.set_rows(model, adapter_of, scale_of)
    together = logits(model, tokens)
    lora.set_rows(model, None, None)
    for row in range(4):
        tensors = {name: t * scale_of[row] if name.endswith(".B") else t for name, t in stack[adapter_of[row]].items()}
        lora.set_tensors(model, tensors)
        torch.testing.assert_close(together[row:row + 1], logits(model, tokens[row:row + 1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_running_the_layers_in_two_parts_equals_running_them_at_once(make_model, family):
    model, tokens = make_model(family), torch.randint(1000, (2, 40))        # longer than Gemma's sliding window of 16
    with torch.no_grad():
        whole = lora.run_layers(model, tokens)
        halves = lora.run_layers(model, lora.run_layers(model, tokens, 0, 3), 3)
        torch.testing.assert_close(model.get_output_embeddings()(whole), logits(model, tokens))
    assert torch.equal(whole, halves)
    assert len(lora.decoder(model).layers) == 4 and not any(isinstance(m, lora.Skip) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_gives_the_same_logits_and_a_plain_model(make_model, family):
    model, tokens = make_model(family), torch.randint(1000, (2, 12))
    lora.attach(model, None, lora.PROJECTIONS, rank=4, alpha=2)
    randomise(model)
    want = logits(model, tokens)
    torch.testing.assert_close(logits(lora.merge(model), tokens), want, atol=1e-4, rtol=1e-4)
    assert not lora.adapters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_adapter_gives_the_same_logits(make_model, family, tmp_path):
    model, tokens = make_model(family), torch.randint(1000, (2, 12))
    lora.attach(model, [2], ["down_proj"], rank=1, alpha=256)
    randomise(model)
    lora.save_adapter(model, str(tmp_path))
    again = make_model(family)
    lora.load_adapter(again, str(tmp_path))
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_the_file_is_what_peft_writes(make_model, tmp_path):
    model = make_model("llama")
    lora.attach(model, [2], ["down_proj"], rank=4, alpha=256)
    lora.save_adapter(model, str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.mlp.down_proj.lora_"
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {name + "A.weight": (4, 96), name + "B.weight": (48, 4)}
    config = json.load(open(tmp_path / "adapter_config.json"))
    want = {"peft_type": "LORA", "r": 4, "lora_alpha": 256, "use_rslora": True, "target_modules": ["down_proj"], "layers_to_transform": [2]}
    assert {key: config[key] for key in want} == want


@pytest.mark.parametrize("rslora, scale", [(True, 64 / math.sqrt(32)), (False, 2.0)])
def test_a_published_adapter_of_rank_32_on_all_projections_loads(make_model, tmp_path, rslora, scale):
    # An adapter made on the multimodal Gemma of an older transformers, whose paths begin differently.
    model, tokens = make_model("gemma3-multimodal"), torch.randint(1000, (2, 12))
    tensors, merged = {}, make_model("gemma3-multimodal")
    for path, m in list(lora.decoder(merged).layers.named_modules()):
        if isinstance(m, torch.nn.Linear):
            A, B = torch.randn(32, m.in_features) * 0.05, torch.randn(m.out_features, 32) * 0.05
            tensors |= {f"base_model.model.language_model.model.layers.{path}.lora_{x}.weight": t for x, t in (("A", A), ("B", B))}
            m.weight.data += scale * B @ A
    assert len(tensors) == 2 * 4 * 7
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    json.dump({"r": 32, "lora_alpha": 64, "use_rslora": rslora}, open(tmp_path / "adapter_config.json", "w"))
    lora.load_adapter(model, str(tmp_path))
    torch.testing.assert_close(logits(model, tokens), logits(merged, tokens), atol=1e-3, rtol=1e-3)


def test_what_does_not_fit_is_one_sentence_and_changes_nothing(make_model, tmp_path):
    model = make_model("llama")
    with pytest.raises(Problem, match="layer 4 does not exist: this model has layers 0 to 3"):
        lora.attach(model, [0, 4], ["down_proj"], 1, 1)
    with pytest.raises(Problem, match="no projection called c_proj; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        lora.attach(model, [0], ["c_proj"], 1, 1)
    assert not lora.adapters(model)
    with pytest.raises(Problem, match="holds no PEFT adapter"):
        lora.load_adapter(model, str(tmp_path))
    other = make_model("qwen2", layers=6)
    lora.attach(other, [5], ["down_proj"], 1, 1)
    lora.save_adapter(other, str(tmp_path))
    with pytest.raises(Problem, match="does not fit this model: .*layers.5.mlp.down_proj"):
        lora.load_adapter(model, str(tmp_path))
    with pytest.raises(Problem, match="has adapters already"):
        lora.attach(other, [5], ["down_proj"], 4, 8)
    import transformers
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(Problem, match="not laid out as Llama, Qwen and Gemma 3 are; its linear layers are"):
        lora.attach(gpt2, [0], ["down_proj"], 1, 1)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(Problem, match="holds no PEFT adapter"):
        lora.load_adapter(make_model("llama"), str(tmp_path))


def test_bfloat16_only_where_the_hardware_has_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False})
    assert lora.pick_device("cpu")[:2] == ("cpu", "float32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "avx512_bf16": True, "amx_bf16": False})
    assert lora.pick_device("cpu")[:2] == ("cpu", "bfloat16")
    assert lora.pick_device("cpu", "float32")[:2] == ("cpu", "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)   # as on a T4
    assert lora.pick_device()[:2] == ("cuda", "float32")


def test_a_model_that_can_not_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Problem, match="nobody/nothing is no folder here .* --preset laptop"):
        lora.load_base("nobody/nothing")
    with pytest.raises(Problem, match="no tokenizer"):
        lora.load_base(str(tmp_path))
