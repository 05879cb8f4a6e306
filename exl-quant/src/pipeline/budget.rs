//! From a bitrate to a layout for every linear.

use std::path::PathBuf;

use exl_format::{Dtype, Exl2Linear, TensorSpec};
use exl_models::{
    BlockPart, LayerSpec, MlpSpec, ModelSource, Module, WeightKey, WeightKind, block_plan,
};
use exl_tensor::KvType;

use super::logits::Head;
use super::machine::Machine;
use super::measurement::{LinearMeasurement, Measurement};
use super::original::{sampled, widest};
use super::perturb::side_by_side;
use super::probe::{PROBE_LAYERS, PROBE_POSITIONS, roles};
use super::quantize::Layouts;
use super::sites::{STOPS, Stop};
use super::solver::{gpu_bytes, host_bytes};
use super::{ConvertOptions, Job, Target};
use crate::calib::Calibration;
use crate::{Choice, Error, Layout, Result, allocate, head_recipe, smallest};

/// Head size whose bytes the budget counts on when the allocation may choose.
const NOMINAL_HEAD: u32 = 6;

/// Allocates layouts for one bitrate.
pub(super) fn target(job: &Job<'_>, bits: f64, measurement: &Measurement) -> Result<Target> {
    let head = job.source.spec().head.linear.key.clone();
    let free_head = job.options.head_bits.is_none();
    let mut linears: Vec<&LinearMeasurement> = Vec::new();
    for key in job.source.layout().iter().filter(|k| k.is_linear()) {
        let found = measurement
            .linear(&key.name)
            .ok_or_else(|| Error::Journal {
                file: (job.options.measurement.clone()).unwrap_or_else(|| job.options.work.clone()),
                what: format!("has no curve for {}; measure again", key.name),
            })?;
        if key.name != head || free_head {
            linears.push(found);
        }
    }
    let fixed_head = fixed_head(job)?;
    let mut layouts = Layouts::new();
    if let Some(layout) = &fixed_head {
        layouts.insert(head.clone(), layout.clone());
    }
    let items: Vec<Vec<Choice>> = linears
        .iter()
        .map(|l| {
            let choice = |p: &super::LayoutPoint| Choice {
                cost: p.bits,
                loss: p.loss * l.sensitivity,
            };
            l.points.iter().map(choice).collect()
        })
        .collect();
    let least = items
        .iter()
        .map(|i| i.iter().map(|c| c.cost).min().unwrap_or(0));
    let room = room(job, bits, least.sum())?;
    let picks = allocate(&items, room)?;
    let mut predicted = 0.0;
    for ((linear, item), &pick) in linears.iter().zip(&items).zip(&picks) {
        predicted += item[pick].loss;
        layouts.insert(linear.name.clone(), linear.points[pick].layout.parse()?);
    }
    let name = name(bits);
    Ok(Target {
        bits,
        out: out_dir(job.options, bits),
        name,
        layouts,
        predicted,
    })
}

/// Refuses bitrates that no layout can meet. The curves are not needed for it: sizes are known.
pub(super) fn check_bits(job: &Job<'_>) -> Result<()> {
    let least = smallest_sum(job)?;
    for &bits in &job.options.bits {
        room(job, bits, least)?;
    }
    Ok(())
}

/// The least bits per weight that can be asked for, in hundredths.
pub(super) fn least_bits(job: &Job<'_>) -> Result<f64> {
    let needed = overhead(job)? + smallest_sum(job)?;
    let over = needed as f64 - budget_bits(job, 0.0)? as f64;
    let bits = (over / decoder_weights(&job.source) as f64 * 100.0).ceil() / 100.0;
    Ok(bits.max(2.0))
}

