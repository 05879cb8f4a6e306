//! What takes the time of a step.

use crate::ui::{Align, Table};
use exl_models::PartTime;
use serde::Serialize;

/// A step, part by part.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Profile {
    /// What was measured.
    pub(super) step: String,
    /// Ops of the CPU, kernels of a GPU; the most expensive first.
    pub(super) parts: Vec<Part>,
}

/// All parts of one name.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Part {
    name: &'static str,
    count: usize,
    /// Together.
    ms: f64,
}

impl Profile {
    pub(super) fn new(step: String, times: &[PartTime]) -> Self {
        let mut parts: Vec<Part> = Vec::new();
        for time in times {
            let ms = time.seconds * 1e3;
            match parts.iter_mut().find(|part| part.name == time.name) {
                Some(part) => {
                    part.count += 1;
                    part.ms += ms;
                }
                None => parts.push(Part {
                    name: time.name,
                    count: 1,
                    ms,
                }),
            }
        }
        parts.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Self { step, parts }
    }

    pub(super) fn table(&self) -> Table {
        let columns = ["parts of a step", "count", "ms", "share"];
        let aligns = [Align::Left, Align::Right, Align::Right, Align::Right];
        let columns: Vec<_> = columns.into_iter().zip(aligns).collect();
        let mut table = Table::new(&columns);
        let all: f64 = self.parts.iter().map(|part| part.ms).sum();
        for part in &self.parts {
            table.row([
                part.name.to_owned(),
                part.count.to_string(),
                format!("{:.3}", part.ms),
                format!("{:.0}%", part.ms / all * 100.0),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_one_name_are_added_up() {
        let time = |name, seconds| PartTime { name, seconds };
        let times = [time("a", 0.001), time("b", 0.005), time("a", 0.002)];
        let profile = Profile::new("a step".to_owned(), &times);
        let found: Vec<_> = profile.parts.iter().map(|p| (p.name, p.count)).collect();
        assert_eq!(found, [("b", 1), ("a", 2)]);
        assert!((profile.parts[1].ms - 3.0).abs() < 1e-9);
    }
}
