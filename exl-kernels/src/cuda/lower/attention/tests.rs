use super::*;
use crate::cuda::lower::{Scratch, lower};
use crate::ops::{Op, RopeAppend, RopeStyle};
use crate::{KvType, Mem, MemMut, Place};

pub(super) const BASE: usize = 0x7000_0000;

pub(super) fn read(at: usize, elements: usize, dtype: DType) -> Mem<'static> {
    let pointer = std::ptr::without_provenance(at);
    // SAFETY: lowering reads no memory.
    unsafe { Mem::from_raw(pointer, elements * dtype.bytes(), dtype, Place::Device(0)) }
}

pub(super) fn write(at: usize, elements: usize, dtype: DType) -> MemMut<'static> {
    let pointer = std::ptr::without_provenance_mut(at);
    let bytes = elements * dtype.bytes();
    // SAFETY: lowering touches no memory.
    unsafe { MemMut::from_raw(pointer, bytes, dtype, Place::Device(0)) }
}

pub(super) fn sample(name: &str) -> DeviceProps {
    let found = DeviceProps::samples().into_iter().find(|p| p.name == name);
    found.unwrap()
}

/// Heads, KV heads, head size.
pub(super) type Heads = (usize, usize, usize);

fn shape((heads, kv_heads, dim): Heads, rows: usize, seqs: usize, tokens: usize) -> Shape {
    Shape {
        rows,
        seqs,
        tokens,
        heads,
        kv_heads,
        dim,
        cache: DType::F16,
        aligned: true,
    }
}

fn entry(s: &Shape, props: &DeviceProps, deterministic: bool) -> &'static str {
    select(s, props, deterministic).unwrap().kernel.entry
}

const LLAMA2: Heads = (32, 32, 128);
pub(super) const LLAMA3: Heads = (32, 8, 128);
const GEMMA: Heads = (16, 8, 256);
const TINY: Heads = (32, 4, 64);

#[test]
fn limits_of_every_gpu_hold() {
    let odd = [(1, 1, 32), (4, 2, 64), (8, 1, 80), (6, 6, 128), (71, 1, 64)];
    let all = [LLAMA2, LLAMA3, GEMMA, TINY, (4, 4, 33), (2, 1, 320)];
    for heads in all.into_iter().chain(odd) {
        for (rows, seqs) in [(1, 1), (7, 1), (64, 64), (600, 3), (8192, 2), (70_000, 1)] {
            for tokens in [256, 8192, 131_072] {
                for cache in [DType::F16, DType::F32] {
                    let s = Shape {
                        cache,
                        ..shape(heads, rows, seqs, tokens)
                    };
                    check_limits(&s);
                }
            }
        }
    }
}

fn check_limits(s: &Shape) {
    for props in DeviceProps::samples() {
        for deterministic in [false, true] {
            let c = select(s, &props, deterministic).unwrap();
            assert!(KERNELS.contains(&c.kernel), "{c:?}");
            assert!(c.grid.iter().all(|&n| n > 0), "{c:?}");
            assert!(c.grid[1] <= 65535 && c.grid[2] <= 65535, "{c:?}");
            assert!(c.threads <= 1024 && c.shared <= props.shared_per_block as usize);
            assert_eq!(c.grid[2], c.splits);
            assert!(c.splits == 1 || c.grid[0] * c.grid[1] <= COUNTERS, "{c:?}");
            assert!(s.scratch(c.splits) <= 2 * MAX_SCRATCH, "{s:?} {c:?}");
            // Every key has a block.
            assert!(c.chunk == 0 || c.splits == 1 || c.splits * c.chunk >= s.tokens);
        }
    }
}

#[test]
fn long_contexts_fill_the_gpu_and_short_ones_stay_whole() {
    let h200 = sample("H200");
    for (heads, tokens, most) in [
        (LLAMA2, 8192, 8),
        (LLAMA3, 8192, 33),
        (TINY, 8192, 64),
        (LLAMA3, 2048, 16),
        (LLAMA3, 256, 2),
    ] {
        let c = select(&shape(heads, 1, 1, tokens), &h200, false).unwrap();
        assert_eq!((c.splits, c.chunk), (most, 0), "{heads:?} {tokens}");
    }
    // Enough sequences are blocks enough.
    for seqs in [8, 64] {
        let c = select(&shape(LLAMA2, seqs, seqs, 8192), &h200, false).unwrap();
        assert_eq!(c.splits, 1);
    }
    // 192 blocks would leave a quarter of the GPU idle.
    let c = select(&shape(LLAMA2, 6, 6, 8192), &h200, false).unwrap();
    assert_eq!(c.splits, 4);
}

