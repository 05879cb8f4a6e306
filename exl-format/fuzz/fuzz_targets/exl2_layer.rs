//! Tensors of a layer, nearly right: an error or a layer that decodes and is written back as it
//! was read. The same bytes are also tried as a GPTQ layer.
#![no_main]

use std::path::Path;

use arbitrary::Arbitrary;
use exl_format::{Bytes, Exl2Linear, GptqFormat, GptqLinear, LayerTensor, SafetensorsFile};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Sizes in blocks of 32, kept small.
    outputs: u8,
    /// Bits and blocks of rows of each group.
    groups: Vec<(u8, u8)>,
    bias: bool,
    edits: Vec<Edit>,
    /// Codes, scales and whatever else, repeated as needed.
    noise: Vec<u8>,
}

#[derive(Arbitrary, Debug)]
enum Edit {
    /// Overwrites bytes of a tensor.
    Data { tensor: u8, at: u16, value: u32 },
    /// Replaces a size, data follows.
    Size { tensor: u8, dimension: u8, size: u16 },
    /// Another element type.
    Type { tensor: u8, name: u8 },
    /// Leaves a tensor out.
    Drop { tensor: u8 },
}

struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    data: Vec<u8>,
}

const TYPES: [&str; 6] = ["I32", "U32", "F16", "BF16", "I16", "F32"];

fn width(dtype: &str) -> usize {
    if dtype.ends_with("32") { 4 } else { 2 }
}

/// A layer that is valid wherever the groups are, its permutation a rotation.
fn tensors(input: &Input) -> Vec<Tensor> {
    let widths = [8, 6, 5, 4, 3, 2];
    let n = 32 * (usize::from(input.outputs % 3) + 1);
    let mut groups: Vec<(u16, usize)> = input
        .groups
        .iter()
        .take(12)
        // Some widths are none, now and then the order is wrong.
        .map(|(b, r)| match b {
            200.. => (u16::from(*b % 11), usize::from(r % 3)),
            _ => (widths[usize::from(b % 6)], usize::from(r % 3) + 1),
        })
        .collect();
    if input.noise.first() != Some(&255) {
        groups.sort_by_key(|g| std::cmp::Reverse(g.0));
    }
    let (mut table, mut words, mut inputs) = (Vec::new(), 0, 0);
    for (bits, blocks) in &groups {
        table.extend([*bits, words as u16]);
        words += blocks * usize::from(*bits);
        inputs += 32 * blocks;
    }
    let mut noise = input.noise.iter().copied().cycle();
    let mut fill = |bytes: usize| -> Vec<u8> {
        let some: Vec<u8> = noise.by_ref().take(bytes).collect();
        if some.is_empty() { vec![0x35; bytes] } else { some }
    };
    let turn = input.noise.len();
    let perm = (0..inputs).flat_map(|k| (((k + turn) % inputs) as u32).to_le_bytes());
    let g = groups.len();
    let tensor = |suffix: &str, dtype, shape: &[usize], data| Tensor {
        name: format!("p.{suffix}"),
        dtype,
        shape: shape.to_vec(),
        data,
    };
    let mut all = vec![
        tensor("q_weight", "I32", &[words, n], fill(4 * words * n)),
        tensor("q_scale", "I32", &[g, n / 8], fill(g * n / 2)),
        tensor("q_scale_max", "F16", &[g], fill(2 * g)),
        tensor(
            "q_groups",
            "I16",
            &[2 * g],
            table.iter().flat_map(|t| t.to_le_bytes()).collect(),
        ),
        tensor("q_invperm", "I32", &[inputs], perm.collect()),
        // The same sizes as a GPTQ layer.
        tensor("qweight", "I32", &[inputs / 8, n], fill(inputs / 2 * n)),
        tensor("qzeros", "I32", &[g, n / 8], fill(g * n / 2)),
        tensor("scales", "F16", &[g, n], fill(2 * g * n)),
    ];
    if input.bias {
        all.push(tensor("bias", "F16", &[n], fill(2 * n)));
        let group = |k: usize| (k % g.max(1)) as u32;
        let idx = (0..inputs).flat_map(|k| group(k).to_le_bytes()).collect();
        all.push(tensor("g_idx", "I32", &[inputs], idx));
    }
    all
}

fn apply(edit: &Edit, tensors: &mut Vec<Tensor>) {
    let count = tensors.len().max(1);
    let pick = |t: &u8| usize::from(*t) % count;
    match edit {
        Edit::Data { tensor, at, value } => {
            let Some(t) = tensors.get_mut(pick(tensor)) else { return };
            for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
                if let Some(target) = t.data.get_mut(usize::from(*at) + i) {
                    *target = byte;
                }
            }
        }
        Edit::Size { tensor, dimension, size } => {
            let Some(t) = tensors.get_mut(pick(tensor)) else { return };
            let dimensions = t.shape.len().max(1);
            if let Some(d) = t.shape.get_mut(usize::from(*dimension) % dimensions) {
                *d = usize::from(*size) % 2100;
            }
            t.data.resize(t.shape.iter().product::<usize>() * width(t.dtype), 1);
        }
        Edit::Type { tensor, name } => {
            let Some(t) = tensors.get_mut(pick(tensor)) else { return };
            t.dtype = TYPES[usize::from(*name) % TYPES.len()];
            t.data.resize(t.shape.iter().product::<usize>() * width(t.dtype), 1);
        }
        Edit::Drop { tensor } => {
            if !tensors.is_empty() {
                tensors.remove(pick(tensor));
            }
        }
    }
}

fn file(tensors: &[Tensor]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for t in tensors {
        let start = data.len();
        data.extend_from_slice(&t.data);
        entries.push(format!(
            r#""{}":{{"dtype":"{}","shape":{:?},"data_offsets":[{start},{}]}}"#,
            t.name,
            t.dtype,
            t.shape,
            data.len()
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    file
}

fn open(bytes: Vec<u8>) -> SafetensorsFile {
    SafetensorsFile::from_bytes(Path::new("fuzz"), Bytes::from(bytes))
        .expect("headers made here are valid")
}

fuzz_target!(|input: Input| {
    let mut tensors = tensors(&input);
    for edit in input.edits.iter().take(6) {
        apply(edit, &mut tensors);
    }
    let source = open(file(&tensors));
    if let Ok(layer) = Exl2Linear::read(&source, "p") {
        assert_eq!(layer.dequantize_f16().len(), layer.inputs * layer.outputs);
        let written: Vec<Tensor> = layer
            .to_tensors("p")
            .into_iter()
            .map(|LayerTensor { spec, data }| Tensor {
                name: spec.name,
                dtype: spec.dtype.as_str(),
                shape: spec.shape,
                data,
            })
            .collect();
        let again = Exl2Linear::read(&open(file(&written)), "p");
        assert_eq!(again.expect("what was read is valid"), layer);
    }
    if let Ok(layer) = GptqLinear::read_as(&source, "p", GptqFormat::default()) {
        assert_eq!(layer.dequantize_f16().len(), layer.inputs * layer.outputs);
    }
});
