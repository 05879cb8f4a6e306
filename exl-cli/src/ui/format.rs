//! Numbers as people read them.

use std::time::Duration;

/// `3.00 MB`: decimal units, three significant digits.
pub(crate) fn bytes(n: u64) -> String {
    scaled(n as f64, &[" B", " kB", " MB", " GB", " TB"])
}

/// `6.74 B` parameters: decimal units, three significant digits.
pub(crate) fn count(n: u64) -> String {
    scaled(n as f64, &["", " k", " M", " B", " T"])
}

fn scaled(mut value: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // 999.5 would print as "1000".
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$}{}", units[unit])
}

/// `2.7 ms`, `950 ms`, `4.2 s`, `3 min 05 s`, `2 h 03 min`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 if time < Duration::from_millis(10) => format!("{:.1} ms", 1e3 * time.as_secs_f64()),
        0 => format!("{} ms", time.as_millis()),
        1..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// A bar of `width` cells filled to `share`, in eighths of a cell.
pub(crate) fn bar(share: f64, width: usize) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let filled = (share.clamp(0.0, 1.0) * width as f64 * 8.0).round() as usize;
    let mut cells: String = "█".repeat(filled / 8);
    if !filled.is_multiple_of(8) {
        cells.push(EIGHTHS[filled % 8]);
    }
    let used = cells.chars().count();
    cells.extend(std::iter::repeat_n(' ', width - used));
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_significant_digits_and_the_right_unit() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(999_600), "1.00 MB");
        assert_eq!(bytes(3_005_312), "3.01 MB");
        assert_eq!(bytes(17_749_760), "17.7 MB");
        assert_eq!(count(6_738_415_616), "6.74 B");
        assert_eq!(count(512), "512");
    }

    #[test]
    fn durations_change_unit_with_size() {
        assert_eq!(duration(Duration::from_micros(2680)), "2.7 ms");
        assert_eq!(duration(Duration::from_millis(950)), "950 ms");
        assert_eq!(duration(Duration::from_millis(4200)), "4.2 s");
        assert_eq!(duration(Duration::from_secs(185)), "3 min 05 s");
        assert_eq!(duration(Duration::from_secs(7380)), "2 h 03 min");
    }

    #[test]
    fn bars_keep_their_width() {
        assert_eq!(bar(0.5, 4), "██  ");
        assert_eq!(bar(0.0, 3), "   ");
        for share in [-1.0, 0.01, 0.33, 0.999, 1.0, 7.0] {
            assert_eq!(bar(share, 10).chars().count(), 10);
        }
    }
}