#[test]
fn prompts_take_large_tiles_and_decoding_small_ones() {
    let h200 = sample("H200");
    let rtx3090 = sample("RTX 3090");
    let named = |s: &Shape| entry(s, &h200, false);
    let elsewhere = |s: &Shape| entry(s, &rtx3090, false);
    assert_eq!(named(&shape(LLAMA3, 1, 1, 512)), "exl_attn_decode_128");
    assert_eq!(named(&shape(LLAMA3, 64, 64, 512)), "exl_attn_decode_128");
    assert_eq!(named(&shape(LLAMA3, 8, 1, 512)), "exl_attn_decode_128");
    for (heads, rows, seqs, dim) in [
        (LLAMA3, 2048, 1, 128),
        (GEMMA, 2048, 1, 256),
        (TINY, 512, 4, 64),
    ] {
        let s = shape(heads, rows, seqs, 2048);
        assert_eq!(named(&s), format!("exl_attn_wgmma_{dim}"));
        assert_eq!(elsewhere(&s), format!("exl_attn_prefill_{dim}"));
    }
    // Too few rows for tiles of 128.
    assert_eq!(named(&shape(LLAMA2, 300, 3, 512)), "exl_attn_prefill_128");
    // A short prompt of few heads has too few large tiles.
    assert_eq!(
        named(&shape((8, 2, 128), 64, 1, 256)),
        "exl_attn_decode_128"
    );
    // Head sizes in between take the next larger kernel.
    assert_eq!(named(&shape((4, 2, 16), 1, 1, 256)), "exl_attn_decode_64");
    assert_eq!(
        named(&shape((24, 12, 16), 322, 2, 256)),
        "exl_attn_wgmma_64"
    );
    assert_eq!(named(&shape((32, 32, 80), 1, 1, 256)), "exl_attn_decode_96");
    assert_eq!(
        named(&shape((32, 8, 192), 1, 1, 256)),
        "exl_attn_decode_256"
    );
}

#[test]
fn what_tensor_cores_cannot_take_goes_row_by_row() {
    let h100 = sample("H100");
    let single = shape(LLAMA3, 1, 1, 512);
    let full = Shape {
        cache: DType::F32,
        ..single
    };
    let crooked = Shape {
        aligned: false,
        ..single
    };
    let named = |s: &Shape| entry(s, &h100, false);
    assert_eq!(named(&full), "exl_attn_rows_f32_128");
    assert_eq!(named(&crooked), "exl_attn_rows_f16_128");
    assert_eq!(named(&Shape { dim: 36, ..single }), "exl_attn_rows_f16_64");
    assert_eq!(
        named(&Shape { dim: 264, ..single }),
        "exl_attn_rows_any_f16"
    );
    assert_eq!(named(&Shape { dim: 257, ..full }), "exl_attn_rows_any_f32");
    let huge = Shape {
        dim: 1 << 16,
        ..single
    };
    assert_eq!(select(&huge, &h100, false), None);
}

#[test]
fn deterministic_kernels_and_chunks_do_not_depend_on_the_batch() {
    for props in DeviceProps::samples() {
        for cache in [DType::F16, DType::F32] {
            let choice = |rows, seqs, tokens| {
                let s = Shape {
                    cache,
                    ..shape(LLAMA3, rows, seqs, tokens)
                };
                let c = select(&s, &props, true).unwrap();
                (c.kernel, c.chunk)
            };
            let alone = choice(1, 1, 256);
            for (rows, seqs) in [(2, 1), (16, 16), (300, 3), (4096, 1)] {
                for tokens in [256, 8192, 131_072] {
                    assert_eq!(choice(rows, seqs, tokens), alone);
                }
            }
        }
    }
}

