#![doc = include_str!("../README.md")]

mod error;
mod mem;
pub mod ops;
mod quant;

pub use error::{Error, Mismatch, Result};
pub use mem::{DType, Element, Mem, MemMut, Place};
pub use quant::{Exl2Parts, GptqParts, Group};
