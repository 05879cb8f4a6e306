//! A comparison as a picture: layers at the left, tokens at the right.

use super::Report;
use crate::ui::plot::{Axes, Drawn, Panel, largest, two_panels};
use anyhow::Result;
use plotters::prelude::*;

/// Points of the curve over tokens.
const POINTS: usize = 200;

/// An SVG file.
pub(super) fn svg(report: &Report) -> Result<String> {
    let layers: Vec<(f64, f64)> = report
        .layers
        .iter()
        .enumerate()
        .map(|(at, &d)| (at as f64, 100.0 * d))
        .collect();
    let tokens = sorted(report);
    let title = format!("{} against {}", report.b, report.a);
    two_panels(&title, |left, right| {
        line(
            left,
            ("Difference of hidden states, percent", "layers"),
            &layers,
        )?;
        line(
            right,
            ("KL of tokens, sorted", "percent of tokens"),
            &tokens,
        )
    })
}

/// (percent of tokens below, KL).
fn sorted(report: &Report) -> Vec<(f64, f64)> {
    let mut all: Vec<f32> = report.token_kl.iter().flatten().copied().collect();
    all.sort_unstable_by(f32::total_cmp);
    let last = all.len().saturating_sub(1);
    (0..=POINTS)
        .filter_map(|i| {
            let value = all.get(i * last / POINTS)?;
            Some((100.0 * i as f64 / POINTS as f64, f64::from(*value)))
        })
        .collect()
}

fn line<'a>(area: &Panel<'a>, names: (&str, &str), points: &[(f64, f64)]) -> Drawn<'a> {
    let x_max = largest(points.iter().map(|p| p.0), 1.0);
    let y_max = largest(points.iter().map(|p| p.1), 1e-9) * 1.05;
    let axes = Axes {
        names,
        ends: (x_max, y_max),
        left: 70,
        number: |v| format!("{v:.3e}"),
    };
    axes.draw(area)?.draw_series(LineSeries::new(
        points.iter().copied(),
        BLUE.stroke_width(2),
    ))?;
    Ok(())
}
