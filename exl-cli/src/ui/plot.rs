//! Pictures in SVG: two charts side by side.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

const SIZE: (u32, u32) = (960, 420);

/// A part of the picture.
pub(crate) type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// What drawing gives; `'a` is the picture.
pub(crate) type Drawn<'a, T = ()> = std::result::Result<T, Box<dyn std::error::Error + 'a>>;
/// A chart whose axes are drawn.
pub(crate) type Chart<'a, 'b> =
    ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// An SVG file: `draw` fills its two panels.
pub(crate) fn two_panels(
    title: &str,
    draw: impl for<'a> Fn(&Panel<'a>, &Panel<'a>) -> Drawn<'a>,
) -> Result<String> {
    let mut text = String::new();
    both(title, draw, &mut text).map_err(|e| anyhow!("cannot draw the plot: {e}"))?;
    Ok(text)
}

fn both<'a>(
    title: &str,
    draw: impl Fn(&Panel<'a>, &Panel<'a>) -> Drawn<'a>,
    out: &'a mut String,
) -> Drawn<'a> {
    let area = SVGBackend::with_string(out, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let area = area.titled(title, ("sans-serif", 18))?;
    let panels = area.split_evenly((1, 2));
    draw(&panels[0], &panels[1])?;
    area.present()?;
    Ok(())
}

/// How the axes of a chart are drawn. Both begin at 0.
pub(crate) struct Axes<'t> {
    /// What the chart shows, and along which quantity.
    pub(crate) names: (&'t str, &'t str),
    /// Where they end.
    pub(crate) ends: (f64, f64),
    /// Room for the numbers at the left.
    pub(crate) left: u32,
    /// How those are written.
    pub(crate) number: fn(&f64) -> String,
}

/// A number without decimals.
pub(crate) fn whole(v: &f64) -> String {
    format!("{v:.0}")
}

/// The largest of some numbers, `least` at least.
pub(crate) fn largest(values: impl Iterator<Item = f64>, least: f64) -> f64 {
    values.fold(least, f64::max)
}

impl Axes<'_> {
    /// Draws them.
    pub(crate) fn draw<'a, 'b>(&self, area: &Panel<'a>) -> Drawn<'a, Chart<'a, 'b>> {
        let (title, x_name) = self.names;
        let mut chart = ChartBuilder::on(area)
            .caption(title, ("sans-serif", 15))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(self.left)
            .build_cartesian_2d(0.0..self.ends.0, 0.0..self.ends.1)?;
        chart
            .configure_mesh()
            .x_desc(x_name)
            .x_label_formatter(&whole)
            .y_label_formatter(&self.number)
            .light_line_style(WHITE)
            .draw()?;
        Ok(chart)
    }
}
