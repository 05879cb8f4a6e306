//! The measurements as a picture: prefill at the left, decode at the right.

use super::Report;
use crate::ui::plot::{Axes, Drawn, Panel, largest, two_panels, whole};
use anyhow::Result;
use plotters::prelude::*;

/// One line of a chart.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// An SVG file.
pub(super) fn svg(report: &Report) -> Result<String> {
    let prefill = [Series {
        name: "batch 1".to_owned(),
        points: report
            .prefill
            .iter()
            .map(|p| (p.tokens as f64, p.tok_s))
            .collect(),
    }];
    let decode = decode(report);
    two_panels(&report.model, |left, right| {
        chart(
            left,
            ("Prefill, tokens/s", "tokens in the prompt"),
            &prefill,
        )?;
        chart(right, ("Decode, tokens/s", "tokens in the cache"), &decode)
    })
}

fn decode(report: &Report) -> Vec<Series> {
    let mut batches: Vec<usize> = report.decode.iter().map(|d| d.batch).collect();
    batches.sort_unstable();
    batches.dedup();
    batches
        .into_iter()
        .map(|batch| Series {
            name: format!("batch {batch}"),
            points: report
                .decode
                .iter()
                .filter(|d| d.batch == batch)
                .map(|d| (d.context as f64, d.tok_s))
                .collect(),
        })
        .collect()
}

fn chart<'a>(area: &Panel<'a>, names: (&str, &str), series: &[Series]) -> Drawn<'a> {
    let points = || series.iter().flat_map(|s| s.points.iter());
    let axes = Axes {
        names,
        ends: (
            largest(points().map(|p| p.0), 1.0) * 1.1,
            largest(points().map(|p| p.1), 1.0) * 1.1,
        ),
        left: 60,
        number: whole,
    };
    let mut chart = axes.draw(area)?;
    for (at, line) in series.iter().enumerate() {
        let color = Palette99::pick(at).to_rgba();
        chart
            .draw_series(LineSeries::new(
                line.points.iter().copied(),
                color.stroke_width(2),
            ))?
            .label(line.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
        // A single measurement makes no line.
        chart.draw_series(
            line.points
                .iter()
                .map(|p| Circle::new(*p, 3, color.filled())),
        )?;
    }
    chart
        .configure_series_labels()
        .border_style(BLACK.mix(0.4))
        .background_style(WHITE)
        .draw()?;
    Ok(())
}
