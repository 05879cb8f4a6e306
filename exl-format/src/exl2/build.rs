//! Putting a layer together group by group.

use super::{Exl2Linear, Group, codec};
use crate::{Error, Result};

/// Assembles a layer from codes and scales, group by group in packed order.
#[derive(Clone, Debug)]
pub struct Exl2Builder {
    layer: Exl2Linear,
}

impl Exl2Builder {
    /// For a matrix of `outputs` columns, a multiple of 32.
    pub fn new(outputs: usize) -> Self {
        Self {
            layer: Exl2Linear {
                q_weight: Vec::new(),
                q_scale: Vec::new(),
                q_scale_max: Vec::new(),
                groups: Vec::new(),
                q_invperm: Vec::new(),
                bias: None,
                inputs: 0,
                outputs,
            },
        }
    }

    /// Appends a group: `codes` `[rows, outputs]`, one scale code per output, and the bits of the
    /// binary16 maximum scale.
    ///
    /// # Errors
    /// [`Error::Encode`] for codes that do not fit, or sizes that do not belong together.
    pub fn push_group(
        &mut self,
        bits: u8,
        codes: &[u8],
        scale_codes: &[u8],
        q_scale_max: u16,
    ) -> Result<&mut Self> {
        let n = self.layer.outputs;
        let words = codec::pack_codes(bits, n, codes)?;
        if scale_codes.len() != n {
            let found = scale_codes.len().to_string();
            return Err(Error::encode(
                "scale codes of a group",
                n.to_string(),
                found,
            ));
        }
        let scales = codec::pack_scales(scale_codes)?;
        let rows = codes.len() / n;
        let group = Group {
            bits,
            rows: u32::try_from(rows)
                .map_err(|_| Error::encode("rows of a group", "at most 65536", rows.to_string()))?,
        };
        self.layer.q_weight.extend(words);
        self.layer.q_scale.extend(scales);
        self.layer.q_scale_max.push(q_scale_max);
        self.layer.groups.push(group);
        self.layer.inputs += rows;
        Ok(self)
    }

    /// Finishes the layer named `key`. `perm[r]` is the input feature of packed row `r`; `bias`
    /// holds binary16 bits, one per output.
    ///
    /// # Errors
    /// [`Error::Tensor`] when a rule of the format is broken.
    pub fn finish(self, key: &str, perm: &[u32], bias: Option<Vec<u16>>) -> Result<Exl2Linear> {
        let mut layer = self.layer;
        // Rows out of range and features named twice leave a gap here that the check reports.
        layer.q_invperm = vec![u32::MAX; perm.len()];
        for (row, &feature) in perm.iter().enumerate() {
            if let Some(slot) = layer.q_invperm.get_mut(feature as usize) {
                *slot = row as u32;
            }
        }
        layer.bias = bias;
        Exl2Linear::from_parts(key, layer)
    }
}