#[test]
fn every_tile_has_a_slot() {
    // The rule of attn.cuh: slots of sequence s begin at q_start[s] * group / 16 + s.
    for group in [1, 2, 5, 16, 71] {
        for lens in [vec![1; 9], vec![0, 17, 0, 16, 1], vec![15, 33, 2], vec![0]] {
            let rows: usize = lens.iter().sum();
            let s = shape((group, 1, 64), rows, lens.len(), 256);
            let mut start = 0;
            for (i, n) in lens.iter().enumerate() {
                let first = start * group / DECODE_ROWS + i;
                start += n;
                let next = start * group / DECODE_ROWS + i + 1;
                assert!(first + (n * group).div_ceil(DECODE_ROWS) <= next);
                assert!(next <= s.slots(DECODE_ROWS));
            }
        }
    }
}

fn attention(heads: Heads, rows: usize, pages: usize, q_at: usize) -> Op<'static> {
    let (heads, kv_heads, head_dim) = heads;
    let cache = 2 * PAGE_TOKENS * kv_heads * head_dim;
    Op::PagedAttn(PagedAttn {
        q: read(q_at, rows * heads * head_dim, DType::F32),
        k_cache: read(BASE + (1 << 24), cache, DType::F16),
        v_cache: read(BASE + (2 << 24), cache, DType::F16),
        kv: KvType::F16,
        block_table: read(BASE + (3 << 24), pages, DType::I32),
        q_start: read(BASE + (4 << 24), 2, DType::I32),
        kv_len: read(BASE + (5 << 24), 1, DType::I32),
        out: write(BASE + (6 << 24), rows * heads * head_dim, DType::F32),
        rows,
        seqs: 1,
        pages_per_seq: pages,
        heads,
        kv_heads,
        head_dim,
        scale: 0.125,
        softcap: 0.0,
        window: usize::MAX,
    })
}

#[test]
fn launches_stay_within_the_scratch_they_asked_for() {
    for props in DeviceProps::samples() {
        for (op, q_aligned) in [
            (attention(LLAMA3, 1, 32, BASE), true),
            (attention(LLAMA2, 64, 4, BASE + 4), false),
            (attention(TINY, 0, 4, BASE), true),
        ] {
            let Op::PagedAttn(o) = &op else {
                unreachable!()
            };
            let bytes = paged_attn_scratch(o, &props);
            for deterministic in [false, true] {
                let target = Target {
                    props: &props,
                    scratch: Scratch::default(),
                    deterministic,
                };
                let mut list = Vec::new();
                lower(&op, &target, &mut list).unwrap();
                assert_eq!(list.len(), usize::from(o.rows > 0));
                for launch in list {
                    let splits = launch.grid[2] as usize;
                    assert!(Shape::new(o).scratch(splits) as u64 <= bytes);
                    assert_eq!(launch.kernel.module == "attn/simt", !q_aligned);
                    assert_eq!(launch.args.params().count(), 21);
                }
            }
        }
    }
}

#[test]
fn rotations_use_several_blocks_for_few_rows() {
    let h200 = sample("H200");
    let target = Target {
        props: &h200,
        scratch: Scratch::default(),
        deterministic: false,
    };
    for (rows, pairs, dtype, blocks, sections) in [
        (1, 64, DType::F16, 3, None),
        (1, 64, DType::F16, 3, Some([16, 24, 24])),
        (1, 0, DType::F32, 1, None),
        (1, 48, DType::F16, 2, None),
        (4096, 64, DType::F16, 1, None),
    ] {
        let axes = if sections.is_some() { 3 } else { 1 };
        let (heads, kv_heads, head_dim) = LLAMA3;
        let width = kv_heads * head_dim;
        let op = Op::RopeAppend(RopeAppend {
            q: write(BASE, rows * heads * head_dim, DType::F32),
            k: read(BASE + (1 << 26), rows * width, DType::F32),
            v: read(BASE + (2 << 26), rows * width, DType::F32),
            positions: read(BASE + (3 << 26), axes * rows, DType::I32),
            slots: read(BASE + (4 << 26), rows, DType::I32),
            inv_freq: read(BASE + (5 << 26), pairs, DType::F32),
            k_centers: Mem::host::<half::f16>(&[]),
            k_cache: write(BASE + (6 << 26), 16 * PAGE_TOKENS * width, dtype),
            v_cache: write(BASE + (7 << 26), 16 * PAGE_TOKENS * width, dtype),
            kv: if dtype == DType::F16 {
                KvType::F16
            } else {
                KvType::F32
            },
            rows,
            heads,
            kv_heads,
            head_dim,
            style: RopeStyle::GptJ,
            attention_factor: 1.0,
            sections,
        });
        let mut list = Vec::new();
        lower(&op, &target, &mut list).unwrap();
        assert_eq!(list.len(), 1);
        assert_eq!(list[0].grid, [rows as u32, blocks, 1]);
        assert_eq!(list[0].kernel, ROPE[usize::from(dtype == DType::F32)]);
        assert_eq!(list[0].args.params().count(), 16);
        let none = i32::MAX as u64;
        let starts = sections.map_or([none; 2], |_| [16, 40]);
        assert_eq!(list[0].args.words()[14..], starts);
    }
}

