//! What weights take on a GPU, from all of the files but the numbers.

use exl_format::{Exl2Shape, GptqShape};
use exl_tensor::{DType, GpuSketch, Group};

use super::read::{dense_view, dtype};
use super::{ModelSource, Storage};
use crate::{Result, Spec, WeightKey};

pub(super) fn sketch(source: &ModelSource) -> Result<GpuSketch> {
    let mut sketch = GpuSketch::new();
    for (i, rope) in source.spec.ropes.iter().enumerate() {
        sketch.dense(&Spec::rope_weight(i), DType::F32, &[rope.inv_freq.len()]);
    }
    for key in &source.layout {
        add(source, key, &mut sketch)?;
    }
    let head = &source.spec.head.linear.key;
    if source.storage.get(head) == Some(&Storage::Tied) {
        sketch.share(&source.spec.embed.key, head);
    }
    Ok(sketch)
}

fn add(source: &ModelSource, key: &WeightKey, sketch: &mut GpuSketch) -> Result<()> {
    let files = &source.files;
    match source.storage(key) {
        Storage::Dense => {
            let view = files.tensor(&format!("{}.weight", key.name))?;
            sketch.dense(&key.name, dtype(&view)?, &key.shape);
        }
        Storage::Exl2 => {
            let shape = Exl2Shape::read(files, &key.name)?;
            let groups = shape.groups.iter().map(|g| Group {
                bits: g.bits,
                rows: g.rows,
            });
            let size = (shape.inputs, shape.outputs);
            sketch.exl2(&key.name, size, groups.collect(), &shape.q_invperm);
        }
        Storage::Gptq => {
            let shape = GptqShape::read(files, &key.name, source.gptq)?;
            let size = (shape.inputs, shape.outputs);
            sketch.gptq(&key.name, size, shape.group_size, shape.g_idx.as_deref());
        }
        Storage::Tied => {}
    }
    let Some(bias) = &key.bias else { return Ok(()) };
    let outputs = key.shape[0];
    let padded = [outputs.next_multiple_of(32)];
    let view = dense_view(files, bias, &[&[outputs], &padded])?;
    sketch.dense(bias, dtype(&view)?, &[outputs]);
    Ok(())
}