/// Bits of the linears that the allocation decides about at their smallest.
fn smallest_sum(job: &Job<'_>) -> Result<u64> {
    let free_head = job.options.head_bits.is_none();
    let mut least = 0;
    for key in job.source.layout().iter().filter(|k| k.is_linear()) {
        if free_head || key.kind == WeightKind::Linear {
            let outputs = key.shape[0].next_multiple_of(32);
            least += smallest(key.shape[1])?.bits(outputs);
        }
    }
    Ok(least)
}

/// Bits of the header and of a head whose size was asked for.
fn overhead(job: &Job<'_>) -> Result<u64> {
    let head = fixed_head(job)?;
    let free_head = job.options.head_bits.is_none();
    // The header is part of the files; its size depends on the number of digits in the offsets,
    // so the bound is taken over the widest ones.
    let header = match job.options.count_headers {
        true => 8 * header_bytes(job, head.is_some() || free_head),
        false => 0,
    };
    let fixed = head.map_or(0, |l| l.bits(job.source.spec().vocab.next_multiple_of(32)));
    Ok(header + fixed)
}

/// Bits left for the linears that the allocation decides about, which take `least` or more.
fn room(job: &Job<'_>, bits: f64, least: u64) -> Result<u64> {
    let (budget, overhead) = (budget_bits(job, bits)?, overhead(job)?);
    if overhead + least <= budget {
        return Ok(budget - overhead);
    }
    let possible = least_bits(job)?;
    Err(Error::Option {
        option: "--bits",
        what: format!("{bits} is less than this model can be stored in; the least is {possible}"),
    })
}

/// `4.0bpw`, with as many digits as the number needs.
fn name(bits: f64) -> String {
    let text = format!("{bits}");
    if text.contains('.') {
        format!("{text}bpw")
    } else {
        format!("{text}.0bpw")
    }
}

/// Where the result for a bitrate goes.
pub(super) fn out_dir(options: &ConvertOptions, bits: f64) -> PathBuf {
    match options.bits.len() {
        0 | 1 => options.out.clone(),
        _ => options.out.join(name(bits)),
    }
}

/// Weights of the decoder's linears, padding included.
pub(super) fn decoder_weights(source: &ModelSource) -> u64 {
    let linears = source
        .layout()
        .iter()
        .filter(|k| k.kind == WeightKind::Linear);
    linears
        .map(|k| (k.shape[0].next_multiple_of(32) * k.shape[1]) as u64)
        .sum()
}

/// Layout of a head whose size was asked for.
fn fixed_head(job: &Job<'_>) -> Result<Option<Layout>> {
    match job.options.head_bits {
        None | Some(16) => Ok(None),
        // Finer scales than ExLlamaV2's, paid for by the layers: with all of them at 8 bits, what the
        // head's rounding leaves is a good part of the whole.
        Some(8) => Ok(Some(Layout::uniform(8, 32, job.source.spec().hidden)?)),
        Some(bits) => Ok(Some(head_recipe(bits)?.layout(job.source.spec().hidden)?)),
    }
}

/// Bits that the linears and the header may take: the target over the decoder's weights, plus a
/// head of the size asked for.
fn budget_bits(job: &Job<'_>, bits: f64) -> Result<u64> {
    let weights = decoder_weights(&job.source) as f64;
    let head = head_bits(&job.source, job.options.head_bits)?;
    Ok((bits * weights).floor() as u64 + head)
}

/// Bits of a head of the size asked for, or of the nominal one; 0 when it stays unquantized.
pub(super) fn head_bits(source: &ModelSource, asked: Option<u32>) -> Result<u64> {
    let spec = source.spec();
    match asked.unwrap_or(NOMINAL_HEAD) {
        16 => Ok(0),
        bits => Ok(head_recipe(bits)?
            .whole_groups(spec.hidden)?
            .bits(spec.vocab.next_multiple_of(32))),
    }
}

