"""What the cases of all families share: random weights, publishing, checks, golden values."""

import copy
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import no_init_weights

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# Odd, so that no vector register divides it.
VOCAB = 131
IDS = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0)
BASE = dict(
    IDS,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
# For many layers or experts, and for variants of what another case covers.
SMALL = dict(BASE, hidden_size=32, intermediate_size=64)
# Where heads are as wide as the hidden size says: two of 16.
NARROW = dict(SMALL, num_attention_heads=2, num_key_value_heads=1)
PROMPT, NEW = 12, 50
# Relative to the range of the logits, fp32 on both sides.
SAME = 1e-5
# What ignoring a setting must change at least; the tests allow 1e-4.
DIFFERENT = 5e-3
# Smallest distances that count as a decision: between router logits, and between the two best
# logits relative to their range.
ROUTER_GAP, GREEDY_GAP = 1e-3, 1e-3
# Fewest different tokens of a greedy continuation; one that repeats itself shows little.
VARIETY = 10
ATTEMPTS = 200


@dataclass(frozen=True)
class Case:
    """One fixture.

    model: the class of transformers that computes. settings: its configuration's arguments.
    build: makes the model from the configuration where `model` alone does not.
    logits: `[T, V]` from the model and ids `[1, T]`, where calling the model does not give them.
    publish: turns what transformers saves (config.json, tensors) into what is published.
    check: logits of a published folder, read in another way than by `model.from_pretrained`.
    dropped: parts of tensors' names that are left out of the file.
    extra: more golden tensors, from the model and the rows whose logits are stored.
    router: how the name of a router ends, and how many experts it chooses.
    matters: changes of the settings, each of which changes the logits.
    high: input ids lie below.
    embedding_std: of the token embeddings; a tied head prefers the last token, and smaller
        embeddings keep the greedy continuation from repeating that one.
    """

    model: type
    settings: dict
    tokens: int = 40
    build: Callable | None = None
    logits: Callable | None = None
    publish: Callable | None = None
    check: Callable | None = None
    dropped: tuple = ()
    extra: Callable | None = None
    router: tuple | None = None
    matters: tuple = ()
    high: int = VOCAB
    embedding_std: float | None = None

    def construct(self, changes=None):
        # Copied, as configurations write into the tables they are given.
        settings = copy.deepcopy({**self.settings, **(changes or {})})
        config = self.model.config_class(**settings)
        config._attn_implementation = "eager"
        # Randomized afterwards; and what transformers does at first fails for some of StableLM.
        with no_init_weights():
            model = self.build(config) if self.build else self.model(config)
        model.tie_weights()
        return model.float().eval()

    def compute(self, model, ids):
        with torch.no_grad():
            if self.logits:
                return self.logits(model, ids)
            return model(ids, use_cache=False).logits[0]


def randomize(model, embedding_std):
    """Weights N(0, 0.2), norms N(1, 0.2), rounded to bf16; the default 0.02 hides errors."""
    embeddings = model.get_input_embeddings().weight
    if not embedding_std:
        embedding_std = 0.1 if embeddings is model.get_output_embeddings().weight else 0.2
    with torch.no_grad():
        for module in model.modules():
            kind = type(module).__name__
            # Gemma adds the one.
            one = "Norm" in kind and not kind.startswith("Gemma")
            for name, p in module.named_parameters(recurse=False):
                mean = 1.0 if one and name == "weight" else 0.0
                std = embedding_std if p is embeddings else 0.2
                p.copy_((torch.randn(p.shape) * std + mean).bfloat16().float())


def distance(a, b):
    """Largest difference relative to the range of `b`."""
    return float((a - b).abs().max() / (b.max() - b.min()))


def greedy(case, model, prompt):
    """The best next token by full passes, past any end token, and its lead over the second.

    None if a lead is too small.
    """
    ids, gaps = prompt.tolist(), []
    for _ in range(NEW):
        logits = case.compute(model, torch.tensor([ids]))[-1]
        top = logits.topk(2)
        if top.values[0] - top.values[1] < GREEDY_GAP * (logits.max() - logits.min()):
            return None
        ids.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
    return ids[len(prompt) :], gaps


def router_gap(case, model, sequences):
    """Smallest distance between the last expert chosen and the first one left out."""
    suffix, chosen = case.router
    smallest, hooks = [], []

    def hook(_, __, logits):
        best = logits.float().topk(chosen + 1, dim=-1).values
        smallest.append(float((best[..., -2] - best[..., -1]).min()))

    for name, module in model.named_modules():
        if name.endswith(suffix):
            hooks.append(module.register_forward_hook(hook))
    assert hooks, suffix
    for ids in sequences:
        case.compute(model, ids)
    for handle in hooks:
        handle.remove()
    return min(smallest)


def decided(case, model, ids):
    """Greedy continuation, or the reason why another seed is wanted."""
    if case.router and router_gap(case, model, [ids]) < ROUTER_GAP:
        return None, "router"
    continued = greedy(case, model, ids[0, :PROMPT])
    if not continued:
        return None, "tie"
    new, gaps = continued
    if len(set(new)) < VARIETY:
        return None, "repeats"
    whole = torch.cat([ids[0, :PROMPT], torch.tensor(new)])[None]
    if case.router and router_gap(case, model, [whole]) < ROUTER_GAP:
        return None, "router"
    return (new, gaps), None


def prepare(name, case):
    """A model whose decisions are not razor-thin, input ids and the greedy continuation."""
    reasons = []
    for attempt in range(ATTEMPTS):
        torch.manual_seed(sum(name.encode()) + 1000 * attempt)
        model = case.construct()
        randomize(model, case.embedding_std)
        ids = torch.randint(3, case.high, (1, case.tokens))
        continued, reason = decided(case, model, ids)
        if continued:
            return model, ids, continued, attempt
        reasons.append(reason)
    raise SystemExit(f"{name}: no seed: {dict(Counter(reasons))}")


def save(case, model, out):
    """config.json and model.safetensors as published, bf16."""
    with tempfile.TemporaryDirectory() as folder:
        model.bfloat16().save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        state = load_file(Path(folder) / "model.safetensors")
    if case.publish:
        config, state = case.publish(config, state)
    state = {k: v for k, v in state.items() if not any(part in k for part in case.dropped)}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    state = {k: v.contiguous() for k, v in state.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def reload(case, out, ids):
    """Logits of the folder as transformers reads it."""
    model, info = case.model.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    missing = [k for k in info["missing_keys"] if not any(part in k for part in case.dropped)]
    assert not missing and not info["mismatched_keys"], f"{missing} {info}"
    return case.compute(model.eval(), ids)


def check_settings(name, case, state, ids, logits):
    for change in case.matters:
        other = case.construct(change)
        other.load_state_dict(state, strict=False)
        error = distance(case.compute(other, ids), logits)
        assert error > DIFFERENT, f"{name}: {change} changes only {error:.1e}"


def make(name, case, here):
    torch.set_num_threads(1)
    model, ids, (new, gaps), attempt = prepare(name, case)
    logits = case.compute(model, ids)
    assert logits.isfinite().all()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    check_settings(name, case, state, ids, logits)
    rows = torch.arange((case.tokens - 1) % 3, case.tokens, 3)
    golden = {
        "input_ids": ids[0].int(),
        "positions": rows.int(),
        "logits": logits[rows].contiguous(),
        "greedy_prompt": ids[0, :PROMPT].int().contiguous(),
        "greedy": torch.tensor(new, dtype=torch.int32),
        "greedy_gap": torch.tensor(gaps),
    }
    if case.extra:
        golden.update(case.extra(model, rows))
    out = here / f"{name}-tiny"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    save(case, model, out)
    again = (case.check or reload_of(case))(out, ids)
    error = distance(again, logits)
    assert error < SAME, f"{name}: published weights give {error:.1e} other logits"
    save_file(golden, out / "golden.safetensors")
    size = sum(f.stat().st_size for f in out.iterdir())
    assert size < 220_000, f"{name}: {size} bytes"
    print(
        f"{name}: {size} bytes, seed {attempt}, logits {logits.min():.2f} to {logits.max():.2f},"
        f" gap {min(gaps):.3f}, {len(set(new))} tokens, reread {error:.1e}",
        flush=True,
    )


def reload_of(case):
    return lambda out, ids: reload(case, out, ids)
