//! Fields of a protocol buffer message, as they lie in its bytes.

/// A field's value, by the way it is stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'a> {
    /// A whole number, a truth value or a name out of a list.
    Varint(u64),
    /// Eight bytes, low ones first.
    Fixed64(u64),
    /// A text, bytes or a message.
    Bytes(&'a [u8]),
    /// Four bytes, low ones first.
    Fixed32(u32),
}

/// The fields of one message, one after the other: number and value. Ends behind an error.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
    /// Bytes of the message, to name places by.
    length: usize,
}

impl<'a> Fields<'a> {
    pub(super) fn new(message: &'a [u8]) -> Self {
        Self {
            rest: message,
            length: message.len(),
        }
    }

    fn field(&mut self) -> Result<(u32, Value<'a>), String> {
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).ok().filter(|&number| number > 0);
        let number = number.ok_or_else(|| format!("a field has the number {}", key >> 3))?;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(u64::from_le_bytes(self.array()?)),
            2 => {
                let length = self.varint()?;
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                Value::Bytes(self.take(length)?)
            }
            5 => Value::Fixed32(u32::from_le_bytes(self.array()?)),
            kind => return Err(format!("field {number} is of the unknown kind {kind}")),
        };
        Ok((number, value))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let have = self.rest.len();
        let (taken, rest) = self.rest.split_at_checked(length).ok_or_else(|| {
            format!("a field of {length} bytes begins where {have} bytes are left")
        })?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    /// Seven bits per byte, low ones first; the eighth says that more follow.
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a number has more than 64 bits".to_owned())
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u32, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let at = self.length - self.rest.len();
        let field = self.field().map_err(|reason| {
            self.rest = &[];
            format!("byte {at} of a message: {reason}")
        });
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn varint(mut value: u64, out: &mut Vec<u8>) {
        while value >= 0x80 {
            out.push(value as u8 | 0x80);
            value >>= 7;
        }
        out.push(value as u8);
    }

    fn write(number: u32, value: Value<'_>, out: &mut Vec<u8>) {
        let key = |kind: u64| u64::from(number) << 3 | kind;
        match value {
            Value::Varint(n) => {
                varint(key(0), out);
                varint(n, out);
            }
            Value::Fixed64(n) => {
                varint(key(1), out);
                out.extend(n.to_le_bytes());
            }
            Value::Bytes(bytes) => {
                varint(key(2), out);
                varint(bytes.len() as u64, out);
                out.extend(bytes);
            }
            Value::Fixed32(n) => {
                varint(key(5), out);
                out.extend(n.to_le_bytes());
            }
        }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(
            fields in prop::collection::vec(
                (1u32..1 << 29, 0u8..4, any::<u64>(), prop::collection::vec(any::<u8>(), 0..9)),
                0..8,
            ),
            cut in 0usize..200,
        ) {
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for (number, kind, n, text) in &fields {
                let value = match kind {
                    0 => Value::Varint(*n),
                    1 => Value::Fixed64(*n),
                    2 => Value::Bytes(text),
                    _ => Value::Fixed32(*n as u32),
                };
                write(*number, value, &mut bytes);
                expected.push(Ok((*number, value)));
            }
            prop_assert_eq!(Fields::new(&bytes).collect::<Vec<_>>(), &expected[..]);
            // Cut short, it is a beginning of the fields and at most one error.
            let short = &bytes[..cut.min(bytes.len())];
            let read: Vec<_> = Fields::new(short).collect();
            let whole = read.iter().take_while(|field| field.is_ok()).count();
            prop_assert!(read.len() <= whole + 1);
            prop_assert_eq!(&read[..whole], &expected[..whole]);
        }

        #[test]
        fn any_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(Fields::new(&bytes).count() <= bytes.len());
        }
    }

    #[test]
    fn errors_say_where() {
        let error = |bytes: &[u8]| Fields::new(bytes).last().unwrap().unwrap_err();
        let long = error(&[0x08, 0x01, 0x12, 0xff, 0xff, 0xff, 0xff, 0x0f]);
        assert!(
            long.contains("byte 2") && long.contains("4294967295 bytes"),
            "{long}"
        );
        assert!(error(&[0xff; 12]).contains("more than 64 bits"));
        assert!(error(&[0x00]).contains("number 0"));
        assert!(error(&[0x0b]).contains("kind 3"));
    }
}
