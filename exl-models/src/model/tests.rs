use std::path::Path;

use exl_format::ConfigFile;
use exl_tensor::{DType, Group};
use serde_json::json;

use super::*;
use crate::rope::RopeOptions;
use crate::{WeightKind, layout, parse};

fn llama2_7b() -> Spec {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 16384
    });
    let file = ConfigFile::from_value(Path::new("config.json"), config).unwrap();
    parse(&file, &RopeOptions::default(), false).unwrap()
}

/// The weights of a model at 4 bits with a permutation for each input of a layer.
fn sketch(spec: &Spec) -> GpuSketch {
    let mut sketch = GpuSketch::new();
    for (i, rope) in spec.ropes.iter().enumerate() {
        sketch.dense(&Spec::rope_weight(i), DType::F32, &[rope.inv_freq.len()]);
    }
    for key in layout(spec) {
        if !key.is_linear() || matches!(key.kind, WeightKind::Head { .. }) {
            sketch.dense(&key.name, DType::F16, &key.shape);
            continue;
        }
        let (outputs, inputs) = (key.shape[0], key.shape[1]);
        let groups = vec![Group { bits: 4, rows: 128 }; inputs / 128];
        let layer = key.name.split('.').nth(2).unwrap().parse::<u32>().unwrap();
        let turn = |i: u32| (i + 1 + layer) % inputs as u32;
        let invperm: Vec<u32> = (0..inputs as u32).map(turn).collect();
        sketch.exl2(&key.name, (inputs, outputs), groups, &invperm);
    }
    sketch
}

#[test]
fn a_prompt_of_a_7b_takes_known_memory() {
    let spec = llama2_7b();
    let sketch = sketch(&spec);
    let request = MemoryRequest::new((1, 8192), KvType::F16, 2048);
    let row = 2048 * 4096 * 4;
    for props in DeviceProps::samples() {
        let used = gpu_memory_for(&spec, &sketch, &props, &request).unwrap();
        println!("{}: {used:?}", props.name);
        assert_eq!(used.cache, 2 * 32 * 8192 * 4096 * 2);
        // The residual, its norm, q, k and v.
        assert_eq!(used.arena, 5 * row);
        // Inputs of 16 bits for down, and weights of 16 bits for a part of it.
        let inputs = 2048 * 11008 * 2;
        let weights = if props.has_warpgroup_products() {
            4096 * 11008 * 2
        } else {
            192 << 20
        };
        assert!(used.scratch > inputs, "{}", props.name);
        assert!(used.scratch <= inputs + weights + 4 * 2048 * 11008);
    }
}

/// Codes take fewer bytes; prompts unpack the pages of one layer, whatever their number of sequences.
#[test]
fn quantized_caches_take_their_bytes_and_room_to_unpack_one_layer() {
    let spec = llama2_7b();
    let sketch = sketch(&spec);
    for props in DeviceProps::samples() {
        let used = |kv, seqs, context| {
            let request = MemoryRequest::new((seqs, context), kv, 2048);
            gpu_memory_for(&spec, &sketch, &props, &request).unwrap()
        };
        for (seqs, context) in [(1, 32768), (4, 8192)] {
            let (floats, codes) = (
                used(KvType::F16, seqs, context),
                used(KvType::Q4, seqs, context),
            );
            // Of a page the centers of its keys, there and of its number.
            let centers = 2 * 32 * (32768 / 256) * 4096 * 2;
            assert_eq!(codes.cache, floats.cache / 32 * 9 + centers);
            let layer = 2 * 32768 * 4096 * 2;
            assert!(
                codes.scratch >= layer && codes.scratch <= layer.max(floats.scratch) + (64 << 20)
            );
        }
    }
}

