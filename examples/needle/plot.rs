//! What was found, by depth and length: a heat map for dense and one for sparse attention.

use std::path::Path;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use SegmentValue::{CenterOf, Exact};

use crate::cli::Length;
use crate::report::{percent, Report, Side, SIDES};

const FONT: &str = "sans-serif";
const SIZE: (u32, u32) = (1000, 450);
const LEGEND: i32 = 40;

/// Where all was found; none is white, a scale that every colour vision can read.
const FULL: RGBColor = RGBColor(0, 90, 160);

/// Writes the plot as SVG.
pub fn draw(report: &Report, file: &Path) -> Result<()> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let title = format!("Needles found in a haystack, of {} in each prompt: {}", report.needles, report.model);
        let rest = root.titled(&title, (FONT, 24))?;
        let (panels, below) = rest.split_vertically(rest.dim_in_pixel().1 as i32 - LEGEND);
        for (panel, (name, side)) in panels.split_evenly((1, 2)).iter().zip(SIDES) {
            heat_map(panel, name, side, report)?;
        }
        legend(&below)?;
        root.present()?;
    }
    std::fs::write(file, svg).map_err(|error| anyhow::anyhow!("cannot write {}: {error}", file.display()))
}

fn heat_map(area: &DrawingArea<SVGBackend, Shift>, name: &str, side: Side, report: &Report) -> Result<()> {
    let (lengths, depths) = (report.lengths(), report.depths());
    let attended = percent(report.attended(side, None), if name == "dense" { 0 } else { 1 });
    let title = format!("{name}, {attended} of the keys: {} of {} found", report.found(side), report.total());
    let (columns, rows) = (lengths.len() as i32, depths.len() as i32);
    // A range of segments has its end too.
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 21))
        .margin(12)
        .x_label_area_size(46)
        .y_label_area_size(66)
        .build_cartesian_2d((0..columns - 1).into_segmented(), (0..rows - 1).into_segmented())?;
    let center = |value: &SegmentValue<i32>| match value {
        SegmentValue::CenterOf(index) => usize::try_from(*index).ok(),
        _ => None,
    };
    // From the top down, as in a text.
    let depth_at = |row: usize| depths.iter().rev().nth(row);
    chart
        .configure_mesh()
        .disable_mesh()
        .x_labels(lengths.len())
        .y_labels(depths.len())
        .x_desc("tokens of the prompt")
        .y_desc("depth of the needle")
        .x_label_formatter(&|x| {
            center(x).and_then(|column| lengths.get(column)).map_or(String::new(), |n| Length(*n).to_string())
        })
        .y_label_formatter(&|y| center(y).and_then(depth_at).map_or(String::new(), |depth| percent(*depth, 0)))
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 17))
        .draw()?;
    for (x, length) in (0..columns).zip(&lengths) {
        for (y, cell) in (0..rows).rev().zip(report.cells(Some(*length))) {
            let (found, all) = (cell.found(side), cell.needles.len());
            let share = found as f64 / all as f64;
            let cell = |style| Rectangle::new([(Exact(x), Exact(y)), (Exact(x + 1), Exact(y + 1))], style);
            let (fill, frame) = (color(share).filled(), BLACK.mix(0.3).stroke_width(1));
            chart.draw_series([cell(fill), cell(frame)])?;
            let ink = if share > 0.5 { &WHITE } else { &BLACK };
            let style = (FONT, 17).into_font().color(ink).pos(Pos::new(HPos::Center, VPos::Center));
            let center = (CenterOf(x), CenterOf(y));
            chart.draw_series([Text::new(format!("{found}/{all}"), center, style)])?;
        }
    }
    Ok(())
}

/// The scale from none to all.
fn legend(area: &DrawingArea<SVGBackend, Shift>) -> Result<()> {
    const STEPS: i32 = 10;
    const WIDTH: i32 = 24;
    let left = (SIZE.0 as i32 - STEPS * WIDTH) / 2;
    for step in 0..=STEPS {
        let x = left + WIDTH * step;
        let corners = [(x, 4), (x + WIDTH, 20)];
        area.draw(&Rectangle::new(corners, color(f64::from(step) / f64::from(STEPS)).filled()))?;
    }
    let frame = [(left, 4), (left + WIDTH * (STEPS + 1), 20)];
    area.draw(&Rectangle::new(frame, BLACK.mix(0.3).stroke_width(1)))?;
    let text = |side| (FONT, 16).into_font().color(&BLACK).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new("none found", (left - 8, 12), text(HPos::Right)))?;
    Ok(area.draw(&Text::new("all", (frame[1].0 + 8, 12), text(HPos::Left)))?)
}

fn color(share: f64) -> RGBColor {
    let mix = |full: u8| (255. + share * (f64::from(full) - 255.)).round() as u8;
    RGBColor(mix(FULL.0), mix(FULL.1), mix(FULL.2))
}