/// At most this many bytes of safetensors header, in one file.
fn header_bytes(job: &Job<'_>, quantized_head: bool) -> u64 {
    // Group tables of any layout have shapes of at most this many digits.
    let one = [exl_format::Group { bits: 8, rows: 32 }];
    let mut specs: Vec<TensorSpec> = Vec::new();
    let plain = |name: String| TensorSpec {
        name,
        dtype: Dtype::F16,
        shape: Vec::new(),
    };
    for key in job.source.layout() {
        let head = matches!(key.kind, WeightKind::Head { .. });
        if key.is_linear() && (!head || quantized_head) {
            specs.extend(Exl2Linear::specs(&key.name, 32, &one, key.bias.is_some()));
        } else {
            let name = format!("{}.weight", key.name);
            let names = std::iter::once(name).chain(key.bias.clone());
            specs.extend(names.map(plain));
        }
    }
    let towers = job.source.towers().into_iter();
    specs.extend(towers.map(|name| plain(name.to_owned())));
    let total = job.source.files().total_bytes().to_string().len();
    let of_spec = |s: &TensorSpec| {
        // {"NAME":{"dtype":"F16","shape":[N,N],"data_offsets":[N,N]}} and a comma.
        (s.name.len() + 55 + 7 * 2 + 2 * total) as u64
    };
    specs.iter().map(of_spec).sum::<u64>() + 16
}

/// Refuses a promise on memory that cannot be kept.
pub(super) fn check_memory(
    options: &ConvertOptions,
    calibration: &Calibration,
    source: &ModelSource,
) -> Result<()> {
    let Some(allowed) = options.max_ram else {
        return Ok(());
    };
    let spec = source.spec();
    let tokens = (calibration.rows.len() * calibration.length()) as u64;
    let widest = widest(source) as u64;
    let largest = source
        .layout()
        .iter()
        .filter(|k| k.is_linear())
        .map(|k| k.parameters())
        .max();
    // Between computing them and their products, inputs of o or of down: with experts one for each that
    // a token goes through, beside the inputs of the experts.
    let kept = |layer: &LayerSpec| match &layer.mlp {
        MlpSpec::Moe(moe) => {
            let inner = moe.experts.first().map_or(0, |e| e.down.inputs);
            spec.hidden + moe.top_k * inner
        }
        MlpSpec::Dense(_) => 0,
    };
    let kept = spec.layers.iter().map(kept).max().unwrap_or(0) as u64;
    // Some rows go through the original too.
    let (count, length) = (calibration.rows.len(), calibration.length());
    let beside = (sampled(count, length, widest as usize).len() * length) as u64;
    // Where both halves of a layer see the same, the inputs of o wait for the end.
    let waiting = |l: &LayerSpec| if l.parallel { l.attn.o.inputs } else { 0 };
    let waiting = spec.layers.iter().map(waiting).max().unwrap_or(0) as u64;
    let each = spec.hidden as u64 + widest.max(kept) + waiting;
    // And the original's last states of the rows that judge stay.
    let judged = tokens.div_ceil(8) * spec.hidden as u64;
    let hidden = 4 * ((tokens + beside) * each + judged);
    let threads = rayon::current_num_threads();
    let (hessian, matrix) = host_bytes(widest as usize, largest.unwrap_or(0), threads);
    let logits = 3 * (32 << 20) + tokens.min(1 << 16) * spec.vocab as u64 / 64;
    // Measuring holds the weights of the probed layers at three bits (four with scales), first
    // beside the rows measured, then beside the hidden states at those layers and the end.
    let probed = PROBE_LAYERS.min(spec.layers.len()) as u64;
    let weights: u64 = source
        .layout()
        .iter()
        .filter(|k| k.is_linear())
        .map(|k| k.parameters())
        .sum();
    let packed = weights / 2 * probed / spec.layers.len().max(1) as u64;
    let rows = options.measure_rows.min(calibration.rows.len());
    let measured = (rows * options.measure_length.min(calibration.length())) as u64;
    let measured = measured * each * 4;
    // The model's own states, and those of as many exchanged ones as run side by side.
    let changes = spec.layers.iter().map(|l| roles(l).len()).max();
    let exchanged = probed as usize * changes.unwrap_or(0) + 1;
    let streams = exchanged.min(side_by_side(spec, PROBE_POSITIONS)) as u64;
    let states = (streams + 2) * PROBE_POSITIONS as u64 * spec.hidden as u64 * 4;
    let probe = packed + measured.max(states);
    let decoded = decoded(source);
    let needed = hidden.max(probe) + decoded + hessian + matrix + logits;
    if needed <= allowed {
        return Ok(());
    }
    let gb = |b: u64| b as f64 / 1e9;
    Err(Error::Memory {
        needed_gb: gb(needed),
        allowed_gb: gb(allowed),
        what: format!(
            "hidden states {:.2}, decoded weights of a layer {:.2}, Hessian {:.2}, largest matrix {:.2}",
            gb(hidden.max(probe)),
            gb(decoded),
            gb(hessian),
            gb(matrix)
        ),
    })
}

