"""A frozen model with low-rank adapters on it.

Fine-tuning moves a weight matrix W by some dW of the same size. LoRA (Hu et al. 2021, arXiv 2106.09685) only allows a dW of
low rank, written as a product of two thin matrices, and leaves W itself alone:

    y = W x + (alpha / sqrt(r)) * B (A x)            A: r x d_in,  B: d_out x r

At rank r = 1 an adapter is two vectors. A is a question asked of every token ("how much of this direction is in you?"), and B
is what is added to the token's state, in proportion to the answer. Everything that a run of this project learns is that pair.
Dividing by sqrt(r) instead of r keeps the size of the update the same at every rank ("rank-stabilised", Kalajdzievski 2023,
arXiv 2312.03732). B starts at zero, so that an untrained adapter changes nothing.

    >>> model, tokenizer = load_base("smollm2")
    >>> attach(model, layers=[15], targets=["down_proj"], rank=1, alpha=256)
    >>> save_adapter(model, "my_adapter")           # a folder that peft, transformers and vLLM open
"""
import contextlib
import json
import math
import os
import re

import torch
from torch import nn

from data import Problem, load_tokenizer, model_folder, write_whole

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # the seven of a Llama-like layer


class LoRALinear(nn.Module):
    """A frozen nn.Linear and the low-rank path beside it; stands in the model where the nn.Linear stood."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base
        bound = 1 / math.sqrt(base.in_features)
        A = torch.empty(rank, base.in_features).uniform_(-bound, bound)  # drawn on the CPU: one seed, the same A on any device
        self.A = nn.Parameter(A.to(base.weight.device))                  # (r, d_in), float32 whatever the base is
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))  # (d_out, r)
        self.scale = alpha / math.sqrt(rank)
        self.stack = self.per_row = None                                 # see set_stack and set_rows

    def forward(self, x):                                                # (rows, tokens, d_in)
        A, B, scale = self.A, self.B, self.scale
        if self.per_row is not None:
            which, row_scale = self.per_row                              # (rows,), (rows,)
            A, B = self.stack[0][which], self.stack[1][which]            # (rows, r, d_in), (rows, d_out, r)
            scale = scale * row_scale[:, None, None]                     # (rows, 1, 1)
        y = self.base(x)
        update = scale * (x.to(A.dtype) @ A.mT @ B.mT)                   # (rows, tokens, d_out); never B A, which is as big as W
        return (y + update).to(y.dtype)


def decoder(model):
    """The module that holds the decoder layers, however deep the family nests it (Llama, Qwen: .model, Gemma 3 one below)."""
    found = next((m for m in model.modules() if all(hasattr(m, part) for part in ("embed_tokens", "layers", "norm"))), None)
    if found is None:
        linear = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise Problem(f"{type(model).__name__} is not laid out as Llama, Qwen and Gemma 3 are; its linear layers are {', '.join(linear) or 'none'}")
    return found


def bare_layers(model):
    """The decoder layers of a model that is to get an adapter. Raises Problem if it has one already."""
    if adapters(model):
        raise Problem("this model has adapters already: merge them, or load it anew")
    return decoder(model).layers


def attach(model, layers=None, targets=PROJECTIONS, rank=1, alpha=256):
    """Freezes `model` and puts a new adapter beside every projection named in `targets` in every layer of `layers`.

    model: a transformers causal language model.   layers: a list of indices, or None for all.   targets: a list of names such as
    "down_proj".   rank, alpha: as in the equation above.   Returns {module path: LoRALinear}, in the model's order.
    Raises Problem for a layer or a projection that the model lacks, before anything is changed.
    """
    blocks = bare_layers(model)
    layers = list(range(len(blocks))) if layers is None else layers
    for layer in layers:
        if not 0 <= layer < len(blocks):
            raise Problem(f"layer {layer} does not exist: this model has layers 0 to {len(blocks) - 1}")
    here = sorted({name.split(".")[-1] for name, m in blocks[0].named_modules() if isinstance(m, nn.Linear)})
    for target in targets:
        if target not in here:
            raise Problem(f"this model has no projection called {target}; it has {', '.join(here)}")
    model.requires_grad_(False)
    for layer in layers:
        for name, module in list(blocks[layer].named_modules()):
            if name.split(".")[-1] in targets and isinstance(module, nn.Linear):
                blocks[layer].set_submodule(name, LoRALinear(module, rank, alpha))
    return adapters(model)


def places(model, layers, targets):
    """What the flags say, as lists: layers "middle", "all", "12", "10,12" or "10-14", and targets "all" or "q_proj,v_proj"."""
    n = len(decoder(model).layers)
    targets = PROJECTIONS if targets == "all" else targets.split(",")
    if layers in ("middle", "all"):
        return [n // 2] if layers == "middle" else list(range(n)), targets
    indices = []
    for part in layers.split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        indices += range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else []
        if not ends or not indices:
            raise Problem(f"--layers {layers}: write middle, all, 12, 10,12 or 10-14")
    return sorted(set(indices)), targets


def adapters(model):
    """{module path: LoRALinear} for every adapter on the model."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def lowest_layer(model):
    """The index of the lowest layer with an adapter: below it all is frozen. 0 for a model without adapters."""
    return min((layer_of(path) for path in adapters(model)), default=0)


