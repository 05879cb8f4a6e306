"""The text side of models that see: nested configurations, prefixes, rotation by three positions.

The towers are as small as they may be and left out of the files.
"""

import torch
from transformers import (
    Gemma3ForConditionalGeneration,
    LlavaForConditionalGeneration,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

from .common import IDS, NARROW, SMALL, Case, distance

# Ids of the vocabulary that mean images; no input holds them.
TEXT_IDS = 120
SPECIAL = dict(
    vision_start_token_id=121, vision_end_token_id=122, image_token_id=123, video_token_id=124
)
TOWER = ("visual", "vision_tower", "multi_modal_projector")
# Of two spans: after how many tokens of text, and frames, rows and columns of merged patches.
SPANS = (7, (1, 3, 4)), (6, (2, 2, 3))


def mrope_positions(tokens):
    """`[3, tokens]`: text, a picture, text, a video, text.

    Text counts all three on. A span counts frames, rows and columns from where the text ended, and
    text goes on after the largest.
    """
    columns, at = [], 0
    for text, (frames, height, width) in SPANS:
        columns += [(at + i,) * 3 for i in range(text)]
        at += text
        grid = [(t, h, w) for t in range(frames) for h in range(height) for w in range(width)]
        columns += [tuple(at + p for p in point) for point in grid]
        at += max(frames, height, width)
    columns += [(at + i,) * 3 for i in range(tokens - len(columns))]
    return torch.tensor(columns).T.contiguous()


def with_positions(tokens):
    """Golden logits with given positions, for ids of their own."""

    def extra(model, rows):
        ids = torch.randint(3, TEXT_IDS, (1, tokens), generator=torch.Generator().manual_seed(5))
        positions = mrope_positions(tokens)

        def compute(ids, positions):
            with torch.no_grad():
                return model(ids, position_ids=positions[:, None], use_cache=False).logits[0]

        logits = compute(ids, positions)
        in_line = compute(ids, torch.arange(tokens).expand(3, -1))
        assert distance(logits, in_line) > 0.1
        # Every row sees the first token and none sees the last: the mask knows no positions.
        for changed, seen in ((0, 1), (tokens - 1, 0)):
            other = ids.clone()
            other[0, changed] = 3 if ids[0, changed] != 3 else 4
            moved = (compute(other, positions) - logits).abs().amax(-1)[: tokens - 1]
            assert bool((moved > 0).all()) if seen else not moved.any()
        return {
            "mrope_ids": ids[0].int(),
            "mrope_positions": positions.int(),
            "mrope_logits": logits[rows].contiguous(),
        }

    return extra


QWEN_TEXT = dict(
    NARROW,
    rope_theta=1e6,
    rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]),
    tie_word_embeddings=True,
)


def qwen2_vl_released(config, state):
    """Everything of the text at the top level, as in the first releases."""
    text, vision = config["text_config"], config["vision_config"]
    keys = (
        "attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range"
        " intermediate_size max_position_embeddings max_window_layers num_attention_heads"
        " num_hidden_layers num_key_value_heads rms_norm_eps rope_theta use_cache vocab_size"
    )
    flat = {key: text[key] for key in keys.split()}
    kept = "depth embed_dim hidden_size mlp_ratio num_heads patch_size spatial_merge_size"
    tower = {key: vision[key] for key in kept.split()} | dict(
        in_chans=3, spatial_patch_size=14, temporal_patch_size=2
    )
    flat |= SPECIAL | dict(
        architectures=config["architectures"],
        model_type="qwen2_vl",
        rope_scaling=QWEN_TEXT["rope_scaling"],
        sliding_window=256,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
        transformers_version="4.41.2",
        use_sliding_window=False,
        vision_config=tower,
        vision_token_id=125,
    )
    return flat, state


def gemma3_released(config, state):
    """What a released configuration says of the text; the rest are defaults of the class."""
    kept = (
        "head_dim hidden_size intermediate_size model_type num_hidden_layers rope_scaling"
        " sliding_window vocab_size"
    )
    config["text_config"] = {key: config["text_config"][key] for key in kept.split()}
    config.pop("dtype")
    return config | dict(torch_dtype="bfloat16", transformers_version="4.50.0.dev0"), state


