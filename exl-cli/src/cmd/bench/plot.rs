//! The measurements as a picture: prefill at the left, decode at the right.

use super::Report;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

const SIZE: (u32, u32) = (960, 420);

/// One line of a chart.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

/// An SVG file.
pub(super) fn svg(report: &Report) -> Result<String> {
    let mut text = String::new();
    draw(report, &mut text).map_err(|e| anyhow!("cannot draw the plot: {e}"))?;
    Ok(text)
}

fn draw<'a>(report: &Report, out: &'a mut String) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let area = SVGBackend::with_string(out, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let area = area.titled(&report.model, ("sans-serif", 18))?;
    let panels = area.split_evenly((1, 2));
    let prefill = Series {
        name: "batch 1".to_owned(),
        points: report
            .prefill
            .iter()
            .map(|p| (p.tokens as f64, p.tok_s))
            .collect(),
    };
    chart(
        &panels[0],
        ("Prefill, tokens/s", "tokens in the prompt"),
        &[prefill],
    )?;
    chart(
        &panels[1],
        ("Decode, tokens/s", "tokens in the cache"),
        &decode(report),
    )?;
    area.present()?;
    Ok(())
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

fn chart<'a>(
    area: &DrawingArea<SVGBackend<'a>, Shift>,
    (title, x_name): (&str, &str),
    series: &[Series],
) -> Result<(), Box<dyn std::error::Error + 'a>> {
    let points = || series.iter().flat_map(|s| s.points.iter());
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(1.0, f64::max) * 1.1;
    let (x_max, y_max) = (
        most(&mut points().map(|p| p.0)),
        most(&mut points().map(|p| p.1)),
    );
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..x_max, 0.0..y_max)?;
    let whole = |v: &f64| format!("{v:.0}");
    chart
        .configure_mesh()
        .x_desc(x_name)
        .x_label_formatter(&whole)
        .y_label_formatter(&whole)
        .light_line_style(WHITE)
        .draw()?;
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
