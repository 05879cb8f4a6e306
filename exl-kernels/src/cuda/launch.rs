//! Kernel launches as plain data.

use std::fmt;
use std::sync::Arc;

/// Most parameters of a kernel.
pub const MAX_ARGS: usize = 32;
/// Most 64-bit words of all arguments of a kernel.
pub(crate) const MAX_WORDS: usize = 112;

/// An entry point of the kernel pack.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Translation unit without its extension, such as `norm/rms_norm`.
    pub module: &'static str,
    /// Name of the `extern "C" __global__` function.
    pub entry: &'static str,
}

impl Kernel {
    /// The entry point `entry` of `cuda/<module>.cu`.
    pub const fn new(module: &'static str, entry: &'static str) -> Self {
        Self { module, entry }
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}", self.module, self.entry)
    }
}

/// Arguments of a launch in the order of the kernel's parameters. A parameter is read from the low
/// bytes of a 64-bit word, be it a pointer, an integer or a float, or it is a struct of several
/// words.
#[derive(Clone, PartialEq, Eq)]
pub struct Args {
    words: [u64; MAX_WORDS],
    used: usize,
    /// First word of each parameter.
    starts: [u8; MAX_ARGS],
    len: usize,
    /// What must lie in device memory, at an address that takes the place of the first word.
    table: Option<Arc<[u64]>>,
}

impl Args {
    /// No arguments.
    pub const fn new() -> Self {
        Self {
            words: [0; MAX_WORDS],
            used: 0,
            starts: [0; MAX_ARGS],
            len: 0,
            table: None,
        }
    }

    fn push(self, value: u64) -> Self {
        self.block(&[value])
    }

    /// A parameter that is a struct, word by word.
    ///
    /// # Panics
    /// When the arguments are more than [`MAX_ARGS`] or [`MAX_WORDS`].
    #[must_use]
    pub fn block(mut self, words: &[u64]) -> Self {
        let end = self.used + words.len();
        assert!(
            self.len < MAX_ARGS && end <= MAX_WORDS,
            "a kernel has at most {MAX_ARGS} parameters of {MAX_WORDS} words"
        );
        self.words[self.used..end].copy_from_slice(words);
        self.starts[self.len] = self.used as u8;
        self.used = end;
        self.len += 1;
        self
    }

    /// Replaces words of the arguments.
    ///
    /// # Panics
    /// When there are fewer words.
    pub fn patch(&mut self, first: usize, words: &[u64]) {
        self.words[..self.used][first..first + words.len()].copy_from_slice(words);
    }

    /// Makes the first word the address of these words in device memory: a table that a kernel looks up,
    /// which never changes. Whoever makes the launch ready puts it there.
    #[must_use]
    pub fn with_table(self, table: Arc<[u64]>) -> Self {
        Self {
            table: Some(table),
            ..self
        }
    }

    /// The words of [`Args::with_table`].
    pub fn table(&self) -> Option<&Arc<[u64]>> {
        self.table.as_ref()
    }

    /// A device address; 0 for an absent buffer.
    #[must_use]
    pub fn ptr(self, address: u64) -> Self {
        self.push(address)
    }

    /// An `int` or `unsigned` parameter.
    ///
    /// # Panics
    /// When the value does not fit 31 bits: lowering checks shapes before.
    #[must_use]
    pub fn int(self, value: usize) -> Self {
        let value = i32::try_from(value).expect("sizes were checked when the op was lowered");
        self.push(u64::from(value.cast_unsigned()))
    }

    /// A `float` parameter.
    #[must_use]
    pub fn float(self, value: f32) -> Self {
        self.push(u64::from(value.to_bits()))
    }

    /// A 64-bit integer parameter.
    #[must_use]
    pub fn long(self, value: u64) -> Self {
        self.push(value)
    }

    /// The words of all arguments.
    pub fn words(&self) -> &[u64] {
        &self.words[..self.used]
    }

    /// First word of each argument.
    pub fn params(&self) -> impl Iterator<Item = &u64> {
        self.starts[..self.len]
            .iter()
            .map(|&s| &self.words[usize::from(s)])
    }
}

impl Default for Args {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Args {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.words()).finish()
    }
}

/// One kernel launch, with everything fixed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// What runs.
    pub kernel: Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory per block.
    pub shared_bytes: u32,
    /// The arguments.
    pub args: Args,
}