/// Refuses a GPU, or a promise on its memory, that does not suffice.
pub(super) fn check_device_memory(
    options: &ConvertOptions,
    calibration: &Calibration,
    source: &ModelSource,
) -> Result<()> {
    let Some(gpu) = &options.gpu else {
        return Ok(());
    };
    let need = DeviceNeed::new(source, calibration.length());
    let (free, _) = gpu.memory()?;
    let (allowed, limit) = match options.max_vram {
        Some(promise) if promise < free => (promise, "allowed by --max-vram"),
        _ => (free, "free"),
    };
    need.check(allowed, limit)
}

/// Bytes of some weights as 32-bit floats.
fn float_bytes(source: &ModelSource, wanted: impl Fn(&WeightKey) -> bool) -> u64 {
    let keys = source.layout().iter().filter(|k| wanted(k));
    keys.map(|k| 4 * k.parameters()).sum()
}

/// Those of the largest layer.
fn layer_bytes(source: &ModelSource, wanted: impl Fn(&WeightKey) -> bool) -> u64 {
    let of = |l: usize| {
        let halves = [Module::Attention(l), Module::Mlp(l)];
        float_bytes(source, |k| halves.contains(&k.module) && wanted(k))
    };
    let layers = 0..source.spec().layers.len();
    layers.map(of).max().unwrap_or(0)
}

/// Bytes of the largest layer's linears, or the head, as 32-bit floats: what is quantized is decoded, and takes the
/// place of the original's until the layer ends.
fn decoded(source: &ModelSource) -> u64 {
    let head = float_bytes(source, |k| k.module == Module::Head && k.is_linear());
    layer_bytes(source, WeightKey::is_linear).max(head)
}

/// Bytes of the linears of a layer that one plan has, at most, as 32-bit floats.
fn widest_stop(source: &ModelSource, layer: &LayerSpec) -> u64 {
    let of = |stop: Stop| -> u64 {
        let names = stop.sites(layer).into_iter().flat_map(|s| s.linears);
        let keys = names.filter_map(|name| source.key(&name));
        keys.map(|k| 4 * k.parameters()).sum()
    };
    STOPS.into_iter().map(of).max().unwrap_or(0)
}

/// Device memory of a conversion, in bytes.
#[derive(Clone, Copy, Debug)]
struct DeviceNeed {
    /// Weights of layers and heads.
    weights: u64,
    /// Activations and cache of one row.
    row: u64,
    /// Hessians, a factor, and the largest matrix with what it is rounded in.
    solver: u64,
}

