#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod allocate;
mod calib;
mod cross;
mod error;
mod eval;
mod gptq;
mod hessian;
mod layout;
mod linalg;
mod matrix;
mod measure;
mod mix;
#[cfg(feature = "pipeline")]
mod pipeline;
mod quantized;
#[cfg(any(test, feature = "pipeline"))]
mod refine;
#[cfg(feature = "pipeline")]
mod report;
#[cfg(feature = "pipeline")]
mod resume;
mod scales;
#[cfg(test)]
mod testing;
mod wide;

pub use allocate::{Choice, allocate};
pub use calib::{Calibration, Chat, ChatTurn, Encode, builtin, token_ids};
pub use cross::CrossMoment;
pub use error::{Error, Result};
pub use eval::KlScore;
pub use gptq::{Gptq, Quantizer, Rtn};
pub use hessian::{Hessian, HessianAccumulator, HessianSet, Part};
pub use layout::{GroupSpec, Layout, ROW_STEP, Recipe, Section, WIDTHS, head_recipe};
pub use linalg::{Factor, activity_order, order_by};
pub use matrix::Matrix;
pub use measure::{Curve, Point, SAMPLE_COLUMNS, measure, measure_with, smallest};
pub use quantized::{Quantized, Stats};
pub use scales::scale_value;

#[cfg(feature = "pipeline")]
pub use pipeline::{
    Check, CompareOptions, ComparedPosition, Comparison, ConvertOptions, Event, LayoutPoint,
    Likeliest, LinearMeasurement, MEASUREMENT_VERSION, MOST_BITS, Measurement, PlanPoint, Stage,
    VerifyOptions, bits_within, compare, convert, plan, stated_quality, verify_quality,
};
#[cfg(feature = "pipeline")]
pub use report::ConvertReport;
