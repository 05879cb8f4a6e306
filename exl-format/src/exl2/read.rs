//! Reading a layer, with every rule of the format checked.

use std::path::Path;

use super::{BLOCK, Exl2Linear, Exl2Shape, Group, MAX_INPUTS, WIDTHS};
use crate::{Dtype, Error, Result, TensorSource, TensorView};

impl Exl2Shape {
    /// Reads and checks the group table and the permutation of the layer `key`; codes and scales are
    /// not looked at.
    ///
    /// # Errors
    /// As [`Exl2Linear::read`].
    pub fn read(source: &(impl TensorSource + ?Sized), key: &str) -> Result<Self> {
        let view = |suffix: &str| source.tensor(&format!("{key}.{suffix}"));
        let (weight, table, invperm) = (view("q_weight")?, view("q_groups")?, view("q_invperm")?);
        let [q_rows, outputs] = weight.expect(Dtype::I32)?;
        let [inputs] = invperm.expect(Dtype::I32)?;
        let [table_len] = table.expect(Dtype::I16)?;
        check_outputs(&weight, outputs)?;
        check_inputs(&invperm, inputs)?;
        if table_len == 0 || !table_len.is_multiple_of(2) {
            return Err(table.error(
                "pairs of bits and first row",
                format!("{table_len} numbers"),
            ));
        }
        let max = view("q_scale_max")?;
        let ([max_len], count) = (max.expect(Dtype::F16)?, table_len / 2);
        if max_len != count {
            return Err(max.error(
                format!("one for each of {count} groups"),
                max_len.to_string(),
            ));
        }
        let groups = read_groups(&table, q_rows)?;
        check_rows(&table, &groups, inputs)?;
        let q_invperm = invperm.to_u32();
        check_permutation(&invperm, &q_invperm)?;
        Ok(Self {
            inputs,
            outputs,
            groups,
            q_invperm,
        })
    }
}

impl Exl2Linear {
    /// Reads the layer `key` and checks types, shapes, group table, scales and permutation.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] or [`Error::Tensor`] with the broken rule.
    pub fn read(source: &(impl TensorSource + ?Sized), key: &str) -> Result<Self> {
        let view = |suffix: &str| source.tensor(&format!("{key}.{suffix}"));
        let (weight, scale, max) = (view("q_weight")?, view("q_scale")?, view("q_scale_max")?);
        let Exl2Shape {
            inputs,
            outputs,
            groups,
            q_invperm,
        } = Exl2Shape::read(source, key)?;
        let [scale_rows, scale_columns] = scale.expect(Dtype::I32)?;
        let count = groups.len();
        if scale_rows != count || Some(outputs) != scale_columns.checked_mul(8) {
            return Err(scale.error(
                format!("shape {:?}", [count, outputs / 8]),
                format!("{:?}", scale.shape),
            ));
        }
        let q_scale_max = max.to_u16();
        check_scales(&max, &q_scale_max)?;
        Ok(Self {
            q_weight: weight.to_u32(),
            q_scale: scale.to_u32(),
            q_scale_max,
            groups,
            q_invperm,
            bias: read_bias(source, key, outputs)?,
            inputs,
            outputs,
        })
    }

    /// Checks parts made in memory by the rules of [`Exl2Linear::read`].
    ///
    /// # Errors
    /// [`Error::Tensor`] with the broken rule; the file is named `(memory)`.
    pub fn from_parts(key: &str, parts: Self) -> Result<Self> {
        let view = |suffix: &str| Unread {
            name: format!("{key}.{suffix}"),
        };
        let (n, count) = (parts.outputs, parts.groups.len());
        check_outputs(&view("q_weight"), n)?;
        check_inputs(&view("q_invperm"), parts.inputs)?;
        check_groups(&view("q_groups"), &parts.groups)?;
        check_rows(&view("q_groups"), &parts.groups, parts.inputs)?;
        let q_rows: usize = parts.groups.iter().map(|g| g.q_rows()).sum();
        let sizes = [
            ("q_weight", parts.q_weight.len(), q_rows * n),
            ("q_scale", parts.q_scale.len(), count * n / 8),
            ("q_scale_max", parts.q_scale_max.len(), count),
            ("q_invperm", parts.q_invperm.len(), parts.inputs),
            ("bias", parts.bias.as_ref().map_or(n, Vec::len), n),
        ];
        for (suffix, found, expected) in sizes {
            if found != expected {
                let expected = format!("{expected} elements");
                return Err(view(suffix).error(expected, found.to_string()));
            }
        }
        check_scales(&view("q_scale_max"), &parts.q_scale_max)?;
        check_permutation(&view("q_invperm"), &parts.q_invperm)?;
        Ok(parts)
    }
}

/// What a broken rule is reported on.
trait Subject {
    fn error(&self, expected: impl Into<String>, found: impl Into<String>) -> Error;
}

impl Subject for TensorView {
    fn error(&self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        TensorView::error(self, expected, found)
    }
}

/// A tensor that is in no file yet.
struct Unread {
    name: String,
}

