//! Random checkpoints in the shape of known models: files as real as any, values without meaning.
//!
//! Speed depends on shapes and bit mixes only, so these stand in for models of tens of gigabytes.

mod recipe;
mod shape;
mod tokenizer;
mod weights;
mod write;

pub(crate) use recipe::Recipe;
pub(crate) use shape::Shape;
pub(crate) use write::write_checkpoint;