def pixtral_released(config, state):
    """Without the number of heads, as released: 32 is what the class says."""
    kept = (
        "head_dim hidden_size intermediate_size max_position_embeddings model_type"
        " num_hidden_layers num_key_value_heads rms_norm_eps rope_theta sliding_window vocab_size"
    )
    text = {key: config["text_config"][key] for key in kept.split()}
    tower = config["vision_config"]
    tower = {key: tower[key] for key in tower if key not in ("dtype", "transformers_version")}
    return dict(
        architectures=config["architectures"],
        ignore_index=-100,
        image_seq_length=1,
        image_token_index=config["image_token_index"],
        model_type="llava",
        projector_hidden_act="gelu",
        text_config=dict(text, is_composition=True),
        torch_dtype="bfloat16",
        transformers_version=None,
        vision_config=dict(tower, is_composition=True, tie_word_embeddings=False),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ), state


def without(settings, *names):
    return {key: value for key, value in settings.items() if key not in names}


PIXTRAL_TOWER = dict(
    model_type="pixtral",
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=1,
    head_dim=16,
    image_size=32,
    patch_size=16,
)
MISTRAL_TEXT = dict(
    NARROW,
    model_type="mistral",
    head_dim=16,
    rope_theta=1e9,
    rms_norm_eps=1e-5,
    sliding_window=None,
)
PIXTRAL_TEXT = dict(
    without(MISTRAL_TEXT, "num_attention_heads", *IDS),
    vocab_size=IDS["vocab_size"],
    num_key_value_heads=2,
    intermediate_size=32,
)
GEMMA_TEXT = dict(
    without(SMALL, "num_attention_heads", "num_key_value_heads", *IDS),
    vocab_size=IDS["vocab_size"],
    head_dim=16,
    intermediate_size=32,
    num_hidden_layers=6,
    max_position_embeddings=131072,
    sliding_window=8,
    rope_scaling=dict(rope_type="linear", factor=8.0),
    tie_word_embeddings=True,
)


def text(settings, **changes):
    return dict(text_config=dict(settings, **changes))


CASES = {
    "qwen2-vl": Case(
        Qwen2VLForConditionalGeneration,
        dict(
            text_config=QWEN_TEXT,
            vision_config=dict(depth=1, embed_dim=16, num_heads=1, hidden_size=32),
            architectures=["Qwen2VLForConditionalGeneration"],
            tie_word_embeddings=True,
            **SPECIAL,
        ),
        tokens=45,
        publish=qwen2_vl_released,
        dropped=TOWER,
        extra=with_positions(45),
        high=TEXT_IDS,
    ),
    "qwen2.5-vl": Case(
        Qwen2_5_VLForConditionalGeneration,
        dict(
            text_config=dict(QWEN_TEXT, tie_word_embeddings=False),
            # Which saving alone puts below text_config.
            architectures=["Qwen2_5_VLForConditionalGeneration"],
            vision_config=dict(
                depth=1,
                hidden_size=16,
                intermediate_size=16,
                num_heads=1,
                out_hidden_size=32,
                fullatt_block_indexes=[0],
            ),
            tie_word_embeddings=False,
            **SPECIAL,
        ),
        tokens=45,
        dropped=TOWER,
        extra=with_positions(45),
        high=TEXT_IDS,
    ),
    "gemma3": Case(
        Gemma3ForConditionalGeneration,
        dict(
            text_config=GEMMA_TEXT,
            vision_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                image_size=56,
                patch_size=14,
                vision_use_head=False,
            ),
            mm_tokens_per_image=4,
            boi_token_index=121,
            eoi_token_index=122,
            image_token_index=123,
            eos_token_id=[1, 106],
        ),
        tokens=48,
        publish=gemma3_released,
        dropped=TOWER,
        matters=(
            text(GEMMA_TEXT, sliding_window=9),
            text(GEMMA_TEXT, layer_types=["sliding_attention"] * 6),
            text(GEMMA_TEXT, rope_scaling=None),
            text(GEMMA_TEXT, query_pre_attn_scalar=16),
        ),
        high=TEXT_IDS,
    ),
    "llava-pixtral": Case(
        LlavaForConditionalGeneration,
        dict(
            text_config=PIXTRAL_TEXT,
            vision_config=PIXTRAL_TOWER,
            image_token_index=123,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=False,
        ),
        publish=pixtral_released,
        dropped=TOWER,
        matters=(text(PIXTRAL_TEXT, rope_theta=1e4),),
        high=TEXT_IDS,
    ),
    "mistral3": Case(
        Mistral3ForConditionalGeneration,
        dict(
            text_config=MISTRAL_TEXT,
            vision_config=PIXTRAL_TOWER,
            image_token_index=123,
            tie_word_embeddings=False,
        ),
        dropped=TOWER,
        high=TEXT_IDS,
    ),
}