/// One row has kernels of its own: what they want is there before a step of one row comes.
#[test]
fn memory_is_enough_for_steps_of_one_row() {
    let (spec, props) = (llama2_7b(), &DeviceProps::samples()[5]);
    let sketch = sketch(&spec);
    for seqs in [1, 4] {
        let request = MemoryRequest::new((seqs, 512), KvType::F16, 4);
        let shape = spec.kv_shape(KvType::F16);
        let rows = request.steps(&shape, None).map(|key| (key.rows, key.seqs));
        assert_eq!(rows, [(4, seqs.min(4)), (seqs, seqs), (1, 1)]);
        let all = gpu_memory_for(&spec, &sketch, props, &request).unwrap();
        for key in request.steps(&shape, None) {
            let plan = Arc::new(plan(&spec, &key));
            let pages = request.kv_pages(&shape);
            let own = sketch.plan(&plan, (&shape, pages), props).unwrap();
            assert!(own.scratch <= all.scratch && own.arena <= all.arena);
        }
    }
}

#[test]
fn equal_permutations_are_counted_once() {
    let groups = vec![Group { bits: 4, rows: 64 }];
    let orders: [Vec<u32>; 3] = [
        (0..64).collect(),
        (0..64).rev().collect(),
        (0..64).map(|i| (i + 1) % 64).collect(),
    ];
    let bytes = |list: &[usize]| {
        let mut sketch = GpuSketch::new();
        for (i, &order) in list.iter().enumerate() {
            let (name, groups) = (i.to_string(), groups.clone());
            sketch.exl2(&name, (64, 32), groups, &orders[order]);
        }
        sketch.weight_bytes()
    };
    let (one, perm) = (bytes(&[0]), 8 * 64);
    assert_eq!(bytes(&[0, 0]), 2 * one);
    assert_eq!(bytes(&[1, 1]), 2 * one + perm);
    assert_eq!(bytes(&[0, 1, 2, 1]), 4 * one + 2 * perm);
}

/// In the shape of Gemma 3 27B: a layer in six sees everything, the others a window of 1024 tokens.
#[test]
fn sliding_layers_of_a_27b_keep_a_window_of_a_long_text() {
    let config = json!({
        "architectures": ["Gemma3ForCausalLM"], "hidden_size": 5376, "intermediate_size": 21504,
        "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128, "vocab_size": 262_144, "sliding_window": 1024, "sliding_window_pattern": 6,
        "max_position_embeddings": 131_072
    });
    let file = ConfigFile::from_value(Path::new("config.json"), config).unwrap();
    let spec = parse(&file, &RopeOptions::default(), false).unwrap();
    let shape = spec.kv_shape(KvType::F16);
    assert_eq!((shape.full_layers(), shape.sliding.layers), (10, 52));
    let cache_at = |tokens, rows, window_pages| {
        let request = MemoryRequest {
            window_pages,
            ..MemoryRequest::new((1, tokens), KvType::F16, rows)
        };
        memory_for(&spec, 0, &request).cache
    };
    let cache = |rows, window_pages| cache_at(32768, rows, window_pages);
    let layer_page = 2 * 16 * 128 * 256 * 2;
    let whole = 62 * 128 * layer_page;
    assert_eq!(cache(2049, WindowPages::All), whole);
    assert_eq!(whole, 16_642_998_272);
    // Of 128 pages 20 in steps of 2048 tokens, and 14 in steps of 512.
    let pages = |sliding: u64| (10 * 128 + 52 * sliding) * layer_page;
    assert_eq!(cache(2049, WindowPages::Needed), pages(20));
    assert_eq!(cache(513, WindowPages::Needed), pages(14));
    assert_eq!((pages(20), pages(14)), (4_865_392_640, 4_211_081_216));
    // Bytes of a token: of all layers, and of those that see everything.
    assert_eq!(shape.token_bytes(), 507_904);
    let more = cache_at(131_072, 513, WindowPages::Needed) - pages(14);
    assert_eq!(more / (131_072 - 32768), 81_920);
    // A context of a few windows takes no less.
    let short = |window_pages| cache_at(3584, 513, window_pages);
    assert_eq!(short(WindowPages::Needed), short(WindowPages::All));
}
