"""Forward passes that read published files by themselves, to check what was renamed and packed.

They share nothing with the oracles but the files: matrices stay as they are stored, and what comes
out of a fused one is taken apart as the published code of the family does.
"""

import json

import torch
from safetensors.torch import load_file
from torch.nn import functional as F


class Llama:
    """Llama with its own names; each family says what differs."""

    layer = "model.layers.{}."
    embeddings, last_norm, output = "model.embed_tokens", "model.norm", "lm_head"
    norms = "input_layernorm", "post_attention_layernorm"
    eps_key, theta_key = "rms_norm_eps", "rope_theta"

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.tensors = {name: tensor.float() for name, tensor in stored.items()}
        self.unread = set(self.tensors)
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config.get("num_key_value_heads", self.heads)
        self.head_dim = self.config.get("head_dim", self.config["hidden_size"] // self.heads)

    def get(self, name):
        self.unread.discard(name)
        return self.tensors.get(name)

    def linear(self, name, x):
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, name, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config[self.eps_key])
        return x * self.get(f"{name}.weight")

    def embed(self, ids):
        return self.get(f"{self.embeddings}.weight")[ids]

    def qkv(self, layer, x):
        """Queries `[heads, T, d]`, keys and values `[kv_heads, T, d]`."""
        rows = [self.linear(f"{layer}self_attn.{name}_proj", x) for name in "qkv"]
        return [r.view(len(x), -1, self.head_dim).transpose(0, 1) for r in rows]

    def attention_output(self, layer, x):
        return self.linear(f"{layer}self_attn.o_proj", x)

    def mlp(self, layer, x):
        gate, up = (self.linear(f"{layer}mlp.{name}_proj", x) for name in ("gate", "up"))
        return self.linear(f"{layer}mlp.down_proj", F.silu(gate) * up)

    def residual(self, x):
        return x

    def head(self, x):
        return self.linear(self.output, x)

    def rotate(self, x):
        """Complex numbers of the first and second half, turned."""
        half = self.head_dim // 2
        theta = float(self.config.get(self.theta_key, 10000.0))
        speed = theta ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(x.shape[1]).float(), speed)
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(()), angle)
        return torch.cat([turned.real, turned.imag], -1)

    def attention(self, layer, x):
        q, k, v = self.qkv(layer, x)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 0) for t in (k, v))
        scores = q @ k.mT * self.head_dim**-0.5
        later = torch.ones(len(x), len(x)).triu(1).bool()
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.attention_output(layer, mixed.transpose(0, 1).flatten(1))

    def logits(self, ids):
        h = self.embed(ids[0])
        for i in range(self.config["num_hidden_layers"]):
            layer = self.layer.format(i)
            first, second = (layer + name for name in self.norms)
            h = h + self.residual(self.attention(layer, self.norm(first, h)))
            h = h + self.residual(self.mlp(layer, self.norm(second, h)))
        logits = self.head(self.norm(self.last_norm, h))
        assert not self.unread, self.unread
        return logits


class Swiglu(Llama):
    def mlp(self, layer, x):
        gate, up = self.linear(f"{layer}mlp.swiglu.w12", x).chunk(2, -1)
        return self.linear(f"{layer}mlp.swiglu.w3", F.silu(gate) * up)


class Yi(Llama):
    norms = "ln1", "ln2"


class InternLm2(Llama):
    embeddings, output = "model.tok_embeddings", "output"
    norms = "attention_norm", "ffn_norm"

    def qkv(self, layer, x):
        # [T, groups, queries of a group then key then value, d]
        size = self.heads // self.kv_heads
        fused = self.linear(f"{layer}attention.wqkv", x)
        groups = fused.view(len(x), self.kv_heads, size + 2, self.head_dim)
        q = groups[:, :, :size].flatten(1, 2)
        return [t.transpose(0, 1) for t in (q, groups[:, :, -2], groups[:, :, -1])]

    def attention_output(self, layer, x):
        return self.linear(f"{layer}attention.wo", x)

    def mlp(self, layer, x):
        w1, w3 = (self.linear(f"{layer}feed_forward.{name}", x) for name in ("w1", "w3"))
        return self.linear(f"{layer}feed_forward.w2", F.silu(w1) * w3)


class Index(Llama):
    def head(self, x):
        weight = self.get("lm_head.weight")
        return F.linear(x, weight / weight.pow(2).sum(1, keepdim=True).sqrt())


class Orion(Llama):
    def norm(self, name, x):
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config["rms_norm_eps"])


class MiniCpm(Llama):
    def embed(self, ids):
        return super().embed(ids) * self.config["scale_emb"]

    def residual(self, x):
        return x * self.config["scale_depth"] * self.config["num_hidden_layers"] ** -0.5

    def head(self, x):
        scale = self.config["hidden_size"] / self.config["dim_model_base"]
        return F.linear(x / scale, self.get("model.embed_tokens.weight"))


class Qwen(Llama):
    layer = "transformer.h.{}."
    embeddings, last_norm = "transformer.wte", "transformer.ln_f"
    norms = "ln_1", "ln_2"
    eps_key, theta_key = "layer_norm_epsilon", "rotary_emb_base"

    def qkv(self, layer, x):
        fused = self.linear(f"{layer}attn.c_attn", x)
        parts = fused.split(self.config["hidden_size"], dim=-1)
        return [p.view(len(x), self.heads, self.head_dim).transpose(0, 1) for p in parts]

    def attention_output(self, layer, x):
        return self.linear(f"{layer}attn.c_proj", x)

    def mlp(self, layer, x):
        a1, a2 = (self.linear(f"{layer}mlp.{name}", x) for name in ("w1", "w2"))
        assert a1.shape[-1] == self.config["intermediate_size"] // 2
        return self.linear(f"{layer}mlp.c_proj", a1 * F.silu(a2))


class GemMoe(Llama):
    def embed(self, ids):
        return super().embed(ids) * self.config["hidden_size"] ** 0.5

    def norm(self, name, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * (1 + self.get(f"{name}.weight"))

    def head(self, x):
        return F.linear(x, self.get("model.embed_tokens.weight"))

    def mlp(self, layer, x):
        """Every expert for every token; those not chosen weigh nothing."""
        moe = f"{layer}block_sparse_moe."
        chosen, experts = self.linear(f"{moe}gate", x).topk(self.config["num_experts_per_tok"])
        share = torch.zeros(len(x), self.config["num_local_experts"])
        share = share.scatter(1, experts, chosen.softmax(-1))
        out = torch.zeros_like(x)
        for e in range(self.config["num_local_experts"]):
            w1, w3 = (self.linear(f"{moe}experts.{e}.{name}", x) for name in ("w1", "w3"))
            inner = F.gelu(w1, approximate="tanh") * w3
            out = out + share[:, e : e + 1] * self.linear(f"{moe}experts.{e}.w2", inner)
        return out


def read_by(reader):
    """A `check` of a case."""

    def check(folder, ids):
        with torch.no_grad():
            return reader(folder).logits(ids)

    return check