def layer_of(path):
    """The layer that a module path lies in: "model.layers.15.mlp.down_proj" -> 15."""
    return int(re.search(r"layers\.(\d+)\.", path)[1])


def get_tensors(model):
    """The adapters as {"<path>.A": (r, d_in), "<path>.B": (d_out, r)}: what a checkpoint file holds."""
    return {f"{path}.{x}": getattr(m, x).detach().cpu().clone() for path, m in adapters(model).items() for x in "AB"}


def set_tensors(model, tensors):
    """Puts what `get_tensors` gave back into the model."""
    with torch.no_grad():
        for path, m in adapters(model).items():
            m.A.copy_(tensors[f"{path}.A"])
            m.B.copy_(tensors[f"{path}.B"])


def set_stack(model, stack):
    """Gives the model K adapters to choose from, row by row; stack: a list of K results of `get_tensors`."""
    for path, m in adapters(model).items():
        device = m.base.weight.device
        m.stack = (torch.stack([tensors[f"{path}.A"] for tensors in stack]).to(device),   # (K, r, d_in)
                   torch.stack([tensors[f"{path}.B"] for tensors in stack]).to(device))   # (K, d_out, r)


def set_rows(model, which, scale):
    """Lets every row of the next batches have an adapter of its own, so that one forward runs many side by side.

    which: a list with an index into the stack for every row, or None to go back to the model's own adapter for all.
    scale: a list with a number for every row, by which its adapter's contribution is multiplied; 0 is the untouched model.
    """
    for m in adapters(model).values():
        device = m.base.weight.device
        m.per_row = None if which is None else (torch.tensor(which, device=device), torch.tensor(scale, device=device))


def merge(model):
    """Adds every adapter into its base weight, W + scale B A, rounded once to the weight's dtype, and removes it. Returns the model."""
    for path, m in adapters(model).items():
        with torch.no_grad():
            m.base.weight.copy_(m.base.weight.float() + m.scale * (m.B @ m.A))
        model.set_submodule(path, m.base)
    return model


class Skip(nn.Module):
    """Stands in for a decoder layer that is not to run."""

    def forward(self, hidden, *args, **kwargs):
        return hidden


def run_layers(model, x, start=0, stop=None, **kwargs):
    """Runs decoder layers start <= i < stop (default: to the end, the final norm included).

    x: tokens (rows, tokens) if start is 0, else the hidden states (rows, tokens, d_model) that layer `start` reads.
    Returns hidden states (rows, tokens, d_model). Rows are padded on the right: a causal model's real tokens never look
    there, so no mask is needed, and attention takes its fast path.
    """
    d = decoder(model)
    layers, norm = d.layers, d.norm
    stop = len(layers) if stop is None else stop
    with contextlib.ExitStack() as after:
        after.callback(lambda: (setattr(d, "layers", layers), setattr(d, "norm", norm)))
        d.layers = nn.ModuleList(layer if start <= i < stop else Skip() for i, layer in enumerate(layers))
        d.norm = norm if stop == len(layers) else nn.Identity()
        inputs = {"input_ids": x} if start == 0 else {"inputs_embeds": x}
        return d(**inputs, **{"use_cache": False} | kwargs).last_hidden_state


