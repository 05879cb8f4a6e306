#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod bytes;
mod config;
mod dtype;
mod error;
pub mod exl2;
mod files;
pub mod gptq;
mod json;
#[allow(unsafe_code)]
mod mmap;
pub mod quality;
mod rope;
mod safetensors;
#[cfg(test)]
mod testing;
pub mod writer;

pub use bytes::Bytes;
pub use config::{ConfigFile, Lookup};
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use exl2::{Exl2Builder, Exl2Linear, Exl2Shape, Group, LayerTensor};
pub use files::{FileNames, ModelFiles, Split, SplitPart};
pub use gptq::{GptqFormat, GptqLinear, GptqShape};
pub use json::{read_json, to_json_text};
pub use quality::Quality;
pub use rope::{Llama3Rope, LongRope, RopeConfig, RopeKind, YarnRope};
pub use safetensors::{MAX_HEADER_BYTES, SafetensorsFile, TensorSource, TensorView};
pub use writer::{
    CheckpointWriter, QuantizationConfig, Sealed, TensorSpec, WriterOptions, Written,
    copy_side_files, patch_quantization_config, remove_leftovers, write_file_atomic,
};