/// Attention over a quantized cache of `pages` pages, which every sequence may have.
fn quantized_attention(
    kv: KvType,
    (heads, kv_heads, head_dim): Heads,
    (rows, seqs, pages): (usize, usize, usize),
) -> PagedAttn<'static> {
    let region = |at: usize, page: usize| read(BASE + at, pages * page, DType::U8);
    PagedAttn {
        q: read(BASE, rows * heads * head_dim, DType::F32),
        k_cache: region(1 << 40, kv.k.key_page_bytes(kv_heads, head_dim)),
        v_cache: region(2 << 40, kv.v.page_bytes(kv_heads, head_dim)),
        kv,
        block_table: read(BASE + (3 << 40), seqs * pages, DType::I32),
        q_start: read(BASE + (4 << 40), seqs + 1, DType::I32),
        kv_len: read(BASE + (5 << 40), seqs, DType::I32),
        out: write(BASE + (6 << 40), rows * heads * head_dim, DType::F32),
        rows,
        seqs,
        pages_per_seq: pages,
        heads,
        kv_heads,
        head_dim,
        scale: 0.125,
        softcap: 0.0,
        window: 0,
    }
}

fn lowered(o: PagedAttn<'static>, props: &DeviceProps, deterministic: bool) -> Vec<Launch> {
    let target = Target {
        props,
        scratch: Scratch {
            address: 7 << 40,
            bytes: paged_attn_scratch(&o, props),
            counters: 8 << 40,
        },
        deterministic,
    };
    let mut list = Vec::new();
    lower(&Op::PagedAttn(o), &target, &mut list).unwrap();
    list
}

const QUANTIZED: [KvType; 4] = [
    KvType::Q8,
    KvType::Q6,
    KvType::Q4,
    KvType {
        k: crate::KvFormat::Q8,
        v: crate::KvFormat::Q4,
    },
];

#[test]
fn few_rows_read_codes_and_prompts_read_unpacked_pages() {
    for props in DeviceProps::samples() {
        for (kv, name) in QUANTIZED
            .into_iter()
            .zip(["q8_q8", "q6_q6", "q4_q4", "q8_q4"])
        {
            for (heads, dim) in [(LLAMA3, 128), (TINY, 64)] {
                for (rows, seqs) in [(1, 1), (7, 1), (8, 8)] {
                    let list = lowered(
                        quantized_attention(kv, heads, (rows, seqs, 32)),
                        &props,
                        false,
                    );
                    assert_eq!(list.len(), 1, "{}", props.name);
                    assert_eq!(
                        list[0].kernel.entry,
                        format!("exl_attn_decode_{dim}_{name}")
                    );
                    // Of the cache as it lies there.
                    assert_eq!(list[0].args.params().nth(20), Some(&1));
                }
                let prompt = quantized_attention(kv, heads, (2048, 1, 32));
                let list = lowered(prompt, &props, false);
                assert_eq!(list[0].kernel, quantized::UNPACK);
                assert_eq!(list[1].args.params().nth(20), Some(&0));
                let floats = shape(heads, 2048, 1, 8192);
                assert_eq!(
                    list[1].kernel,
                    select(&floats, &props, false).unwrap().kernel
                );
                assert_eq!(list[2].kernel, quantized::RESTORE);
                // One kernel for every number of rows.
                for (rows, seqs) in [(1, 1), (300, 3), (2048, 1)] {
                    let list = lowered(
                        quantized_attention(kv, heads, (rows, seqs, 32)),
                        &props,
                        true,
                    );
                    assert_eq!(list.len(), 1);
                    assert_eq!(
                        list[0].kernel.entry,
                        format!("exl_attn_decode_{dim}_{name}")
                    );
                }
            }
        }
        // Heads and pairs of formats without a kernel of their own.
        let odd = KvType {
            k: crate::KvFormat::Q6,
            v: crate::KvFormat::Q4,
        };
        for (kv, heads) in [(KvType::Q4, GEMMA), (KvType::Q8, (2, 1, 22)), (odd, LLAMA3)] {
            let list = lowered(quantized_attention(kv, heads, (1, 1, 4)), &props, false);
            assert_eq!(list.len(), 3);
        }
    }
}

