//! The tests of kernels, models and the engine that want a GPU, in one program with one copy of the
//! kernels, which `cargo xtask bundle` takes to machines without cargo. (There `exl convert` runs on both
//! devices instead of the quantizer's tests, whose libraries would make the bundle too large.)
//! `EXL_TEST_ROOT` names the folder that holds the models there.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
// The files have helpers that only the other tests of their crates use.
#![allow(dead_code)]

#[path = "../../../exl-models/tests/it/axes.rs"]
mod axes;
#[path = "../../../exl-models/tests/it/common.rs"]
mod common;
#[path = "../../../exl-kernels/tests/gpu_conformance.rs"]
mod conformance;
#[path = "../../../exl-gen/tests/draws.rs"]
mod draws;
#[path = "../../../exl-gen/tests/gpu.rs"]
mod engine;
#[path = "../../../exl-models/tests/it/extras.rs"]
mod extras;
#[path = "../../../exl-models/tests/it/golden.rs"]
mod golden;
#[path = "../../../exl-models/tests/it/greedy.rs"]
mod greedy;
#[path = "../../../exl-models/tests/it/gpu.rs"]
mod models;
#[path = "../../../exl-models/tests/it/quantized.rs"]
mod quantized;
#[path = "../../../exl-models/tests/it/windows.rs"]
mod windows;