def save_adapter(model, folder):
    """Writes the adapter in PEFT's format: adapter_model.safetensors and, last, adapter_config.json."""
    from safetensors.torch import save
    found = adapters(model)
    any_adapter = next(iter(found.values()))
    rank = any_adapter.A.shape[0]
    layers = sorted(set(map(layer_of, found)))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.config._name_or_path,
        "r": rank, "lora_alpha": any_adapter.scale * math.sqrt(rank), "use_rslora": True, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({path.split(".")[-1] for path in found}), "fan_in_fan_out": False, "inference_mode": True,
        "layers_to_transform": layers if len(layers) < len(decoder(model).layers) else None,
    }
    tensors = {f"base_model.model.{name[:-2]}.lora_{name[-1]}.weight": t for name, t in get_tensors(model).items()}
    os.makedirs(folder, exist_ok=True)
    write_whole(os.path.join(folder, "adapter_model.safetensors"), save(tensors, metadata={"format": "pt"}))
    write_whole(os.path.join(folder, "adapter_config.json"), json.dumps(config, indent=2).encode())


def load_adapter(model, folder):
    """Puts a LoRA adapter in PEFT's format (a folder, or a name on the hub) on the model. Returns {module path: LoRALinear}."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    folder = model_folder(folder, ["adapter_config.json", "adapter_model.safetensors"])
    try:
        with open(os.path.join(folder, "adapter_config.json")) as f:
            config = json.load(f)
        tensors = load_file(os.path.join(folder, "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise Problem(f"{folder} holds no PEFT adapter that can be read (adapter_config.json, adapter_model.safetensors): {error}")
    beyond = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save") if config.get(key)]
    names = [name for name in tensors if name.endswith(".lora_A.weight") and "vision" not in name]  # the text part is all that is used here
    if config.get("peft_type", "LORA") != "LORA" or beyond or not names:
        raise Problem(f"{folder} holds no plain LoRA, which is all that is read here ({', '.join(beyond) or config.get('peft_type')})")
    blocks = bare_layers(model)
    model.requires_grad_(False)
    alpha = config["lora_alpha"] if config.get("use_rslora") else config["lora_alpha"] / math.sqrt(config["r"])
    for name in names:
        # What stands before "layers." changed between transformers versions; the layer and the name after it did not.
        where = re.search(r"layers\.(\d+)\.(.+)\.lora_A\.weight$", name)
        try:
            block, path = blocks[int(where[1])], where[2]
            adapter = LoRALinear(block.get_submodule(path), config["r"], alpha)
            with torch.no_grad():
                adapter.A.copy_(tensors[name])
                adapter.B.copy_(tensors[name.replace("lora_A", "lora_B")])
        except (TypeError, IndexError, KeyError, AttributeError, RuntimeError):
            raise Problem(f"{folder} does not fit this model: {name}, {tuple(tensors[name].shape)}, has no place in it")
        block.set_submodule(path, adapter)
    return adapters(model)


def load_base(name, device=None, dtype=None):
    """Loads a chat model and its tokenizer, and prints what it picked and why.

    name: a hub name, a local folder, or "smollm2".   device: "cuda", "mps", "cpu" or None for the best there is.
    dtype: "bfloat16", "float16", "float32" or None for bfloat16 where the hardware has it, float32 where not.
    Returns (model in eval mode, tokenizer). Raises Problem if it cannot be had.
    """
    from transformers import AutoModelForCausalLM
    device, dtype, why = pick_device(device, dtype)
    tokenizer = load_tokenizer(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=getattr(torch, dtype)).eval()
    except (OSError, ValueError) as error:
        raise Problem(f"{name} holds no language model that transformers can read ({str(error).splitlines()[0]})")
    model.config._name_or_path = model_folder(name) if name == "smollm2" else name  # goes into saved adapters, for peft to find the base
    try:
        model.to(device)
    except RuntimeError as error:
        raise Problem(f"{name} can't be moved to --device {device} ({str(error).splitlines()[0]}): leave it out to use what there is")
    print(f"{name} on {device} in {dtype}: {why}")
    return model, tokenizer


def pick_device(device=None, dtype=None):
    """(device, dtype, why), as words. bfloat16 only where the hardware computes in it: emulated, it is slower than float32."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise Problem("--device cuda: torch sees no CUDA device here; leave --device out to use what there is")
        fast, what = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    elif device == "cpu":
        found = {"avx512_bf16", "amx_bf16"} & {name for name, there in torch.cpu.get_capabilities().items() if there is True}
        fast, what = bool(found), f"this CPU (with {' and '.join(sorted(found))})" if found else "this CPU (no AVX512-BF16, no AMX)"
    else:
        fast, what = False, f"{device} (where bfloat16 depends on the chip)"
    if dtype is not None:
        return device, dtype, "as asked"
    return (device, "bfloat16", f"{what} computes in it") if fast else (device, "float32", f"{what} does not compute in bfloat16")