#[test]
fn limits_hold_for_quantized_caches() {
    for props in DeviceProps::samples() {
        for kv in QUANTIZED {
            for heads in [LLAMA2, LLAMA3, TINY, GEMMA, (4, 4, 80), (71, 1, 64)] {
                for (rows, seqs, pages) in [(1, 1, 1), (64, 64, 512), (600, 3, 32), (8192, 2, 32)] {
                    for deterministic in [false, true] {
                        let o = quantized_attention(kv, heads, (rows, seqs, pages));
                        let scratch = paged_attn_scratch(&o, &props);
                        // Two unpacked layers at most, beside what is shared out.
                        let unpacked = 4 * pages * PAGE_TOKENS * heads.1 * heads.2;
                        assert!(scratch <= (unpacked + 2 * MAX_SCRATCH) as u64);
                        for launch in lowered(o, &props, deterministic) {
                            assert!(KERNELS.contains(&launch.kernel));
                            assert!(launch.grid.iter().all(|&n| n > 0));
                            assert!(launch.grid[1] <= 65535 && launch.grid[2] <= 65535);
                            assert!(launch.shared_bytes <= props.shared_per_block);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn appends_to_quantized_caches_have_a_block_per_head() {
    let h200 = sample("H200");
    let target = Target {
        props: &h200,
        scratch: Scratch::default(),
        deterministic: false,
    };
    let (heads, kv_heads, head_dim) = LLAMA3;
    // Few rows are looked at by seven times the threads.
    for (rows, kernel, threads) in [
        (3, quantized::APPEND_FEW, 896),
        (12, quantized::APPEND, 128),
    ] {
        let width = kv_heads * head_dim;
        let format = KvType::Q4.k;
        let op = Op::RopeAppend(RopeAppend {
            q: write(BASE, rows * heads * head_dim, DType::F32),
            k: read(BASE + (1 << 26), rows * width, DType::F32),
            v: read(BASE + (2 << 26), rows * width, DType::F32),
            positions: read(BASE + (3 << 26), rows, DType::I32),
            slots: read(BASE + (4 << 26), rows, DType::I32),
            inv_freq: read(BASE + (5 << 26), 64, DType::F32),
            k_centers: read(BASE + (8 << 26), 4 * width, DType::F16),
            k_cache: write(
                BASE + (6 << 26),
                4 * format.key_page_bytes(kv_heads, head_dim),
                DType::U8,
            ),
            v_cache: write(
                BASE + (7 << 26),
                4 * format.page_bytes(kv_heads, head_dim),
                DType::U8,
            ),
            kv: KvType::Q4,
            rows,
            heads,
            kv_heads,
            head_dim,
            style: RopeStyle::Neox,
            attention_factor: 1.0,
            sections: None,
        });
        let mut list = Vec::new();
        lower(&op, &target, &mut list).unwrap();
        assert_eq!(list.len(), 1);
        assert_eq!((list[0].kernel, list[0].block), (kernel, [threads, 1, 1]));
        assert_eq!(list[0].grid, [rows as u32, 48, 1]);
        assert_eq!(list[0].shared_bytes, 640);
        assert_eq!(list[0].args.params().count(), 20);
        assert_eq!(list[0].args.words()[9], 4, "rows of centers");
    }
}
