//! How keys and values are stored, and what that costs.

use std::fmt;
use std::str::FromStr;

use exl_tensor::{DType, KvShape, PAGE_TOKENS};

use crate::{Error, Result};

/// Storage type of keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvDtype {
    /// Half precision: two bytes an element.
    #[default]
    F16,
    /// Single precision: four bytes an element, for comparisons.
    F32,
}

impl KvDtype {
    /// Bytes of `elements` consecutive elements.
    pub fn bytes(self, elements: usize) -> usize {
        elements * self.dtype().bytes()
    }

    /// The element type of the buffers.
    pub fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
        }
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::F32 => "f32",
        })
    }
}

impl FromStr for KvDtype {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "f16" | "fp16" => Ok(Self::F16),
            "f32" | "fp32" => Ok(Self::F32),
            _ => Err(Error::UnknownDtype(name.to_owned())),
        }
    }
}

/// Storage of one model's cache: `[pages, 256, kv_heads, head_dim]` for K and V of each layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Attention layers.
    pub layers: usize,
    /// Key/value heads per layer.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Storage type of both K and V.
    pub dtype: KvDtype,
}

impl KvLayout {
    /// Bytes one token takes over all layers, K and V.
    pub fn token_bytes(&self) -> usize {
        2 * self.layers * self.dtype.bytes(self.kv_heads * self.head_dim)
    }

    /// Bytes one page takes over all layers, K and V.
    pub fn page_bytes(&self) -> usize {
        PAGE_TOKENS * self.token_bytes()
    }

    /// Bytes of a pool of `pages` pages, the reserved one included.
    pub fn bytes(&self, pages: usize) -> usize {
        pages * self.page_bytes()
    }

    /// Pages, the reserved one included, of the largest pool within `budget` bytes.
    ///
    /// # Errors
    /// [`Error::Budget`] when not even one usable page fits.
    pub fn pages_within(&self, budget: usize) -> Result<usize> {
        let page_bytes = self.page_bytes();
        let pages = budget.checked_div(page_bytes).unwrap_or(0);
        if pages < 2 {
            return Err(Error::Budget {
                budget,
                pages,
                page_bytes,
            });
        }
        Ok(pages)
    }

    /// The shape the buffers are allocated with.
    pub fn shape(&self) -> KvShape {
        KvShape {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            dtype: self.dtype.dtype(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dtype: KvDtype) -> KvLayout {
        KvLayout {
            layers: 22,
            kv_heads: 4,
            head_dim: 64,
            dtype,
        }
    }

    #[test]
    fn bytes_are_those_of_the_buffers() {
        for dtype in [KvDtype::F16, KvDtype::F32] {
            let layout = layout(dtype);
            assert_eq!(layout.bytes(7), layout.shape().bytes(7));
        }
        assert_eq!(layout(KvDtype::F16).token_bytes(), 22_528);
        assert_eq!(layout(KvDtype::F32).page_bytes(), 2 * 256 * 22_528);
    }

    #[test]
    fn budget_is_never_exceeded() {
        let layout = layout(KvDtype::F16);
        let pages = layout.pages_within(100_000_000).unwrap();
        assert!(layout.bytes(pages) <= 100_000_000);
        assert!(layout.bytes(pages + 1) > 100_000_000);
        let tight = layout.pages_within(2 * layout.page_bytes() - 1);
        assert!(matches!(tight, Err(Error::Budget { pages: 1, .. })));
    }

    #[test]
    fn names_round_trip() {
        for dtype in [KvDtype::F16, KvDtype::F32] {
            assert_eq!(dtype.to_string().parse::<KvDtype>().unwrap(), dtype);
        }
        let error = "q9".parse::<KvDtype>().unwrap_err().to_string();
        assert!(error.contains("q9") && error.contains("f16"));
    }
}
