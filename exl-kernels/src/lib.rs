#![doc = include_str!("../README.md")]

pub mod conformance;
pub mod cpu;
pub mod cuda;
mod error;
mod kv;
mod mem;
pub mod ops;
mod quant;
pub mod reference;

pub use error::{Error, Mismatch, Result};
pub use kv::{KeyHeads, KvFormat, KvType};
pub use mem::{DType, Element, Mem, MemMut, Place};
pub use quant::{Exl2Parts, GptqParts, Group, QuantMatrix};
