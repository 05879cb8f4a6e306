//! What a model takes on a GPU, which need not be here.

use crate::failure::Usage;
use crate::memory;
use crate::session::{self, Room};
use crate::ui;
use anyhow::Result;
use exl_models::{MemoryUse, ModelSource};
use exl_tensor::{DeviceProps, Gpu, KvType, probe};
use serde::Serialize;

/// The GPU that memory is worked out for.
#[derive(Debug)]
pub(super) enum Place {
    /// It is here.
    Here(Gpu),
    /// Known from data sheets.
    Described(DeviceProps),
}

impl Place {
    fn props(&self) -> &DeviceProps {
        match self {
            Self::Here(gpu) => gpu.props(),
            Self::Described(props) => props,
        }
    }
}

/// The named GPU, or the first one of this machine.
pub(super) fn place(name: Option<&str>) -> Result<Option<Place>> {
    if let Some(name) = name {
        return described(name).map(|props| Some(Place::Described(props)));
    }
    let found = probe().ok();
    let first = found.as_ref().and_then(|list| list.first());
    // One that cannot be opened is a matter for `exl doctor`.
    let gpu = first.and_then(|info| Gpu::open(info.ordinal).ok());
    Ok(gpu.map(Place::Here))
}

/// A GPU of the list by its name, in any case and with or without its family.
fn described(name: &str) -> Result<DeviceProps> {
    let plain = |name: &str| -> String {
        let letters = name.chars().filter(char::is_ascii_alphanumeric);
        let plain: String = letters.collect::<String>().to_lowercase();
        plain.trim_start_matches("rtx").to_owned()
    };
    let samples = DeviceProps::samples();
    let found = samples.iter().find(|s| plain(&s.name) == plain(name));
    if let Some(found) = found {
        return Ok(found.clone());
    }
    let names: Vec<&str> = samples.iter().map(|s| s.name.as_str()).collect();
    let names = names.join(", ");
    Err(Usage(format!(
        "--gpu {name}: no description of it; there are {names}"
    ))
    .into())
}

/// Device memory of a model, by what takes it.
#[derive(Debug, Serialize)]
pub(super) struct GpuNeeds {
    name: String,
    /// It is in this machine; otherwise it is known from data sheets.
    present: bool,
    context: usize,
    /// Prompt tokens of a step.
    rows: usize,
    weight_bytes: u64,
    cache_bytes: u64,
    /// Activations of the largest step.
    activation_bytes: u64,
    /// Scratch memory of the most demanding kernel.
    scratch_bytes: u64,
    /// Tokens, positions and block tables of a step.
    step_bytes: u64,
    /// The driver's context and the kernels' code.
    driver_bytes: u64,
    /// Whether that was measured here, with what other programs take, or is a figure of another GPU.
    driver_measured: bool,
    total_bytes: u64,
    memory_bytes: u64,
    /// Host memory for copies to and from the GPU.
    pinned_bytes: u64,
    fits: bool,
}

impl GpuNeeds {
    pub(super) fn new(
        source: &ModelSource,
        place: &Place,
        context: usize,
        cache: KvType,
    ) -> Result<Self> {
        let rows = session::GPU_PREFILL_ROWS.min(context);
        let request = Room::one(context, cache).memory_request(session::GPU_PREFILL_ROWS);
        let props = place.props();
        let used: MemoryUse = source.gpu_memory_for(props, &request)?;
        let driver_bytes = match place {
            Place::Here(gpu) => {
                gpu.load_kernels()?;
                let taken = gpu.taken()?;
                (taken.context + taken.kernels).max(0).unsigned_abs()
            }
            Place::Described(_) => memory::DRIVER_BYTES,
        };
        let total_bytes = used.total().saturating_add(driver_bytes);
        Ok(Self {
            name: props.name.clone(),
            present: matches!(place, Place::Here(_)),
            context,
            rows,
            weight_bytes: used.weights,
            cache_bytes: used.cache,
            activation_bytes: used.arena,
            scratch_bytes: used.scratch,
            step_bytes: used.step,
            driver_bytes,
            driver_measured: matches!(place, Place::Here(_)),
            total_bytes,
            memory_bytes: props.memory_bytes,
            // A step goes to the GPU in one piece, a token comes back; logits where they are asked for.
            pinned_bytes: used.step + 4 * source.spec().vocab as u64,
            fits: total_bytes <= props.memory_bytes,
        })
    }

    pub(super) fn text(&self) -> String {
        let driver = match self.driver_measured {
            true => "measured here, other programs included",
            false => "as on an H200 with driver 580, others differ",
        };
        let lines = [
            ("weights", self.weight_bytes, "as repacked"),
            ("cache", self.cache_bytes, ""),
            ("activations", self.activation_bytes, ""),
            ("scratch", self.scratch_bytes, "of kernels"),
            ("step", self.step_bytes, "tokens, positions, block tables"),
            ("driver", self.driver_bytes, driver),
        ];
        let mut text = format!(
            "on {} {}: {} at {} tokens, prompts in steps of {}\n",
            self.name,
            if self.present { "here" } else { "(not here)" },
            ui::bytes(self.total_bytes),
            self.context,
            self.rows
        );
        for (name, bytes, remark) in lines {
            let line = format!("  {name:<14}{:>10}  {remark}", ui::bytes(bytes));
            text.push_str(line.trim_end());
            text.push('\n');
        }
        let verdict = if self.fits { "fits" } else { "does not fit" };
        let memory = ui::bytes(self.memory_bytes);
        text.push_str(&format!(
            "{verdict} ({memory}); graphs of decode steps come on top, exl bench measures them\n"
        ));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_found_by_their_names() {
        for name in ["RTX 4090", "rtx-4090", "4090", "rtx4090"] {
            assert_eq!(described(name).unwrap().name, "RTX 4090");
        }
        assert_eq!(described("h200").unwrap().name, "H200");
        let error = described("voodoo2").unwrap_err().to_string();
        assert!(
            error.contains("--gpu voodoo2") && error.contains("H200"),
            "{error}"
        );
    }
}
