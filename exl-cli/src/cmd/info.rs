//! `exl info`: what a model is made of and what it needs.

mod bits;
mod gpu;
mod words;

pub(super) use bits::{Bits, bits};

use crate::args::InfoArgs;
use crate::failure::Usage;
use crate::machine;
use crate::session::{self, Room};
use crate::ui::{self, Align, Table, Ui};
use anyhow::Result;
use exl_models::{LayerSpec, LoadOptions, MemoryUse, MlpSpec, ModelSource, Spec};
use exl_tensor::KvType;
use gpu::GpuNeeds;
use serde::Serialize;
use std::fmt::Write;
use words::Words;

/// Context planned for when the user names none.
const DEFAULT_CONTEXT: usize = 4096;
/// Width of the bars in characters.
const BAR_WIDTH: usize = 32;

#[derive(Serialize)]
struct Output<'a> {
    architecture: &'a str,
    family: &'a str,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<Experts>,
    #[serde(skip_serializing_if = "Option::is_none")]
    windows: Option<Windows>,
    vocab: usize,
    tokenizer: Words,
    max_context: usize,
    parameters: u64,
    #[serde(flatten)]
    bits: &'a Bits,
    memory: Memory,
    machine: Machine,
    /// Whether the memory that is free now suffices; absent where the system does not tell.
    fits: Option<bool>,
    /// On the GPU that is here or was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    gpu: Option<GpuNeeds>,
}

/// Of the layers that have them.
#[derive(Serialize)]
struct Experts {
    count: usize,
    /// For each token.
    used: usize,
}

/// Of the layers that do not see all of a text.
#[derive(Serialize)]
struct Windows {
    layers: usize,
    /// The largest one.
    tokens: usize,
}

impl Windows {
    fn of(spec: &Spec) -> Option<Self> {
        let sliding = spec.sliding();
        (sliding.layers > 0).then_some(Self {
            layers: sliding.layers,
            tokens: sliding.window,
        })
    }
}

#[derive(Serialize)]
struct Memory {
    context: usize,
    cache: String,
    weight_bytes: u64,
    cache_bytes: u64,
    activation_bytes: u64,
    total_bytes: u64,
}

#[derive(Serialize)]
struct Machine {
    memory_bytes: Option<u64>,
    available_bytes: Option<u64>,
}

pub(crate) fn run(args: &InfoArgs, ui: &Ui) -> Result<()> {
    let dir = args.dir.as_ref().or(args.model.as_ref());
    let dir = dir.ok_or_else(|| Usage("name a model directory".to_owned()))?;
    let context = args.context.map(|n| n as usize);
    let options = LoadOptions {
        assume_llama: args.load.assume_llama,
        rope: exl_models::rope::RopeOptions {
            context,
            ..Default::default()
        },
        ..LoadOptions::default()
    };
    let source = session::open(dir, &options, ui)?;
    let bits = bits(&source);
    // A GPU that does not exist is told before the rest.
    let place = gpu::place(args.gpu.as_deref())?;
    let memory = memory(&source, context, args.cache);
    let gpu = match &place {
        Some(place) => Some(GpuNeeds::new(&source, place, memory.context, args.cache)?),
        None => None,
    };
    session::check_context(&source, "--context", memory.context, ui)?;
    let found = machine::memory();
    let spec = source.spec();
    let attn = spec.layers.first().map(|layer| &layer.attn);
    let output = Output {
        architecture: &spec.architecture,
        family: spec.family,
        layers: spec.layers.len(),
        hidden: spec.hidden,
        heads: attn.map_or(0, |a| a.heads),
        kv_heads: attn.map_or(0, |a| a.kv_heads),
        head_dim: attn.map_or(0, |a| a.head_dim),
        experts: spec.layers.iter().find_map(experts),
        windows: Windows::of(spec),
        vocab: spec.vocab,
        tokenizer: Words::new(&source),
        max_context: spec.max_context,
        parameters: spec.parameters(),
        bits: &bits,
        fits: found.map(|(_, available)| memory.total_bytes <= available),
        memory,
        machine: Machine {
            memory_bytes: found.map(|(total, _)| total),
            available_bytes: found.map(|(_, available)| available),
        },
        gpu,
    };
    if args.json {
        return ui::print_json(&output);
    }
    ui::print(&text(&output)?)?;
    Ok(())
}