impl Subject for Unread {
    fn error(&self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::tensor(Path::new("(memory)"), &self.name, expected, found)
    }
}

fn check_outputs(weight: &impl Subject, outputs: usize) -> Result<()> {
    if outputs > 0 && outputs.is_multiple_of(BLOCK) {
        return Ok(());
    }
    Err(weight.error("a multiple of 32 columns", outputs.to_string()))
}

fn check_inputs(invperm: &impl Subject, inputs: usize) -> Result<()> {
    if inputs > 0 && inputs.is_multiple_of(BLOCK) && inputs <= MAX_INPUTS {
        return Ok(());
    }
    let expected = format!("a multiple of 32 rows, at most {MAX_INPUTS}");
    Err(invperm.error(expected, inputs.to_string()))
}

/// The table as it is stored: bits and first row of `q_weight` of each group.
fn read_groups(table: &TensorView, q_rows: usize) -> Result<Vec<Group>> {
    let numbers = table.to_u16();
    let (pairs, _) = numbers.as_chunks::<2>();
    let mut groups = Vec::with_capacity(pairs.len());
    for (g, &[bits, first]) in pairs.iter().enumerate() {
        let first = usize::from(first);
        let end = pairs.get(g + 1).map_or(q_rows, |next| usize::from(next[1]));
        if g == 0 && first != 0 {
            return Err(table.error("the first group at row 0", first.to_string()));
        }
        if end <= first || end > q_rows {
            let expected = format!("group {g} to end after row {first} and by row {q_rows}");
            return Err(table.error(expected, end.to_string()));
        }
        let Some(&bits) = WIDTHS.iter().find(|&&w| u16::from(w) == bits) else {
            let expected = format!("2, 3, 4, 5, 6 or 8 bits in group {g}");
            return Err(table.error(expected, bits.to_string()));
        };
        let q = end - first;
        if !q.is_multiple_of(usize::from(bits)) {
            let expected = format!("group {g} of {bits} bits to have a multiple of {bits} rows");
            return Err(table.error(expected, q.to_string()));
        }
        let rows = q / usize::from(bits) * BLOCK;
        let rows = u32::try_from(rows).map_err(|_| table.error("fewer rows", rows.to_string()))?;
        groups.push(Group { bits, rows });
    }
    check_groups(table, &groups)?;
    Ok(groups)
}

fn check_groups(table: &impl Subject, groups: &[Group]) -> Result<()> {
    for (g, group) in groups.iter().enumerate() {
        if !WIDTHS.contains(&group.bits) {
            let expected = format!("2, 3, 4, 5, 6 or 8 bits in group {g}");
            return Err(table.error(expected, group.bits.to_string()));
        }
        if group.rows == 0 || !group.rows.is_multiple_of(BLOCK as u32) {
            let expected = format!("a multiple of 32 rows in group {g}");
            return Err(table.error(expected, group.rows.to_string()));
        }
        if g > 0 && group.bits > groups[g - 1].bits {
            return Err(table.error(
                "bits that never increase",
                format!("{} after {} in group {g}", group.bits, groups[g - 1].bits),
            ));
        }
    }
    Ok(())
}

fn check_rows(table: &impl Subject, groups: &[Group], inputs: usize) -> Result<()> {
    let rows: u64 = groups.iter().map(|g| u64::from(g.rows)).sum();
    if rows == inputs as u64 {
        return Ok(());
    }
    let expected = format!("groups of {inputs} rows in all (the length of q_invperm)");
    Err(table.error(expected, rows.to_string()))
}

/// An infinite scale would turn a group into NaN.
fn check_scales(max: &impl Subject, scales: &[u16]) -> Result<()> {
    match scales.iter().position(|s| s & 0x7c00 == 0x7c00) {
        None => Ok(()),
        Some(g) => Err(max.error(
            "finite scales",
            format!("{} in group {g}", half::f16::from_bits(scales[g])),
        )),
    }
}

fn check_permutation(invperm: &impl Subject, rows: &[u32]) -> Result<()> {
    let mut seen = vec![false; rows.len()];
    for (feature, &row) in rows.iter().enumerate() {
        let Some(slot) = seen.get_mut(row as usize) else {
            return Err(invperm.error(
                format!("a permutation of 0 to {}", rows.len() - 1),
                format!("{row} at {feature}"),
            ));
        };
        if std::mem::replace(slot, true) {
            return Err(invperm.error("a permutation", format!("{row} twice, again at {feature}")));
        }
    }
    Ok(())
}

fn read_bias(
    source: &(impl TensorSource + ?Sized),
    key: &str,
    outputs: usize,
) -> Result<Option<Vec<u16>>> {
    let name = format!("{key}.bias");
    if !source.contains(&name) {
        return Ok(None);
    }
    let bias = source.tensor(&name)?;
    let [len] = bias.expect(Dtype::F16)?;
    if len != outputs {
        return Err(bias.error(format!("{outputs} numbers"), len.to_string()));
    }
    Ok(Some(bias.to_u16()))
}
