//! Any bytes as a safetensors file: an error or a table whose every tensor can be read.
#![no_main]

use std::path::Path;

use exl_format::{Bytes, SafetensorsFile, TensorSource};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    // Odd first bytes: the rest is the file. Even ones: the rest is JSON and gets a true length,
    // and data of a size that small offsets fit.
    let Some((&mode, rest)) = input.split_first() else {
        return;
    };
    let file = if mode & 1 == 1 {
        rest.to_vec()
    } else {
        let mut file = (rest.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(rest);
        file.resize(file.len() + usize::from(mode), mode);
        file
    };
    let size = file.len() as u64;
    let Ok(file) = SafetensorsFile::from_bytes(Path::new("fuzz"), Bytes::from(file)) else {
        return;
    };
    let mut total = 0;
    for name in file.names() {
        let view = file.tensor(name).expect("a listed tensor is there");
        assert!(file.contains(name));
        assert_eq!(view.dtype.bytes_of(&view.shape), Some(view.data.len()));
        total += view.data.iter().fold(0u64, |n, _| n + 1);
    }
    assert_eq!(total, file.total_bytes());
    assert!(total <= size, "tensors overlap");
});