impl DeviceNeed {
    fn new(source: &ModelSource, length: usize) -> Self {
        let spec = source.spec();
        let linears: Vec<_> = source.layout().iter().filter(|k| k.is_linear()).collect();
        let outputs = |k: &WeightKey| k.shape[0].next_multiple_of(32) as u64;
        let largest = linears.iter().map(|k| outputs(k) * k.shape[1] as u64).max();
        let columns = linears.iter().map(|k| outputs(k)).max();
        // Decoded weights are 32-bit floats, and beside them so are those they are mixed with.
        let of = |module: Module| float_bytes(source, |k| k.module == module);
        let layers = layer_bytes(source, |_| true);
        let stops = spec.layers.iter().map(|layer| widest_stop(source, layer));
        let stops = stops.max();
        // The heads of the original, of the model compared with it, and of the one before that.
        let ends = (3 * of(Module::Head)).max(of(Module::Embedding));
        let key = Machine::key(length);
        // Some models have two kinds of layers; the last one is of the larger kind then.
        let last = spec.layers.len().saturating_sub(1);
        let plans = [
            BlockPart::Layer(0),
            BlockPart::Layer(last),
            BlockPart::Attention(0),
            BlockPart::Embed,
        ];
        let arena = plans
            .map(|part| block_plan(spec, part, &key).arena().bytes())
            .into_iter()
            .max();
        let kv = spec.block_kv_shape(KvType::F32);
        // The machine for rows and the one for logits live together.
        let row = arena.unwrap_or(0)
            + Head::plan(spec, length).arena().bytes()
            + kv.bytes(key.pages_per_seq)
            + kv.bytes(1);
        Self {
            // The weights of a plan leave when those of the next one are there: layers while measuring, and
            // while quantizing the linears of a stop, with those of the original beside.
            weights: (2 * layers).max(4 * stops.unwrap_or(0)) + ends,
            row: 2 * row as u64,
            solver: gpu_bytes(widest(source), largest.unwrap_or(0), columns.unwrap_or(0)),
        }
    }

    fn total(&self) -> u64 {
        self.weights + self.row + self.solver
    }

    fn check(&self, allowed: u64, limit: &'static str) -> Result<()> {
        if self.total() <= allowed {
            return Ok(());
        }
        let gb = |b: u64| b as f64 / 1e9;
        Err(Error::DeviceMemory {
            needed_gb: gb(self.total()),
            allowed_gb: gb(allowed),
            limit,
            what: format!(
                "weights of layers and heads {:.2}, activations of a row {:.2}, Hessians and a matrix {:.2}",
                gb(self.weights),
                gb(self.row),
                gb(self.solver)
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoded_weights_are_those_of_both_halves_of_a_layer() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../exl-models/tests/golden");
        let open = |name: &str| {
            let dir = std::path::Path::new(golden).join(name);
            ModelSource::open(&dir, &exl_models::LoadOptions::default()).unwrap()
        };
        // q and o, k and v, three matrices of eight experts; the head is smaller.
        let linears = 2 * 32 * 64 + 2 * 32 * 32 + 8 * 3 * 32 * 32;
        assert_eq!(decoded(&open("mixtral-tiny")), 4 * linears);
        // One layer is smaller than the head.
        let source = open("llama-plain-tiny");
        let head = source
            .layout()
            .iter()
            .filter(|k| k.module == Module::Head && k.is_linear());
        assert!(decoded(&source) >= head.map(|k| 4 * k.parameters()).sum());
    }

    #[test]
    fn device_memory_is_counted_before_the_work() {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/demo-4m");
        let source = ModelSource::open(demo.as_ref(), &exl_models::LoadOptions::default()).unwrap();
        let (short, long) = (DeviceNeed::new(&source, 64), DeviceNeed::new(&source, 512));
        assert!(short.row < long.row && short.weights == long.weights);
        let inputs = source.layout().iter().filter(|k| k.is_linear());
        let inputs = inputs.map(|k| k.shape[1] as u64).max().unwrap();
        assert!(short.solver > 24 * inputs * inputs);
        let needed = short.total();
        assert!(short.check(needed, "free").is_ok());
        let error = short
            .check(needed - 1, "allowed by --max-vram")
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("--max-vram") && text.contains("Hessians"),
            "{text}"
        );
    }
}
