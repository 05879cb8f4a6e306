//! Element types of safetensors files.

use std::fmt;

macro_rules! dtypes {
    ($($name:ident $text:literal $bits:literal $doc:literal,)*) => {
        /// Element type of a tensor in a safetensors file.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Dtype {
            $(#[doc = $doc] $name,)*
        }

        impl Dtype {
            /// Every type.
            pub const ALL: &[Dtype] = &[$(Dtype::$name),*];

            /// The name in a header.
            pub fn as_str(self) -> &'static str {
                match self { $(Dtype::$name => $text,)* }
            }

            /// Bits of one element.
            pub fn bits(self) -> usize {
                match self { $(Dtype::$name => $bits,)* }
            }

            /// The type with this name in a header.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Dtype::$name),)* _ => None }
            }
        }
    };
}

dtypes! {
    Bool "BOOL" 8 "One byte, 0 or 1.",
    F4 "F4" 4 "4-bit float of the OCP microscaling formats.",
    F6E2m3 "F6_E2M3" 6 "6-bit float of the OCP microscaling formats.",
    F6E3m2 "F6_E3M2" 6 "6-bit float of the OCP microscaling formats.",
    U8 "U8" 8 "Unsigned byte.",
    I8 "I8" 8 "Signed byte.",
    F8E5m2 "F8_E5M2" 8 "8-bit float, 5 exponent bits.",
    F8E4m3 "F8_E4M3" 8 "8-bit float, 4 exponent bits.",
    F8E8m0 "F8_E8M0" 8 "8-bit power of two.",
    F8E4m3Fnuz "F8_E4M3FNUZ" 8 "8-bit float without negative zero, 4 exponent bits.",
    F8E5m2Fnuz "F8_E5M2FNUZ" 8 "8-bit float without negative zero, 5 exponent bits.",
    I16 "I16" 16 "Signed 16-bit integer.",
    U16 "U16" 16 "Unsigned 16-bit integer.",
    F16 "F16" 16 "IEEE binary16.",
    Bf16 "BF16" 16 "The upper half of binary32.",
    I32 "I32" 32 "Signed 32-bit integer; EXL2 and GPTQ keep raw bit patterns in it.",
    U32 "U32" 32 "Unsigned 32-bit integer.",
    F32 "F32" 32 "IEEE binary32.",
    C64 "C64" 64 "Complex number of two binary32.",
    F64 "F64" 64 "IEEE binary64.",
    I64 "I64" 64 "Signed 64-bit integer.",
    U64 "U64" 64 "Unsigned 64-bit integer.",
}

impl Dtype {
    /// Bytes of a tensor of this shape, or `None` when that overflows or is no whole number.
    pub fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        let bits = shape
            .iter()
            .try_fold(self.bits(), |bits, &size| bits.checked_mul(size))?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for &dtype in Dtype::ALL {
            assert_eq!(Dtype::from_name(dtype.as_str()), Some(dtype));
        }
        assert_eq!(Dtype::from_name("F99"), None);
    }

    #[test]
    fn sizes_do_not_overflow() {
        assert_eq!(Dtype::F16.bytes_of(&[3, 5]), Some(30));
        assert_eq!(Dtype::F16.bytes_of(&[]), Some(2));
        assert_eq!(Dtype::F4.bytes_of(&[3]), None);
        assert_eq!(Dtype::F4.bytes_of(&[4]), Some(2));
        assert_eq!(Dtype::U8.bytes_of(&[usize::MAX, 2]), None);
        assert_eq!(Dtype::F32.bytes_of(&[0, usize::MAX]), Some(0));
    }
}
