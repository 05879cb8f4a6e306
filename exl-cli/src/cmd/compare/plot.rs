//! A comparison as a picture: layers at the left, tokens at the right.

use super::Report;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

const SIZE: (u32, u32) = (960, 420);
/// Points of the curve over tokens.
const POINTS: usize = 200;

/// An SVG file.
pub(super) fn svg(report: &Report) -> Result<String> {
    let mut text = String::new();
    draw(report, &mut text).map_err(|e| anyhow!("cannot draw the plot: {e}"))?;
    Ok(text)
}

fn draw<'a>(report: &Report, out: &'a mut String) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let area = SVGBackend::with_string(out, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!("{} against {}", report.b, report.a);
    let area = area.titled(&title, ("sans-serif", 18))?;
    let panels = area.split_evenly((1, 2));
    let layers: Vec<(f64, f64)> = report
        .layers
        .iter()
        .enumerate()
        .map(|(at, &d)| (at as f64, 100.0 * d))
        .collect();
    line(
        &panels[0],
        ("Difference of hidden states, percent", "layers"),
        &layers,
    )?;
    line(
        &panels[1],
        ("KL of tokens, sorted", "percent of tokens"),
        &sorted(report),
    )?;
    area.present()?;
    Ok(())
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

fn line<'a>(
    area: &DrawingArea<SVGBackend<'a>, Shift>,
    (title, x_name): (&str, &str),
    points: &[(f64, f64)],
) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
    let x_max = most(&mut points.iter().map(|p| p.0)).max(1.0);
    let y_max = most(&mut points.iter().map(|p| p.1)).max(1e-9) * 1.05;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..x_max, 0.0..y_max)?;
    chart
        .configure_mesh()
        .x_desc(x_name)
        .x_label_formatter(&|v| format!("{v:.0}"))
        .y_label_formatter(&|v| format!("{v:.3e}"))
        .light_line_style(WHITE)
        .draw()?;
    chart.draw_series(LineSeries::new(
        points.iter().copied(),
        BLUE.stroke_width(2),
    ))?;
    Ok(())
}