fn experts(layer: &LayerSpec) -> Option<Experts> {
    match &layer.mlp {
        MlpSpec::Moe(moe) => Some(Experts {
            count: moe.experts.len(),
            used: moe.top_k,
        }),
        MlpSpec::Dense(_) => None,
    }
}

fn memory(source: &ModelSource, context: Option<usize>, cache: KvType) -> Memory {
    let context = context.unwrap_or(DEFAULT_CONTEXT.min(source.spec().max_context));
    let request = Room::one(context, cache).memory_request(session::PREFILL_ROWS);
    let used: MemoryUse = source.memory_for(&request);
    Memory {
        context,
        cache: cache.to_string(),
        weight_bytes: used.weights,
        cache_bytes: used.cache,
        activation_bytes: used.arena + used.step,
        total_bytes: used.total(),
    }
}

fn text(o: &Output<'_>) -> Result<String> {
    let mut out = String::new();
    let mut shape = format!(
        "{} layers, hidden {}, {} heads of {} ({} for keys and values)",
        o.layers, o.hidden, o.heads, o.head_dim, o.kv_heads
    );
    if let Some(experts) = &o.experts {
        let (count, used) = (experts.count, experts.used);
        write!(shape, ", {count} experts, {used} for each token")?;
    }
    let mut context = format!("up to {} tokens", o.max_context);
    if let Some(Windows { layers, tokens }) = &o.windows {
        let all = o.layers;
        write!(context, "; {layers} of {all} layers see the last {tokens}")?;
    }
    let size = format!(
        "{}, {} ({:.2} bits per layer weight, head {:.2})",
        ui::bytes(o.bits.bytes),
        o.bits.storage,
        o.bits.bpw,
        o.bits.head_bpw
    );
    for (name, value) in [
        ("architecture", format!("{} ({})", o.architecture, o.family)),
        ("shape", shape),
        ("vocabulary", o.vocab.to_string()),
        ("tokenizer", o.tokenizer.text()),
        ("context", context),
        ("parameters", ui::count(o.parameters)),
        ("files", size),
    ] {
        writeln!(out, "{name:<14}{value}")?;
    }
    write!(out, "\n{}", tensors(o.bits).render())?;
    writeln!(out, "\nbits per weight of each layer")?;
    let most = o.bits.layers.iter().copied().fold(8.0, f64::max);
    for (layer, bits) in o.bits.layers.iter().enumerate() {
        writeln!(
            out,
            "{layer:>4} {}{bits:6.2}",
            ui::bar(bits / most, BAR_WIDTH)
        )?;
    }
    write!(out, "\n{}", needs(o))?;
    if let Some(gpu) = &o.gpu {
        write!(out, "\n{}", gpu.text())?;
    }
    Ok(out)
}

fn tensors(bits: &Bits) -> Table {
    let mut table = Table::new(&[
        ("tensors", Align::Left),
        ("stored", Align::Left),
        ("count", Align::Right),
        ("parameters", Align::Right),
        ("bytes", Align::Right),
        ("bits", Align::Right),
    ]);
    for row in &bits.tensors {
        table.row([
            row.name.clone(),
            row.storage.clone(),
            row.count.to_string(),
            ui::count(row.parameters),
            ui::bytes(row.bytes),
            format!("{:.3}", row.bpw),
        ]);
    }
    table
}

fn needs(o: &Output<'_>) -> String {
    let m = &o.memory;
    let mut text = format!(
        "on the CPU, memory at {} tokens, cache {}: {} (weights {}, cache {}, activations {})\n",
        m.context,
        m.cache,
        ui::bytes(m.total_bytes),
        ui::bytes(m.weight_bytes),
        ui::bytes(m.cache_bytes),
        ui::bytes(m.activation_bytes)
    );
    if let (Some(total), Some(free), Some(fits)) =
        (o.machine.memory_bytes, o.machine.available_bytes, o.fits)
    {
        let verdict = if fits {
            "fits this machine"
        } else if m.total_bytes <= total {
            "fits this machine only when other programs free memory"
        } else {
            "does not fit this machine"
        };
        text.push_str(&format!(
            "{verdict} ({} free of {})\n",
            ui::bytes(free),
            ui::bytes(total)
        ));
    }
    text
}
