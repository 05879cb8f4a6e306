//! Where the host regions of ops lie in one device buffer.

use crate::{Error, Result};

/// Bytes before, between and behind the regions that nobody may write.
const GUARD: usize = 4096;
const ALIGN: usize = 256;
/// What guards hold, and outputs before they are written: NaN in every float type.
pub(super) const POISON: u8 = 0xff;

/// How an op uses a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    /// Writes every byte and reads none.
    Write,
    /// Keeps some of what was there.
    Update,
}

/// Regions that overlap on the host, as one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Address on the host.
    pub(super) start: usize,
    pub(super) bytes: usize,
    /// Place in the buffer.
    pub(super) offset: usize,
    /// Some op uses what was there before.
    pub(super) input: bool,
    /// Some op writes it.
    pub(super) output: bool,
}

/// All ranges, in order of their addresses and offsets.
#[derive(Debug, Default)]
pub(super) struct Spans {
    list: Vec<Span>,
    bytes: usize,
}

impl Spans {
    /// From `(address, bytes, access)` of every region. Regions that overlap keep their distances,
    /// others get a guard between them.
    pub(super) fn new(mut regions: Vec<(usize, usize, Access)>) -> Self {
        regions.retain(|r| r.1 > 0);
        regions.sort_unstable_by_key(|r| r.0);
        let mut list: Vec<Span> = Vec::new();
        for (start, bytes, access) in regions {
            let new = Span {
                start,
                bytes,
                offset: 0,
                input: access != Access::Write,
                output: access != Access::Read,
            };
            match list
                .last_mut()
                .filter(|last| start < last.start + last.bytes)
            {
                Some(last) => {
                    last.bytes = last.bytes.max(start + bytes - last.start);
                    last.input |= new.input;
                    last.output |= new.output;
                }
                None => list.push(new),
            }
        }
        let mut end = GUARD;
        for span in &mut list {
            span.offset = end;
            end = (end + span.bytes + GUARD).next_multiple_of(ALIGN);
        }
        Self { list, bytes: end }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Span> {
        self.list.iter()
    }

    /// Size of the buffer, guards included.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Offset in the buffer of a region that was given to [`Spans::new`].
    pub(super) fn offset(&self, start: usize, bytes: usize) -> Result<usize> {
        let after = self.list.partition_point(|s| s.start <= start);
        let span = after.checked_sub(1).map(|i| self.list[i]);
        span.filter(|s| start + bytes <= s.start + s.bytes)
            .map(|s| s.offset + (start - s.start))
            .ok_or_else(|| Error::argument("region", "one that was collected", "another"))
    }

    /// Looks for bytes outside of the regions that are no longer poison.
    pub(super) fn stray(&self, buffer: &[u8]) -> Option<String> {
        let mut begin = 0;
        for span in &self.list {
            if let Some(at) = written(&buffer[begin..span.offset]) {
                let distance = span.offset - begin - at;
                let bytes = span.bytes;
                return Some(format!(
                    "a kernel wrote {distance} bytes before a buffer of {bytes} bytes"
                ));
            }
            begin = span.offset + span.bytes;
        }
        let last = self.list.last()?;
        written(&buffer[begin..]).map(|at| {
            let bytes = last.bytes;
            format!("a kernel wrote {at} bytes behind the end of a buffer of {bytes} bytes")
        })
    }
}

/// First byte that is not poison.
pub(super) fn written(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|&b| b != POISON)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn access() -> impl Strategy<Value = Access> {
        prop_oneof![
            Just(Access::Read),
            Just(Access::Write),
            Just(Access::Update)
        ]
    }

    proptest! {
        #[test]
        fn aliases_stay_aliases_and_others_stay_apart(
            regions in prop::collection::vec((0usize..40_000, 1usize..3000, access()), 1..40),
        ) {
            let spans = Spans::new(regions.clone());
            for &(start, bytes, access) in &regions {
                let offset = spans.offset(start, bytes).unwrap();
                prop_assert!(offset >= GUARD && offset + bytes + GUARD <= spans.bytes());
                for &(other, length, _) in &regions {
                    let second = spans.offset(other, length).unwrap();
                    let overlap = start < other + length && other < start + bytes;
                    let placed = offset < second + length && second < offset + bytes;
                    prop_assert_eq!(overlap, placed);
                    if overlap {
                        prop_assert_eq!(other as isize - start as isize,
                            second as isize - offset as isize);
                    }
                }
                let span = spans.iter().rfind_span(start);
                prop_assert!(access == Access::Write || span.input);
                prop_assert!(access == Access::Read || span.output);
            }
            prop_assert!(spans.iter().all(|s| s.offset % ALIGN == 0));
        }

        #[test]
        fn stray_writes_show(
            regions in prop::collection::vec((0usize..40_000, 1usize..3000), 1..20),
            at in 0usize..100_000,
        ) {
            let list = regions.iter().map(|&(s, n)| (s, n, Access::Write)).collect();
            let spans = Spans::new(list);
            let mut buffer = vec![POISON; spans.bytes()];
            for span in spans.iter() {
                buffer[span.offset..span.offset + span.bytes].fill(0);
            }
            prop_assert_eq!(spans.stray(&buffer), None);
            let at = at % buffer.len();
            let inside = buffer[at] == 0;
            buffer[at] = 1;
            prop_assert_eq!(spans.stray(&buffer).is_none(), inside);
        }
    }

    trait Find<'a> {
        fn rfind_span(self, start: usize) -> &'a Span;
    }

    impl<'a, I: Iterator<Item = &'a Span>> Find<'a> for I {
        fn rfind_span(self, start: usize) -> &'a Span {
            self.filter(|s| s.start <= start).last().unwrap()
        }
    }

    #[test]
    fn neighbours_are_not_aliases() {
        let spans = Spans::new(vec![
            (1000, 24, Access::Read),
            (1024, 8, Access::Write),
            (1024, 0, Access::Read),
        ]);
        assert_eq!(spans.iter().count(), 2);
        let (a, b) = (
            spans.offset(1000, 24).unwrap(),
            spans.offset(1024, 8).unwrap(),
        );
        assert!(b >= a + 24 + GUARD);
        assert!(spans.offset(1020, 8).is_err(), "crosses a border");
        assert!(spans.offset(0, 1).is_err());
        assert!(spans.offset(5000, 1).is_err());
    }
}
